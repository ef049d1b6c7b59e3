"""Where a pipeline runs: device, dtype and memory mode. `choose_*` decide and are pure, `find_*` ask this machine first.

Memory estimates follow measurements of the full-size NF4 pipeline (9.3 GB of weights) on an H100: peak reserved memory
was 10.1 GiB at 512x512 and 14.8 GiB at 1024x1024 with everything on the GPU, and 4.7 GiB at 512x512 with offload.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass

import torch

from .errors import DeviceUnavailable, InvalidSettings

logger = logging.getLogger(__name__)

GIB = 1024**3
DEVICE_TYPES = ("cuda", "xpu", "mps", "cpu")  # in order of preference; bitsandbytes has NF4 for each of them
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEMORY_MODES = ("auto", "resident", "offload")

# The VAE decodes the whole picture at once; at 1024x1024 that is most of the memory beyond the weights.
DECODE_BYTES_PER_PIXEL = 6 * GIB / 1024**2
# Activations of the transformer and text encoder, and what the allocator rounds up.
WORKING_BYTES = 1 * GIB


@dataclass(frozen=True)
class Placement:
    """Where and how a pipeline runs.

    Attributes:
        device: Device of the computation.
        dtype: dtype of activations and of all weights that aren't quantized.
        memory: ``"resident"`` (all on the device) or ``"offload"`` (component by component).
    """

    device: torch.device
    dtype: torch.dtype
    memory: str

    @property
    def load_device(self) -> torch.device:
        """Where the weights are loaded to: offloaded ones wait on the CPU, so that the GPU never holds them all."""
        return torch.device("cpu") if self.memory == "offload" else self.device


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

    Below compute capability 8.0 CUDA only emulates bfloat16. Those of 7.x have tensor cores for float16 (65 TFLOP/s on
    a T4, against 8 in float32); older ones are slower in float16 than in float32. A CPU without bfloat16 instructions
    took 2.3 s a step in bfloat16 where float32 took 0.42 s, and 93 s for a VAE decode instead of 0.4 s.

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
    pixels: int,
) -> tuple[str, str]:
    """The memory mode, with the reason in words.

    ``"auto"`` stays resident where all weights and a picture of the recommended size fit; a mode asked for by name is
    refused only where not even its weights and `WORKING_BYTES` fit, as a smaller picture may well do.

    Args:
        requested: ``"auto"``, ``"resident"`` or ``"offload"``.
        device: The device it will run on.
        weight_bytes: Component name -> bytes of its weight files.
        free_bytes: Free memory of the device, None if it is the machine's own memory.
        pixels: Pixels of a picture of the recommended size.

    Raises:
        DeviceUnavailable: Too little memory.
        InvalidSettings: Not a memory mode, or offload on a device that shares the machine's memory.
    """
    if requested not in MEMORY_MODES:
        raise InvalidSettings(f"Memory mode {requested!r} is none of {', '.join(MEMORY_MODES)}.")
    if free_bytes is None:
        if requested == "offload":
            raise InvalidSettings(
                f"Memory mode 'offload' moves components between a GPU and the CPU, but the device is {device}: "
                "use memory='auto' or 'resident'."
            )
        return "resident", "it works in the machine's own memory"
    everything, largest = sum(weight_bytes.values()), max(weight_bytes.values(), default=0)
    minimum = {"resident": everything + WORKING_BYTES, "offload": largest + WORKING_BYTES}
    comfortable = everything + max(WORKING_BYTES, int(DECODE_BYTES_PER_PIXEL * pixels))
    if requested == "auto":
        mode = "resident" if free_bytes >= comfortable else "offload"
        reason = f"{_gib(free_bytes)} free, {_gib(comfortable)} needed to keep all components there"
    else:
        mode, reason = requested, f"as asked, {_gib(free_bytes)} free"
    if free_bytes < minimum[mode]:
        smaller = "" if mode == "offload" else "memory='offload' (--memory offload), "
        raise DeviceUnavailable(
            f"Memory mode {mode!r} needs {_gib(minimum[mode])} on {device}, where {_gib(free_bytes)} are free: "
            f"close what else uses the device, or use {smaller}prompt_enhancer=False (--no-pe) or device='cpu'."
        )
    return mode, reason


def find_device(requested: str | torch.device | None) -> torch.device:
    """`choose_device` among the devices of this machine."""
    return choose_device(requested, device_counts())


def find_dtype(requested: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`choose_dtype` by what this machine's hardware has."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose_dtype(requested, device, capability, cpu_has_bfloat16())


def find_memory(requested: str, device: torch.device, *, weight_bytes: dict[str, int], pixels: int) -> str:
    """`choose_memory` by what is free now; the choice and its reason are logged at INFO level."""
    mode, reason = choose_memory(
        requested, device, weight_bytes=weight_bytes, free_bytes=free_memory(device), pixels=pixels
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
