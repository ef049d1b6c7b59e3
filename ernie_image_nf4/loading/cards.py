"""What is taken on each generation of NVIDIA cards, and why: a table for people, asked of the functions that decide."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..fast.products import CAPABILITY
from ..memory.placement import choose_dtype, find_device, find_dtype
from ..repository.record import Repository
from .pipeline import decide_placement

CUDA = torch.device("cuda", 0)
FLASH_ATTENTION = (8, 0)  # least compute capability that PyTorch's has kernels for
BFLOAT16 = (8, 0)  # least one whose tensor cores multiply it


@dataclass(frozen=True)
class Generation:
    """Cards of one compute capability.

    Attributes:
        capability: Their compute capability.
        name: NVIDIA's name of the architecture.
        cards: Some of them.
        measured: Whether figures of such a card are published here. For the others the kernels were compiled, and
            their arithmetic was tried on a card that was measured.
    """

    capability: tuple[int, int]
    name: str
    cards: str
    measured: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the computation, unless another is asked for."""
        return choose_dtype(None, CUDA, self.capability)

    @property
    def why(self) -> str:
        """Why this dtype."""
        if self.capability >= BFLOAT16:
            return "what the weights were trained in"
        return "bfloat16 is only emulated; residual and norms are in float32, so that nothing overflows"

    @property
    def products(self) -> list[str]:
        """What `load` takes as ``products`` beside the dtype, the finest first."""
        return [name for name, (least, _) in CAPABILITY.items() if self.capability >= least]

    @property
    def attention(self) -> str:
        """PyTorch's kernel for attention."""
        return "FlashAttention" if self.capability >= FLASH_ATTENTION else "memory-efficient"

    @property
    def evidence(self) -> str:
        """How we know."""
        return "measured" if self.measured else "compiled, not run"


GENERATIONS = (
    Generation((7, 5), "Turing", "T4, RTX 20, GTX 16"),
    Generation((8, 0), "Ampere", "A100"),
    Generation((8, 6), "Ampere", "RTX 30, A10"),
    Generation((8, 9), "Ada", "RTX 40, L4"),
    Generation((9, 0), "Hopper", "H100", measured=True),
    Generation((10, 0), "Blackwell", "B200"),
    Generation((12, 0), "Blackwell", "RTX 50"),
)


def generation_of(capability: tuple[int, int]) -> Generation | None:
    """The newest generation that isn't newer than a card; None for one before the first."""
    return next((each for each in reversed(GENERATIONS) if each.capability <= capability), None)


def describe_device(repository: Repository, requested: str | torch.device | None = None) -> list[str]:
    """Printable lines: the device, and dtype, products, attention and memory mode that `load` takes on it, and why.

    Args:
        repository: The repository. Without its weights, the memory mode is left out.
        requested: Device as for `load`; None for the one that `load` takes.

    Raises:
        DeviceUnavailable: There is no such device, or it has too little free memory.
        InvalidSettings: Not a device.
    """
    device = find_device(requested)
    dtype = find_dtype(None, device)
    rows = [("device", str(device))]
    if device.type == "cuda":
        rows += _card_rows(device)
    else:
        rows.append(("dtype", str(dtype).removeprefix("torch.")))
    if all(file.exists() for part in repository.components.values() for file in part.weight_files()):
        placement, reason = decide_placement(repository, device, dtype, "auto", fast=True)
        rows.append(("memory", f"{placement.memory}: {reason}"))
    return [f"{label:<12} {text}" for label, text in rows]


def _card_rows(device: torch.device) -> list[tuple[str, str]]:
    capability = torch.cuda.get_device_capability(device)
    dotted = ".".join(map(str, capability))
    rows = [("card", f"{torch.cuda.get_device_name(device)}, compute capability {dotted}")]
    generation = generation_of(capability)
    if generation is None:
        dtype = str(choose_dtype(None, device, capability)).removeprefix("torch.")
        return [*rows, ("generation", f"older than {GENERATIONS[0].name}: untried"), ("dtype", dtype)]
    return [
        *rows,
        ("generation", f"{generation.name} ({generation.cards}): {generation.evidence}"),
        ("dtype", f"{str(generation.dtype).removeprefix('torch.')}: {generation.why}"),
        ("products", ", ".join([str(generation.dtype).removeprefix("torch."), *generation.products])),
        ("attention", generation.attention),
    ]
