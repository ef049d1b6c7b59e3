"""Where a pipeline runs: which device, dtype and memory mode.

`choose_device`, `choose_dtype` and `choose_memory` decide and are pure; the `find_*` functions ask this machine and
call them. A `Placement` records the decision, which ``apply.py`` carries out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import DeviceUnavailable, InvalidSettings
from ..repository.components import COMPONENT
from ..upstream.devices import cpu_has_bfloat16

GIB = 1024**3
DEVICE_TYPES = ("cuda", "xpu", "mps", "cpu")  # in order of preference; bitsandbytes has NF4 for each of them
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEMORY_MODES = ("auto", "resident", "offload", "stream")

# Side of a tile of the VAE's. Pictures up to this size are decoded as upstream decodes them, so most sizes don't
# change by a bit.
TILE = 512
# Decoding takes most of the memory beyond the weights: of a whole picture, or of one tile. In
# benchmarks/benchmark_h100.json (resident), 5.0 GiB a megapixel are reserved beyond loading at 512x512, 4.4 at
# 1024x1024; a little more here, for other cards.
DECODE_BYTES_PER_PIXEL = 5.5 * GIB / 1024**2
# Activations of the transformer and text encoder, decoding in tiles, and what the allocator rounds up: 0.6 GiB at
# 512x512 there (offload).
WORKING_BYTES = 1 * GIB


@dataclass(frozen=True)
class Placement:
    """Where and how a pipeline runs.

    Attributes:
        device: Device of the computation.
        dtype: dtype of activations and of all weights that aren't quantized.
        memory: ``"resident"``: all components are on the device. ``"offload"``: one at a time. ``"stream"``: as
            offload, and of the transformer two blocks at a time.
        fast: Whether models become the faster subclasses of upstream's.
    """

    device: torch.device
    dtype: torch.dtype
    memory: str
    fast: bool

    @property
    def moves(self) -> bool:
        """Whether this package reads the weights to the device, while upstream only maps them to host memory."""
        return self.fast and self.memory == "resident"

    @property
    def load_device(self) -> torch.device:
        """Device that upstream loads the weights to.

        The CPU for offloading, so that the GPU never holds all weights. The CPU for fast loading as well: there
        upstream maps the files, which reads nothing.
        """
        return self.device if self.memory == "resident" and not self.fast else torch.device("cpu")


def choose_device(requested: str | torch.device | None, counts: dict[str, int]) -> torch.device:
    """Choose the device to run on.

    Args:
        requested: As for `torch.device`, or None for the first of CUDA, XPU, MPS and CPU that this machine has.
        counts: Device type -> number of such devices on this machine.

    Returns:
        The device, with an index for CUDA and XPU.

    Raises:
        DeviceUnavailable: This machine has no such device.
        InvalidSettings: Not a device name, or a type of device that bitsandbytes has no NF4 for.
    """
    if requested is None:
        requested = next(kind for kind in DEVICE_TYPES if counts.get(kind))
    device: torch.device | None
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
            f"Device {str(device)!r} was asked for, but PyTorch {torch.__version__} sees no {device.type.upper()} "
            "device: install its driver and a PyTorch built for it, or run on the CPU (device='cpu', --device cpu)."
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
    """Choose the dtype of the computation: bfloat16, which the weights were trained in, wherever the hardware
    multiplies it.

    Below compute capability 8.0 CUDA only emulates bfloat16. GPUs of 7.x have tensor cores for float16; older ones are
    slower in float16 than in float32. A CPU without bfloat16 instructions takes 2.3 s instead of 0.42 s for a step of
    the embedded transformer, and 93 s instead of 0.4 s for a decode.

    Args:
        requested: dtype or its name; None to choose.
        device: Device of the computation.
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
    """Choose the memory mode.

    ``"auto"`` takes the first of resident, offload and stream in which the weights and a picture of the recommended
    size fit. A mode asked for by name is refused only if its weights and `WORKING_BYTES` don't fit: a smaller picture
    may still be drawn.

    Args:
        requested: One of `MEMORY_MODES`.
        device: Device of the computation.
        weight_bytes: Component name -> bytes of its weights that are computed with on the device.
        free_bytes: Free memory of the device; None for a device that uses the machine's memory.
        working_bytes: Bytes that a picture of the recommended size takes beside the weights.

    Returns:
        One of `MEMORY_MODES`, never ``"auto"``, and the reason in words.

    Raises:
        DeviceUnavailable: Too little free memory.
        InvalidSettings: Not a memory mode, or offloading on a device that uses the machine's memory.
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
    """Bytes that a picture takes on the device beside the weights.

    Args:
        pixels: Pixels of the picture.
        fast: Whether the VAE decodes in tiles where a whole picture doesn't fit.
    """
    at_once = min(pixels, TILE**2) if fast else pixels
    return max(WORKING_BYTES, int(DECODE_BYTES_PER_PIXEL * at_once))


def mode_bytes(weight_bytes: dict[str, int]) -> dict[str, int]:
    """Memory mode -> bytes of weights on the device at once, in falling order.

    Args:
        weight_bytes: Component name -> bytes of its weights.
    """
    sizes = weight_bytes.values()
    return {
        "resident": sum(sizes),
        "offload": max(sizes, default=0),
        "stream": max((size for name, size in weight_bytes.items() if not COMPONENT[name].streamed), default=0),
    }


def find_device(requested: str | torch.device | None) -> torch.device:
    """`choose_device` for this machine."""
    return choose_device(requested, device_counts())


def find_dtype(requested: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`choose_dtype` for this machine."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose_dtype(requested, device, capability, cpu_has_bfloat16())


def find_memory(
    requested: str, device: torch.device, *, weight_bytes: dict[str, int], working_bytes: int
) -> tuple[str, str]:
    """`choose_memory` by the device's free memory now."""
    return choose_memory(
        requested, device, weight_bytes=weight_bytes, free_bytes=free_memory(device), working_bytes=working_bytes
    )


def device_counts() -> dict[str, int]:
    """Device type -> number of such devices that PyTorch sees on this machine."""
    return {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU, with what PyTorch keeps reserved; None for a device that uses the machine's memory."""
    if device.type not in ("cuda", "xpu"):
        return None
    backend = getattr(torch, device.type)
    free, _ = backend.mem_get_info(device)
    return free + backend.memory_reserved(device) - backend.memory_allocated(device)


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
