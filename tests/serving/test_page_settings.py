"""What the page reads and says, without a browser: settings of pictures, values of the form, words in two languages."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from string import Formatter
from typing import Any

import gradio as gr
import pytest
from conftest import CHECKOUT
from PIL import Image, PngImagePlugin

from ernie_image_nf4.errors import (
    DrawingFailed,
    InvalidRequest,
    QueueFull,
    RequestTimedOut,
    WorkerLost,
)
from ernie_image_nf4.generation.settings import LoraUse
from ernie_image_nf4.repository.metadata import Recommended
from ernie_image_nf4.serving.engine import Engine
from ernie_image_nf4.serving.events import Event, Queued, Revised, Started, Step
from ernie_image_nf4.serving.page import Page, fill_form, form_request, make_page, picture_line
from ernie_image_nf4.serving.page_drawing import Progress, last_line, note, progress_line, seconds_left
from ernie_image_nf4.serving.page_layout import Parts, lay_out
from ernie_image_nf4.serving.page_settings import max_file_bytes, read_request, request_of, shape_sizes
from ernie_image_nf4.serving.page_texts import CHINESE, ENGLISH, LANGUAGES, Refusal
from ernie_image_nf4.serving.requests import DrawRequest, Limits

GOOD = {"prompt": "a cat", "seed": "3", "steps": "4", "guidance_scale": "2.5", "width": "64", "height": "48"}
INK = LoraUse("ink.safetensors", 1.0, "0" * 64)
VALUES = {
    "prompt": "a cat",
    "negative_prompt": "",
    "width": 64,
    "height": 48,
    "steps": 4,
    "guidance_scale": 2.5,
    "guidance_until": 1,
    "cache": 1,
    "seed": " 12 ",
    "count": 1,
    "use_pe": True,
}


@pytest.fixture
def png(tmp_path):
    """Writes a PNG with text in it."""

    def write(size=(64, 48), **texts):
        info = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text)
        path = tmp_path / "picture.png"
        Image.new("L", size).save(path, pnginfo=info)
        return path

    return write


def refusal(path, **limits) -> str:
    with pytest.raises(Refusal) as caught:
        read_request(path, "x.png", Limits(**limits), {"ink": INK})
    return str(caught.value)


# Pictures' settings


def test_a_pictures_settings_are_the_request_that_drew_it(png):
    request, revised = read_request(png(**GOOD, revised_prompt="an orange cat"), "x.png", Limits(), {})
    assert request == DrawRequest(prompt="a cat", seed=3, steps=4, guidance_scale=2.5, width=64, height=48)
    assert revised == "an orange cat"
    request, revised = read_request(png(**GOOD), "x.png", Limits(), {})
    assert not request.use_pe
    assert revised is None


def test_what_a_pictures_steps_left_out_is_part_of_its_request(png):
    request, _ = read_request(png(**GOOD, guidance_until="0.33", cache="3"), "x.png", Limits(), {})
    assert (request.guidance_until, request.cache) == (0.33, 3)
    filled = fill_form(parts := layout(), request)
    assert (filled[parts.form["guidance_until"]], filled[parts.form["cache"]]) == (0.33, 3)
    plain, _ = read_request(png(**GOOD), "x.png", Limits(), {})
    assert (plain.guidance_until, plain.cache) == (1.0, 1)
    assert picture_line(plain, "en") == "Seed 3 · 64×48 · 4 steps · guidance 2.5"
    assert picture_line(request, "en").endswith(" · guidance until 33% · one of 3 steps computed")
    assert picture_line(request, "zh").endswith(" · 引导截止 33% · 每 3 步计算一步")


def test_a_pictures_loras_are_found_among_those_offered_by_their_digest(png):
    oil = LoraUse("a: b; c:1 (x).safetensors", 0.125, "f" * 64)
    noted = "; ".join(map(str, (oil, replace(INK, file="renamed.safetensors", strength=0.75))))
    request, _ = read_request(png(**GOOD, lora=noted), "x.png", Limits(), {"ink": INK, "oil": oil})
    assert request.lora == (("oil", 0.125), ("ink", 0.75))


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("steps", "many", "steps is 'many', not a whole number."),
        ("steps", "101", "101 is too many for steps"),
        ("width", "9" * 5000, "width is '9999"),
        ("width", "63", "Width 63 is not a positive multiple of 16"),
        ("guidance_scale", "nan", "guidance_scale nan is out of range"),
        ("guidance_scale", "30", "guidance_scale 30.0 is out of range: use 0 to 20."),
        ("guidance_until", "0", "guidance_until 0.0 is out of range: use 0.05 to 1."),
        ("cache", "9", "cache 9 is out of range: use 1 to 8."),
        ("cache", "1.5", "cache is '1.5', not a whole number."),
        ("lora", f"ink.safetensors:1 (sha256 {'e' * 64})", "its LoRA ink.safetensors isn't offered here."),
        (
            "lora",
            f"ink.safetensors:-1 (sha256 {'0' * 64})",
            "LoRA ink: strength -1.0 is out of range: use 0 to 2.",
        ),
        (
            "lora",
            f"hand-made:1 (tensors: sha256 {'e' * 64}); ink.safetensors:1 (sha256 {'0' * 64})",
            "its LoRA hand-made isn't offered here.",
        ),
        ("lora", f"ink.safetensors:1e999 (sha256 {'0' * 64})", "out of range"),
        ("lora", f"ink.safetensors:{'1' * 10000}", "names no LoRA with its strength and SHA-256."),
        ("lora", "style", "lora is 'style', which names no LoRA"),
        ("seed", str(2**63), "out of range"),
        ("prompt", "x" * 8001, "prompt has 8001 characters"),
    ],
)
def test_settings_that_cant_be_drawn_are_named(png, key, text, reason):
    message = refusal(png(**{**GOOD, key: text}))
    assert message.startswith("x.png holds settings that this page can't take: ")
    assert reason in message


def test_settings_that_are_missing_are_named(png):
    assert refusal(png(**{key: text for key, text in GOOD.items() if key != "height"})).endswith("height is missing.")
    assert "holds no settings" in refusal(png(prompt="a cat", Software="another program"))


def test_files_are_refused_before_their_pixels_are_read(png, tmp_path):
    path = png(size=(4000, 4000), **GOOD)  # 16 million pixels of one value: some KB
    assert refusal(path).startswith("x.png has 16,000,000 pixels")
    path.write_bytes(path.read_bytes()[:200])  # nothing but a header
    assert refusal(path).startswith("x.png has 16,000,000 pixels")
    path.write_bytes(b"\0" * (max_file_bytes(Limits(max_pixels=256)) + 1))
    assert refusal(path, max_pixels=256).startswith("x.png is too large")
    for content in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        assert "can't be read as a PNG" in refusal(path)


# The form


def test_the_forms_values_become_a_request():
    request = request_of(VALUES | {"guidance_until": 0.5, "cache": 3.0}, {"ink": 0.5})
    assert request == DrawRequest(
        prompt="a cat",
        width=64,
        height=48,
        steps=4,
        guidance_scale=2.5,
        guidance_until=0.5,
        cache=3,
        seed=12,
        lora=(("ink", 0.5),),
    )
    assert request_of({**VALUES, "seed": ""}, {}).seed is None


@pytest.mark.parametrize(
    ("field", "value", "english"),
    [
        ("prompt", " \n", "The prompt is empty"),
        ("steps", None, "fill in Steps"),
        ("guidance_until", None, "fill in Guidance until"),
        ("cache", None, "fill in Compute every"),
        ("count", None, "fill in Pictures"),
        ("seed", "1.5", "The seed 1.5 is no whole number"),
        ("seed", "1" * 31, "is no whole number"),
    ],
)
def test_values_that_make_no_request_are_told_in_both_languages(field, value, english):
    with pytest.raises(Refusal) as caught:
        request_of({**VALUES, field: value}, {})
    assert english in caught.value.said("en") == str(caught.value)
    assert re.search(r"[\u4e00-\u9fff]", caught.value.said("zh"))


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (256, 256), (512, 768)])
def test_shapes_have_about_the_pixels_that_suit_the_model(width, height):
    for name, size in shape_sizes(Recommended(height, width), Limits()).items():
        long, short = map(int, name.split(":"))
        assert size[0] % 16 == size[1] % 16 == 0
        assert size[0] * size[1] == pytest.approx(width * height, rel=0.1)
        assert size[0] / size[1] == pytest.approx(long / short, rel=0.1)


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_shapes_are_ones_that_the_server_allows(side):
    limits = Limits(max_pixels=side**2)
    sizes = shape_sizes(Recommended(side, side), limits).values()
    assert all(0.8 * side**2 < width * height <= side**2 for width, height in sizes)


def layout(*lora_names: str, **options: Any) -> Parts:
    """The page's parts over the mini, which isn't loaded."""
    engine = Engine(str(CHECKOUT), **options)
    engine.loras = {name: LoraUse(f"{name}.safetensors", 1.0, name) for name in lora_names}  # which only workers read
    with gr.Blocks(analytics_enabled=False):
        return lay_out(engine)


def test_the_enhancer_is_offered_only_where_the_server_has_it():
    offered, missing = layout().form["use_pe"], layout(prompt_enhancer=False).form["use_pe"]
    assert (offered.visible, offered.value) == (True, True)
    assert (missing.visible, missing.value) == (False, False)


def test_loras_are_there_only_where_the_server_has_some():
    assert not layout().lora.visible
    parts = layout("ink", "chalk")
    assert parts.lora.visible
    assert [slider.label for slider in parts.strengths] == ["ink", "chalk"]
    request = form_request(parts, [*(VALUES[name] for name in parts.form), ["chalk"], 0.1, 0.75])
    assert request.lora == (("chalk", 0.75),)
    filled = fill_form(parts, request)
    assert filled[parts.lora] == ["chalk"]
    assert filled[parts.strengths[1]] == gr.update(value=0.75, visible=True)
    assert not filled[parts.strengths[0]]["visible"]


def test_files_are_taken_by_upload_only():
    """Gradio would fetch a file that is named by an address."""
    with Page(analytics_enabled=False) as page:
        text = gr.Textbox()
        text.change(print, text)
    event = page.fns[0]
    for named in ({"path": "http://127.0.0.1/x.png"}, [{"x": {"path": "https://a.org/x.png", "url": None}}]):
        with pytest.raises(gr.Error, match="by upload"):
            page.validate_inputs(event, [named])
    page.validate_inputs(event, [{"path": "/tmp/gradio/1/x.png", "url": "http://127.0.0.1/gradio_api/file=x.png"}])
    page.validate_inputs(event, ["a cat http://example.org"])


# Drawing


def plain(html: str) -> str:
    """The text of a line of status."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def told(*events: Event) -> list[str]:
    """What the page says as events come in."""
    progress, lines = Progress(request_of(VALUES, {})), []
    for event in events:
        note(progress, event)
        lines.append(plain(progress_line(progress, event, "en")))
    return lines


