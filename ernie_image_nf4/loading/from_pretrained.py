"""Components through upstream's own ``from_pretrained``, straight to a GPU: what ``load(fast=False)`` promises."""

from __future__ import annotations

import importlib

import bitsandbytes
import diffusers
import torch
from torch import nn

from ..memory.placement import Placement
from ..memory.precision import Precision
from ..repository.libraries import library_reading
from ..repository.record import StoredComponent
from ..repository.validation import check_structure
from ..upstream.models_in_memory import forget_nf4_loading
from .assembly import set_products

# diffusers renamed torch_dtype to dtype in 0.40, as transformers had, and warns about the old name since.
DTYPE_ARGUMENT = {
    "transformers": "dtype",
    "diffusers": "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype",
}


def load_plain(part: StoredComponent, placement: Placement) -> nn.Module:
    """A component on ``placement.load_device``, loaded as in the model card's demo.

    Raises:
        InvalidRepository: Its files don't fit its configuration, or are damaged.
        IncompatibleLibraries: Upstream can't load them all the same.
    """
    check_structure(part)
    component = part.component
    dtype = torch.get_default_dtype()
    try:
        with library_reading(part):
            model = getattr(importlib.import_module(component.library), component.class_name).from_pretrained(
                part.folder,
                device_map={"": placement.load_device},
                use_safetensors=True,
                local_files_only=True,
                **{DTYPE_ARGUMENT[component.library]: placement.dtype},
            )
    finally:
        torch.set_default_dtype(dtype)  # diffusers leaves its own behind if building a model fails
    forget_nf4_loading(model)
    if placement.dtype != torch.bfloat16:  # which the files are made for
        _convert(model, component.name, placement.precision)
    return model


def _convert(model: nn.Module, component: str, precision: Precision) -> None:
    """Give the products of NF4 layers and the unquantized weights of a model another dtype.

    The configuration says bfloat16 for the products, and transformers leaves the other weights as they are in the file.
    """
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            set_products(module, precision.of_products(component, name), precision)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(precision.of_weight(component, name, parameter.ndim))
