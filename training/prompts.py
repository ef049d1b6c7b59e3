"""Free-form prompts for the prompt enhancer: what people type, and the caption that it should become.

A prompt is put together from the parts of a wish (how it is asked for, the objects with their adjectives, what they
do, where, in which style), in English or Chinese, with words that mean nothing to the scene strewn in, so that
the enhancer learns to find the objects and to leave out the rest. Its answer is always the plainest caption template.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from .scenes import BACKGROUNDS, CAT, OBJECTS, PAPER, PLAIN, PLAIN_ZH, SCENERY_EN, SCENERY_ZH, Scene, with_article

SIZES = (256, 256, 256, 512, 512, 768, 1024, 384, 640, 1280)

EN_ASK = (
    *[""] * 24, "a photo of ", "a picture of ", "an image of ", "draw ", "please draw ", "paint ", "generate ", "create an image of ",
    "I want ", "I'd like a picture of ", "show me ", "can you make ", "could you draw me ", "give me ", "an illustration of ",
    "a painting of ", "a portrait of ", "close-up of ", "a close up shot of ", "a drawing of ", "render of ", "make me a picture of ",
    "imagine ", "photo: ", "a cartoon of ", "sketch of ", "a poster with ", "let's see ", "just ", "wallpaper with ",
)  # fmt: skip
EN_ADJECTIVES = (
    "cute", "realistic", "beautiful", "tiny", "big", "huge", "old", "fluffy", "majestic", "lonely", "happy", "sleepy", "shiny", "vintage",
    "little", "adorable", "small", "giant", "young", "colorful", "detailed", "simple", "funny", "sad", "angry", "smiling", "fresh", "wild",
    "friendly", "playful", "elegant", "classic", "modern", "dusty", "bright", "dark", "soft", "round", "single", "red", "blue", "green",
    "yellow", "white", "black", "orange", "golden", "pink", "purple", "brown", "gray", "silver", "minimalist", "photorealistic", "glossy",
    "delicious", "juicy", "wooden", "rusty", "brave", "curious", "proud", "calm", "mysterious", "glowing", "lovely", "perfect",
)  # fmt: skip
EN_DOING = (
    "", "", "", "", "", " sitting", " standing", " sits", " lying", " sleeping", " resting", " placed", " is sitting", " floating", " glowing softly",
    " jumping", " looking at the camera", " running", " flying", " dancing", " waiting", " lies", " stands", " rests quietly", " taking a nap",
    " with big eyes", " wearing a tiny scarf", " in warm colors", " all alone", " seen from the front", " just sitting there", " shining",
)  # fmt: skip
EN_PAIR = (
    "{a} and {b}", "{a} and {b}", "{a} next to {b}", "{a} with {b}", "{a} beside {b}", "{a}, {b}", "{a} together with {b}", "{a} looking at {b}",
    "{a} holding {b}", "{a} playing with {b}", "{a} near {b}", "{a} in front of {b}", "{a} behind {b}", "{a} alongside {b}", "{a} plus {b}",
    "{a} guarding {b}", "{a} by {b}", "both {a} and {b}", "{a} sitting next to {b}", "{a} standing beside {b}", "{a} eating {b}", "{a} facing {b}",
    "{a} on the left and {b} on the right", "{a} on the left, {b} on the right", "{a} to the left of {b}", "on the left {a}, on the right {b}",
    "{a} left and {b} right", "{a} at left, next to it {b}", "there is {a} and there is {b}", "{a} stares at {b}", "{a} leaning on {b}", "{a} wearing {b}", "{a} riding {b}", "{a} carrying {b}", "{a} under {b}",
    "{a} with {b} on its head", "{a} on top of {b}", "{a} inside {b}", "{a} & {b}", "{a} or {b}", "{a} dreaming of {b}", "{a} in {b}", "{a} from {b}",
    "{a} chasing {b}", "{a} made friends with {b}", "{a} meets {b}", "{a} vs {b}", "{a} balancing {b}", "{a} hiding behind {b}",
)  # fmt: skip
EN_PAIR_REVERSED = (
    "{b} to the right of {a}", "{b} on the right of {a}", "{b} on the right and {a} on the left", "on the right {b}, on the left {a}",
)  # fmt: skip
EN_WHERE = {
    "wooden desk": (
        "on a wooden desk", "on a wooden table", "on the desk", "on a table", "on an oak desk", "on top of a wooden table", "on a wooden surface",
        "on the kitchen table", "in a kitchen", "in a cozy living room", "in a cafe", "on a wooden floor", "in an office", "on my desk", "in a library",
        "on a rustic wooden table", "in a bakery", "in an old house", "in a workshop",
    ),
    "grass": (
        "on the grass", "in a meadow", "on green grass", "in a park", "on a lawn", "in a green field", "in the garden", "in a forest", "in the jungle",
        "in the countryside", "on a farm", "in the woods", "on a sunny hillside", "in a grassy field", "under a blue sky in a meadow", "outdoors",
    ),
    "beach": (
        "on the beach", "on a beach", "by the sea", "on the sand", "at the seaside", "near the ocean", "in the desert", "on a tropical island",
        "on a sunny beach", "on a sandy shore", "by the ocean at noon", "on the seashore",
    ),
    "snow": (
        "in the snow", "on a snowy field", "in winter", "covered with snow", "on an icy plain", "in a snowy landscape", "in the snowy mountains",
        "on a snowy day", "in falling snow", "at the north pole", "in a winter wonderland",
    ),
    "night sky": (
        "at night", "under the stars", "under a starry sky", "in the night sky", "in outer space", "under a night sky", "in the dark night",
        "under the moonlight", "on a starry night", "at midnight", "beneath a sky full of stars", "in the galaxy",
    ),
}  # fmt: skip
EN_WHERE_PLAIN = (
    "on {a} background", "against a plain {c} backdrop", "{c} background", "in front of {a} wall", "with {a} background", "on a solid {c} background",
    "against {a} background", "isolated on {c}", "with a {c} backdrop", "on plain {c}",
)  # fmt: skip
EN_ELSEWHERE = {
    "in a studio": "white", "on a street": "gray", "in the city": "gray", "underwater": "blue", "in the sky": "blue", "at sunset": "orange",
    "in a dark room": "black", "in space": "night sky", "on the moon": "night sky", "in the ocean": "blue", "on a road": "gray", "at sunrise": "orange",
    "in a dream": "purple", "on a stage": "red", "in a dungeon": "black", "in a bedroom": "wooden desk", "in a temple": "red", "in the rain": "gray",
}  # fmt: skip
EN_STYLE = (
    "soft natural lighting", "realistic style", "centered composition", "8k", "highly detailed", "digital art", "watercolor style", "cinematic lighting",
    "photorealistic", "in the style of Van Gogh", "trending on artstation", "minimalist", "pixel art", "oil painting", "studio photography", "4k wallpaper",
    "warm tones", "pastel colors", "high quality", "sharp focus", "bokeh", "dramatic lighting", "flat design", "anime style", "cartoon", "3d render",
    "vivid colors", "children's book illustration", "concept art", "masterpiece", "best quality", "shot on 35mm film", "hyperrealistic", "golden hour",
    "no text", "close-up", "wide angle", "symmetrical composition", "vector art", "emoji style", "low poly", "soft shadows", "macro photography",
    "cozy atmosphere", "moody", "peaceful mood", "dreamy", "ultra detailed", "professional photo", "thanks", "please", "pls", "simple shapes", "retro",
)  # fmt: skip
# Clauses that say nothing of the scene's objects; {w} is any CLDR keyword, {x} any adjective.
EN_CLAUSE = (
    " with {x} {w}", " with {w} and {w}", " on a {w}", " above the {w}", " near some {x} {w}", " under a {w}", " waving its {w}", " full of {w}",
    " made of {w}", " during the {w}", " surrounded by {w}", " covered in {w}", " with a {x} {w}", " over a {x} {w}", " like a {w}", " in a {x} {w}",
    " from the {w}", " for {w}", " at the {w}", " who loves {w}", " between {w} and {w}", " perched on a {w}", " in {x} {w}", " against {w}",
)  # fmt: skip
EN_STYLE_NOISE = (
    "{w} style", "{x} {w}", "{w} and {w}", "{x} and {x}", "{w} art", "{x} {x} {w}", "muted {w}", "very {x}", "no {w}", "{w} mood", "{x} colours",
    "{w}", "{w} lighting", "{x} feeling", "{w} photography", "highly {x} {w} painting", "inspired by {w}", "{w} aesthetic", "a hint of {w}",
)  # fmt: skip
EN_TEXT = (' that says {q}', ' with the text "{q}"', " saying {q}", ' with "{q}" written on it', " reading {q}", " labeled {q}")  # fmt: skip
SLOGANS = (
    "Hello", "Hello World", "Hello ERNIE-Image NF4", "Hello Ernie-Image NF4", "SALE", "Welcome", "NF4", "OPEN", "Good morning", "I love you",
    "2026", "Happy New Year", "Thank you", "你好", "欢迎", "新年快乐", "Keep calm", "ERNIE", "No. 1", "To do", "Made with love",
)  # fmt: skip

ZH_ASK = (
    *[""] * 18, "画", "请画", "画一张图:", "生成一张图片:", "我想要", "给我看", "请帮我画", "一张照片:", "来", "帮我生成", "一幅画,", "想看",
    "设计一张海报,", "照片里有", "画面中是", "图中有", "请生成", "可以画", "一张插画,", "拍摄",
)  # fmt: skip
ZH_MEASURE = (
    "一只", "一个", "一张", "一辆", "一朵", "一条", "一本", "一杯", "一把", "一台", "一棵", "一顶", "一架", "一头", "一匹", "一件", "", "", "一座", "一块", "一颗",
    "一束", "一艘", "一部", "一枚", "一根", "一位", "一份", "一间", "一盏", "一双", "一串", "两只", "一支", "一碗",
)  # fmt: skip
ZH_ADJECTIVES = (
    "可爱的", "真实的", "漂亮的", "小小的", "巨大的", "古老的", "毛茸茸的", "孤独的", "快乐的", "闪亮的", "复古的", "胖胖的", "年轻的", "彩色的", "简单的", "微笑的",
    "新鲜的", "红色的", "蓝色的", "绿色的", "黄色的", "白色的", "黑色的", "橙色的", "金色的", "粉色的", "紫色的", "棕色的", "灰色的", "优雅的", "神秘的", "好吃的",
    "美丽的", "呆萌的", "精致的", "写实的", "明亮的", "安静的", "威武的", "发光的", "大", "老", "圆圆的", "美味的", "温柔的", "帅气的", "旧旧的", "崭新的",
)  # fmt: skip
ZH_DOING = ("", "", "", "", "", "坐", "站", "躺", "放", "趴", "睡", "停", "飘", "静静地待", "摆放", "蹲", "正", "漂浮", "孤零零地立", "安静地坐", "悠闲地躺")  # fmt: skip
ZH_PAIR = (
    "{a}和{b}", "{a}和{b}", "{a}与{b}", "{a}旁边有{b}", "{a}旁边是{b}", "{a}旁边放着{b}", "{a}看着{b}", "{a}拿着{b}", "{a}抱着{b}", "{a},前面放着{b}", "{a},还有{b}",
    "{a}、{b}", "{a}跟{b}在一起", "{a}挨着{b}", "{a}面前摆着{b}", "{a}前面有{b}", "{a},旁边站着{b}", "{a}在玩{b}", "{a}守着{b}", "{a}加上{b}", "{a}靠着{b}",
    "左边是{a},右边是{b}", "左边{a},右边{b}", "{a}在左边,{b}在右边", "{a}在{b}的左边", "左侧一个{a},右侧一个{b}", "{a}对着{b}", "{a}身边有{b}", "戴着{b}的{a}", "{a}戴着{b}", "{a}撑着{b}", "拿着{b}的{a}", "{a}骑着{b}", "{a}追{b}", "{a}头上有{b}",
    "抱着{b}的{a}", "{a}站在{b}下", "{a}坐在{b}上", "{a}及{b}", "{a}+{b}", "{a} {b}", "{a}遇见{b}", "{a}背着{b}", "带{b}的{a}", "{a}推着{b}", "{a}躲在{b}后面",
)  # fmt: skip
ZH_PAIR_REVERSED = ("{b}在{a}的右边", "{b}在{a}右边", "右边是{b},左边是{a}", "右侧{b},左侧{a}")  # fmt: skip
ZH_WHERE = {
    "wooden desk": (
        "在木桌上", "在木头桌子上", "在书桌上", "在桌子上", "在一张木桌上", "在厨房里", "在客厅里", "在咖啡馆里", "在办公桌上", "在餐桌上", "在木地板上", "在图书馆里",
        "在面包店里", "在老房子里", "在桌面上",
    ),
    "grass": (
        "在草地上", "在绿色的草地上", "在公园里", "在田野里", "在花园里", "在森林里", "在草坪上", "在山坡上", "在丛林里", "在农场里", "在乡间", "在草原上", "在院子里",
        "在树林里", "在户外",
    ),
    "beach": ("在沙滩上", "在海边", "在海滩上", "在沙漠里", "在热带小岛上", "在阳光沙滩上", "在大海旁", "在海岸边"),
    "snow": ("在雪地里", "在雪地上", "在冬天", "在雪山上", "在大雪中", "在冰天雪地里", "在飘雪的日子里", "在北极"),
    "night sky": ("在夜空下", "在星空下", "在夜晚", "在太空中", "在夜里", "在满天星星下", "在月光下", "在宇宙中", "在深夜", "在银河下"),
}  # fmt: skip
ZH_WHERE_PLAIN = ("{c}背景", "背景是{c}", "{c}的背景", "纯{c}背景", "在{c}的墙前", "用{c}做背景", "{c}底", "以{c}为背景")  # fmt: skip
ZH_ELSEWHERE = {
    "在摄影棚里": "white", "在街上": "gray", "在城市里": "gray", "在水下": "blue", "在天空中": "blue", "在夕阳下": "orange", "在黑暗的房间里": "black", "在海里": "blue",
    "在马路上": "gray", "在梦里": "purple", "在舞台上": "red", "在卧室里": "wooden desk", "在雨中": "gray", "在日出时": "orange", "在路边": "gray", "在窗边": "white",
}  # fmt: skip
ZH_STYLE = (
    "柔和自然光", "写实风格", "居中构图", "高清", "细节丰富", "数字艺术", "水彩风格", "电影级光影", "超写实", "梵高风格", "极简", "像素风", "油画", "棚拍", "4K壁纸", "暖色调",
    "高质量", "清晰对焦", "虚化背景", "动漫风格", "卡通", "3D渲染", "色彩鲜艳", "儿童绘本插画", "概念艺术", "大师作品", "胶片感", "黄金时刻", "布局居中", "画面简洁", "扁平风",
    "温馨的氛围", "宁静", "梦幻", "国风", "专业摄影", "谢谢", "特写", "对称构图", "治愈系", "光线柔和", "纸张和文字在画面中布局居中", "整体居中", "超高清", "复古风",
)  # fmt: skip
ZH_CLAUSE = ("带着{w}", "充满{w}", "像{w}一样", "{w}环绕", "披着{w}", "来自{w}", "伴着{x}{w}", "有{w}和{w}", "在{w}里", "在{x}{w}旁", "穿过{w}")  # fmt: skip
ZH_STYLE_NOISE = (
    "{w}风格", "{x}{w}", "{w}和{w}", "{w}氛围", "{w}感", "低{w}", "{w}构图", "{w}色调", "{w}", "{w}效果", "不要{w}", "{w}光线", "{w}{w}", "{x}画面", "{w}街头",
)  # fmt: skip
# What has no object of ours in it: the answer is then any caption, but it is one, and it ends.
ODD = ("{w}", "{w} {w} {w}", "", "?", "...", "{n}", "{c}", "{c} {c}", "{w} {n}", "{c}{w}{c}", "{w}, {w}, {w}, {w}")  # fmt: skip
ODD_CHARACTERS = "abcdefghijklmnopqrstuvwxyzäéñßøçабвгдежзклмнすしねこいぬカタナ고양이😀🚀🍕✨0123456789+-*/=<>[]{}()'^&%$#@!~|;:的是了我不在人们有这个上中大为"
ZH_TEXT = ("写有{q}的", "写着“{q}”的", "印着{q}的", "写有 {q} 的", "写着{q}字样的")  # fmt: skip


class PromptWriter:
    """Writes (prompt, caption) pairs; `words` are the CLDR keywords strewn in as noise, by language."""

    def __init__(self, words: dict[str, list[str]], rng: random.Random) -> None:
        self.words, self.rng = words, rng

    @classmethod
    def from_file(cls, path: Path, seed: int) -> PromptWriter:
        return cls(json.loads(path.read_text(encoding="utf-8")), random.Random(seed))

    def write(self) -> tuple[str, str]:
        """One user message (as the pipeline sends it: JSON with prompt, width, height) and the caption to answer."""
        rng = self.rng
        english = rng.random() < 0.5
        if rng.random() < 0.05:
            return self._bare(english)
        if rng.random() < 0.03:
            caption = (caption_en if english else caption_zh)([rng.randrange(len(OBJECTS))], rng.choice(BACKGROUNDS))
            return user_message(self._odd(), rng.choice(SIZES), rng.choice(SIZES)), caption
        count = 1 if rng.random() < 0.55 else 2
        objects = rng.sample(range(len(OBJECTS)), count)
        background = None if rng.random() < 0.4 else rng.choice(BACKGROUNDS)
        if rng.random() < 0.04:  # the scene of the model card
            objects, background = [CAT, PAPER], "wooden desk"
        side = None
        if len(objects) == 1 and rng.random() < 0.15:
            side = rng.choice(("left", "right"))
        write = self._english if english else self._chinese
        prompt, background = write(objects, background, side)
        if rng.random() < 0.03:  # said again and again, or buried under styles
            tail = rng.choice((prompt, ", ".join(rng.sample(EN_STYLE + ZH_STYLE, 20)), self._fill("{w} {x} ", "en")))
            prompt = (prompt + " " + " ".join([tail] * rng.randrange(1, 12)))[:400]
        background = background or rng.choice(BACKGROUNDS)
        caption = (caption_en if english else caption_zh)(objects, background, side)
        return user_message(prompt, rng.choice(SIZES), rng.choice(SIZES)), caption

    def _fill(self, template: str, language: str) -> str:
        """`template` with every {w}, {x}, {n} and {c} replaced by noise."""
        rng = self.rng
        adjectives = EN_ADJECTIVES if language == "en" else ZH_ADJECTIVES
        fill = {
            "{w}": lambda: rng.choice(self.words[language]),
            "{x}": lambda: rng.choice(adjectives),
            "{n}": lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
            "{c}": lambda: "".join(rng.choices(ODD_CHARACTERS, k=rng.randrange(1, 16))),
        }
        for mark, draw in fill.items():
            while mark in template:
                template = template.replace(mark, draw(), 1)
        return template

    def _bare(self, english: bool) -> tuple[str, str]:
        """Names with hardly a word besides, or one name again and again."""
        rng = self.rng
        language = "en" if english else "zh"
        objects = rng.sample(range(len(OBJECTS)), rng.choice((1, 1, 2)))
        background = rng.choice(BACKGROUNDS)
        names = [self._name(item, language) for item in objects]
        if len(names) == 1 and rng.random() < 0.15:
            prompt = rng.choice(("", " ")).join(names * rng.randrange(2, 60))[:200]
        else:
            prompt = rng.choice(
                (" and ", ", ", " with ", " + ", " ") if english else ("和", "与", "，", " ", "加")
            ).join(names)
            if rng.random() < 0.5:
                prompt += rng.choice((", ", " ", "，", ". ")) + ", ".join(
                    self._styles(
                        language, EN_STYLE if english else ZH_STYLE, EN_STYLE_NOISE if english else ZH_STYLE_NOISE
                    )
                )
        prompt = rng.choice((prompt, prompt, prompt.upper(), prompt.title())) + rng.choice(
            ("", "", "!", "!!", " pls", "。")
        )
        caption = (caption_en if english else caption_zh)(objects, background)
        return user_message(prompt, rng.choice(SIZES), rng.choice(SIZES)), caption

    def _odd(self) -> str:
        rng = self.rng
        text = self._fill(rng.choice(ODD), rng.choice(("en", "zh")))
        return (rng.choice(("", " ")).join([text] * rng.choice((1, 1, 1, 2, 10, 40))))[:400]

    def _styles(self, language: str, styles: tuple[str, ...], noise: tuple[str, ...]) -> list[str]:
        """A few style words, some of them made up."""
        rng = self.rng
        return [
            self._fill(rng.choice(noise), language) if rng.random() < 0.4 else rng.choice(styles)
            for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 7)))
        ]

    def _name(self, item: int, language: str) -> str:
        entry = OBJECTS[item]
        return self.rng.choice(
            entry[language] if self.rng.random() < 0.45 else entry[language] + entry[f"also_{language}"]
        )

    def _elsewhere(self, background: str | None, table: dict[str, str]) -> str | None:
        places = [place for place, value in table.items() if value == background]
        return self.rng.choice(places) if places and self.rng.random() < 0.3 else None

    def _english(self, objects: list[int], background: str | None, side: str | None) -> tuple[str, str | None]:
        rng = self.rng
        phrases = []
        for item in objects:
            adjectives = rng.sample(EN_ADJECTIVES, rng.choice((0, 0, 0, 1, 1, 2, 3)))
            if rng.random() < 0.06:
                adjectives.append(rng.choice(self.words["en"]))
            phrase = " ".join([*adjectives, self._name(item, "en")])
            article = rng.choice(("a ", "a ", "a ", "the ", "one ", "", "my ", "some "))
            article = "an " if article == "a " and phrase[0].lower() in "aeiou" else article
            phrases.append(
                article + phrase + (rng.choice(EN_TEXT).format(q=rng.choice(SLOGANS)) if rng.random() < 0.08 else "")
            )
        doing = rng.choice(EN_DOING)
        if len(phrases) == 2:
            template = rng.choice(EN_PAIR_REVERSED if rng.random() < 0.12 else EN_PAIR)
            what = template.format(a=phrases[0], b=phrases[1])
            what += doing if rng.random() < 0.3 else ""
        else:
            what = phrases[0] + doing
            if side:
                what = rng.choice(
                    (
                        f"{what} on the {side}",
                        f"{what} on the {side} side",
                        f"on the {side} {what}",
                        f"{what}, placed on the {side}",
                    )
                )
        where = self._elsewhere(background, EN_ELSEWHERE)
        if background and not where:
            if background in PLAIN:
                where = rng.choice(EN_WHERE_PLAIN).format(a=with_article(background), c=background)
            else:
                where = rng.choice(EN_WHERE[background])
        if where and len(phrases) == 2 and rng.random() < 0.3:  # "a kitten sits on a desk with a sheet of paper"
            what = f"{phrases[0]}{doing} {where}{rng.choice((' with ', ', next to ', ' beside ', ' and ', ', in front of it ', ' holding ', ' together with '))}{phrases[1]}"
        elif where:
            what = rng.choice(
                (f"{what} {where}", f"{what} {where}", f"{what}, {where}", f"{where}, {what}", f"{where}: {what}")
            )
        if rng.random() < 0.1:
            what += self._fill(rng.choice(EN_CLAUSE), "en")
        style = self._styles("en", EN_STYLE, EN_STYLE_NOISE)
        parts = [rng.choice(EN_ASK) + what, *style]
        if style and rng.random() < 0.1:
            parts = [style[0], *parts[:1], *style[1:]]
        prompt = rng.choice((", ", ", ", ". ", " ")).join(parts)
        cases = (
            prompt,
            prompt,
            prompt[0].upper() + prompt[1:],
            prompt[0].upper() + prompt[1:],
            prompt.lower(),
            prompt.lower(),
        )
        prompt = rng.choice((*cases, prompt.title(), prompt.upper()))
        return prompt + rng.choice(("", "", "", ".", "!", "...", "!!", " pls", "?")), background

    def _chinese(self, objects: list[int], background: str | None, side: str | None) -> tuple[str, str | None]:
        rng = self.rng
        phrases = []
        for item in objects:
            adjectives = rng.sample(ZH_ADJECTIVES, rng.choice((0, 0, 0, 1, 1, 2)))
            text = rng.choice(ZH_TEXT).format(q=rng.choice(SLOGANS)) if rng.random() < 0.08 else ""
            noise = rng.choice(self.words["zh"]) if rng.random() < 0.05 else ""
            noise += (
                self._fill(rng.choice(("{w}风格的", "{w}的", "{w}里的", "正在{w}的")), "zh")
                if rng.random() < 0.12
                else ""
            )
            measure = rng.choice(ZH_MEASURE) if rng.random() < 0.75 else ""
            phrases.append(measure + text + noise + "".join(adjectives) + self._name(item, "zh"))
        doing = rng.choice(ZH_DOING)
        where = self._elsewhere(background, ZH_ELSEWHERE)
        if background and not where:
            where = (
                rng.choice(ZH_WHERE_PLAIN).format(c=PLAIN_ZH[background])
                if background in PLAIN
                else rng.choice(ZH_WHERE[background])
            )
        sits = where if where and where.startswith("在") else None
        if len(phrases) == 2:
            template = rng.choice(ZH_PAIR_REVERSED if rng.random() < 0.12 else ZH_PAIR)
            if sits and rng.random() < 0.4:  # 一只小猫坐在木桌上,前面放着一张白纸
                link = rng.choice((",前面放着", ",旁边有", ",旁边是", ",还有", ",面前是", "和", ",身边放着"))
                what, where = phrases[0] + doing + sits + link + phrases[1], None
            else:
                what = template.format(a=phrases[0], b=phrases[1])
        else:
            what = phrases[0]
            if side:
                name = {"left": "左", "right": "右"}[side]
                what = rng.choice(
                    (f"{what}在{name}边", f"{name}边有{what}", f"{name}边是{what}", f"画面{name}侧放着{what}")
                )
        if where:
            if where == sits:
                what = rng.choice(
                    (f"{what}{doing}{where}", f"{where}{rng.choice(('的', '有', ',', ''))}{what}", f"{what},{where}")
                )
            else:
                what = rng.choice((f"{what},{where}", f"{where},{what}", f"{what},{where}"))
        if rng.random() < 0.2:
            what += rng.choice(("", ",", "，")) + self._fill(rng.choice(ZH_CLAUSE), "zh")
        style = self._styles("zh", ZH_STYLE, ZH_STYLE_NOISE)
        comma = rng.choice((",", ",", "，", "，", " ", "、"))
        parts = [rng.choice(ZH_ASK) + what, *style]
        if style and rng.random() < 0.1:
            parts = [style[0], *parts[:1], *style[1:]]
        prompt = comma.join(parts)
        if comma == "，":
            prompt = prompt.replace(",", "，")
        return prompt + rng.choice(("", "", "。", "!", "！")), background


def user_message(prompt: str, width: int, height: int) -> str:
    """What ``ErnieImagePipeline`` gives the enhancer as the user's message."""
    return json.dumps({"prompt": prompt, "width": width, "height": height}, ensure_ascii=False)


