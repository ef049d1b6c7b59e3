"""Where a pipeline runs: which device, dtype and memory mode.

`choose_device`, `choose_dtype` and `choose_memory` decide and are pure; the `find_*` functions ask this machine and
call them. A `Placement` records the decision, which ``apply.py`` carries out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import DeviceUnavailable, InvalidSettings
from ..upstream.devices import cpu_has_bfloat16
from .precision import BFLOAT16, Precision
from .requirements import GIB, MODES, WeightBytes, mode_needs, without_optional

DEVICE_TYPES = ("cuda", "xpu", "mps", "cpu")  # in order of preference; bitsandbytes has NF4 for each of them
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEMORY_MODES = ("auto", *MODES)

CPU_CURE = "device='cpu' (--device cpu)"
# Left free by whoever fills a device with batches.
WORKING_BYTES = 1 * GIB


@dataclass(frozen=True)
class Placement:
    """Where and how a pipeline runs.

    Attributes:
        device: Device of the computation.
        dtype: dtype of activations and of all weights that aren't quantized; see `precision`.
        memory: ``"resident"``: all components are on the device. ``"offload"``: one at a time. ``"stream"``: as
            offload, and of the transformer two blocks at a time.
        fast: Whether models become the faster subclasses of upstream's.
        exact: Whether these are to give upstream's bits.
        mixed: As of `Precision`.
    """

    device: torch.device
    dtype: torch.dtype
    memory: str
    fast: bool
    exact: bool = False
    mixed: bool = False

    @property
    def precision(self) -> Precision:
        """dtypes of all parts."""
        return Precision(self.dtype, self.mixed)

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
    scaled: bool = True,
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
        scaled: Whether float16 is scaled (``fast/float16.py``). Where it isn't, ERNIE-Image overflows in it.

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
        return torch.float16 if scaled and capability >= (7, 0) else torch.float32
    return torch.bfloat16


def choose_memory(
    requested: str,
    device: torch.device,
    *,
    weights: dict[str, WeightBytes],
    free_bytes: int | None,
    pixels: int,
    precision: Precision = BFLOAT16,
    tiled: bool = True,
) -> tuple[str, str]:
    """Choose the memory mode.

    ``"auto"`` takes the first of resident, offload and stream in which a picture of the recommended size fits, of
    prompts up to 1,024 tokens. A mode asked for by name, and stream where none fits, is refused only if not even a
    small picture of a short prompt does.

    Args:
        requested: One of `MEMORY_MODES`.
        device: Device of the computation.
        weights: Of each component, on the device.
        free_bytes: As of `free_memory`.
        pixels: Of a picture of the recommended size.
        precision: Of the computation.
        tiled: Whether the VAE decodes in tiles where a whole picture doesn't fit.

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
    if requested == "auto":
        needs = mode_needs(weights, pixels, precision=precision, tiled=tiled)
        mode = next((mode for mode in MODES if needs[mode] <= free_bytes), MODES[-1])
        takes = ", ".join(f"{_at_least(need)} for {mode}" for mode, need in needs.items())
        smaller = "" if needs[mode] <= free_bytes else ", and less for a smaller picture or a short prompt"
        reason = f"{_at_most(free_bytes)} free; it takes {takes}{smaller}"
    else:
        mode, reason = requested, f"as asked, {_at_most(free_bytes)} free"
    least = _least_needs(weights, precision)
    if free_bytes < least[mode]:
        found = _cures(mode, weights, precision, free_bytes)
        cures = [f"{cure}, which needs {_at_least(need)}" for cure, need in found]
        raise DeviceUnavailable(
            f"Memory mode {mode!r} needs {_at_least(least[mode])} on {device}, where {_at_most(free_bytes)} are free: "
            f"close what else uses the device, or use {', or '.join([*cures, CPU_CURE])}."
        )
    return mode, reason


def _least_needs(weights: dict[str, WeightBytes], precision: Precision) -> dict[str, int]:
    """Memory mode -> bytes below which not even a small picture of a short prompt is drawn."""
    return mode_needs(weights, 0, precision=precision, long_text=False)


def _cures(
    mode: str, weights: dict[str, WeightBytes], precision: Precision, free_bytes: int
) -> Iterator[tuple[str, int]]:
    """What to use where a memory mode doesn't fit, and the bytes that it needs, of which there are enough."""
    least, alone = _least_needs(weights, precision), _least_needs(without_optional(weights), precision)
    smaller = next((other for other in MODES[MODES.index(mode) + 1 :] if least[other] <= free_bytes), None)
    if smaller is not None:
        yield f"memory={smaller!r} (--memory {smaller})", least[smaller]
    if least[mode] > free_bytes >= alone[mode]:
        yield "prompt_enhancer=False (--no-pe)", alone[mode]
    elif smaller is None and least["stream"] > free_bytes >= alone["stream"]:
        yield "memory='stream' and prompt_enhancer=False (--memory stream --no-pe)", alone["stream"]


def find_device(requested: str | torch.device | None) -> torch.device:
    """`choose_device` for this machine."""
    return choose_device(requested, device_counts())


def find_dtype(requested: str | torch.dtype | None, device: torch.device, *, scaled: bool = True) -> torch.dtype:
    """`choose_dtype` for this machine."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose_dtype(requested, device, capability, cpu_has_bfloat16(), scaled)


def find_memory(
    requested: str,
    device: torch.device,
    *,
    weights: dict[str, WeightBytes],
    pixels: int,
    precision: Precision,
    tiled: bool,
) -> tuple[str, str]:
    """`choose_memory` by the device's free memory now."""
    return choose_memory(
        requested,
        device,
        weights=weights,
        free_bytes=free_memory(device),
        pixels=pixels,
        precision=precision,
        tiled=tiled,
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
    """Free bytes of a GPU, with what PyTorch keeps reserved; None for a device that uses the machine's memory.

    To ask makes the process's context on the device if there is none, so what that takes (0.5 GiB on an H100) is not
    free any more.
    """
    if device.type not in ("cuda", "xpu"):
        return None
    backend = getattr(torch, device.type)
    free, _ = backend.mem_get_info(device)
    return free + backend.memory_reserved(device) - backend.memory_allocated(device)


def _at_least(count: int) -> str:
    """A need in words, rounded up: no figure smaller than what is asked for."""
    return f"{math.ceil(10 * count / GIB) / 10:.1f} GiB"


def _at_most(count: int) -> str:
    """What is there in words, rounded down."""
    return f"{math.floor(10 * count / GIB) / 10:.1f} GiB"
