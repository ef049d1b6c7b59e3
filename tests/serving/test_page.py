"""The page in a browser: Chromium draws with the mini through the server's own application."""

from __future__ import annotations

import base64
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT
from PIL import Image
from running import Loop, request, running_engine, running_loop, serving, until

from ernie_image_nf4.generation.image_file import Drawing, read_settings, save_picture
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.serving.engine import Engine, Picture
from ernie_image_nf4.serving.page_settings import max_file_bytes

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

LONGEST = 30_000  # ms that anything may take
PROGRESS = "[role=progressbar]"


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with running_loop() as loop:
        yield loop


@pytest.fixture(scope="module")
def engine(loop: Loop) -> Iterator[Engine]:
    with running_engine(loop, CHECKOUT) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(loop: Loop, engine: Engine) -> Iterator[str]:
    with serving(loop, engine, page=True) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page, in a browser of its own language, size and so on. It must not ask any other machine."""
    contexts: list[Any] = []
    asked: list[str] = []

    def open_page(address: str = url, **options: Any) -> Any:
        options = {"locale": "en-GB", "viewport": {"width": 1280, "height": 900}, **options}
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(LONGEST)
        page.on("request", lambda each: asked.append(each.url))
        page.goto(address)
        page.wait_for_selector("#prompt textarea")
        page.wait_for_function("document.documentElement.lang && document.querySelector('#shape[aria-labelledby]')")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []


def fill(page: Any, **values: object) -> None:
    """Fill the form with what draws in a second, and these values."""
    values = {"prompt": "a cat on the beach", "width": 128, "height": 128, "steps": 2, "seed": 5, **values}
    for name, value in values.items():
        kind = "textarea" if name == "prompt" else "input >> nth=0"
        page.fill(f"#{name} {kind}", str(value))
    page.focus("#prompt textarea")


def drawn(page: Any) -> None:
    """Wait until a draw that has just been asked for is over."""
    page.wait_for_selector("#stop")
    page.wait_for_selector("#draw")


def status(page: Any) -> str:
    return page.inner_text("#status")


def form(page: Any) -> dict[str, str]:
    names = ("width", "height", "steps", "guidance", "seed")
    values = {name: page.input_value(f"#{name} input >> nth=0") for name in names}
    texts = {name: page.input_value(f"#{name} textarea >> nth=0") for name in ("prompt", "negative")}
    return {**texts, **values, "enhance": str(page.is_checked("#enhance input"))}


def drop(page: Any, name: str, content: bytes) -> None:
    """Drop a file on the middle of the page."""
    script = """([name, content]) => {
      const held = new DataTransfer();
      held.items.add(new File([Uint8Array.from(atob(content), (each) => each.charCodeAt(0))], name));
      return held;
    }"""
    held = page.evaluate_handle(script, [name, base64.b64encode(content).decode()])
    page.dispatch_event("#result", "dragover", {"dataTransfer": held})
    assert page.is_visible("#drop")
    page.dispatch_event("#result", "drop", {"dataTransfer": held})
    assert not page.is_visible("#drop")


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., bytes]:
    """Makes a PNG as the package writes it, which says that it was drawn with these settings."""

    def make(revised: str | None = None, name: str = "picture.png", **values: Any) -> bytes:
        usual = {"height": 144, "width": 192, "num_inference_steps": 7, "guidance_scale": 2.5, "seed": 2**60 + 1}
        settings = Settings(**{"prompt": '一只猫, "quoted"', "negative_prompt": "blurry", **usual, **values})
        image = Image.radial_gradient("L").convert("RGB")
        save_picture(Drawing(image, settings, revised, 1.0), tmp_path / name, model="mini")
        return (tmp_path / name).read_bytes()

    return make


# Opening


def test_the_page_opens_with_what_suits_the_model(visit, engine):
    page = visit()
    assert page.title() == f"{engine.name} · ERNIE-Image"
    assert form(page) == {
        "prompt": "",
        "negative": "",
        "width": "256",
        "height": "256",
        "steps": str(engine.recommended.num_inference_steps),
        "guidance": f"{engine.recommended.guidance_scale:g}",
        "seed": "",
        "enhance": "True",
    }
    assert page.is_checked("#shape [value='1:1']")


def test_everything_that_can_be_used_has_a_name(visit):
    """As a screen reader finds it: by text, label or aria-label."""
    nameless = """() => [...document.querySelectorAll("button, input, textarea, fieldset")].filter((each) =>
        each.type !== "file" && each.getClientRects().length && !each.innerText?.trim() &&
        !each.getAttribute("aria-label") && !each.getAttribute("aria-labelledby") &&
        ![...(each.labels ?? [])].some((label) => label.innerText.trim())).map((each) => each.outerHTML)"""
    assert visit().evaluate(nameless) == []


def test_a_phone_has_it_all_in_one_column(visit):
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    tops = [page.locator(part).bounding_box()["y"] for part in ("#prompt", "#draw", "#result", "#settings")]
    assert tops == sorted(tops)


def test_it_is_dark_where_the_system_is_and_remembers_another_choice(visit):
    background = "getComputedStyle(document.querySelector('gradio-app')).backgroundColor"
    light, page = visit(color_scheme="light").evaluate(background), visit(color_scheme="dark")
    dark = page.evaluate(background)
    assert sum(json.loads(dark.replace("rgb(", "[").replace(")", "]"))) < 100
    page.click("#theme")
    page.reload()
    page.wait_for_selector("#prompt textarea")
    page.wait_for_function(f"{background} === {light!r}")


def test_chinese_by_the_browsers_language_and_by_a_button(visit):
    page = visit(locale="zh-CN")
    assert page.inner_text("#draw") == "开始绘制"
    page.click("#draw")
    assert page.inner_text("[role=alert]") == "提示词是空的：请写下想画什么。"
    page.fill("#prompt textarea", "沙滩上的一只猫")
    page.click("#switch")
    page.wait_for_selector("#draw >> text=Draw")
    assert page.get_by_label("Negative prompt").is_visible()
    assert page.input_value("#prompt textarea") == "沙滩上的一只猫"
    page.reload()
    page.wait_for_selector("#draw >> text=Draw")
    # Gradio knows no Chinese of Hong Kong
    assert visit(locale="zh-HK").wait_for_selector("#draw >> text=开始绘制")


# The form


def test_shapes_swap_and_dice_fill_the_form_at_once(visit):
    page = visit()
    page.click("#shape >> text=4:3")
    page.wait_for_function("document.querySelector('#width input').value === '288'")
    assert form(page)["height"] == "224"
    page.click("#swap")
    page.wait_for_function("document.querySelector('#shape [value=\"3:4\"]').checked")
    assert (form(page)["width"], form(page)["height"]) == ("224", "288")
    page.fill("#width input", "240")
    page.wait_for_function("!document.querySelector('#shape :checked')")
    page.click("#dice")
    page.wait_for_function("document.querySelector('#seed input').value !== ''")
    assert 0 <= int(form(page)["seed"]) < 2**32


def test_what_cant_be_drawn_is_said_plainly(visit, engine):
    page = visit()
    for values, text in (
        ({"prompt": " "}, "The prompt is empty: say what to draw."),
        ({"seed": "-1"}, "The seed -1 is no whole number: clear the field for a new one each time, or roll one."),
        ({"width": 130}, "Width 130 is not a positive multiple of 16: try 128."),
        ({"width": ""}, "A setting is missing: fill in Width."),
        ({"width": 4096, "height": 4096}, "4096x4096 is larger than this server draws: at most 4194304 pixels."),
    ):
        fill(page, **values)
        page.click("#draw")
        page.wait_for_selector(f"[role=alert] >> text={text}")
        assert page.is_visible("#draw")
    assert engine.unfinished == 0


# Drawing


def test_a_prompt_is_drawn_step_by_step(visit, loop, engine, tmp_path):
    page = visit()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
          const bar = document.querySelector("[role=progressbar]");
          if (bar) window.seen.push(+bar.ariaValueNow);
        }).observe(document.querySelector("#result"), { attributes: true, childList: true, subtree: true }); }"""
    )
    fill(page, width=192, height=192, steps=4)
    page.keyboard.press("Control+Enter")
    drawn(page)
    seen = page.evaluate("window.seen")
    assert seen == sorted(seen)
    assert {1, 2, 3} <= {*seen} <= {0, 1, 2, 3, 4}
    assert status(page).startswith("Drawn in ")
    assert page.inner_text("#line") == "Seed 5 · 192×192 · 4 steps · guidance 4"
    assert page.evaluate("document.activeElement.closest('#prompt') !== null")  # drawing leaves the focus where it is

    with page.expect_download() as download:
        page.click("#download a")
    assert download.value.suggested_filename == "ernie-image-5.png"
    path = tmp_path / "downloaded.png"
    download.value.save_as(path)

    async def again() -> bytes:
        same = request("a cat on the beach", width=192, height=192, steps=4, guidance_scale=4.0, seed=5)
        (picture,) = [event async for event in engine.draw(same) if isinstance(event, Picture)]
        return picture.png

    assert path.read_bytes() == loop.run(again())  # not encoded anew: the settings are in it
    assert page.input_value("#revised textarea") == read_settings(path)["revised_prompt"] != "a cat on the beach"
    assert page.get_attribute("#picture img", "alt") == read_settings(path)["revised_prompt"]


