"""The page's parts and where they stand. What they do is in `page`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..repository.components import PIXELS_PER_PATCH
from ..repository.metadata import Recommended
from .page_settings import LORA_STRENGTHS, MAX_GUIDANCE, SKIPPING, shape_sizes
from .page_texts import TEXTS
from .requests import Limits

if TYPE_CHECKING:
    from .engine import Engine

# Gradio's names of the languages that it shows in the browser's own; others are told by `page.js`.
WORDS = gr.I18n(en=TEXTS["en"], **{"zh-CN": TEXTS["zh"], "zh-TW": TEXTS["zh"]})
EXAMPLES = ("example_1", "example_2", "example_3")


def word(key: str) -> Any:
    """Stands for a text, in place of a string."""
    return WORDS(key)


@dataclass(frozen=True)
class Parts:
    """The parts of the page that events read or write.

    Attributes:
        language: Of `LANGUAGES`, a text field that isn't shown.
        switch: Button for the other language.
        form: What makes a request, by the names of `DrawRequest`'s fields.
        shape: One of `SHAPES`.
        swap: Exchanges width and height.
        dice: Rolls a seed.
        lora: Names of the adapters to use.
        strengths: A slider for each adapter.
        read: Takes a picture to read its settings.
        too_large: Button that isn't shown; `page.js` clicks it for a file that it doesn't send.
        refused: Name of that file, a text field that isn't shown.
        draw: Button.
        stop: Button, there while drawing.
        status: Progress, result or problem.
        empty: What stands in the place of pictures before the first.
        examples: A button for each example.
        picture: The one that is looked at.
        gallery: All pictures, newest first.
        details: What stands below the picture.
        line: Its settings in a line.
        download: A link to its file.
        reuse: Button that takes its settings into the form.
        revised: Its prompt as the enhancer rewrote it.
        redraw: Button that draws it again with that text.
        paths: Files of the pictures in the gallery.
        selected: Index of the picture among them.
    """

    language: gr.Textbox
    switch: gr.Button
    form: dict[str, Any]
    shape: gr.Radio
    swap: gr.Button
    dice: gr.Button
    lora: gr.Dropdown
    strengths: list[gr.Slider]
    read: gr.UploadButton
    too_large: gr.Button
    refused: gr.Textbox
    draw: gr.Button
    stop: gr.Button
    status: gr.HTML
    empty: gr.Column
    examples: list[gr.Button]
    picture: gr.Image
    gallery: gr.Gallery
    details: gr.Column
    line: gr.HTML
    download: gr.HTML
    reuse: gr.Button
    revised: gr.Textbox
    redraw: gr.Button
    paths: gr.State
    selected: gr.State


def lay_out(engine: Engine) -> Parts:
    """Build the page, inside of a `gr.Blocks`.

    Args:
        engine: Whose name is shown, with whose recommended values the form begins, and what it can do is offered.
    """
    parts: dict[str, Any] = _head(engine.name)
    with gr.Row(elem_id="columns"):
        with gr.Column(elem_id="ask"):
            parts |= _asking(engine.prompt_enhancer)
        with gr.Column(elem_id="result"):
            parts |= _result()
        with gr.Column(elem_id="settings"):
            parts |= _settings(engine.recommended, engine.limits, [*engine.loras])
    parts["form"] = parts.pop("texts") | parts.pop("numbers")
    return Parts(**parts)


def _head(name: str) -> dict[str, Any]:
    with gr.Row(elem_id="head"):
        gr.HTML(f"<h1>ERNIE-Image</h1><p>{escape(name)}</p>", elem_id="title")
        gr.Button(word("theme"), elem_id="theme", size="sm", min_width=0)
        switch = gr.Button(word("other_language"), elem_id="switch", size="sm", min_width=0)
    return {"language": gr.Textbox("en", visible=False), "switch": switch}


def _asking(enhancer: bool) -> dict[str, Any]:
    prompt = gr.Textbox(
        label=word("prompt"),
        placeholder=word("prompt_hint"),
        lines=4,
        max_lines=12,
        elem_id="prompt",
    )
    negative = gr.Textbox(label=word("negative"), placeholder=word("negative_hint"), lines=1, elem_id="negative")
    enhance = gr.Checkbox(
        enhancer, label=word("enhance"), info=word("enhance_info"), visible=enhancer, elem_id="enhance"
    )
    draw = gr.Button(word("draw"), variant="primary", size="lg", elem_id="draw")
    stop = gr.Button(word("stop"), variant="stop", size="lg", visible=False, elem_id="stop")
    gr.HTML(word("keys"), elem_id="keys")
    texts = {"prompt": prompt, "negative_prompt": negative, "use_pe": enhance}
    return {"texts": texts, "draw": draw, "stop": stop}


def _result() -> dict[str, Any]:
    status = gr.HTML("", elem_id="status")
    with gr.Column(elem_id="empty") as empty:
        gr.HTML(word("empty"), elem_id="empty-line")
        gr.HTML(word("examples"), elem_id="examples-line")
        examples = [gr.Button(word(key), size="sm", elem_classes="example") for key in EXAMPLES]
    picture = gr.Image(
        label=word("picture"),
        show_label=False,
        visible=False,
        interactive=False,
        buttons=["fullscreen"],
        elem_id="picture",
    )
    # Without Gradio's own preview, which takes the focus from whoever is writing when a picture comes in
    gallery = gr.Gallery(
        label=word("gallery"),
        show_label=False,
        visible=False,
        interactive=False,
        allow_preview=False,
        columns=8,
        height="auto",
        buttons=[],
        elem_id="gallery",
    )
    with gr.Column(elem_id="details", visible=False) as details:
        with gr.Row(elem_id="picture-line"):
            line = gr.HTML("", elem_id="line")
            download = gr.HTML("", elem_id="download")
            reuse = gr.Button(word("reuse"), size="sm", min_width=0, elem_id="reuse")
        revised = gr.Textbox(
            label=word("revised"),
            info=word("revised_info"),
            lines=2,
            max_lines=8,
            interactive=True,
            elem_id="revised",
        )
        redraw = gr.Button(word("redraw"), size="sm", elem_id="redraw")
    return {
        "status": status,
        "empty": empty,
        "examples": examples,
        "picture": picture,
        "gallery": gallery,
        "details": details,
        "line": line,
        "download": download,
        "reuse": reuse,
        "revised": revised,
        "redraw": redraw,
        "paths": gr.State([]),
        "selected": gr.State(0),
    }


def _settings(recommended: Recommended, limits: Limits, lora_names: Sequence[str]) -> dict[str, Any]:
    size: dict[str, Any] = {"precision": 0, "step": PIXELS_PER_PATCH, "min_width": 80}
    sizes = shape_sizes(recommended, limits)
    now = next((shape for shape, its in sizes.items() if its == (recommended.width, recommended.height)), None)
    shape = gr.Radio([*sizes], value=now, label=word("shape"), elem_id="shape")
    with gr.Row(elem_id="size"):
        width = gr.Number(recommended.width, label=word("width"), elem_id="width", **size)
        swap = gr.Button(word("swap"), elem_id="swap", size="sm", min_width=0)
        height = gr.Number(recommended.height, label=word("height"), elem_id="height", **size)
    with gr.Row(elem_id="seeds"):
        seed = gr.Textbox(label=word("seed"), placeholder=word("seed_hint"), max_lines=1, elem_id="seed", min_width=80)
        dice = gr.Button(word("dice"), elem_id="dice", size="sm", min_width=0)
        count = gr.Number(1, label=word("count"), precision=0, step=1, elem_id="count", min_width=80)
    steps = gr.Slider(
        1,
        limits.max_steps,
        recommended.num_inference_steps,
        step=1,
        label=word("steps"),
        info=word("steps_info"),
        elem_id="steps",
    )
    guidance = gr.Slider(
        0,
        MAX_GUIDANCE,
        recommended.guidance_scale,
        step=0.1,
        label=word("guidance"),
        info=word("guidance_info"),
        elem_id="guidance",
    )
    numbers = {"width": width, "height": height, "steps": steps, "guidance_scale": guidance, "seed": seed}
    numbers |= {"count": count} | _skipping()
    lora = gr.Dropdown(
        [*lora_names], multiselect=True, label=word("lora"), visible=bool(lora_names), value=[], elem_id="lora"
    )
    strengths = [
        gr.Slider(*LORA_STRENGTHS, 1.0, step=0.05, label=each, info=word("lora_strength"), visible=False)
        for each in lora_names
    ]
    read = gr.UploadButton(word("read"), size="sm", elem_id="read")
    gr.HTML(word("read_info"), elem_id="read-info")
    return {
        "shape": shape,
        "swap": swap,
        "dice": dice,
        "numbers": numbers,
        "lora": lora,
        "strengths": strengths,
        "read": read,
        "too_large": gr.Button("", elem_id="too-large"),
        "refused": gr.Textbox("", visible=False),
    }


def _skipping() -> dict[str, Any]:
    """Sliders for what steps leave out."""
    return {
        name: gr.Slider(
            low, high, usual, step=step, label=word(name), info=word(f"{name}_info"), elem_id=name.replace("_", "-")
        )
        for name, (low, high, usual, step) in SKIPPING.items()
    }
