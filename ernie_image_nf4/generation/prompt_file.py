"""Prompt files: text, JSON Lines or CSV become rows, every one of them checked before anything heavy is imported."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    ConfigDict,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from ..errors import InvalidLora, InvalidSettings, RepositoryNotFound
from .settings import check_settings

if TYPE_CHECKING:
    from .loras import LoraFiles

UNSAFE_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')  # path separators, and what Windows refuses
# Characters of a name, and its bytes in UTF-8: file systems allow 255, some of which number, ending and the name of the
# unfinished file need.
MAX_NAME, MAX_NAME_BYTES = 100, 200
STANDARD_INPUT = "-"
MAX_PROBLEMS = 20  # shown at once


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("problem", "{text}", {"text": text})


def _check_setting(value: Any, info: ValidationInfo) -> Any:
    """Refuse a value that `check_settings` refuses. Its arguments have the names of the fields."""
    try:
        check_settings(**{"prompt": "-", str(info.field_name): value})
    except InvalidSettings as error:
        raise _problem(str(error)) from None
    return value


def _check_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _problem("has half a surrogate pair, which is no character.") from None
    return text


def _check_name(name: str) -> str:
    if UNSAFE_IN_NAMES.search(name) or name.startswith(".") or not 0 < len(name.strip()) <= MAX_NAME:
        raise _problem(f"{name!r:.60} can't be part of a file name, use up to {MAX_NAME} letters and digits.")
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        raise _problem(f"{name!r:.60} is too long for a file name: {size} bytes in UTF-8, use up to {MAX_NAME_BYTES}.")
    return name


Setting = AfterValidator(_check_setting)
Text = Annotated[StrictStr, AfterValidator(_check_unicode)]
Name = Annotated[Text, AfterValidator(_check_name)]
Loras = tuple[Text, ...]


@dataclass(frozen=True)
class Row:
    """One picture to draw. None stands for the value that holds for all rows.

    Attributes:
        prompt: What to draw.
        negative: What not to draw.
        seed: Of the initial latents and of the prompt enhancer's sampling.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        steps: Denoising steps.
        guidance: Guidance scale.
        name: Readable part of the file's name, instead of one made of the prompt.
        guidance_until: Share of the steps with guidance, as for `set_skipping`.
        cache: Every how many steps the transformer is computed, likewise.
        lora: LoRAs, each ``FILE`` or ``FILE:STRENGTH`` as `generate_batch` takes them. In CSV with ``;`` between them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    prompt: Annotated[Text, Setting]
    negative: Text | None = None
    seed: Annotated[StrictInt, Setting] | None = None
    height: Annotated[StrictInt, Setting] | None = None
    width: Annotated[StrictInt, Setting] | None = None
    steps: Annotated[StrictInt, Setting] | None = None
    guidance: Annotated[StrictFloat, Setting] | None = None
    name: Name | None = None
    guidance_until: Annotated[StrictFloat, Setting] | None = None
    cache: Annotated[StrictInt, Setting] | None = None
    lora: Loras | None = None


FIELDS = tuple(field.name for field in fields(Row))
WHOLE_NUMBERS, FLOATS = ("seed", "height", "width", "steps", "cache"), ("guidance", "guidance_until")
NUMBERS = dict.fromkeys(WHOLE_NUMBERS, int) | dict.fromkeys(FLOATS, float)  # all other fields are text


