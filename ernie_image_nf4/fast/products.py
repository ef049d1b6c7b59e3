"""Products of the transformer's blocks in 8 bits, as an option: faster on GPUs that have them, for some precision.

int8 runs on cards since RTX 20 and has finer numbers than fp8, which runs since RTX 40. What they do to values is in
``ops/eight_bit.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from bitsandbytes.nn import Linear4bit
from diffusers import ErnieImageTransformer2DModel
from torch import nn

from ..errors import InvalidSettings
from .linear import LAYERS, EightBitLayer
from .ops.eight_bit import FP8, INT8, fits, scaled_product
from .subclassing import become
from .transformer import TransformerRuntime, runtime_of

AUTO, BFLOAT16 = "auto", "bfloat16"
PRODUCTS = (AUTO, BFLOAT16, INT8.name, FP8.name)
# The least compute capability, and the cards that have it.
CAPABILITY = {INT8.name: ((7, 5), "RTX 20 or newer, T4"), FP8.name: ((8, 9), "RTX 40 or newer, H100")}
FORMATS = {each.name: each for each in (INT8, FP8)}
TRIED = 256  # rows and columns
INSTEAD = "leave products out (--products)"


def find_products(products: str, device: torch.device, dtype: torch.dtype, fast: bool) -> str | None:
    """What the transformer's blocks multiply in: ``"int8"``, ``"fp8"``, or None for the dtype of the computation.

    Args:
        products: As given to ``load``.
        device: Device of the computation.
        dtype: dtype of activations.
        fast: Whether the fast code paths are used.

    Raises:
        InvalidSettings: It is none of `PRODUCTS`, or there are no such products: the device isn't a GPU on which
            PyTorch has them, the dtype isn't bfloat16, which fp8 needs and ``"bfloat16"`` means, fp8 lacks Triton, or
            upstream's code paths were asked for.
    """
    if products not in PRODUCTS:
        raise InvalidSettings(f"Products {products!r} are none of {', '.join(PRODUCTS)}: {INSTEAD}.")
    if products == AUTO:
        return None
    if products == BFLOAT16:
        if dtype != torch.bfloat16:
            raise InvalidSettings(
                f"Products in bfloat16 need dtype='bfloat16' (--dtype bfloat16), here it is {dtype}: ask for it, "
                f"or {INSTEAD}."
            )
        return None
    _check_eight_bits(products, device, dtype, fast)
    return products


def _check_eight_bits(products: str, device: torch.device, dtype: torch.dtype, fast: bool) -> None:
    what = f"Products in {products}"
    if device.type != "cuda":
        raise InvalidSettings(f"{what} need a CUDA GPU, the device is {device}: {INSTEAD}.")
    if not fast:
        raise InvalidSettings(f"{what} are part of the fast code paths: leave fast=False or {INSTEAD}.")
    if products == FP8.name:
        _check_fp8(dtype, "dtype")
        if importlib.util.find_spec("triton") is None:
            raise InvalidSettings(f"{what} need Triton, which isn't installed: {INSTEAD}.")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    least, cards = CAPABILITY[products]
    if capability < least:
        raise InvalidSettings(
            f"{what} need compute capability {_dotted(least)} ({cards}), {name} has {_dotted(capability)}: {INSTEAD}."
        )
    try:
        _try_product(products, device, dtype)
    except Exception as error:  # of builds for Windows and ROCm, and whatever Triton raises when it compiles
        reason = next(iter(str(error).splitlines()), "")
        raise InvalidSettings(
            f"PyTorch {torch.__version__} has no products in {products} for {name} ({reason}): {INSTEAD}."
        ) from error


def _check_fp8(dtype: torch.dtype, what: str) -> None:
    if dtype != torch.bfloat16:
        raise InvalidSettings(f"Products in fp8 give bfloat16, the {what} is {dtype}: leave dtype or {INSTEAD}.")


def _try_product(products: str, device: torch.device, dtype: torch.dtype) -> None:
    # Of a size that takes the same kernel as the real ones.
    values = torch.ones(TRIED, TRIED, device=device).to(FORMATS[products].dtype)
    scale = torch.ones(TRIED, 1, device=device)
    scaled_product(values, scale, values, scale, dtype)


def set_products(transformer: ErnieImageTransformer2DModel, products: str | None) -> None:
    """Let the NF4 layers of a fast transformer's blocks multiply in a format. Copies and pickles of it do so too.

    Args:
        transformer: The transformer.
        products: ``"int8"``, ``"fp8"``, or None for the dtype of the computation.

    Raises:
        InvalidSettings: The transformer isn't a fast one, has no layer that can, or isn't in bfloat16, which fp8 needs.
    """
    runtime = runtime_of(transformer)
    if products is None:
        _leave_eight_bits(transformer)
        if runtime is not None:
            _note_products(runtime, None)
        return
    if products == FP8.name:
        _check_fp8(transformer.dtype, "transformer's dtype")
    if runtime is None:
        raise InvalidSettings(
            f"Products in {products} are part of the fast forward pass, which is not in use: {INSTEAD}."
        )
    if not any(fits(layer.weight.quant_state) for layer in _layers(transformer, Linear4bit, *LAYERS.values())):
        raise InvalidSettings(
            f"No layer of the transformer's blocks is in NF4 and of a size that {products} takes: {INSTEAD}."
        )
    _leave_eight_bits(transformer)
    for layer in _layers(transformer, Linear4bit):
        if fits(layer.weight.quant_state):
            become(layer, LAYERS[products])
    _note_products(runtime, products)


def products_of(transformer: nn.Module) -> str | None:
    """``"int8"`` or ``"fp8"`` if the transformer's blocks multiply in it, None for the dtype of the computation."""
    runtime = runtime_of(transformer)
    return None if runtime is None else runtime.products


def _leave_eight_bits(transformer: ErnieImageTransformer2DModel) -> None:
    for layer in _layers(transformer, *LAYERS.values()):
        layer.__class__ = Linear4bit


def _note_products(runtime: TransformerRuntime, products: str | None) -> None:
    runtime.products = products
    runtime.release_graph()  # captured with the other products


def _layers(transformer: ErnieImageTransformer2DModel, *kinds: type[Linear4bit]) -> list[Linear4bit | EightBitLayer]:
    """The blocks' layers of just these classes. Through `modules`: iterating over streamed blocks would onload them."""
    return [module for module in transformer.layers.modules() if type(module) in kinds]


def _dotted(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))
