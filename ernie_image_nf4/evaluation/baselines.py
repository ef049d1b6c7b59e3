"""Other libraries' quantizations of an original pipeline, to compare with: each replaces the weights of its linear layers in place.

Every peer is applied to the transformer and to the text encoder, with its library's own settings for that format. The prompt
enhancer isn't loaded: no peer is about it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ErnieImagePipeline
from torch import nn

from ..errors import DeviceUnavailable, InvalidRepository, InvalidSettings
from ..loading.pipeline import load
from ..repository.components import QUANTIZED
from ..repository.resolve import is_quantized

COMPONENTS = tuple(component for component in QUANTIZED if not component.optional)
TORCHAO_GROUP = 128  # values that share a scale and a zero point
TORCHAO_SETTINGS = {"set_inductor_config": False}  # which would go on for whatever is compiled after it in the process


@dataclass(frozen=True)
class Peer:
    """A quantization that isn't ours.

    Attributes:
        format: What it makes of a weight, in words.
        package: The distribution that makes it, as pip knows it.
        quantize: Quantizes the linear layers of a model in place, on the device where they are.
    """

    format: str
    package: str
    quantize: Callable[[nn.Module], None]


def load_peer(
    name: str, folder: Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> ErnieImagePipeline:
    """An original repository as a pipeline that a peer has quantized, all of it on the device, without the prompt enhancer.

    The device first holds the transformer and the text encoder in original precision: 24 GB at full size.

    Args:
        name: A key of `PEERS`.
        folder: Folder of the original repository.
        device: As for `load`.
        dtype: As for `load`.

    Raises:
        InvalidSettings: No such peer, or its library isn't installed.
        InvalidRepository: The repository is quantized.
        DeviceUnavailable: The peer has no kernels for this device.
        Exception: Whatever else the library raises where it can't do its work.
    """
    if name not in PEERS:
        raise InvalidSettings(f"There is no peer {name!r}: use one of {', '.join(PEERS)}.")
    peer_version(name)
    for component in COMPONENTS:
        if is_quantized(folder, component):
            raise InvalidRepository(f"{folder} is quantized, peers are made from originals: name the original.")
    pipe = load(folder, device=device, dtype=dtype, memory="resident", fast=False, prompt_enhancer=False)
    with torch.no_grad():
        for component in COMPONENTS:
            PEERS[name].quantize(getattr(pipe, component.name))
    return pipe


def peer_version(name: str) -> str:
    """The installed version of a peer's library.

    Raises:
        InvalidSettings: It isn't installed.
    """
    package = PEERS[name].package
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise InvalidSettings(
            f"{package} is not installed: `pip install {package}`, or ernie-image-nf4[peers] for all peers."
        ) from None


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _nf4_stock(model: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in linear_layers(model).items():
        replacement = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, device="meta"
        )
        weight = Params4bit(layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
        replacement.weight = weight.to(layer.weight.device)  # which quantizes it
        replacement.bias = layer.bias
        model.set_submodule(name, replacement)


def _sdnq_uint4(model: nn.Module) -> None:
    from sdnq import sdnq_post_load_quant

    device = next(model.parameters()).device
    sdnq_post_load_quant(
        model, weights_dtype="uint4", quantization_device=device, return_device=device, torch_dtype=model.dtype
    )


def _torchao_int4(model: nn.Module) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    device = next(model.parameters()).device
    if device.type == "cuda":  # kernels that PyTorch itself has; the default packing needs another library
        config = Int4WeightOnlyConfig(
            group_size=TORCHAO_GROUP, int4_packing_format="tile_packed_to_4d", **TORCHAO_SETTINGS
        )
    elif device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=TORCHAO_GROUP, **TORCHAO_SETTINGS)
    else:
        raise DeviceUnavailable(f"torchao has int4 kernels for CUDA and CPU, not for {device}.")
    quantize_(model, config)


def _torchao_float8(model: nn.Module) -> None:
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


def _quanto(model: nn.Module, qtype: str) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, qtype), include=list(linear_layers(model)))
    quanto.freeze(model)


def _gguf_q4_0(model: nn.Module) -> None:
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
    with ThreadPoolExecutor() as workers:  # NumPy on one core would take minutes at full size
        for name, replacement in zip(layers, workers.map(quantized, layers.values()), strict=True):
            model.set_submodule(name, replacement)


PEERS: dict[str, Peer] = {
    "nf4-stock": Peer("NF4 as bitsandbytes makes it: blocks of 64, double quantization", "bitsandbytes", _nf4_stock),
    "sdnq-uint4": Peer("unsigned 4-bit integers with scale and zero point, SDNQ's default groups", "sdnq", _sdnq_uint4),
    "torchao-int4": Peer(
        f"4-bit integers, groups of {TORCHAO_GROUP}, weight only; on CUDA padded to a multiple of 1024 columns",
        "torchao",
        _torchao_int4,
    ),
    "torchao-float8": Peer(
        "float8 e4m3, a scale a row; activations too where the GPU multiplies float8", "torchao", _torchao_float8
    ),
    "quanto-int4": Peer(
        "4-bit integers, groups of up to 128, weight only", "optimum-quanto", lambda model: _quanto(model, "qint4")
    ),
    "quanto-int8": Peer(
        "8-bit integers, a scale a row, weight only", "optimum-quanto", lambda model: _quanto(model, "qint8")
    ),
    "gguf-q4_0": Peer("GGUF Q4_0: 4-bit integers, blocks of 32 with a float16 scale", "gguf", _gguf_q4_0),
}
