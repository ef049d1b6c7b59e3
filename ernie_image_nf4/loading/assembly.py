"""NF4 weights put straight into the models that diffusers and transformers build.

Both libraries' ``from_pretrained`` build the model, load all other tensors and finish it, as ever. But each NF4 weight is six
tensors, and what their Python does with each is much of the time that loading takes. Here the files are mapped once, and the weights are views of the mapping, made by bitsandbytes' own ``Params4bit.from_prequantized``.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers.models.model_loading_utils
import torch
import transformers.modeling_utils
from bitsandbytes.nn import Params4bit

from ..repository import nf4_format as nf4
from ..repository.meta_model import upstream_lock
from ..repository.safetensors_io import DTYPES, StoredTensor

# Where each library calls what puts tensors into a model.
LOADERS = {
    "diffusers": (diffusers.models.model_loading_utils, "load_model_dict_into_meta"),
    "transformers": (transformers.modeling_utils, "convert_and_load_state_dict_in_model"),
}


@dataclass(frozen=True)
class NF4Weight:
    """A weight in NF4, as it is stored.

    Attributes:
        name: Of the weight in the file.
        key: Of the weight in the model.
        parts: Its tensors by the suffix to `name`, ``""`` for the codes.
        settings: The JSON of its quantization state.
    """

    name: str
    key: str
    parts: dict[str, StoredTensor]
    settings: dict[str, Any]


@contextmanager
def direct_loading(library: str, weights: Sequence[NF4Weight]) -> Iterator[None]:
    """Let ``from_pretrained`` of a component, in this context and thread, leave NF4 weights to us. They come to be on the CPU.

    Args:
        library: The component's.
        weights: All of its NF4 weights, checked to fit the model that is loaded. The list may be filled until the model is built.
    """
    module, name = LOADERS[library]
    upstream = getattr(module, name, None)
    if upstream is None or os.name == "nt":  # Windows sets memory aside for what is mapped
        yield
        return
    thread = threading.get_ident()

    @functools.wraps(upstream)
    def load(model: torch.nn.Module, state_dict: dict[str, Any], *args, **kwargs):
        if threading.get_ident() != thread:
            return upstream(model, state_dict, *args, **kwargs)
        # diffusers calls for one file after the other, among which the tensors of a weight may be split.
        chosen = [weight for weight in weights if weight.name in state_dict]
        names = {weight.name + suffix for weight in weights for suffix in weight.parts}
        others = {name: tensor for name, tensor in state_dict.items() if name not in names}
        result = upstream(model, others, *args, **kwargs)
        put_into(model, chosen, of_transformers=library == "transformers")
        if library == "transformers":  # returns what it hasn't found as an attribute, at first as its first value
            getattr(result[0], "missing_keys", result[0]).difference_update(weight.key for weight in chosen)
        elif (unexpected := kwargs.get("unexpected_keys")) is not None:  # of which diffusers takes out what it has used
            unexpected[:] = [name for name in unexpected if name not in names]
        return result

    with upstream_lock:
        setattr(module, name, load)
        try:
            yield
        finally:
            setattr(module, name, upstream)


def put_into(model: torch.nn.Module, weights: Sequence[NF4Weight], *, of_transformers: bool) -> None:
    """Give layers of `model` their NF4 weights, as views of the mapped files, with the marks that transformers leaves."""
    view, layers = mapped_files(), dict(model.named_modules(remove_duplicate=False))
    for weight in weights:
        layer = layers[weight.key.rpartition(".")[0]]
        parts = {suffix.removeprefix("."): view(stored) for suffix, stored in weight.parts.items()}
        del parts[nf4.QUANT_STATE]  # as a tensor of JSON; `settings` are its values
        parameter = Params4bit.from_prequantized(
            data=parts.pop(""),
            quantized_stats=parts | weight.settings,
            device="cpu",
            module=layer if of_transformers else None,
        )
        if of_transformers:
            layer._is_hf_initialized = parameter._is_hf_initialized = True
        layer.weight = parameter


def mapped_files() -> Callable[[StoredTensor], torch.Tensor]:
    """A function that gives stored tensors as views of their files, each mapped once. Nothing is read before it is used."""
    files: dict[Path, torch.Tensor] = {}

    def view(stored: StoredTensor) -> torch.Tensor:
        if stored.file not in files:
            size = stored.file.stat().st_size
            files[stored.file] = torch.from_file(str(stored.file), shared=False, size=size, dtype=torch.uint8)
        data, dtype = files[stored.file][stored.offset : stored.offset + stored.spec.bytes], DTYPES[stored.spec.dtype]
        if data.storage_offset() % dtype.itemsize:  # no view can start there
            data = data.clone()
        return data.view(dtype).view(stored.spec.shape)

    return view
