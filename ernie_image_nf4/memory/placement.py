"""Where and how a pipeline runs: device, dtype and memory mode. `choose_*` decide and are pure, `find_*` ask this machine first, and
`apply` does it.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass

import torch
from diffusers import ErnieImagePipeline

from ..errors import DeviceUnavailable, InvalidSettings
from ..fast.prompt_enhancer import make_prompt_enhancer_fast
from ..fast.transformer import make_transformer_fast, runtime_of
from ..repository.components import COMPONENT
from .host_embeddings import unused_modules
from .offload import StreamedBlocks, enable_offload
from .vae_tiling import TILE, enable_tiling

logger = logging.getLogger(__name__)

GIB = 1024**3
DEVICE_TYPES = ("cuda", "xpu", "mps", "cpu")  # in order of preference; bitsandbytes has NF4 for each of them
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEMORY_MODES = ("auto", "resident", "offload", "stream")

# Decoded at once, a picture takes most of the memory beyond the weights; in tiles it takes that of one tile. In
# benchmarks/benchmark_h100.json (resident) what is reserved beyond loading is 5.0 GiB a megapixel at 512x512, 4.4 at 1024x1024; a
# little more here, for other cards.
DECODE_BYTES_PER_PIXEL = 5.5 * GIB / 1024**2
# Activations of the transformer and text encoder, decoding in tiles, and what the allocator rounds up: 0.6 GiB at 512x512 there (offload).
WORKING_BYTES = 1 * GIB


@dataclass(frozen=True)
class Placement:
    """Where and how a pipeline runs.

    Attributes:
        device: Device of the computation.
        dtype: dtype of activations and of all weights that aren't quantized.
        memory: ``"resident"`` (all on the device), ``"offload"`` (component by component), or ``"stream"`` (the transformer
            block by block as well).
        fast: Whether upstream's code paths are replaced by faster ones.
    """

    device: torch.device
    dtype: torch.dtype
    memory: str
    fast: bool

    @property
    def moves(self) -> bool:
        """Whether weights are read to the device by us, while upstream maps them to host memory."""
        return self.fast and self.memory == "resident"

    @property
    def load_device(self) -> torch.device:
        """Where upstream loads the weights to.

        Offloaded ones wait on the CPU, so that the GPU never holds them all. Fast loading lets upstream map the files there, which
        reads nothing, and reads them to the device itself.
        """
        return self.device if self.memory == "resident" and not self.fast else torch.device("cpu")


def apply(pipe: ErnieImagePipeline, where: Placement) -> None:
    """Bring a pipeline that was loaded for `where` there.

    Args:
        pipe: The pipeline. If `where.moves`, the quantized components are on the device already.
        where: The decision.
    """
    if where.fast:  # before the hooks of offloading, which wrap the forward method that they find
        make_transformer_fast(pipe.transformer, capture_steps=where.memory != "stream")  # its blocks move in each step
        if pipe.pe is not None:
            make_prompt_enhancer_fast(pipe.pe)
    limit = None
    runtime = runtime_of(pipe.transformer)
    forget_its_graph = runtime.release_graph if runtime is not None else lambda: None
    if where.memory == "stream" or (where.memory == "offload" and where.fast):
        unused = COMPONENT["text_encoder"].unused if where.fast else ()
        excluded = unused_modules(pipe.text_encoder, unused)
        limit = enable_offload(pipe, where.device, excluded=excluded, stream_blocks=where.memory == "stream")
        pipe.transformer._hf_hook.on_offload = forget_its_graph
    elif where.memory == "offload":
        pipe.enable_model_cpu_offload(device=where.device)
    else:
        pipe.vae.to(where.device)
    if where.fast:

        def fits(pixels: int) -> bool:
            room = free_memory(where.device) if limit is None else limit
            return pixels * DECODE_BYTES_PER_PIXEL <= room

        enable_tiling(pipe.vae, fits, forget_its_graph)


def memory_mode(pipe: ErnieImagePipeline) -> str:
    """The memory mode that a pipeline is in."""
    if isinstance(pipe.transformer.layers, StreamedBlocks):
        return "stream"
    return "offload" if any(hasattr(part, "_hf_hook") for part in pipe.components.values()) else "resident"


def choose_device(requested: str | torch.device | None, counts: dict[str, int]) -> torch.device:
    """The device to run on.

    Args:
        requested: As for `torch.device`, or None for the first of CUDA, XPU, MPS and CPU that is there.
        counts: Device type -> number of such devices on this machine.

    Raises:
        DeviceUnavailable: There is no such device here.
        InvalidSettings: Not a device name, or of a type that bitsandbytes has no NF4 for.
    """
    if requested is None:
        requested = next(kind for kind in DEVICE_TYPES if counts.get(kind))
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICE_TYPES:
        raise InvalidSettings(
            f"Device {str(requested)!r} is none of {', '.join(DEVICE_TYPES)} (cuda:1 for the second)."
        )
    count = counts.get(device.type, 0)
    if count == 0:
        raise DeviceUnavailable(
            f"Device {str(device)!r} was asked for, but PyTorch {torch.__version__} sees no {device.type.upper()} device: "
            "install its driver and a PyTorch built for it, or run on the CPU (device='cpu', --device cpu)."
        )
    if device.type in ("cpu", "mps"):
        return torch.device(device.type)
    if (device.index or 0) >= count:
        raise DeviceUnavailable(
            f"Device {str(device)!r} was asked for, but this machine has {count} (numbered from 0): "
            f"use {device.type}:{count - 1} or lower."
        )
    return torch.device(device.type, device.index or 0)


def choose_dtype(
    requested: str | torch.dtype | None,
    device: torch.device,
    capability: tuple[int, int] | None = None,
    cpu_has_bfloat16: bool = False,
) -> torch.dtype:
    """The dtype of the computation: bfloat16, as the weights were made for, wherever the hardware multiplies it.

    Below compute capability 8.0 CUDA only emulates bfloat16. Those of 7.x have tensor cores for float16; older
    ones are slower in float16 than in float32. A CPU without bfloat16 instructions is many times slower in bfloat16 than in
    float32, at convolutions above all.

    Args:
        requested: dtype or its name; None to choose.
        device: The device it will run on.
        capability: Compute capability of a CUDA device.
        cpu_has_bfloat16: Whether the CPU has bfloat16 instructions.

    Raises:
        InvalidSettings: A dtype other than bfloat16, float16 and float32.
    """
    if requested is not None:
        dtype = DTYPES.get(str(requested).removeprefix("torch."))
        if dtype is None:
            raise InvalidSettings(f"dtype {str(requested)!r} is none of {', '.join(DTYPES)}.")
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16 else torch.float32
    if device.type == "cuda" and capability is not None and capability < (8, 0):
        return torch.float16 if capability >= (7, 0) else torch.float32
    return torch.bfloat16


def choose_memory(
    requested: str,
    device: torch.device,
    *,
    weight_bytes: dict[str, int],
    free_bytes: int | None,
    working_bytes: int = WORKING_BYTES,
) -> tuple[str, str]:
    """The memory mode, with the reason in words.

    ``"auto"`` takes the first of resident, offload and stream where weights and a picture of the recommended size fit; a mode asked
    for by name is refused only where not even its weights and `WORKING_BYTES` fit, as a smaller picture may well do.

    Args:
        requested: One of `MEMORY_MODES`.
        device: The device it will run on.
        weight_bytes: Component name -> bytes of its weights that come to the device.
        free_bytes: Free memory of the device, None if it is the machine's own memory.
        working_bytes: What a picture of the recommended size takes beside the weights.

    Raises:
        DeviceUnavailable: Too little memory.
        InvalidSettings: Not a memory mode, or one for GPUs on a device that shares the machine's memory.
    """
    if requested not in MEMORY_MODES:
        raise InvalidSettings(f"Memory mode {requested!r} is none of {', '.join(MEMORY_MODES)}.")
    if free_bytes is None:
        if requested in ("offload", "stream"):
            raise InvalidSettings(
                f"Memory mode {requested!r} moves weights between a GPU and the CPU, but the device is {device}: "
                "use memory='auto' or 'resident'."
            )
        return "resident", "it works in the machine's own memory"
    weights = mode_bytes(weight_bytes)
    if requested == "auto":
        mode = next((mode for mode in weights if free_bytes >= weights[mode] + working_bytes), "stream")
        needs = ", ".join(f"{_gib(size + working_bytes)} for {mode}" for mode, size in weights.items())
        reason = f"{_gib(free_bytes)} free; it takes {needs}"
    else:
        mode, reason = requested, f"as asked, {_gib(free_bytes)} free"
    if free_bytes < (minimum := weights[mode] + WORKING_BYTES):
        smaller = "" if mode == "stream" else "memory='stream' (--memory stream), "
        raise DeviceUnavailable(
            f"Memory mode {mode!r} needs {_gib(minimum)} on {device}, where {_gib(free_bytes)} are free: "
            f"close what else uses the device, or use {smaller}prompt_enhancer=False (--no-pe) or device='cpu'."
        )
    return mode, reason


def working_bytes(pixels: int, fast: bool) -> int:
    """What a picture takes on the device beside the weights.

    Args:
        pixels: Its pixels.
        fast: Whether large pictures are decoded in tiles, if need be.
    """
    at_once = min(pixels, TILE**2) if fast else pixels
    return max(WORKING_BYTES, int(DECODE_BYTES_PER_PIXEL * at_once))


def mode_bytes(weight_bytes: dict[str, int]) -> dict[str, int]:
    """Memory mode -> bytes of weights that are on the device at a time, from the most to the least."""
    sizes = weight_bytes.values()
    return {
        "resident": sum(sizes),
        "offload": max(sizes, default=0),
        "stream": max((size for name, size in weight_bytes.items() if not COMPONENT[name].streamed), default=0),
    }


def find_device(requested: str | torch.device | None) -> torch.device:
    """`choose_device` among the devices of this machine."""
    return choose_device(requested, device_counts())


def find_dtype(requested: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`choose_dtype` by what this machine's hardware has."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose_dtype(requested, device, capability, cpu_has_bfloat16())


def find_memory(requested: str, device: torch.device, *, weight_bytes: dict[str, int], working_bytes: int) -> str:
    """`choose_memory` by what is free now; the choice and its reason are logged at INFO level."""
    mode, reason = choose_memory(
        requested, device, weight_bytes=weight_bytes, free_bytes=free_memory(device), working_bytes=working_bytes
    )
    logger.info("Memory mode %s on %s: %s", mode, device, reason)
    return mode


def device_counts() -> dict[str, int]:
    """How many devices of each type PyTorch sees here."""
    return {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU, what PyTorch holds in reserve included; None for a device in the machine's own memory."""
    if device.type not in ("cuda", "xpu"):
        return None
    backend = getattr(torch, device.type)
    free, _ = backend.mem_get_info(device)
    return free + backend.memory_reserved(device) - backend.memory_allocated(device)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions, and PyTorch the kernels that use them.

    On x86 oneDNN's own answer is too generous: it accepts any AVX-512, and emulates.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
