"""Prompt files: text, JSON Lines or CSV -> rows, every one of them checked before anything heavy is imported."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidSettings
from .single import check_settings

KINDS: dict[str, type] = {
    "prompt": str,
    "negative": str,
    "seed": int,
    "height": int,
    "width": int,
    "steps": int,
    "guidance": float,
    "name": str,
}
KIND_NAMES = {str: "text", int: "a whole number", float: "a number"}
UNSAFE_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')  # path parts, and what Windows refuses
MAX_NAME = 100  # characters; file systems allow 255 bytes
MAX_PROBLEMS = 20  # shown at once


@dataclass(frozen=True)
class Row:
    """One picture to draw. None stands for the value that holds for all rows.

    Attributes:
        prompt: What to draw.
        negative: What not to draw.
        seed: Of the noise and of the prompt enhancer's sampling.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        steps: Denoising steps.
        guidance: Guidance scale.
        name: Readable part of the file's name, instead of one made of the prompt.
    """

    prompt: str
    negative: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    name: str | None = None


def read_prompts(path: str | Path) -> list[Row]:
    """The rows of a prompt file, which its suffix says how to read. All in UTF-8.

    ``.txt`` (or no suffix): one prompt a line; blank lines and those that begin with ``#`` are skipped. ``.jsonl``: one object
    a line, with the fields of `Row`. ``.csv``: a header line with names of those fields; an empty cell stands for None.

    Raises:
        InvalidSettings: The file can't be read, or rows are wrong; then a line for each says where (file, line, field) and why.
    """
    path = Path(path)
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise InvalidSettings(
            f"Prompt file {path} is none of text (.txt), JSON Lines (.jsonl) and CSV (.csv): name it so."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets begin their CSV with a byte order mark
    except OSError as error:
        raise InvalidSettings(f"Prompt file {path} can't be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise InvalidSettings(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8, save the file as UTF-8.") from None
    rows = check_rows((f"{path}, line {line}", values) for line, values in read(text))
    if not rows:
        raise InvalidSettings(f"Prompt file {path} has no prompts.")
    return rows


def check_rows(entries: Iterable[tuple[str, Mapping[str, Any] | str]]) -> list[Row]:
    """Rows of values that have been checked.

    Args:
        entries: Where each row stands, and its values by field, or in words what kept them from being read.

    Raises:
        InvalidSettings: A row is wrong; its message has a line for each problem.
    """
    rows, problems, names = [], [], {}
    for place, values in entries:
        if isinstance(values, str):
            problems.append(f"{place}: {values}")
            continue
        values = {field: value for field, value in values.items() if value is not None}
        found = [f"{place}, {field}: {problem}" for field, problem in _problems(values)]
        if not found and "name" in values:
            key = unicodedata.normalize("NFC", values["name"]).casefold()  # one file on many file systems
            if key in names:
                found = [f"{place}, name: {values['name']!r} was used before ({names[key]}), choose another."]
            names.setdefault(key, place)
        if not found:
            rows.append(Row(**values))
        problems += found
    if problems:
        more = [f"... and {len(problems) - MAX_PROBLEMS} more."] if len(problems) > MAX_PROBLEMS else []
        raise InvalidSettings("\n".join(problems[:MAX_PROBLEMS] + more))
    return rows


def _problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field that can't work, and why."""
    if "prompt" not in values:
        yield "prompt", "is missing."
    for field, value in values.items():
        kind = KINDS.get(field)
        if kind is None:
            yield field, f"is no known field, use {', '.join(KINDS)}."
        elif type(value) is not kind and not (kind is float and type(value) is int and abs(value) < 2**53):
            yield field, f"expected {KIND_NAMES[kind]}, found {value!r:.60}."
        elif kind is str and not _is_unicode(value):
            yield field, "has half a surrogate pair, which is no character."
        elif field == "name":
            if UNSAFE_IN_NAMES.search(value) or value.startswith(".") or not 0 < len(value.strip()) <= MAX_NAME:
                yield field, f"{value!r:.60} can't be part of a file name, use up to {MAX_NAME} letters and digits."
        elif field != "negative":
            try:
                check_settings(**{"prompt": "-", field: value})
            except InvalidSettings as error:
                yield field, str(error)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt}


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"is not JSON ({error})."
        else:
            yield number, value if isinstance(value, dict) else f"expected an object, found {line.strip():.60}."


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1  # a quoted cell may go over several lines: the row's first one
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not header:
                header = cells
                if unknown := [cell for cell in header if cell not in KINDS]:
                    yield line, f"column {unknown[0]!r} is no known field, use {', '.join(KINDS)}, separated by commas."
                    return
                if len(set(header)) < len(header):
                    yield line, "a column occurs twice."
                    return
            elif len(cells) > len(header):
                yield line, f"has {len(cells)} cells, the header {len(header)}: quote a cell that has a comma in it."
            elif any(cells):
                yield (
                    line,
                    {field: _typed(cell, KINDS[field]) for field, cell in zip(header, cells, strict=False) if cell},
                )
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, f"is not CSV ({error})."


def _typed(cell: str, kind: type) -> str | int | float:
    """A cell as its field's type, or as it is where it can't be: the check names it then."""
    try:
        return kind(cell)
    except ValueError:
        return cell


READERS = {"": _text_rows, ".txt": _text_rows, ".jsonl": _json_rows, ".csv": _csv_rows}
