"""The page in the browser: a form over the engine, mounted on the server's application.

Gradio makes it: `page_layout` says what stands where, this module what happens. `page_drawing` tells of a draw,
`page_settings` goes from form to request and from picture to form, `page_texts` holds the words, `page.css` the looks,
and `page.js` what the browser does by itself: the dice, shapes, light and dark, and pictures that are dropped.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import gradio as gr
from fastapi import FastAPI
from gradio.i18n import I18nData
from gradio.processing_utils import save_bytes_to_cache

from ..errors import ErnieImageNF4Error
from ..fast.step_plan import ALL_STEPS, EVERY_STEP
from .page_drawing import Running, follow, message, problem, status
from .page_layout import EXAMPLES, WORDS, Parts, lay_out
from .page_settings import max_file_bytes, read_request, request_of, shape_sizes, too_large
from .page_texts import texts
from .requests import DrawRequest
from .security import is_api_key

if TYPE_CHECKING:
    from .engine import Engine

HERE = Path(__file__).parent
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "PingFang SC"]
KEPT_PICTURES = 60  # in a gallery; older ones leave it
SECONDS_OF_FILES = 24 * 3600  # after which a picture's file is removed, looked at every hour

# Of events that are over at once: answered by themselves, not through the stream that a draw needs for itself. A stream
# that Gradio closes behind one event can take the messages of the next with it.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Of draws: no limit on how many run, for the engine has its own
DRAWN: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

Updates = dict[Any, Any]


class Page(gr.Blocks):
    """Blocks that take no file by its address: Gradio would fetch it, in the place of an uploaded one."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        if any("://" in path for path in named_files(inputs)):
            raise gr.Error("Files are taken by upload, not by address.")
        super().validate_inputs(block_fn, inputs)


def named_files(values: Any) -> Iterator[str]:
    """The paths in what a browser sends, wherever they are."""
    if isinstance(values, dict):
        yield str(values.get("path", ""))
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from named_files(value)


def mount_page(app: FastAPI, engine: Engine, *, path: str = "/", api_key: str | None = None) -> FastAPI:
    """Add the page to an application.

    Args:
        app: Of the server. Its routes that are there already come first.
        engine: Draws.
        path: Where the page is.
        api_key: Asked for as the password, with any user name, before the page is shown.

    Returns:
        The same application.
    """
    page = make_page(engine)
    return gr.mount_gradio_app(
        app,
        page,
        path=path,
        theme=make_theme(),
        css_paths=HERE / "page.css",
        head=f"<style>body.dark {{ color-scheme: dark; }}</style><script>{page_script(engine)}</script>",
        i18n=WORDS,
        auth=None if api_key is None else lambda _, password: is_api_key(password, api_key),
        auth_message="Any user name; the password is the server's API key. 用户名任意，密码为服务器的 API 密钥。",
        max_file_size=max_file_bytes(engine.limits),
        footer_links=[],
        **_no_history(),
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )


def page_script(engine: Engine) -> str:
    """`page.js` with what it needs to know of the server."""
    sizes = shape_sizes(engine.recommended, engine.limits)
    known = {"/* SIZES */ {}": sizes, "/* LARGEST_FILE */ Infinity": max_file_bytes(engine.limits)}
    script = (HERE / "page.js").read_text(encoding="utf-8")
    for stand_in, value in known.items():
        script = script.replace(stand_in, json.dumps(value))
    return script


def _no_history() -> dict[str, Any]:
    """Newer versions of Gradio keep what was asked for in the browser's storage, unless they are told not to."""
    return {"run_history": False} if "run_history" in signature(gr.mount_gradio_app).parameters else {}


def make_theme() -> gr.themes.Base:
    """Light and dark looks, with fonts of the system: none is fetched."""
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        spacing_size="md",
        font=[*FONTS, "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="0px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
    )


def make_page(engine: Engine) -> gr.Blocks:
    """The page, not mounted yet."""
    title, kept = f"{engine.name} · ERNIE-Image", (3600, SECONDS_OF_FILES)
    with Page(title=title, analytics_enabled=False, fill_width=True, delete_cache=kept) as page:
        parts = lay_out(engine)
        gr.HTML(WORDS("drop"), elem_id="drop")
        connect_form(parts)
        connect_drawing(parts, engine, page.GRADIO_CACHE)
        connect_pictures(parts, engine)
        connect_language(page, parts, engine)
    return page


# The form


