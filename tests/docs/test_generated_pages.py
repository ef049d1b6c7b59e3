"""Pages that are written from the code are what their scripts write today, and the scripts do what they say."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from doc_pages import read

import ernie_image_nf4
from docs import make_api, make_cli, make_rooms


def test_the_python_api_is_that_of_the_docstrings() -> None:
    assert read("docs/python-api.md") == make_api.page(), "run: python docs/make_api.py"


def test_the_commands_are_those_of_the_command_line() -> None:
    page = read("docs/command-line.md")
    assert page == make_cli.page(page), "run: python docs/make_cli.py"


def test_the_drawing_is_that_of_the_imports() -> None:
    assert read("docs/rooms.svg") == make_rooms.drawing(), "run: python docs/make_rooms.py"
    ElementTree.fromstring(read("docs/rooms.svg"))


def test_everything_that_the_package_offers_is_described() -> None:
    offered = {name for name in ernie_image_nf4.__all__ if not name.startswith("_")}
    assert make_api.exported() == offered
    assert offered <= {*make_api.FUNCTIONS, *make_api.RECORDS}


def test_a_docstring_becomes_markdown() -> None:
    source = '''
def draw(prompt: str, *, steps: int = 50, memory: str = "auto", device: str | None = None, size: int = 1024) -> None:
    """Draw ``prompt``.

    Args:
        prompt: What to draw, in one
            or two lines.
        steps: How many.

    Raises:
        ValueError: None of
            that.

    Example:
        >>> draw(
        ...     "a cat")
        1
    """
'''
    text = make_api.described(ast.parse(source).body[0])
    assert '    memory: str = "auto",\n    device: str | None = None,\n' in text
    assert "\nDraw `prompt`.\n" in text
    assert "**Arguments**\n\n- `prompt`: What to draw, in one or two lines.\n- `steps`: How many.\n" in text
    assert "- `ValueError`: None of that.\n" in text
    assert '```python\ndraw(\n    "a cat")\n```' in text


def test_a_name_that_nothing_or_several_modules_have_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(make_api, "PACKAGE", tmp_path / "package")
    for room in ("one", "two", "cli"):
        (tmp_path / "package" / room).mkdir(parents=True)
        (tmp_path / "package" / room / "module.py").write_text("def twice(): pass\n")
    (tmp_path / "package" / "one" / "other.py").write_text("class Once: pass\n")
    assert make_api.find("Once")[0] == "package.one.other"
    with pytest.raises(ValueError, match=r"twice: found in \['package.one.module', 'package.two.module'\]"):
        make_api.find("twice")
    with pytest.raises(ValueError, match="found in no module"):
        make_api.find("never")


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    chain = {("cli", "loading"), ("loading", "memory"), ("cli", "memory")}
    assert make_rooms.direct(chain) == {("cli", "loading"), ("loading", "memory")}
    upwards = ("memory", "cli")
    assert upwards in make_rooms.direct(chain | {upwards})


def test_every_room_is_described() -> None:
    page = read("docs/how-it-works.md")
    rooms = make_rooms.rooms()
    places = [page.index(f"| [`{room}`](../ernie_image_nf4/{room}) |") for room in rooms]
    assert places == sorted(places), "in the order of the drawing"
    assert {"cli", "loading", "upstream"} <= set(rooms)


def test_an_option_is_described_with_its_values_and_default() -> None:
    def draw(
        prompt: Annotated[str, typer.Argument(help="What to draw.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="The file.")] = Path("out.png"),
        memory: Annotated[Literal["auto", "resident"], typer.Option(help="Where weights are.")] = "auto",
        seed: Annotated[int | None, typer.Option(help="Of the noise. Default: a random one.")] = None,
        shards: Annotated[bool, typer.Option(help="Split files.")] = True,
        first: Annotated[int, typer.Option(metavar="ROW", help="Where to begin.")] = 0,
        old: Annotated[bool, typer.Option("--old", hidden=True)] = False,
    ) -> None:
        """Draw."""

    text = make_cli.described("draw", draw)
    assert text.startswith("### draw\n\nDraw.\n\n```text\nernie-image-nf4 draw PROMPT [OPTIONS]\n```\n")
    assert text.splitlines()[-6:] == [
        "| `PROMPT` | What to draw. |",
        "| `--output, -o PATH` | The file. Default: `out.png`. |",
        "| `--memory auto\\|resident` | Where weights are. Default: `auto`. |",
        "| `--seed NUMBER` | Of the noise. Default: a random one. |",
        "| `--shards/--no-shards` | Split files. Default: on. |",
        "| `--first ROW` | Where to begin. Default: `0`. |",
    ]