def test_pictures_gather_in_a_gallery_and_give_back_their_settings(visit):
    page = visit()
    fill(page, count=2, steps=1)
    page.click("#draw")
    drawn(page)
    assert status(page).startswith("2 pictures drawn in ")
    page.wait_for_selector("#gallery .thumbnail-item >> nth=1")
    assert page.inner_text("#line").startswith("Seed 6 ")
    page.click("#gallery .thumbnail-item >> nth=1")
    page.wait_for_selector("#line >> text=Seed 5 ")
    fill(page, seed="", prompt="another", steps=9)
    page.click("#reuse")
    page.wait_for_selector("#status >> text=The form has the settings of ernie-image-5.png.")
    assert (form(page)["seed"], form(page)["prompt"], form(page)["steps"]) == ("5", "a cat on the beach", "1")


def test_the_enhancers_text_can_be_edited_and_drawn(visit, tmp_path):
    page = visit()
    fill(page)
    page.click("#draw")
    drawn(page)
    fill(page, prompt="the form is left alone", seed="77")
    page.fill("#revised textarea", "a red apple on the beach")
    page.click("#redraw")
    drawn(page)
    with page.expect_download() as download:
        page.click("#download a")
    download.value.save_as(tmp_path / "again.png")
    settings = read_settings(tmp_path / "again.png")
    assert (settings["prompt"], settings["seed"]) == ("a red apple on the beach", "5")
    assert "revised_prompt" not in settings
    assert form(page)["prompt"] == "the form is left alone"