def connect_form(parts: Parts) -> None:
    """What the browser does by itself: shapes, dice and examples, by functions of `page.js`."""
    sides = [parts.form["width"], parts.form["height"]]
    quiet: dict[str, Any] = {"fn": None, "api_visibility": "private"}
    parts.shape.input(js="window.ernie.size", inputs=[parts.shape, *sides], outputs=sides, **quiet)
    parts.swap.click(js="(width, height) => [height, width]", inputs=sides, outputs=sides, **quiet)
    for side in sides:
        side.change(js="window.ernie.shape", inputs=sides, outputs=parts.shape, **quiet)
    parts.dice.click(js="window.ernie.roll", outputs=parts.form["seed"], **quiet)
    for button, key in zip(parts.examples, EXAMPLES, strict=True):
        both = json.dumps({language: texts(language)[key] for language in ("en", "zh")})
        choose = f"(language) => ({both})[language]"
        button.click(js=choose, inputs=parts.language, outputs=parts.form["prompt"], **quiet)
    if parts.strengths:
        names = [name for _, name in parts.lora.choices]
        parts.lora.change(
            lambda chosen: [gr.update(visible=name in chosen) for name in names],
            parts.lora,
            parts.strengths,
            **QUICK,
        )


# Drawing


def connect_drawing(parts: Parts, engine: Engine, folder: str) -> None:
    """Buttons that draw and stop. Stopping drops the request, upon which the engine frees its worker."""
    running: Running = {}

    def drawing(ask: Callable[..., DrawRequest]) -> Callable[..., AsyncIterator[Updates]]:
        async def draw(tab: gr.Request, language: str, paths: list[str], *values: Any) -> AsyncIterator[Updates]:
            session = str(tab.session_hash)
            if session in running:  # the button was pressed twice
                return
            try:
                request = ask(paths, *values)
            except ErnieImageNF4Error as error:
                yield {parts.status: problem(message(error, language))}
                return
            yield _buttons(parts, drawing=True)
            async with aclosing(follow(engine, request, language, running, session)) as lines:
                async for line, picture in lines:
                    updates: Updates = {parts.status: line}
                    if picture is not None:
                        name = f"ernie-image-{picture.seed}.png"
                        paths = [save_bytes_to_cache(picture.png, name, folder), *paths][:KEPT_PICTURES]
                        updates |= show_new_picture(parts, engine, paths, language)
                    yield updates
            yield _buttons(parts, drawing=False)

        return draw

    def edited_request(paths: list[str], selected: int, prompt: str) -> DrawRequest:
        drawn, _ = read_request(Path(paths[selected]), "", engine.limits, engine.loras)
        return replace(drawn, prompt=prompt, use_pe=False)

    def stop(tab: gr.Request) -> None:
        if task := running.get(str(tab.session_hash)):
            task.cancel()

    shown = [parts.status, parts.draw, parts.stop, parts.redraw, parts.empty, *_picture_parts(parts)]
    known, form = [parts.language, parts.paths], [*parts.form.values(), parts.lora, *parts.strengths]
    from_form = drawing(lambda paths, *values: form_request(parts, values))
    spoken: dict[str, Any] = {"js": "window.ernie.spoken", **DRAWN}
    parts.draw.click(from_form, [*known, *form], shown, **spoken)
    parts.redraw.click(drawing(edited_request), [*known, parts.selected, parts.revised], shown, **spoken)
    parts.stop.click(stop, **QUICK)


def form_request(parts: Parts, values: Sequence[Any]) -> DrawRequest:
    """The request that the form's values make, in the order in which `connect_drawing` asks for them.

    Raises:
        Refusal: See `request_of`.
    """
    fields = dict(zip(parts.form, values, strict=False))
    chosen, *strengths = values[len(parts.form) :]
    of_each = {name: strength for (_, name), strength in zip(parts.lora.choices, strengths, strict=True)}
    return request_of(fields, {name: of_each[name] for name in chosen or []})


def _buttons(parts: Parts, *, drawing: bool) -> Updates:
    return {
        parts.draw: gr.update(visible=not drawing),
        parts.stop: gr.update(visible=drawing),
        parts.redraw: gr.update(interactive=not drawing),
    }


# Pictures


def _picture_parts(parts: Parts) -> list[Any]:
    below = [parts.details, parts.line, parts.download, parts.revised]
    return [parts.picture, parts.gallery, parts.paths, parts.selected, *below]


def show_picture(parts: Parts, engine: Engine, paths: list[str], selected: int, language: str) -> Updates:
    """A picture, and what stands below it by the settings in its file."""
    request, revised = read_request(Path(paths[selected]), "", engine.limits, engine.loras)
    return {
        parts.selected: selected,
        parts.picture: gr.update(value=paths[selected], visible=True),
        parts.details: gr.update(visible=True),
        parts.line: picture_line(request, language),
        parts.download: download_link(Path(paths[selected]), language),
        parts.revised: revised or request.prompt,
    }