def ending(error: Exception | None, language: str = "en") -> str:
    """What the page says when drawing has ended so."""

    async def end() -> None:
        if error is not None:
            raise error

    async def ended() -> str:
        task = asyncio.create_task(end())
        await asyncio.wait([task])
        return plain(last_line(Progress(request_of(VALUES, {})), task, language))

    return asyncio.run(ended())


def test_a_draw_is_told_from_the_queue_to_the_end():
    assert told(Queued(3), Started(), Revised("a <cat>"), Step(1, 4, 0)) == [
        "Waiting. Pictures that come first: 3",
        "Reading the prompt …",
        "Reading the prompt … Prompt enhanced: a &lt;cat&gt;",
        "Step 1 of 4 Prompt enhanced: a &lt;cat&gt;",
    ]
    assert re.fullmatch(r"Drawn in 0\.\d s\.", ending(None))


@pytest.mark.parametrize(
    ("error", "english"),
    [
        (QueueFull("64 pictures are waiting", 7), "Too many people are waiting. Try again in 7 s."),
        (RequestTimedOut("took longer"), "It took longer than this server allows."),
        (WorkerLost("died", 5), "The program that draws ended"),
        (InvalidRequest("steps", "101 is too many for steps."), "101 is too many for steps."),
        (DrawingFailed("Not enough memory for 4096x4096."), "Not enough memory for 4096x4096."),
        (ZeroDivisionError("secret"), "Something went wrong in the server; its log says what."),
    ],
)
def test_errors_are_told_in_both_languages(error, english):
    assert ending(error).startswith(english)
    assert "secret" not in ending(error)
    assert re.search(r"[\u4e00-\u9fff]", ending(error, "zh"))


