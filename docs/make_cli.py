"""Write the commands and options of ``ernie-image-nf4`` into command-line.md.

    python docs/make_cli.py

There they stand between the comments ``<!-- commands -->`` and ``<!-- /commands -->``; the rest is written by hand.
"""

from __future__ import annotations

import enum
import sys
import typing
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER / "command-line.md"
BEGIN, END = "<!-- commands -->", "<!-- /commands -->"
VALUES = {str: "TEXT", Path: "PATH", int: "NUMBER", float: "NUMBER"}
sys.path.insert(0, str(FOLDER.parent))  # a source checkout needs no installation

from typer.models import ArgumentInfo  # noqa: E402
from typer.utils import get_params_from_function  # noqa: E402

from ernie_image_nf4.cli import app  # noqa: E402


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(text: str) -> str:
    """`text` with today's commands between the comments.

    Raises:
        ValueError: There are no such comments.
    """
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{commands()}\n{END}{after}"


def commands() -> str:
    """Every command with its arguments and options."""
    shown = [command for command in app.registered_commands if not command.hidden]
    return "\n\n".join(described(command.name or command.callback.__name__, command.callback) for command in shown)


def described(name: str, callback: Any) -> str:
    """A command as a section: what it does, how it is called, a table of arguments and options."""
    parameters = [each for each in get_params_from_function(callback).values() if not each.default.hidden]
    arguments = [each for each in parameters if isinstance(each.default, ArgumentInfo)]
    options = [each for each in parameters if not isinstance(each.default, ArgumentInfo)]
    line = " ".join(["ernie-image-nf4", name, *map(argument_name, arguments), *(["[OPTIONS]"] if options else [])])
    rows = [(argument_name(each), each) for each in arguments] + [(option_name(each), each) for each in options]
    lines = [f"### {name}", "", (callback.__doc__ or "").strip(), "", f"```text\n{line}\n```", ""]
    lines += ["| argument or option | meaning |", "|---|---|"]
    lines += [f"| `{cell(title)}` | {cell(meaning(each))} |" for title, each in rows]
    return "\n".join(lines)


def argument_name(parameter: Any) -> str:
    name = parameter.default.metavar or parameter.name.upper()
    return name if parameter.default.default is ... else f"[{name}]"


def option_name(parameter: Any) -> str:
    """All spellings, with the value: ``--output, -o PATH``, ``--fp8``, ``--shards/--no-shards``."""
    plain = parameter.name.replace("_", "-")
    is_flag = parameter.annotation is bool
    spellings = ", ".join(parameter.default.param_decls or ())
    if not spellings:
        spellings = f"--{plain}/--no-{plain}" if is_flag else f"--{plain}"
    return spellings if is_flag else f"{spellings} {parameter.default.metavar or value_name(parameter.annotation)}"


def value_name(annotation: Any) -> str:
    """What stands after an option: the kind of its value, or the values there are to choose from."""
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(str(member.value) for member in annotation)
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    return value_name(inner[0]) if inner else VALUES.get(annotation, "VALUE")


def meaning(parameter: Any) -> str:
    """The help text, with the default unless the text says it."""
    text, default = (parameter.default.help or "").strip(), parameter.default.default
    default = default.value if isinstance(default, enum.Enum) else default
    if default is None or default is ... or default is False or default == "" or "Default:" in text:
        return text
    return f"{text} Default: {'on' if default is True else f'`{default}`'}."


def cell(text: str) -> str:
    """Text as it has to be in a Markdown table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
