"""Products of the transformer's blocks in fp8, as an option: faster on GPUs that have fp8, for some precision.

What fp8 does to values is in ``ops/fp8.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from diffusers import ErnieImageTransformer2DModel
from torch import nn

from ..errors import InvalidSettings
from .linear import Fp8Linear4bit
from .ops.fp8 import FP8, MULTIPLE, scaled_product
from .subclassing import become
from .transformer import TransformerRuntime, runtime_of

CAPABILITY = (8, 9)  # Ada; then Hopper and Blackwell
INSTEAD = "leave fp8 (--fp8) out"


def check_fp8(device: torch.device, dtype: torch.dtype, fast: bool) -> None:
    """Refuse settings with which there are no products in fp8.

    Args:
        device: Device of the computation.
        dtype: dtype of activations.
        fast: Whether the fast code paths are used.

    Raises:
        InvalidSettings: The device isn't a GPU on which PyTorch multiplies fp8, there is no Triton, the dtype isn't
            bfloat16, or upstream's code paths were asked for.
    """
    if device.type != "cuda":
        raise InvalidSettings(f"Products in fp8 need a CUDA GPU, the device is {device}: {INSTEAD}.")
    if dtype != torch.bfloat16:
        raise InvalidSettings(f"Products in fp8 give bfloat16, the dtype is {dtype}: leave dtype or {INSTEAD}.")
    if not fast:
        raise InvalidSettings(f"Products in fp8 are part of the fast code paths: leave fast=False or {INSTEAD}.")
    if importlib.util.find_spec("triton") is None:
        raise InvalidSettings(f"Products in fp8 need Triton, which isn't installed: {INSTEAD}.")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise InvalidSettings(
            f"Products in fp8 need compute capability {_dotted(CAPABILITY)} (RTX 40 or newer, H100), "
            f"{name} has {_dotted(capability)}: {INSTEAD}."
        )
    try:
        _try_product(device)
    except RuntimeError as error:  # of builds for Windows and ROCm
        reason = next(iter(str(error).splitlines()), "")
        raise InvalidSettings(
            f"PyTorch {torch.__version__} has no products in fp8 for {name} ({reason}): {INSTEAD}."
        ) from error


def _try_product(device: torch.device) -> None:
    values, scale = (torch.ones(MULTIPLE, width, device=device) for width in (MULTIPLE, 1))
    scaled_product(values.to(FP8), scale, values.to(FP8), scale)


def enable_fp8(transformer: ErnieImageTransformer2DModel) -> None:
    """Let the NF4 layers of a fast transformer's blocks multiply in fp8. Copies and pickles of it do so too.

    Raises:
        InvalidSettings: The transformer isn't in bfloat16, isn't a fast one, or has no such layer.
    """
    if transformer.dtype != torch.bfloat16:
        raise InvalidSettings(f"Products in fp8 give bfloat16, the transformer is in {transformer.dtype}: {INSTEAD}.")
    runtime = runtime_of(transformer)
    if runtime is None:
        raise InvalidSettings(f"Products in fp8 are part of the fast forward pass, which is not in use: {INSTEAD}.")
    chosen = [layer for layer in _layers(transformer, Linear4bit) if _fits(layer.weight.quant_state)]
    if not (chosen or runtime.fp8):
        raise InvalidSettings(
            f"No layer of the transformer's blocks is in NF4 and of a size that fp8 takes: {INSTEAD}."
        )
    for layer in chosen:
        become(layer, Fp8Linear4bit)
    _set_fp8(runtime, True)


def disable_fp8(transformer: ErnieImageTransformer2DModel) -> None:
    """Let all layers multiply in bfloat16 again."""
    for layer in _layers(transformer, Fp8Linear4bit):
        layer.__class__ = Linear4bit
    runtime = runtime_of(transformer)
    if runtime is not None:
        _set_fp8(runtime, False)


def is_in_fp8(transformer: nn.Module) -> bool:
    """Whether the transformer's blocks multiply in fp8."""
    runtime = runtime_of(transformer)
    return runtime is not None and runtime.fp8


def _set_fp8(runtime: TransformerRuntime, fp8: bool) -> None:
    runtime.fp8 = fp8
    runtime.release_graph()  # captured with the other products


def _layers(transformer: ErnieImageTransformer2DModel, kind: type[Linear4bit]) -> list[Linear4bit]:
    """The blocks' layers of exactly this class. Through `modules`: iterating over streamed blocks would onload them."""
    return [module for module in transformer.layers.modules() if type(module) is kind]


def _fits(state: QuantState) -> bool:
    rows, columns = state.shape
    return rows % MULTIPLE == 0 and columns % MULTIPLE == 0 and columns % state.blocksize == 0


def _dotted(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))
