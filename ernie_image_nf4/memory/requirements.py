"""How much of a device's memory each memory mode takes: the weights that are there at once, and the work beside them.

Components work one after the other. So under offload and stream a mode takes what its largest component takes, weights
and work together; resident takes all weights and the largest work. Not counted is CUDA's context, which is there
already when the free memory is asked for.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from ..repository import nf4_format as nf4
from ..repository.components import COMPONENT
from ..repository.record import StoredComponent
from ..repository.safetensors_io import DTYPES, TensorSpec
from .precision import BFLOAT16, BLOCKS, Precision

GIB = 1024**3
MEGAPIXEL = 1024**2
MODES = ("resident", "offload", "stream")  # from the one that takes most
# Side of a tile of the VAE's. Pictures up to this size are decoded as upstream decodes them, so most sizes don't
# change by a bit.
TILE = 512
# Decoding takes most of the memory beyond the weights: of a whole picture, or of one tile. In
# benchmarks/benchmark_h100.json (resident), 5.0 GiB a megapixel are reserved beyond loading at 512x512, 4.4 at
# 1024x1024; a little more here, for other cards.
DECODE_BYTES_PER_PIXEL = 5.5 * GIB / MEGAPIXEL


@dataclass(frozen=True)
class Work:
    """GiB in bfloat16 that a full-size component takes beside its weights, as reserved by PyTorch.

    Attributes:
        fixed: Whatever is drawn, with a text of some words.
        text: On top, for a text of 1,024 tokens.
        megapixel: On top, for each megapixel.
        kept: Of `fixed` and `text`, what stays when the component has done its work, until its weights leave.
    """

    fixed: float = 0.0
    text: float = 0.0
    megapixel: float = 0.0
    kept: float = 0.0


# In the order in which a pipeline calls them. `fixed` and `megapixel` are peak_reserved_gib of an arm in
# benchmarks/benchmark_h100.json, less the weights that were on the device then; `text` follows from shapes.
WORK = {
    # stream at 512x512, with a key/value cache of 512 tokens. A longer text moves to one of 1,024: 0.10 GiB, and a
    # second captured step.
    "pe": Work(fixed=0.26, text=0.14, kept=0.20),
    # stream, "large", with 155 tokens; the transformer's weights but its blocks, and the VAE's, were there too. A token
    # takes 0.3 MiB: 27 hidden states, 26 layers' keys and values, and activations.
    "text_encoder": Work(fixed=0.23, text=0.27),
    # offload at 512x512 (0.64) and "large", 1024x1024 (1.51), both with guidance.
    "transformer": Work(fixed=0.35, text=0.14, megapixel=1.16),
    "vae": Work(megapixel=DECODE_BYTES_PER_PIXEL * MEGAPIXEL / GIB),
}
# For what CUDA and its libraries load beside PyTorch's reserved memory once the free memory has been asked for: kernels
# of their own, and page tables of pinned memory. beside_pytorch_gib less context_gib in benchmarks/cards.json.
KERNEL_BYTES = int(0.25 * GIB)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a component's weights that are computed with on the device.

    Attributes:
        whole: All of them.
        blocks: Of these, the ones in blocks that come to the device one by one under stream.
        largest_block: The ones in the largest block.
    """

    whole: int
    blocks: int = 0
    largest_block: int = 0

    def unstreamed(self, mode: str) -> int:
        """Bytes that come to the device as a whole."""
        return self.whole - self.blocks if mode == "stream" else self.whole

    def at_once(self, mode: str) -> int:
        """Bytes on the device while the component works: of streamed blocks two."""
        return self.unstreamed(mode) + (min(self.blocks, 2 * self.largest_block) if mode == "stream" else 0)


def weight_bytes(part: StoredComponent, *, fast: bool, precision: Precision) -> WeightBytes:
    """Bytes of a component's weights on the device, by the headers of its files.

    Args:
        part: The component.
        fast: Whether weights that text-to-image doesn't need there stay on the host.
        precision: What unquantized weights are converted to.
    """
    blocks: Counter[str] = Counter()
    whole = 0
    for name, stored in part.device_tensors(fast).items():
        size = _loaded_bytes(part.component.name, name, stored.spec, precision)
        whole += size
        first, _, rest = name.partition(".")
        if part.component.streamed and first == BLOCKS:
            blocks[rest.partition(".")[0]] += size
    return WeightBytes(whole, blocks.total(), max(blocks.values(), default=0))


def mode_needs(
    weights: dict[str, WeightBytes],
    pixels: int,
    *,
    precision: Precision = BFLOAT16,
    tiled: bool = True,
    long_text: bool = True,
) -> dict[str, int]:
    """Memory mode -> bytes that it takes on a device on which CUDA's context is already.

    Args:
        weights: Of each component.
        pixels: Of the picture; 0 for the least that can be drawn.
        precision: Of the computation.
        tiled: Whether the VAE decodes in tiles where a whole picture doesn't fit.
        long_text: Whether prompts and what the prompt enhancer writes may be long: 1,024 tokens.
    """
    called = [(name, weights[name]) for name in WORK if name in weights]
    factors = {name: precision.work_factor(name) for name in WORK}
    needs = {}
    for mode in MODES:
        # Bytes in which the VAE decodes, and beside each other two components may lie: see `offload.enable_offload`.
        limit = max((part.unstreamed(mode) for _, part in called), default=0)
        budget = (0 if mode == "resident" else limit / factors["vae"]) if tiled else None
        work = [factors[name] * _work_bytes(name, pixels, long_text, budget) for name, _ in called]
        if mode == "resident":
            kept = GIB * sum(factors[name] * WORK[name].kept for name, _ in called)
            need = sum(part.whole for _, part in called) + kept + max(work, default=0)
        else:
            held = [part.at_once(mode) for _, part in called]
            for number, ((_, part), (_, following)) in enumerate(itertools.pairwise(called)):
                if part.unstreamed(mode) + following.unstreamed(mode) <= limit:
                    held[number] += following.unstreamed(mode)  # on its way while this one works
            need = max(map(sum, zip(held, work, strict=True)), default=0)
        needs[mode] = int(need) + KERNEL_BYTES
    return needs


def without_optional(weights: dict[str, WeightBytes]) -> dict[str, WeightBytes]:
    """The components without which the pipeline can't run."""
    return {name: part for name, part in weights.items() if not COMPONENT[name].optional}


def _work_bytes(name: str, pixels: int, long_text: bool, budget: float | None) -> float:
    """Bytes in bfloat16 that a component takes beside its weights.

    Args:
        name: The component.
        pixels: Of the picture.
        long_text: As for `mode_needs`.
        budget: Bytes beyond which the VAE decodes in tiles; None if it never does.
    """
    if name == "vae" and budget is not None and pixels * DECODE_BYTES_PER_PIXEL > budget:
        pixels = min(pixels, TILE**2)
    work = WORK[name]
    return GIB * (work.fixed + work.text * long_text + work.megapixel * pixels / MEGAPIXEL)


def _loaded_bytes(component: str, name: str, spec: TensorSpec, precision: Precision) -> int:
    """Bytes of a tensor once it is loaded: those of NF4 stay as they are, others are converted."""
    stored = DTYPES[spec.dtype]
    if not stored.is_floating_point or name.endswith(nf4.SUFFIXES[1:]):
        return spec.bytes
    return spec.bytes // stored.itemsize * precision.of_weight(component, name, len(spec.shape)).itemsize
