"""Models put together without ``from_pretrained``: built without storage, checked, then given the tensors of the files.

The library's own class builds the model, its own quantizer puts the NF4 layers there, and `repository.validation` finds
the stored tensor for each of the model's. What is assigned is a view of the file, mapped to host memory, or of the
device's memory where a `DeviceReader` reads to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from ..fast.module_tensors import tensors_of
from ..memory.precision import Precision
from ..repository import nf4_format as nf4
from ..repository.libraries import library_reading
from ..repository.meta_model import tied_weights
from ..repository.record import StoredComponent
from ..repository.safetensors_io import DTYPES, StoredTensor, read_tensor
from ..repository.validation import StoredModel, StoredNF4, match_tensors
from ..upstream.models_in_memory import finish_loading
from .device_reader import DeviceReader

MAPS_FILES = os.name != "nt"  # Windows sets memory aside for what is mapped
STATE = f".{nf4.QUANT_STATE}"  # a tensor of JSON; `StoredNF4.settings` has its content


class TensorSource:
    """Gives stored tensors: on the device where a reader reads them to, and all others as views of mapped files.

    Args:
        reader: Has been started; None without one.
    """

    def __init__(self, reader: DeviceReader | None = None) -> None:
        self._reader = reader
        self._files: dict[Path, torch.Tensor] = {}

    def get(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor. On a device, its values are there after `wait`."""
        view = self._reader.view(stored) if self._reader else None
        return self._mapped(stored) if view is None else view

    def wait(self) -> None:
        """Wait for the reader."""
        if self._reader:
            self._reader.wait()

    def _mapped(self, stored: StoredTensor) -> torch.Tensor:
        """A view of a file that is mapped once. Nothing is read before it is used."""
        if not MAPS_FILES:
            return read_tensor(stored)
        if stored.file not in self._files:
            size = stored.file.stat().st_size
            self._files[stored.file] = torch.from_file(str(stored.file), shared=False, size=size, dtype=torch.uint8)
        data = self._files[stored.file][stored.offset : stored.offset + stored.spec.bytes]
        dtype = DTYPES[stored.spec.dtype]
        if data.storage_offset() % dtype.itemsize:  # no view can start there
            data = data.clone()
        return data.view(dtype).view(stored.spec.shape)


def assemble(part: StoredComponent, source: TensorSource, precision: Precision) -> nn.Module:
    """The model of a component with its weights, wherever `source` has them, as ``from_pretrained`` would make it.

    Args:
        part: The component.
        source: Where its tensors come from.
        precision: Of activations, and of floating point tensors that aren't NF4.

    Raises:
        InvalidRepository: Files and configuration don't fit each other.
        IncompatibleLibraries: The library can't build the model all the same.
    """
    with torch.inference_mode(False):  # inference tensors can't be moved later
        found = match_tensors(part, precision.dtype)
        with library_reading(part):
            _assign(found, source, part.component.name, precision)
            dtype = precision.of_activations()
            finish_loading(found.model, part.component.library, found.quantizer, part.folder, dtype)
    return found.model


def _assign(found: StoredModel, source: TensorSource, component: str, precision: Precision) -> None:
    """Give the model its tensors."""
    modules = dict(found.model.named_modules(remove_duplicate=False))
    for key, weight in found.nf4.items():
        layer = modules[key.rpartition(".")[0]]
        layer.weight = _nf4_parameter(weight, source)
        if found.of_transformers:
            layer.quant_state = layer.weight.quant_state  # as its `from_pretrained` leaves it
        set_products(layer, precision.of_products(component, key), precision)
    # transformers leaves unquantized tensors of a quantized model as they are stored.
    as_stored = found.of_transformers and found.quantizer is not None and precision.dtype == torch.bfloat16
    for key, stored in (found.plain | found.tied).items():
        owner, _, name = key.rpartition(".")
        tensor, old = source.get(stored), getattr(modules[owner], name)
        if tensor.is_floating_point() and not as_stored:
            tensor = tensor.to(precision.of_weight(component, key, tensor.ndim))
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        setattr(modules[owner], name, tensor)
    if tied := tied_weights(found.model):
        if found.tied:
            source.wait()  # transformers compares values
        # With `missing_keys`, transformers ties what no file has, and leaves apart what files have with other values.
        cast(Any, found.model).tie_weights(missing_keys=set(tied) - set(found.tied), recompute_mapping=False)


def set_products(layer: Linear4bit, dtype: torch.dtype, precision: Precision) -> None:
    """Let an NF4 layer, which has its weight, multiply in a dtype.

    bitsandbytes makes the weight bfloat16, which the files ask for, and converts that in a pass over memory that takes
    longer than dequantizing. The transformer's blocks do without it in mixed precision.
    """
    layer.compute_dtype = dtype
    if precision.mixed and dtype == precision.dtype:
        layer.weight.quant_state.dtype = dtype


def _nf4_parameter(weight: StoredNF4, source: TensorSource) -> Params4bit:
    """A layer's NF4 weight. It doesn't know its layer: the cycle would outlive the layer until a garbage collection."""
    parts = {suffix.removeprefix("."): source.get(stored) for suffix, stored in weight.parts.items() if suffix != STATE}
    codes = parts.pop("")
    return Params4bit.from_prequantized(data=codes, quantized_stats=parts | weight.settings, device=codes.device)


def move_rest(model: nn.Module, device: torch.device, excluded: Iterable[nn.Module] = ()) -> None:
    """Move the tensors that aren't on the device yet: buffers, and what was converted to another dtype on the host.

    Args:
        model: The model.
        device: The device.
        excluded: Modules whose tensors stay where they are.
    """
    for owner, name in tensors_of(model, excluded):
        tensor = getattr(owner, name)
        if tensor.device != device:
            setattr(owner, name, tensor.to(device))


def keep_as_stored(model: nn.Module) -> None:
    """Compute with NF4 weights as they lie in the file, on CPUs with AVX512-BF16 too.

    There bitsandbytes would repack them in the first forward pass, with scales rounded to bfloat16, and save other
    scales than it read.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
