"""What loading takes over from ``from_pretrained``: names of tensors, exchange of layers, the marks left on a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import nn
from transformers.integrations import bitsandbytes as nf4_integration
from transformers.quantizers import AutoHfQuantizer

from .gone import note_gone


def persistent_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by state dict key, those that are shared under each of their keys.

    Instead of `state_dict` of the model, which detaches every tensor and asks NF4 layers
    for states that they don't have yet. Only modules with buffers are asked for theirs.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        tensors = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if buffers := dict(module.named_buffers(recurse=False, remove_duplicate=False)):
            saved = module.state_dict()
            tensors |= {name: buffer for name, buffer in buffers.items() if name in saved}
        found |= {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in tensors.items()}
    return found


def nf4_quantizer(library: str, settings: dict[str, Any], *, pre_quantized: bool = True) -> Any:
    """The quantizer by which a library loads (or makes) NF4 weights.

    Args:
        library: ``"diffusers"`` or ``"transformers"``.
        settings: The configuration's ``quantization_config``.
        pre_quantized: Whether the weights are NF4 already.
    """
    if library == "diffusers":
        config = diffusers.BitsAndBytesConfig.from_dict(settings)
        return DiffusersAutoQuantizer.from_config(config, pre_quantized=pre_quantized)
    config = transformers.BitsAndBytesConfig.from_dict(settings)
    return AutoHfQuantizer.from_config(config, pre_quantized=pre_quantized)


def exchange_layers(model: Any, quantizer: Any, dtype: torch.dtype) -> None:
    """Replace the linear layers that a quantizer converts by ``Linear4bit`` on the meta device; the config tells of it.

    transformers' quantizer does it. diffusers' makes its layers in accelerate's ``init_empty_weights``, which replaces
    ``nn.Module.register_parameter`` in all threads: whatever parameters another thread made or assigned meanwhile would
    lose their storage. So its ``preprocess_model`` is imitated here (diffusers 0.38 to 0.42).
    """
    if isinstance(model, transformers.PreTrainedModel):
        quantizer.preprocess_model(model, config=model.config, dtype=dtype, device_map=None, keep_in_fp32_modules=[])
        return
    settings = quantizer.quantization_config
    skipped = settings.llm_int8_skip_modules or []
    quantizer.modules_to_not_convert = [*skipped]
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or _is_skipped(name, skipped):
            continue
        replacement = Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            settings.bnb_4bit_compute_dtype,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_type=settings.bnb_4bit_quant_type,
            quant_storage=settings.bnb_4bit_quant_storage,
            device="meta",
        )
        replacement.source_cls = type(layer)
        model.set_submodule(name, replacement.requires_grad_(False))
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = settings.quant_method
    model.config.quantization_config = settings


def _is_skipped(name: str, skipped: Sequence[str]) -> bool:
    """Whether a layer keeps its precision: one of the names is its own, or that of a module above it."""
    return name.rpartition(".")[2] in skipped or any(f"{key}." in name or key == name for key in skipped)


def finish_loading(model: Any, library: str, quantizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Leave the marks that ``from_pretrained`` leaves on a model: where it is from, its dtype, how it is quantized.

    Args:
        model: The model, with its weights.
        library: ``"diffusers"`` or ``"transformers"``.
        quantizer: As from `nf4_quantizer`, None without one.
        folder: Of the component.
        dtype: Of the model.
    """
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    if library == "diffusers":
        model.register_to_config(_name_or_path=folder)
        if quantizer is not None:
            settings = quantizer.quantization_config
            model.register_to_config(quantization_config=settings, _pre_quantization_dtype=dtype)
    else:
        model.name_or_path = model.config.name_or_path = str(folder)
        for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
            config.dtype = dtype
    model.eval()


def forget_nf4_loading(model: Any) -> None:
    """Let `save_pretrained` of a model that transformers loaded save NF4 weights as they are.

    Takes transformers' NF4 step, ``Bnb4bitDeserialize``, out of ``_weight_conversions`` (5.0 to 5.24). It is noted
    there to be undone in `save_pretrained`, which raises NotImplementedError, though nothing has to be undone. Gone:
    the model stays as transformers leaves it.
    """
    if not (conversions := getattr(model, "_weight_conversions", None)):
        return
    nf4_loading = getattr(nf4_integration, "Bnb4bitDeserialize", None)
    if nf4_loading is None:
        note_gone("transformers' Bnb4bitDeserialize", "whether NF4 models can be saved is up to transformers")
        return
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if not any(isinstance(operation, nf4_loading) for operation in getattr(conversion, "operations", ()))
    ]
