"""Which tensors of a component become NF4, decided on a model without storage before a weight is read.

diffusers and transformers themselves say which linear layers bitsandbytes replaces, under which names weights are
saved, and what the configs hold. So the result is what ``from_pretrained`` with a quantization config and
``save_pretrained`` would give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from ..errors import InvalidRepository
from ..repository import nf4_format as nf4
from ..repository.components import Component
from ..repository.libraries import library_reading
from ..repository.meta_model import MetaParameters, meta_model, saved_names, tied_weights
from ..repository.metadata import Quantization
from ..repository.record import StoredComponent
from ..repository.safetensors_io import DTYPES, StoredTensor, TensorSpec, read_chunks
from ..upstream.models_in_memory import exchange_layers, nf4_quantizer

QUANTIZATION = Quantization()
# Linear layers that keep their precision by default. final_linear makes a quarter of the error of the mini's
# predictions, with 0.02% of the full-size transformer's bytes (benchmarks/nf4_sensitivity.json). The other two cost
# 1.7% and made no difference there.
DEFAULT_KEEP = (
    "transformer.final_linear",
    "transformer.text_proj",
    "transformer.time_embedding",
)


@dataclass(frozen=True)
class WeightPlan:
    """What becomes of a quantized component.

    Attributes:
        model: The model without storage, its linear layers replaced and its config completed.
        tensors: Name in the output -> where the source has it.
        quantized: The names that become NF4. All others are copied.
        kept_modules: Names of linear layers that were asked to keep their precision.
    """

    model: torch.nn.Module
    tensors: dict[str, StoredTensor]
    quantized: frozenset[str]
    kept_modules: list[str]

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the output, NF4 settings at their largest possible size."""
        specs: dict[str, TensorSpec] = {}
        for name, stored in self.tensors.items():
            parts = {"": stored.spec}
            if name in self.quantized:
                parts = nf4.stored_specs(stored.spec.shape, DTYPES[stored.spec.dtype])
            specs |= {name + suffix: spec for suffix, spec in parts.items()}
        return specs


def plan_weights(part: StoredComponent, keep: Sequence[str] = ()) -> WeightPlan:
    """Decide which tensors of a component become NF4, and under which names all of them are saved.

    Args:
        part: A component of the original repository, one that is to be quantized. Nothing is read but a tied weight
            that is stored twice.
        keep: Globs over full names of linear layers, as in `convert.quantize`.

    Raises:
        InvalidRepository: It is quantized already, or a tensor is missing or has an unexpected shape or dtype.
        IncompatibleLibraries: The libraries can't build the model that the configuration describes.
    """
    folder, component, stored = part.folder, part.component, dict(part.tensors)
    if part.quantized:
        raise InvalidRepository(f"{folder} is quantized already: name the original repository instead.")
    dtype = _main_dtype(folder, stored)
    with library_reading(part, part.config_file):
        model: Any = meta_model(component, part.settings)
    model = model.to(dtype) if component.library == "transformers" else model
    state, names = model.state_dict(), _output_names(model, stored)
    tensors = {name: _find_tensor(folder, component, stored, key, name, state[key]) for key, name in names.items()}
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = [name for name in linear if any(matches(f"{component.name}.{name}", pattern) for pattern in keep)]
    replaced = _replace_linear_layers(model, component, dtype, kept)
    return WeightPlan(model, tensors, frozenset(names[f"{name}.weight"] for name in replaced), kept)


def matches(name: str, pattern: str) -> bool:
    """Whether a glob names a linear layer or a module above it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def save_configs(model: Any, folder: Path) -> None:
    """Write the config files that ``save_pretrained`` writes."""
    if not isinstance(model, transformers.PreTrainedModel):
        model.save_config(folder)
        return
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _output_names(model: torch.nn.Module, stored: dict[str, StoredTensor]) -> dict[str, str]:
    """State dict key -> name in the output.

    A tied weight that the source stores a second time with other values is untied, as ``from_pretrained`` does whatever
    the config says. One that is stored under its second name alone is added to `stored` under the first.
    """
    names = saved_names(model)
    for alias, key in tied_weights(model).items():
        if {alias, names[key]} <= stored.keys() and not _same_values(stored[alias], stored[names[key]]):
            names[alias] = alias
        elif alias in stored:
            stored.setdefault(names[key], stored[alias])
    return names


def _find_tensor(
    folder: Path, component: Component, stored: dict[str, StoredTensor], key: str, name: str, expected: torch.Tensor
) -> StoredTensor:
    """The source's tensor, by its name in the output or its state dict key.

    Raises:
        InvalidRepository: It isn't there, or has an unexpected shape or dtype.
    """
    found = stored.get(name) or stored.get(key)
    if found is None:
        raise InvalidRepository(
            f"{folder} has no tensor {name}, which {component.class_name} needs: download it again."
        )
    if found.spec.shape != tuple(expected.shape):
        raise InvalidRepository(
            f"{found.file}: tensor {name} has shape {list(found.spec.shape)}, but {component.config} asks for "
            f"{list(expected.shape)}: download both again."
        )
    if expected.is_floating_point() and DTYPES[found.spec.dtype] not in nf4.DTYPES:
        raise InvalidRepository(
            f"{found.file}: tensor {name} is {found.spec.dtype}: convert the source to BF16, F16 or F32 first."
        )
    return found


def _replace_linear_layers(model: Any, component: Component, dtype: torch.dtype, kept: Iterable[str]) -> list[str]:
    """Let the library put bitsandbytes layers into the model and settings into its config. Returns the layers' names.

    Layers to keep go into the config by their full names, which both libraries match from the start of a name. Given
    such a list, transformers no longer adds its own choice (output embeddings, tied weights), so that is added here.
    """
    skip = list(kept)
    if skip and component.library == "transformers":
        skip = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, skip, add_default_skips=True)
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": QUANTIZATION.quant_type,
        "bnb_4bit_use_double_quant": QUANTIZATION.double_quantization,
        "bnb_4bit_compute_dtype": QUANTIZATION.compute_dtype,
        "llm_int8_skip_modules": sorted(skip) or None,
    }
    quantizer = nf4_quantizer(component.library, settings, pre_quantized=False)
    with MetaParameters():
        exchange_layers(model, quantizer, dtype)
    if component.library == "diffusers":
        model.register_to_config(quantization_config=quantizer.quantization_config)
    else:
        model.config.quantization_config = quantizer.quantization_config
    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    return one.spec == other.spec and all(
        torch.equal(left, right) for left, right in zip(read_chunks(one), read_chunks(other), strict=True)
    )


def _main_dtype(folder: Path, stored: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype of most floating point values."""
    counts: dict[torch.dtype, int] = {}
    for tensor in stored.values():
        dtype = DTYPES[tensor.spec.dtype]
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + tensor.spec.bytes // dtype.itemsize
    if not counts:
        raise InvalidRepository(f"{folder} has no floating point weights: name an original-precision repository.")
    return max(counts, key=counts.__getitem__)