def test_stop_frees_the_worker(visit, engine):
    page = visit()
    fill(page, steps=100)
    page.click("#draw")
    page.wait_for_selector(f"{PROGRESS}:not([aria-valuenow='0'])")
    assert engine.unfinished == 1
    page.click("#stop")
    page.wait_for_selector("#status >> text=Stopped.")
    until(lambda: engine.unfinished == 0)
    fill(page)  # and the next one is drawn at once
    page.click("#draw")
    drawn(page)
    assert status(page).startswith("Drawn in ")


def test_a_closed_tab_drops_what_it_asked_for(visit, engine):
    page = visit()
    fill(page, steps=100)
    page.click("#draw")
    page.wait_for_selector(f"{PROGRESS}:not([aria-valuenow='0'])")
    page.close()
    until(lambda: engine.unfinished == 0, 20)


# Dropped files


def test_a_dropped_picture_fills_the_form(visit, picture):
    page = visit()
    drop(page, "dropped.png", picture("一只橙色的猫"))
    page.wait_for_selector("#status >> text=The form has the settings of dropped.png.")
    assert skipping(page) == ("1", "1")
    expected = {"prompt": '一只猫, "quoted"', "negative": "blurry", "width": "192", "height": "144", "steps": "7"}
    assert form(page) == expected | {"guidance": "2.5", "seed": str(2**60 + 1), "enhance": "True"}
    drop(page, "other.jpg", picture(None, "other.jpg", seed=3))
    page.wait_for_selector("#status >> text=The form has the settings of other.jpg.")
    assert form(page) == expected | {"guidance": "2.5", "seed": "3", "enhance": "False"}


