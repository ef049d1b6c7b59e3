"""What is measured: the arms, and the work that each of them does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidSettings
from ..evaluation.baselines import BASELINES

# The first of the two prompts of the model card that this project set out from.
PROMPT = (
    "A realistic orange kitten sits on a wooden desk with a white sheet of paper that says Hello ERNIE-Image NF4, "
    "soft natural lighting, centered composition."
)


@dataclass(frozen=True)
class Arm:
    """A way to run the model.

    Attributes:
        name: In the report.
        way: ``"original"`` (bfloat16 with diffusers' CPU offload), ``"demo"`` (the model card's plain
            ``from_pretrained`` calls), ``"ours"`` (`load`), or ``"baseline"``.
        options: Arguments of `load`, or the baseline's name as ``baseline``.
        pictures: How many to draw in a row; None for the workload's number. Slow arms draw fewer: a median needs only a
            few.
        work: What differs from the workload, fields of `Workload`: such an arm has a table of its own.
        texts: Texts that the prompt enhancer is also given at once; 0 for none.
        cold: Whether to empty the caches of compiled kernels first, so that the first picture is that of a first start.
    """

    name: str
    way: str
    options: dict[str, Any] = field(default_factory=dict)
    pictures: int | None = None
    work: dict[str, Any] = field(default_factory=dict)
    texts: int = 0
    cold: bool = False


# ERNIE-Image-Turbo has the architecture, and so the time and memory of a step, of the model that is measured.
TURBO_WORK: dict[str, Any] = {"steps": 8, "guidance": 1.0}
ARMS = (
    Arm("demo", "demo", pictures=4),
    Arm("resident, first start", "ours", {"memory": "resident"}, pictures=2, cold=True),
    Arm("resident", "ours", {"memory": "resident"}, texts=4),
    Arm("resident, exact", "ours", {"memory": "resident", "fast": "exact"}, pictures=4),
    Arm("offload", "ours", {"memory": "offload"}, pictures=4),
    Arm("stream", "ours", {"memory": "stream"}, pictures=4),
    Arm("resident, int8", "ours", {"memory": "resident", "products": "int8"}, pictures=4),
    Arm("resident, fp8", "ours", {"memory": "resident", "products": "fp8"}, pictures=4),
    Arm("resident, float16", "ours", {"memory": "resident", "dtype": "float16"}, pictures=4),
    Arm("turbo", "ours", {"memory": "resident"}, work=TURBO_WORK, pictures=4),
    Arm("turbo, no enhancer", "ours", {"memory": "resident"}, work=TURBO_WORK | {"tokens": 0}, pictures=4),
    Arm("original, CPU offload", "original", pictures=2),
)
# NF4 as bitsandbytes makes it is what the demo loads.
BASELINE_ARMS = tuple(
    Arm(name, "baseline", {"baseline": name}, pictures=4) for name in BASELINES if name != "nf4-stock"
)
REFERENCE = ARMS[0].name
LOADED_AGAIN = (REFERENCE, "resident")


@dataclass(frozen=True)
class Workload:
    """What every arm does.

    Attributes:
        size: Height and width of the pictures.
        steps: Denoising steps.
        guidance: Guidance scale.
        tokens: New tokens of the prompt enhancer; 0 leaves it out.
        pictures: In a row after one load.
        large: Another size, drawn twice at the end with a fifth of the steps and without the prompt enhancer; None for
            none. An arm with work of its own draws whole pictures there.
        loads: How often the arms `LOADED_AGAIN` are loaded, each time in a process of its own.
    """

    size: int = 512
    steps: int = 50
    guidance: float = 4.0
    tokens: int = 256
    pictures: int = 10
    large: int | None = 1024
    loads: int = 3


DEFAULT_WORKLOAD = Workload()


def choose_arms(names: Sequence[str], *, baselines: bool = False) -> list[Arm]:
    """The arms with these names; without names all arms, and the baselines' where asked for.

    Raises:
        InvalidSettings: There is no arm of that name.
    """
    known = {arm.name: arm for arm in (*ARMS, *BASELINE_ARMS)}
    for name in names:
        if name not in known:
            raise InvalidSettings(f"There is no arm {name!r}: choose of {'; '.join(known)}.")
    if names:
        return [known[name] for name in names]
    return [*ARMS, *(BASELINE_ARMS if baselines else ())]


def has_own_work(row: Mapping[str, Any]) -> bool:
    """Whether a row of a result is of other pictures than most, such as Turbo's."""
    return bool(row.get("work"))


def is_baseline(row: Mapping[str, Any]) -> bool:
    """Whether a row of a result is another library's quantization; older files call it a peer."""
    return row["way"] in ("baseline", "peer")