def test_progress_counts_all_pictures_of_a_request():
    progress = Progress(request_of({**VALUES, "count": 2}, {}))
    assert seconds_left(progress, 0.0) is None
    for picture, step in ((0, 1), (1, 1), (0, 2), (1, 2)):  # of one batch
        note(progress, Step(step, 4, picture))
    line = progress_line(progress, Step(2, 4, 1), "en")
    assert 'aria-valuemax="8" aria-valuenow="4"' in line
    assert "0 of 2 pictures done · step 4 of 8" in line
    progress.drawing_since = 100.0
    assert seconds_left(progress, 106.0) == pytest.approx(8.0)  # 3 more steps since the first, 4 to come


# Words


def test_both_languages_say_the_same_things():
    assert ENGLISH.keys() == CHINESE.keys()
    for key, text in ENGLISH.items():
        assert fields_of(text) == fields_of(CHINESE[key]), key


def fields_of(text: str) -> set[str | None]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_every_word_is_used():
    files = (CHECKOUT / "ernie_image_nf4" / "serving").glob("page*.py")
    source = "".join(file.read_text(encoding="utf-8") for file in files if file.name != "page_texts.py")
    built = {"guidance_until_info", "cache_info"}  # from the fields' names
    assert [key for key in ENGLISH.keys() - built if not re.search(f"[\"']{key}[\"']", source)] == []


def test_nothing_of_the_page_is_fetched_from_elsewhere():
    page = make_page(Engine(str(CHECKOUT)))
    assert page.analytics_enabled is False
    for file in ("page.css", "page.js"):
        source = (CHECKOUT / "ernie_image_nf4" / "serving" / file).read_text(encoding="utf-8")
        assert {*re.findall(r"https?://[^\s'\"]+", source)} <= {"http://www.w3.org/2000/svg"}
    assert LANGUAGES == ("en", "zh")
