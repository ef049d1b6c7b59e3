"""Triton kernels compiled for cards that aren't there.

The functions that launch kernels are called with tensors of full size on the CPU. Triton is told that another GPU is
there, compiles what is launched, and launches nothing.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")

from triton.backends.compiler import GPUTarget  # noqa: E402

MOST_SPILLED = 16  # bytes of a thread's values for which there are no registers: four values
KIB = 1024
# By compute capability: the cards, and the shared memory that a program can have (CUDA programming guide, table
# "Technical Specifications per Compute Capability").
CARDS = {
    (7, 5): ("T4, RTX 20", 64 * KIB),
    (8, 0): ("A100", 163 * KIB),
    (8, 6): ("RTX 30", 99 * KIB),
    (8, 9): ("RTX 40", 99 * KIB),
    (9, 0): ("H100", 227 * KIB),
    (10, 0): ("B200", 227 * KIB),
    (12, 0): ("RTX 50", 99 * KIB),
}
on_each_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: f"sm_{card[0]}{card[1]}")


class Compiled(NamedTuple):
    """A compiled kernel: its name, bytes of shared memory and of spilled registers a thread, and its PTX."""

    name: str
    shared: int
    spilled: int
    ptx: str


class Card:
    """What Triton asks a GPU's driver for when it compiles."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.number = 10 * capability[0] + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.number  # which Triton keeps compiled kernels by

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_launched(capability: tuple[int, int], launch: Callable[[], object], folder: Path) -> list[Compiled]:
    """All that the function `launch` launches, compiled for a card. `folder`: for Triton's cache."""
    compiled: list[tuple[str, Any]] = []

    # One after the other: in Python 3.11 threads that parse code at once fail now and then.
    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> None:
        compiled.append((kernel.__name__, run(kernel, *arguments, **options | {"warmup": True})))

    run = triton.runtime.jit.JITFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))  # nothing that was compiled before
        patch.setattr(triton.runtime.driver, "_active", Card(capability))
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)
        launch()
    return [
        Compiled(name, kernel.metadata.shared, spilled(kernel, folder), kernel.asm["ptx"]) for name, kernel in compiled
    ]


def spilled(compiled: Any, folder: Path) -> int:
    """Bytes a thread that a compiled kernel keeps on its stack instead of in registers."""
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@triton.jit
def _nothing(pointer):
    pass


def skip_unless_known(card: tuple[int, int], folder: Path) -> None:
    """Skip the test if Triton no longer compiles for a card."""
    try:
        compile_launched(card, lambda: _nothing[(1,)](torch.empty(1)), folder)
    except Exception as error:
        pytest.skip(f"Triton {triton.__version__} no longer knows {CARDS[card][0]}: {error}")


def check_fit(kernels: Iterable[Compiled], card: tuple[int, int]) -> None:
    """Nothing takes more shared memory than the card has, or keeps values outside of registers."""
    name, shared = CARDS[card]
    assert [kernel[:3] for kernel in kernels if kernel.shared > shared or kernel.spilled > MOST_SPILLED] == [], name


def launches(*modules: ModuleType) -> set[str]:
    """Names of the kernels that modules launch."""
    return {name for module in modules for name in re.findall(r"(_\w+)\[\(", Path(str(module.__file__)).read_text())}
