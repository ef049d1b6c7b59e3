"""The page's words, in English and Chinese.

Every label is a key of both tables. Gradio's own `I18n` shows them in the browser's language from the first moment;
`texts` serves what is written while drawing, and the switch of language.
"""

from __future__ import annotations

from ..errors import InvalidSettings

LANGUAGES = ("en", "zh")

ENGLISH = {
    "other_language": "中文",
    "theme": "Switch between light and dark",
    "prompt": "Prompt",
    "prompt_hint": "What to draw, in English or Chinese",
    "negative": "Negative prompt",
    "negative_hint": "What not to draw",
    "enhance": "Enhance the prompt",
    "enhance_info": "A language model writes it out in detail before drawing",
    "draw": "Draw",
    "stop": "Stop",
    "keys": "Ctrl + Enter draws",
    "shape": "Shape",
    "width": "Width",
    "height": "Height",
    "swap": "Swap width and height",
    "steps": "Steps",
    "steps_info": "More take longer and draw finer",
    "guidance": "Guidance",
    "guidance_info": "Weight of the prompt; up to 1 without guidance, in half the time",
    "seed": "Seed",
    "seed_hint": "A new one each time",
    "dice": "Roll a seed",
    "count": "Pictures",
    "lora": "LoRA",
    "lora_strength": "Strength",
    "guidance_until": "Guidance until",
    "guidance_until_info": "Share of the steps that are guided, the first ones; fewer is faster",
    "cache": "Compute every",
    "cache_info": "One of so many steps is computed; more is faster and coarser",
    "read": "Settings from a picture …",
    "read_info": "Or drop a PNG drawn here anywhere on the page",
    "drop": "Drop the picture to draw with its settings",
    "picture": "Picture",
    "gallery": "All pictures",
    "empty": "Your pictures appear here.",
    "examples": "For a start:",
    "example_1": "An orange cat and a white sheet of paper on a wooden desk",
    "example_2": "A red apple on the beach",
    "example_3": "A sailboat at night",
    "download": "Download PNG",
    "reuse": "Use these settings",
    "revised": "Prompt as it was drawn",
    "revised_info": "With the enhancer, what it made of yours. Edit it to draw again, with the same seed and settings",
    "redraw": "Draw the edited prompt",
    "sending": "Sending …",
    "queued": "Waiting. Pictures that come first: {position}",
    "started": "Reading the prompt …",
    "enhanced": "Prompt enhanced: {prompt}",
    "step": "Step {step} of {steps}",
    "step_of": "{drawn} of {count} pictures done · step {step} of {steps}",
    "left": "about {seconds} s left",
    "done": "Drawn in {seconds} s.",
    "done_many": "{count} pictures drawn in {seconds} s.",
    "stopped": "Stopped.",
    "progress": "Progress",
    "picture_line": "Seed {seed} · {width}×{height} · {steps} steps · guidance {guidance}",
    "guided_line": "guidance until {until}",
    "cache_line": "one of {cache} steps computed",
    "read_done": "The form has the settings of {name}.",
    "no_picture": "{name} can't be read as a PNG, JPEG or WebP picture: drop one that was drawn here.",
    "no_settings": "{name} holds no settings: it was drawn elsewhere, or saved anew by another program. "
    "Drop the original file.",
    "bad_settings": "{name} holds settings that this page can't take: {reason}",
    "too_large": "{name} is too large: up to {most} MB are read.",
    "too_many_pixels": "{name} has {pixels} pixels: pictures up to {most} are read.",
    "missing": "A setting is missing: fill in {field}.",
    "not_a_seed": "The seed {found} is no whole number: clear the field for a new one each time, or roll one.",
    "no_prompt": "The prompt is empty: say what to draw.",
    "invalid": "{reason}",
    "full": "Too many people are waiting. Try again in {seconds} s.",
    "late": "It took longer than this server allows. Try fewer steps or pictures, or a smaller size.",
    "lost": "The program that draws ended, and is started again. Draw once more in a moment.",
    "failed": "{reason}",
    "broken": "Something went wrong in the server; its log says what. Try again.",
}