def skipping(page: Any) -> tuple[str, str]:
    return page.input_value("#guidance-until input >> nth=0"), page.input_value("#cache input >> nth=0")


def test_what_steps_leave_out_is_drawn_and_comes_back_from_the_picture(visit, picture, tmp_path):
    page = visit()
    drop(page, "dropped.png", picture(guidance_until=0.33, cache=2, num_inference_steps=4, height=128, width=128))
    page.wait_for_selector("#status >> text=The form has the settings of dropped.png.")
    assert skipping(page) == ("0.33", "2")
    page.click("#draw")
    drawn(page)
    assert page.inner_text("#line").endswith(" · guidance until 33% · one of 2 steps computed")
    with page.expect_download() as download:
        page.click("#download a")
    download.value.save_as(tmp_path / "drawn.png")
    settings = read_settings(tmp_path / "drawn.png")
    assert (settings["guidance_until"], settings["cache"]) == ("0.33", "2")


def test_a_file_that_doesnt_fit_leaves_the_form_as_it_is(visit, picture, tmp_path):
    page = visit()
    fill(page)
    before = form(page)
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    Image.new("L", (4096, 1040)).save(tmp_path / "large.png")
    for name, content, text in (
        ("plain.png", (tmp_path / "plain.png").read_bytes(), "plain.png holds no settings"),
        ("text.txt", b"a text", "text.txt can't be read as a PNG, JPEG or WebP picture"),
        ("cut.png", picture()[:900], "cut.png can't be read as a PNG"),
        ("large.png", (tmp_path / "large.png").read_bytes(), "large.png has 4,259,840 pixels"),
        ("many.png", picture(num_inference_steps=500), "many.png holds settings that this page can't take: 500 is too"),
        ("odd.png", picture(width=100), "odd.png holds settings that this page can't take: Width 100"),
    ):
        drop(page, name, content)
        page.wait_for_selector(f"[role=alert] >> text={text}")
    assert form(page) == before


@pytest.mark.parametrize(
    ("locale", "text"),
    [("en-GB", "large.png is too large: up to 17 MB are read."), ("zh-CN", "large.png 太大：最多读取 17 MB。")],
)
def test_a_file_too_large_to_send_is_told_of_in_the_pages_language(visit, picture, engine, locale, text):
    page = visit(locale=locale)
    sent: list[str] = []
    page.on("request", lambda each: sent.append(each.url))
    script = """(bytes) => {
      const held = new DataTransfer();
      held.items.add(new File([new Uint8Array(bytes)], "large.png"));
      return held;
    }"""
    held = page.evaluate_handle(script, max_file_bytes(engine.limits) + 1)
    page.dispatch_event("#result", "drop", {"dataTransfer": held})
    page.wait_for_selector(f"[role=alert] >> text={text}")
    assert not [each for each in sent if "upload" in each]
    page.set_input_files("input[type=file]", {"name": "x.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector("#status >> text=x.png")  # the button goes on working
    assert form(page)["seed"] == str(2**60 + 1)


# Safety


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_other_file_is_served(url):
    for path in (CHECKOUT / "pyproject.toml", "/etc/passwd", CHECKOUT / "tests" / ".." / "README.md"):
        assert get(f"{url}/gradio_api/file={path}") == 403
    assert get(f"{url}/gradio_api/proxy=https://example.org/") >= 400
    assert get(f"{url}/monitoring") in (403, 404)


def test_a_key_is_asked_for(visit, loop, engine):
    with serving(loop, engine, page=True, api_key="key-ß") as url:
        assert get(f"{url}/config") == 401
        assert get(f"{url}/gradio_api/file=/tmp/gradio/x.png") in (401, 403)
        login = urllib.request.Request(f"{url}/login", b"username=me&password=wrong")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(login, timeout=60)
        login = urllib.request.Request(f"{url}/login", b"username=me&password=key-%C3%9F")
        with urllib.request.urlopen(login, timeout=60) as answer:
            assert "access-token" in answer.headers["Set-Cookie"]