def picture_line(request: DrawRequest, language: str) -> str:
    """A picture's settings in a line."""
    values = {**vars(request), "guidance": f"{request.guidance_scale:g}", "until": f"{request.guidance_until:.0%}"}
    keys = ["picture_line"]
    if request.guidance_until != ALL_STEPS:
        keys.append("guided_line")
    if request.cache != EVERY_STEP:
        keys.append("cache_line")
    return " · ".join(texts(language)[key].format(**values) for key in keys)


def download_link(path: Path, language: str) -> str:
    """A link to a picture's file as it is, as HTML."""
    file = quote(path.as_posix())
    return f'<a href="gradio_api/file={file}" download="{path.name}">{texts(language)["download"]}</a>'


def show_new_picture(parts: Parts, engine: Engine, paths: list[str], language: str) -> Updates:
    """The first of the pictures, which has just been drawn."""
    return show_picture(parts, engine, paths, 0, language) | {
        parts.paths: paths,
        parts.gallery: gr.update(value=paths, selected_index=0, visible=len(paths) > 1),
        parts.empty: gr.update(visible=False),
    }


def connect_pictures(parts: Parts, engine: Engine) -> None:
    """Looking at a picture, and taking its settings into the form; those of a file that is dropped, too."""

    def look_at(language: str, paths: list[str], event: gr.SelectData) -> Updates:
        return show_picture(parts, engine, paths, event.index, language)

    def take(path: str, name: str, language: str) -> Updates:
        try:
            request, _ = read_request(Path(path), name, engine.limits, engine.loras)
        except ErnieImageNF4Error as error:
            return {parts.status: problem(message(error, language))}
        line = texts(language)["read_done"].format(name=name)
        return {parts.status: status(line)} | fill_form(parts, request)

    def take_dropped(path: str, language: str) -> Updates:
        return take(path, Path(path).name, language) | {parts.read: None}

    def take_selected(paths: list[str], selected: int, language: str) -> Updates:
        return take(paths[selected], Path(paths[selected]).name, language)

    def refuse(name: str, language: str) -> Updates:
        return {parts.status: problem(too_large(name, engine.limits).said(language))}

    shown = [part for part in _picture_parts(parts) if part not in (parts.gallery, parts.paths)]
    parts.gallery.select(look_at, [parts.language, parts.paths], shown, **QUICK)
    form = [parts.status, *parts.form.values(), parts.lora, *parts.strengths]
    parts.read.upload(take_dropped, [parts.read, parts.language], [*form, parts.read], **QUICK)
    refused: dict[str, Any] = {"js": "window.ernie.refused", **QUICK}
    parts.too_large.click(refuse, [parts.refused, parts.language], [parts.status], **refused)
    parts.reuse.click(take_selected, [parts.paths, parts.selected, parts.language], form, **QUICK)


def fill_form(parts: Parts, request: DrawRequest) -> Updates:
    """The form with a request's values."""
    strengths: dict[Any, float] = dict(request.lora)
    values: Mapping[str, Any] = vars(request) | {"seed": str(request.seed)}
    updates: Updates = {part: values[name] for name, part in parts.form.items()}
    updates[parts.lora] = [*strengths]
    for (_, name), part in zip(parts.lora.choices, parts.strengths, strict=True):
        updates[part] = gr.update(value=strengths.get(name, 1.0), visible=name in strengths)
    return updates


# Language


def connect_language(page: gr.Blocks, parts: Parts, engine: Engine) -> None:
    """Say everything in the language that was chosen here before, or else in the browser's."""
    worded = translated_parts(page)

    def say(language: str, paths: list[str], selected: int) -> Updates:
        words = texts(language)
        said: list[dict[str, Any]] = [{name: words[key] for name, key in keys.items()} for keys in worded.values()]
        updates: Updates = {part: gr.update(**properties) for part, properties in zip(worded, said, strict=True)}
        below = show_picture(parts, engine, paths, selected, language) if paths else {}
        return (
            updates | {part: below[part] for part in (parts.line, parts.download) if below} | {parts.language: language}
        )

    known, shown = [parts.language, parts.paths, parts.selected], [parts.language, parts.line, parts.download, *worded]
    page.load(say, known, shown, js="window.ernie.language", **QUICK)
    parts.switch.click(say, known, shown, js="window.ernie.otherLanguage", **QUICK)


def translated_parts(page: gr.Blocks) -> dict[Any, dict[str, str]]:
    """The parts that hold words, each with its properties that do and their keys."""
    found: dict[Any, dict[str, str]] = {}
    for part in page.blocks.values():
        given = part.constructor_args
        if keys := {name: value.key for name, value in given.items() if isinstance(value, I18nData)}:
            found[part] = keys
    return found