def read_prompts(path: str | Path, *, loras: LoraFiles | None = None) -> list[Row]:
    """The rows of a prompt file in UTF-8, read as its suffix says.

    ``.txt`` (or no suffix) has one prompt a line; blank lines and those that begin with ``#`` are skipped. ``.jsonl``
    has one object a line, with the fields of `Row`. ``.csv`` has a header line with names of these fields; an empty
    cell stands for None. ``-`` is standard input: JSON Lines if its first line with text begins with ``{``, else text.

    Args:
        path: The file.
        loras: Looks for the LoRAs that rows name; None leaves that to `generate_batch`.

    Raises:
        InvalidSettings: The file can't be read, or rows are wrong. The message names file, line and field of each
            problem. Or several processes would share the standard input.
        InvalidLora: A LoRA isn't there, or is none. The message names file and line.
        RepositoryNotFound: A LoRA's Hub repository isn't there or can't be reached; likewise.
    """
    if str(path) == STANDARD_INPUT:
        what, place, content = "Standard input", "standard input", _read_standard_input()
        suffix = ".jsonl" if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{") else ".txt"
    else:
        path = Path(path)
        what, place, suffix = f"Prompt file {path}", str(path), path.suffix.lower()
        if suffix not in READERS:
            raise InvalidSettings(f"{what} is none of text (.txt), JSON Lines (.jsonl) and CSV (.csv): name it so.")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InvalidSettings(f"{what} can't be read ({error.strerror}).") from error
    try:
        text = content.decode("utf-8-sig")  # spreadsheets begin their CSV with a byte order mark
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise InvalidSettings(
            f"{place}, line {line}: byte 0x{byte:02x} is not UTF-8, save the file as UTF-8."
        ) from None
    rows = check_rows(((f"{place}, line {line}", values) for line, values in READERS[suffix](text)), loras)
    if not rows:
        raise InvalidSettings(f"{what} has no prompts.")
    return rows


def _read_standard_input() -> bytes:
    """All of standard input.

    Raises:
        InvalidSettings: There is none, or each of several processes would get a part of it.
    """
    processes = os.environ.get("WORLD_SIZE", "1")  # set by accelerate and torchrun
    if processes != "1":
        raise InvalidSettings(f"{processes} processes can't all read the prompts from standard input: use a file.")
    if sys.stdin is None:
        raise InvalidSettings("There is no standard input to read prompts from: use a file.")
    return sys.stdin.buffer.read()


def check_rows(entries: Iterable[tuple[str, Mapping[str, Any] | str]], loras: LoraFiles | None = None) -> list[Row]:
    """Rows of values that have been checked. A `Row` made by hand isn't checked until then.

    Args:
        entries: Place of each row, for messages, and its values by field; or the reason why it couldn't be read.
        loras: Looks for the LoRAs that rows name, once all else is right; None if they aren't to be looked for.

    Raises:
        InvalidSettings: A row is wrong. The message has a line for each problem.
        InvalidLora: A LoRA isn't there, or is none.
        RepositoryNotFound: A LoRA's Hub repository isn't there or can't be reached.
    """
    adapter = TypeAdapter(Row)
    rows: list[Row] = []
    places: list[str] = []
    problems: list[str] = []
    names: dict[str, str] = {}
    for place, values in entries:
        if isinstance(values, str):
            problems.append(f"{place}: {values}")
            continue
        try:
            row = adapter.validate_python({field: value for field, value in values.items() if value is not None})
        except ValidationError as error:
            problems += [f"{place}, {_describe(each)}" for each in error.errors(include_url=False)]
            continue
        if row.name is not None:
            key = unicodedata.normalize("NFC", row.name).casefold()  # one file on many file systems
            if key in names:
                problems.append(f"{place}, name: {row.name!r} was used before ({names[key]}), choose another.")
            names.setdefault(key, place)
        rows.append(row)
        places.append(place)
    if problems:
        more = [f"... and {len(problems) - MAX_PROBLEMS} more."] if len(problems) > MAX_PROBLEMS else []
        raise InvalidSettings("\n".join(problems[:MAX_PROBLEMS] + more))
    if loras is not None:
        for place, row in zip(places, rows, strict=True):
            try:
                loras.find(row.lora or ())
            except (InvalidLora, InvalidSettings, RepositoryNotFound) as error:
                raise type(error)(f"{place}, lora: {error}") from None
    return rows


def _describe(error: ErrorDetails) -> str:
    """A problem that pydantic found, in plain words: the field and what is wrong with it."""
    kind, value = error["type"], error["input"]
    field = error["loc"][0] if error["loc"] else value  # pydantic gives no place to a field name that isn't Unicode
    if kind == "problem":
        return f"{field}: {error['ctx']['text']}"
    if kind == "missing":
        return f"{field}: is missing."
    if field not in FIELDS:
        return f"{field}: is no known field, use {', '.join(FIELDS)}."
    expected = {int: "a whole number", float: "a number"}.get(NUMBERS.get(str(field), str), "text")
    if field == "lora" and len(error["loc"]) == 1:
        expected = "a list"
    return f"{field}: expected {expected}, found {value!r:.60}."


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
                if unknown := [cell for cell in header if cell not in FIELDS]:
                    yield (
                        line,
                        f"column {unknown[0]!r} is no known field, use {', '.join(FIELDS)}, separated by commas.",
                    )
                    return
                if len(set(header)) < len(header):
                    yield line, "a column occurs twice."
                    return
            elif len(cells) > len(header):
                yield line, f"has {len(cells)} cells, the header {len(header)}: quote a cell that has a comma in it."
            elif any(cells):
                yield line, {field: _typed(field, cell) for field, cell in zip(header, cells, strict=False) if cell}
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, f"is not CSV ({error})."


def _typed(field: str, cell: str) -> str | int | float | list[str]:
    """A cell as its field's type, or as text where it can't be: the check says so then."""
    if field == "lora":
        return [lora.strip() for lora in cell.split(";") if lora.strip()]
    try:
        return NUMBERS.get(field, str)(cell)
    except ValueError:
        return cell


READERS = {"": _text_rows, ".txt": _text_rows, ".jsonl": _json_rows, ".csv": _csv_rows}
