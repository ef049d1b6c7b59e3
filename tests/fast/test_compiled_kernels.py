"""Every Triton kernel, compiled for cards that aren't there: it fits them, and int8 is multiplied by tensor cores.

The functions that launch kernels are called with tensors of full size on the CPU. Triton is told that another GPU is
there, compiles what is launched, and launches nothing.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from bitsandbytes.functional import QuantState

from ernie_image_nf4.fast import decode_step
from ernie_image_nf4.fast.ops import eight_bit
from ernie_image_nf4.fast.ops.eight_bit import FP8, INT8
from ernie_image_nf4.fast.products import CAPABILITY

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")

from triton.backends.compiler import GPUTarget  # noqa: E402

from ernie_image_nf4.fast.ops import (  # noqa: E402
    triton_decode,
    triton_eight_bit,
    triton_elementwise,
    triton_float16,
    triton_int8,
    triton_nf4,
    triton_nf4_panels,
    triton_nf4_rows,
)

DECODE_KERNELS = (triton_decode, triton_nf4, triton_nf4_rows)
pytestmark = pytest.mark.slow

KERNELS = (triton_elementwise, triton_eight_bit, triton_float16, triton_int8, triton_nf4_panels, *DECODE_KERNELS)
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
TENSOR_CORES = r"mma\.sync\S*\.s8\.s8|wgmma\.mma_async\S*\.s8\.s8|tcgen05\.mma\S*kind::i8"
# Triton left Turing's tensor cores in its version 3.3: cuBLAS multiplies there, instead of this kernel.
PRODUCT = "_scaled_product"
HIDDEN, INNER, HEADS = 4096, 12288, 32  # of the full-size transformer
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


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Compiled]]:
    """``compile_for(capability, launch) -> kernels``: all that the function ``launch`` launches."""

    def compile_launched(capability: tuple[int, int], launch: Callable[[], object]) -> list[Compiled]:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # empty: nothing that was compiled before
        monkeypatch.setattr(triton.runtime.driver, "_active", Card(capability))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        compiled: list[tuple[str, Any]] = []

        # One after the other: in Python 3.11 threads that parse code at once fail now and then.
        def compile_only(kernel: Any, *arguments: Any, **options: Any) -> None:
            compiled.append((kernel.__name__, run(kernel, *arguments, **options | {"warmup": True})))

        run = triton.runtime.jit.JITFunction.run
        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)
            launch()
        return [
            Compiled(name, kernel.metadata.shared, spilled(kernel, tmp_path), kernel.asm["ptx"])
            for name, kernel in compiled
        ]

    return compile_launched


def spilled(compiled: Any, folder: Path) -> int:
    """Bytes a thread that a compiled kernel keeps on its stack instead of in registers."""
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def launch_all(capability: tuple[int, int]) -> None:
    """Call what launches kernels, for tensors of a step at full size."""
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    x, modulation = torch.empty(1, 3, HIDDEN, dtype=dtype), torch.empty(1, HIDDEN, dtype=dtype)
    weight, rows = modulation[0], torch.zeros(3, dtype=torch.int64)
    triton_elementwise.gated_add_norm(x, x, modulation, weight, modulation, modulation, 1e-6, rows)
    head = torch.empty(1, 3, HIDDEN // HEADS, dtype=dtype)
    triton_elementwise.norm_rotary(x.unflatten(2, (HEADS, -1)), head[0, 0], head, head, 1e-6)
    triton_elementwise.gelu_times(x, x)
    launch_float16()
    launch_panels()
    for to in (INT8, FP8):
        if capability >= CAPABILITY[to.name][0]:
            launch_eight_bits(to, dtype)
    if capability >= eight_bit.TENSOR_CORES:
        multiply(dtype)
    if capability >= decode_step.CAPABILITY:
        for texts in (1, decode_step.MOST_TEXTS):
            launch_decode_step(texts)


def launch_float16() -> None:
    x, modulation = torch.empty(1, 3, HIDDEN), torch.empty(1, HIDDEN)
    values, scale, rows = x.half(), torch.empty(1, 3, 1), torch.zeros(3, dtype=torch.int64)
    triton_float16.gated_add_norm(
        x, values, scale, modulation, modulation[0], modulation, modulation, 1e-6, rows
    )  # fmt: skip
    head = torch.empty(1, 3, HIDDEN // HEADS)
    triton_float16.norm_rotary(values.unflatten(2, (HEADS, -1)), scale, head[0, 0], head, head, 1e-6)
    inner = torch.empty(1, 3, INNER, dtype=torch.float16)
    triton_float16.gelu_times(inner, inner, scale)
    triton_float16.scaled(values, scale)


def launch_panels() -> None:
    panel, square, table = torch.empty(64, INNER), torch.empty(64, 64), torch.empty(16)
    triton_nf4_panels.round_panel(panel, panel, square, panel[0], table)
    triton_nf4_panels.descend_panel(panel, square, panel[0], panel.byte(), table)


def launch_eight_bits(to: eight_bit.Format, dtype: torch.dtype) -> None:
    x, inner = torch.empty(3, HIDDEN, dtype=dtype), torch.empty(3, INNER, dtype=dtype)
    if to is INT8:  # in fp8 it is the next one without the GELU
        triton_eight_bit.quantize_rows(x, to)
    triton_eight_bit.gelu_times_rows(inner, inner, to)
    packed, modulation, rows = x[None], torch.empty(1, HIDDEN, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    triton_eight_bit.gated_add_norm_rows(
        packed, packed, modulation, modulation[0], modulation, modulation, 1e-6, rows, to
    )  # fmt: skip
    codes, absmax = (torch.empty(16 * INNER // size, dtype=torch.uint8) for size in (2, 64))
    outer, levels = torch.empty(16 * INNER // 64 // 256), torch.empty(256)
    into = eight_bit.empty_rows(codes, 16, INNER, to)
    triton_eight_bit.quantize_weight(codes, absmax, into, 64, to, outer, levels, torch.zeros(()), 256)


def launch_decode_step(texts: int) -> None:
    """Of the full-size prompt enhancer."""
    width, heads, key_heads, dim, inner, vocabulary = 3072, 32, 8, 128, 9216, 131072
    x, norm = torch.empty(texts, width, dtype=torch.bfloat16), torch.empty(width, dtype=torch.bfloat16)
    key, up = (packed(rows, width) for rows in (key_heads * dim, inner))
    qkv = triton_nf4_rows.products(x, norm, 1e-5, [packed(heads * dim, width), key, key])
    angles, cache = torch.empty(2, texts, dim, dtype=torch.bfloat16), torch.empty(2, texts, key_heads, 512, dim)
    position, scale = torch.zeros(texts, dtype=torch.int64), torch.ones(texts, dtype=torch.bfloat16)
    attended = triton_decode.attention(qkv, *angles, scale, position, *cache.bfloat16(), 0.1)
    triton_nf4_rows.added_product(attended, x, packed(width, heads * dim))
    triton_nf4_rows.gated_products(x, norm, 1e-5, up, up)
    state = QuantState(torch.empty(64, dtype=torch.uint8), torch.Size([64, 64]), torch.empty(256), 64)
    state.nested, state.offset, state.state2 = (
        True,
        torch.empty(()),
        QuantState(torch.empty(1), None, torch.empty(256), 256),
    )
    triton_nf4.dequantize(torch.empty(2048, dtype=torch.uint8), state, torch.empty(64, 64, dtype=torch.bfloat16))
    logits = triton_decode.head_product(x, torch.empty(vocabulary, width, dtype=torch.bfloat16))
    settings, top_k = torch.empty(texts, 1), torch.zeros(texts, 1, dtype=torch.int64)
    for ranked in (None, logits[:, :50]):
        triton_decode.sample(logits, logits.float(), ranked, settings, top_k, settings)


def packed(rows: int, columns: int) -> triton_nf4_rows.PackedWeight:
    blocks = rows * columns // 64
    return triton_nf4_rows.PackedWeight(
        torch.empty(blocks * 8, dtype=torch.int32), torch.empty(blocks, dtype=torch.uint8), torch.empty(blocks // 256),
        torch.empty(()), torch.empty(256), rows,
    )  # fmt: skip


def multiply(dtype: torch.dtype) -> None:
    x, weight = (torch.empty(rows, HIDDEN, dtype=torch.int8) for rows in (300, INNER))
    arguments = x, torch.empty(300, 1), weight, torch.empty(INNER, 1), dtype
    triton_int8.scaled_product(*arguments)
    triton_int8.scaled_product(*arguments, (torch.empty(300, 48, dtype=dtype), torch.empty(INNER, 48, dtype=dtype)))


@triton.jit
def _nothing(pointer):
    pass


@on_each_card
def test_every_kernel_fits_the_card(compile_for, card):
    name, shared = CARDS[card]
    try:
        compile_for(card, lambda: _nothing[(1,)](torch.empty(1)))
    except Exception as error:
        pytest.skip(f"Triton {triton.__version__} no longer knows {name}: {error}")
    kernels = compile_for(card, lambda: launch_all(card))
    assert [kernel[:3] for kernel in kernels if kernel.shared > shared or kernel.spilled > MOST_SPILLED] == [], name
    products = [kernel for kernel in kernels if kernel.name == PRODUCT]
    assert all(re.search(TENSOR_CORES, kernel.ptx) for kernel in products)
    assert bool(products) == (card >= eight_bit.TENSOR_CORES)
    launched = {name for module in KERNELS for name in launches(module)}
    if card < decode_step.CAPABILITY:
        launched -= {name for module in DECODE_KERNELS for name in launches(module)}
    assert {kernel.name for kernel in kernels} == launched - (set() if products else {PRODUCT})


def launches(module: ModuleType) -> set[str]:
    """Names of the kernels that a module launches."""
    return set(re.findall(r"(_\w+)\[\(", Path(str(module.__file__)).read_text()))


def test_a_tile_that_is_too_large_is_found(compile_for, monkeypatch):
    monkeypatch.setattr(triton_int8, "TILES", {(8, 0): triton_int8.Tile(64, 128, 64, 1, 12)})
    kernels = compile_for((8, 6), lambda: multiply(torch.bfloat16))
    assert len(kernels) == 2  # with LoRAs and without
    for kernel in kernels:
        assert kernel.shared > CARDS[8, 6][1]
        assert kernel.spilled > MOST_SPILLED