CHINESE = {
    "other_language": "English",
    "theme": "切换浅色与深色",
    "prompt": "提示词",
    "prompt_hint": "想画什么，中英文皆可",
    "negative": "反向提示词",
    "negative_hint": "不想出现什么",
    "enhance": "润色提示词",
    "enhance_info": "绘制前先由语言模型把提示词写得更详细",
    "draw": "开始绘制",
    "stop": "停止",
    "keys": "Ctrl + Enter 开始绘制",
    "shape": "画幅",
    "width": "宽度",
    "height": "高度",
    "swap": "交换宽度与高度",
    "steps": "步数",
    "steps_info": "步数越多，耗时越长，画面越精细",
    "guidance": "引导强度",
    "guidance_info": "贴合提示词的程度；不大于 1 时不使用引导，耗时减半",
    "seed": "随机种子",
    "seed_hint": "每次随机",
    "dice": "掷一个种子",
    "count": "张数",
    "lora": "LoRA",
    "lora_strength": "强度",
    "guidance_until": "引导截止",
    "guidance_until_info": "从第一步起使用引导的步数比例；越小越快",
    "cache": "计算间隔",
    "cache_info": "每几步计算一步；越大越快，也越粗略",
    "read": "从图片读取设置…",
    "read_info": "也可以把在这里画的 PNG 拖到页面任意处",
    "drop": "松开即可使用这张图片的设置",
    "picture": "图片",
    "gallery": "全部图片",
    "empty": "画好的图片会出现在这里。",
    "examples": "试试看：",
    "example_1": "木桌上一只橙色的猫和一张白纸",
    "example_2": "沙滩上的一个红苹果",
    "example_3": "夜晚的一艘帆船",
    "download": "下载 PNG",
    "reuse": "使用这些设置",
    "revised": "实际绘制的提示词",
    "revised_info": "使用润色时为润色后的文本。可修改后重画，种子与设置不变",
    "redraw": "按修改后的提示词重画",
    "sending": "正在发送…",
    "queued": "排队中，前面还有 {position} 张",
    "started": "正在读取提示词…",
    "enhanced": "已润色：{prompt}",
    "step": "第 {step} 步，共 {steps} 步",
    "step_of": "已完成 {drawn} 张，共 {count} 张 · 第 {step} 步，共 {steps} 步",
    "left": "约剩 {seconds} 秒",
    "done": "绘制完成，用时 {seconds} 秒。",
    "done_many": "{count} 张图片绘制完成，用时 {seconds} 秒。",
    "stopped": "已停止。",
    "progress": "进度",
    "picture_line": "种子 {seed} · {width}×{height} · {steps} 步 · 引导强度 {guidance}",
    "guided_line": "引导截止 {until}",
    "cache_line": "每 {cache} 步计算一步",
    "read_done": "已填入 {name} 的设置。",
    "no_picture": "{name} 无法作为 PNG、JPEG 或 WebP 图片读取：请拖入在这里绘制的图片。",
    "no_settings": "{name} 不含设置：它不是在这里画的，或被其他程序另存过。请使用原始文件。",
    "bad_settings": "{name} 的设置在此页面无法使用：{reason}",
    "too_large": "{name} 太大：最多读取 {most} MB。",
    "too_many_pixels": "{name} 有 {pixels} 像素：最多读取 {most} 像素的图片。",
    "missing": "缺少设置：请填写{field}。",
    "not_a_seed": "种子 {found} 不是整数：清空则每次随机，或掷一个。",
    "no_prompt": "提示词是空的：请写下想画什么。",
    "invalid": "设置有误：{reason}",
    "full": "排队的人太多，请在 {seconds} 秒后再试。",
    "late": "超过了服务器允许的时间。请减少步数或张数，或缩小尺寸。",
    "lost": "绘制程序已退出，正在重新启动。请稍后再画一次。",
    "failed": "出错了：{reason}",
    "broken": "服务器出错，原因见其日志。请再试一次。",
}

TEXTS = {"en": ENGLISH, "zh": CHINESE}


def texts(language: str) -> dict[str, str]:
    """The words of a language; English for one that the page doesn't know."""
    return TEXTS.get(language, ENGLISH)


class Refusal(InvalidSettings):
    """What the page can't do with what it was given, said in either language."""

    def __init__(self, key: str, **values: object) -> None:
        self.key, self.values = key, values
        super().__init__(self.said("en"))

    def said(self, language: str) -> str:
        """The message. A `field` among its values is a key itself."""
        words = texts(language)
        values = {name: words[str(value)] if name == "field" else value for name, value in self.values.items()}
        return words[self.key].format(**values)
