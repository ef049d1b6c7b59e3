"""What a calibration takes of memory and disk, and the refusal, in one line, of a machine that hasn't got it.

Sizes of weights, of sums and of tokens follow from shapes; the work beside them is estimated. For the full-size model
in bfloat16 (36 blocks of 0.41 GiB, hidden size 4096, feed-forward 12288; 256 predictions at 512x512 with texts of up to
100 tokens, 1,124 tokens each) these are estimates in GiB:

- texts: the text encoder without what stays on the host, 5.7, and its work, 0.5;
- drawing: all but the blocks, 0.3; two blocks, 0.8; work, 0.4;
- sensitivities: all but the blocks, 0.3; three blocks and the three before them, 2.4; what gradients need of three
  blocks, 2.5;
- rounding: all but the blocks twice, 0.6; three blocks, 1.2; then for the widest layer two sums of 12288x12288, 1.1,
  and seven times the layer in float32, 1.3; or for gate and up two sums of 4096x4096, 0.1, and seven times both, 2.6.

On the host there wait the tokens, 0.009 for a sample: of 128 rows while drawing, 1.1; of as many samples as
`CHECKPOINT_BYTES` holds with one copy for every three blocks, 6.0; and of all 256 samples twice while blocks are
rounded, 4.4. Weights on their way from the files take up to 3.3 more.

On an H100 (benchmarks/calibrate_h100.json) PyTorch reserved 6.0 for the texts, 1.1 for drawing, 4.9 for sensitivities
and 5.3 for rounding; the host's peak was 11.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from ..errors import DeviceUnavailable
from ..memory.placement import free_memory
from ..memory.requirements import GIB, KERNEL_BYTES
from ..repository.record import Repository, StoredComponent
from ..repository.safetensors_io import DTYPES
from .calibration_data import LAYERS, layer_names
from .streamed_original import padded

SEGMENTS = (3, 2, 1)  # blocks of which gradients are found at once; fewer where the device is small
CHECKPOINT_BYTES = 6 * GIB  # of tokens that wait while gradients are found
TEXT_WORK = GIB // 2
# Of a token in a block, in values of the hidden and of the feed-forward size: without gradients, and with what they
# need. Residual, norms and modulation are in float32.
FORWARD_WORK, GRADIENT_WORK = (16, 6), (36, 10)
LAYER_COPIES = 7  # of a weight in float32, while it is rounded
PROCESS_BYTES = 3 * GIB  # of host memory, for Python, the libraries and a few tensors


@dataclass(frozen=True)
class Shapes:
    """What the needs of a calibration depend on.

    Attributes:
        text_encoder: Bytes of its weights that come to the device.
        outer: Bytes of the transformer without its blocks.
        block: Bytes of a block.
        blocks: How many there are.
        hidden: Width of a token.
        inner: Width of the feed-forward layers.
        heads: Of attention.
        itemsize: Bytes of a value of the computation.
        tokens: Of each sample, image and text.
        rows: Predictions of a step of all pictures.
    """

    text_encoder: int
    outer: int
    block: int
    blocks: int
    hidden: int
    inner: int
    heads: int
    itemsize: int
    tokens: tuple[int, ...]
    rows: int

    def token_bytes(self, samples: Sequence[int]) -> int:
        """Bytes in which samples of so many tokens wait on the host."""
        return sum(padded(tokens * self.hidden * self.itemsize) for tokens in samples)


def find_shapes(
    source: Repository, dtype: torch.dtype, image_tokens: int, text_tokens: Sequence[int], rows: int
) -> Shapes:
    """The shapes of a repository's calibration.

    Args:
        source: The original.
        dtype: Of the computation.
        image_tokens: Of a picture.
        text_tokens: Of each sample.
        rows: Predictions of a step of all pictures.
    """
    transformer, text_encoder = source.components["transformer"], source.components["text_encoder"]
    config = transformer.config
    sizes = _bytes(transformer, dtype)
    blocks = {name: size for name, size in sizes.items() if name.startswith("layers.")}
    count = config["num_layers"]
    return Shapes(
        text_encoder=sum(_bytes(text_encoder, dtype, fast=True).values()),
        outer=sum(sizes.values()) - sum(blocks.values()),
        block=sum(blocks.values()) // count,
        blocks=count,
        hidden=config["hidden_size"],
        inner=config["ffn_hidden_size"],
        heads=config["num_attention_heads"],
        itemsize=dtype.itemsize,
        tokens=tuple(image_tokens + tokens for tokens in text_tokens),
        rows=rows,
    )


def _bytes(part: StoredComponent, dtype: torch.dtype, fast: bool = False) -> dict[str, int]:
    tensors = part.device_tensors(fast)
    return {
        name: each.spec.bytes // DTYPES[each.spec.dtype].itemsize * dtype.itemsize for name, each in tensors.items()
    }


def device_needs(shapes: Shapes, segment: int) -> dict[str, int]:
    """Phase -> bytes that it takes on a device, an estimate.

    Args:
        shapes: Of the calibration.
        segment: Blocks of which gradients are found at once.
    """
    longest = max(shapes.tokens)
    forward, gradients = (
        longest * shapes.itemsize * (of_hidden * shapes.hidden + of_inner * shapes.inner)
        for of_hidden, of_inner in (FORWARD_WORK, GRADIENT_WORK)
    )
    # Weights of attention and their gradient, in float32 and in the dtype of the computation.
    attention = shapes.heads * longest**2 * (2 * shapes.itemsize + 4)
    sums = {shapes.hidden: 2 * shapes.inner, shapes.inner: shapes.hidden}  # in_features -> out_features of a stage
    rounding = max(4 * (2 * width**2 + LAYER_COPIES * width * out) for width, out in sums.items())
    needs = {
        "texts": shapes.text_encoder + TEXT_WORK,
        "drawing": shapes.outer + 2 * shapes.block + forward,
        "sensitivities": shapes.outer + 2 * segment * shapes.block + segment * (gradients + attention),
        "rounding": 2 * shapes.outer + 3 * shapes.block + max(rounding, forward),
    }
    return {phase: int(need) + KERNEL_BYTES for phase, need in needs.items()}


def chunk_samples(shapes: Shapes, segment: int) -> int:
    """Samples whose gradients are found in one pass: as many as `CHECKPOINT_BYTES` hold, at least one."""
    each = padded(max(shapes.tokens) * shapes.hidden * shapes.itemsize) * _copies(shapes, segment)
    return max(min(CHECKPOINT_BYTES // each, len(shapes.tokens)), 1)


def _copies(shapes: Shapes, segment: int) -> int:
    return -(-shapes.blocks // segment) + 1


def tokens_on_host(shapes: Shapes, segment: int) -> int:
    """Bytes of host memory in which tokens wait, in the phase that takes most."""
    longest = sorted(shapes.tokens, reverse=True)
    drawing = shapes.token_bytes([longest[0]] * shapes.rows)
    checkpoints = _copies(shapes, segment) * shapes.token_bytes(longest[: chunk_samples(shapes, segment)])
    return max(drawing, checkpoints, 2 * shapes.token_bytes(shapes.tokens))


def host_needs(shapes: Shapes, segment: int, *, pinned: bool) -> int:
    """Bytes of host memory, an estimate. The sensitivities of all samples are there as well.

    Args:
        shapes: Of the calibration.
        segment: Blocks of which gradients are found at once.
        pinned: Whether weights pass through page-locked memory, which PyTorch takes in powers of two.
    """
    weights = 2 * segment * shapes.block * (4 if pinned else 3) // 3
    sensitivities = 4 * sum(shapes.tokens) * len(LAYERS) * shapes.blocks
    return tokens_on_host(shapes, segment) + weights + sensitivities + PROCESS_BYTES


def disk_needs(shapes: Shapes, quantized_bytes: int, latents_bytes: int) -> int:
    """Bytes of the checkpoints: NF4 of the transformer, sensitivities, latents of each step of each picture."""
    return quantized_bytes + 4 * sum(shapes.tokens) * len(layer_names(shapes.blocks)) + latents_bytes


def choose_segment(shapes: Shapes, device: torch.device, free: int | None, free_on_host: int) -> int:
    """Blocks of which gradients are found at once: as many as the device has room for.

    Args:
        shapes: Of the calibration.
        device: Where to compute.
        free: Free bytes on the device; None if it uses the host's memory.
        free_on_host: Bytes that the host can give.

    Raises:
        DeviceUnavailable: The device or the host is too small. The message says what would do.
    """
    needs = {segment: max(device_needs(shapes, segment).values()) for segment in SEGMENTS}
    if free is None:
        needs = {segment: need + host_needs(shapes, segment, pinned=False) for segment, need in needs.items()}
        free = free_on_host
        where, other = f"the host's memory for --device {device.type}", "a machine with more of it"
    else:
        where, other = f"{device}", "another card, or --device cpu"
    segment = next((segment for segment, need in needs.items() if need <= free), None)
    if segment is None:
        raise DeviceUnavailable(
            f"Calibration takes about {_gib(min(needs.values()))} of {where}, of which {_gib(free, down=True)} are "
            f"free: close what else uses it, take {other}, or quantize without --calibrate."
        )
    on_host = host_needs(shapes, segment, pinned=device.type == "cuda")
    if on_host > free_on_host:
        raise DeviceUnavailable(
            f"Calibration takes about {_gib(on_host)} of the host's memory, of which {_gib(free_on_host, down=True)} "
            "are free: close what else uses it, or quantize without --calibrate."
        )
    return segment


def find_segment(shapes: Shapes, device: torch.device) -> int:
    """`choose_segment` by what is free now."""
    return choose_segment(shapes, device, free_memory(device), psutil.virtual_memory().available)


def _gib(count: int, *, down: bool = False) -> str:
    rounded = math.floor if down else math.ceil
    return f"{rounded(10 * count / GIB) / 10:.1f} GiB"