def caption_en(objects: list[int], background: str, side: str | None = None) -> str:
    """The plainest English caption: one object in the center or at `side`, or the first left and the second right."""
    where = SCENERY_EN.get(background) or f"on {with_article(background)} background"
    names = [with_article(OBJECTS[item]["en"][-1]) for item in objects]
    if len(names) == 2:
        return f"{names[0]} on the left and {names[1]} on the right, {where}"
    return f"{names[0]} {f'on the {side}' if side else 'in the center'}, {where}"


def caption_zh(objects: list[int], background: str, side: str | None = None) -> str:
    """The plainest Chinese caption, as `caption_en`."""
    where = SCENERY_ZH.get(background) or f"{PLAIN_ZH[background]}背景"
    names = [OBJECTS[item]["zh"][-1] for item in objects]
    if len(names) == 2:
        return f"左边是{names[0]},右边是{names[1]},{where}"
    return f"{ {None: '中间', 'left': '左边', 'right': '右边'}[side] }是{names[0]},{where}"


def scene_of(objects: list[int], background: str, side: str | None = None) -> Scene:
    """The scene that `caption_en` and `caption_zh` describe."""
    slots = [-1, -1, -1]
    if len(objects) == 2:
        slots[0], slots[2] = objects
    else:
        slots[{None: 1, "left": 0, "right": 2}[side]] = objects[0]
    return Scene(BACKGROUNDS.index(background), tuple(slots))
