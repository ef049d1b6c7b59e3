"""Other libraries' quantizations of an original pipeline, to compare with.

A baseline replaces the weights of all linear layers of the transformer and the text encoder in place, with its
library's own settings for the format. The prompt enhancer isn't loaded: evaluations draw without it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from diffusers import ErnieImagePipeline
from torch import nn

from ..errors import DeviceUnavailable, InvalidRepository, InvalidSettings
from ..loading.pipeline import load_opened
from ..repository.record import Repository
from .weights import COMPARED_COMPONENTS, Model, linear_layers

TORCHAO_GROUP = 128  # Values that share a scale and a zero point
# Else torchao changes inductor's settings for all that is compiled later in the process.
TORCHAO_SETTINGS = {"set_inductor_config": False}


@dataclass(frozen=True)
class Baseline:
    """Another library's quantization.

    Attributes:
        format: Number format that it makes of a weight, in words.
        package: Name of its distribution on PyPI.
        quantize: Quantizes the linear layers of a model in place, on the device where they are.
    """

    format: str
    package: str
    quantize: Callable[[Model], None]


def load_baseline(
    name: str, original: Repository, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> ErnieImagePipeline:
    """Load an original repository and quantize it with a baseline: all on the device, without the prompt enhancer.

    The device first holds the transformer and the text encoder in original precision: 24 GB at full size.

    Args:
        name: A key of `BASELINES`.
        original: The original repository.
        device: As for `load`.
        dtype: As for `load`.

    Raises:
        InvalidSettings: There is no such baseline, or its library isn't installed.
        InvalidRepository: The repository is quantized.
        DeviceUnavailable: The baseline has no kernels for this device.
        Exception: Whatever else its library raises where it can't work.
    """
    if name not in BASELINES:
        raise InvalidSettings(f"There is no baseline {name!r}: use one of {', '.join(BASELINES)}.")
    baseline_version(name)
    for component in COMPARED_COMPONENTS:
        if original.components[component.name].quantized:
            raise InvalidRepository(
                f"{original.folder} is quantized, baselines are made from originals: name the original."
            )
    pipe = load_opened(original.without_prompt_enhancer(), device=device, dtype=dtype, memory="resident")
    with torch.no_grad():
        for component in COMPARED_COMPONENTS:
            BASELINES[name].quantize(getattr(pipe, component.name))
    return pipe


def baseline_version(name: str) -> str:
    """The installed version of a baseline's library.

    Raises:
        InvalidSettings: It isn't installed.
    """
    package = BASELINES[name].package
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise InvalidSettings(
            f"{package} is not installed: `pip install {package}`, or ernie-image-nf4[baselines] for all baselines."
        ) from None


def _nf4_stock(model: Model) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in linear_layers(model).items():
        replacement = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, device="meta"
        )
        weight = Params4bit(layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
        replacement.weight = weight.to(layer.weight.device)  # Moving it quantizes it
        replacement.bias = layer.bias
        model.set_submodule(name, replacement)


def _sdnq(model: Model, weights: str, *, products: bool) -> None:
    from sdnq import sdnq_post_load_quant

    device = next(model.parameters()).device
    sdnq_post_load_quant(
        model,
        weights_dtype=weights,
        use_quantized_matmul=products,
        quantization_device=device,
        return_device=device,
        torch_dtype=model.dtype,
    )


def _torchao_int4(model: Model) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    device = next(model.parameters()).device
    if device.type == "cuda":  # A packing with kernels in PyTorch itself; the default one needs another library
        config = Int4WeightOnlyConfig(
            group_size=TORCHAO_GROUP, int4_packing_format="tile_packed_to_4d", **TORCHAO_SETTINGS
        )
    elif device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=TORCHAO_GROUP, **TORCHAO_SETTINGS)
    else:
        raise DeviceUnavailable(f"torchao has int4 kernels for CUDA and CPU, not for {device}.")
    quantize_(model, config)


def _torchao_float8(model: Model) -> None:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    device = next(model.parameters()).device
    has_products = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if has_products:
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **TORCHAO_SETTINGS)
    else:
        config = Float8WeightOnlyConfig(**TORCHAO_SETTINGS)
    quantize_(model, config)


def _quanto(model: Model, qtype: str) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, qtype), include=list(linear_layers(model)))
    quanto.freeze(model)


def _gguf_q4_0(model: Model) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    q4_0 = gguf.GGMLQuantizationType.Q4_0
    block_size, _ = gguf.GGML_QUANT_SIZES[q4_0]

    def quantized(layer: nn.Linear) -> GGUFLinear:
        data = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().float().cpu().numpy(), q4_0))
        replacement = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype, device="meta")
        replacement.weight = GGUFParameter(data.to(layer.weight.device), quant_type=q4_0)
        replacement.bias = layer.bias
        return replacement

    layers = {name: layer for name, layer in linear_layers(model).items() if layer.in_features % block_size == 0}
    with ThreadPoolExecutor() as workers:  # On one core NumPy would take minutes at full size
        for name, replacement in zip(layers, workers.map(quantized, layers.values()), strict=True):
            model.set_submodule(name, replacement)


BASELINES: dict[str, Baseline] = {
    "nf4-stock": Baseline(
        "NF4 as bitsandbytes makes it: blocks of 64, double quantization", "bitsandbytes", _nf4_stock
    ),
    "sdnq-uint4": Baseline(
        "unsigned 4-bit integers with scale and zero point, SDNQ's default groups",
        "sdnq",
        lambda model: _sdnq(model, "uint4", products=False),
    ),
    "sdnq-uint4-products": Baseline(
        "as sdnq-uint4, rounded to 8-bit integers for products with activations in 8 bits",
        "sdnq",
        lambda model: _sdnq(model, "uint4", products=True),
    ),
    "sdnq-int8": Baseline(
        "8-bit integers, a scale a row, products with activations in 8 bits",
        "sdnq",
        lambda model: _sdnq(model, "int8", products=True),
    ),
    "torchao-int4": Baseline(
        f"4-bit integers, groups of {TORCHAO_GROUP}, weight only; on CUDA padded to a multiple of 1024 columns",
        "torchao",
        _torchao_int4,
    ),
    "torchao-float8": Baseline(
        "float8 e4m3, a scale a row; activations too where the GPU multiplies float8", "torchao", _torchao_float8
    ),
    "quanto-int4": Baseline(
        "4-bit integers, groups of up to 128, weight only", "optimum-quanto", lambda model: _quanto(model, "qint4")
    ),
    "quanto-int8": Baseline(
        "8-bit integers, a scale a row, weight only", "optimum-quanto", lambda model: _quanto(model, "qint8")
    ),
    "gguf-q4_0": Baseline("GGUF Q4_0: 4-bit integers, blocks of 32 with a float16 scale", "gguf", _gguf_q4_0),
}
