"""Which prompts calibration draws: those of a file, those that the caller gives, or 64 that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidSettings
from ..generation.prompt_file import STANDARD_INPUT, read_prompts

BUILT_IN = "built in"
FILE = Path(__file__).with_suffix(".txt")


@dataclass(frozen=True)
class CalibrationPrompts:
    """What to draw with the original.

    Attributes:
        texts: The prompts, none without calibration.
        source: `BUILT_IN`, the name of the file that they stood in, or None for prompts that a caller gave.
    """

    texts: tuple[str, ...] = ()
    source: str | None = None


def find_prompts(calibrate: bool | str | Path | Sequence[str] | None, scale_search: bool) -> CalibrationPrompts:
    """The prompts to calibrate with, none without calibration. Arguments as for `convert.quantize`.

    Raises:
        InvalidSettings: There are none in what should have some, or the scale search is off.
    """
    if calibrate is None or calibrate is False:
        return CalibrationPrompts()
    if not scale_search:
        raise InvalidSettings("Calibration starts from searched scales: leave the scale search on, or don't calibrate.")
    if calibrate is True:
        return CalibrationPrompts(_texts(FILE), BUILT_IN)
    if isinstance(calibrate, str | Path):
        name = "standard input" if str(calibrate) == STANDARD_INPUT else Path(calibrate).name
        return CalibrationPrompts(_texts(calibrate), name)
    if not calibrate:
        raise InvalidSettings("There are no prompts to calibrate with: name some, of every kind that matters.")
    return CalibrationPrompts(tuple(calibrate))


def _texts(file: str | Path) -> tuple[str, ...]:
    return tuple(row.prompt for row in read_prompts(file))
