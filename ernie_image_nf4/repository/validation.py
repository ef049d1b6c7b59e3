"""Whether the weight files of a component hold exactly the tensors that its configuration asks for, each in its form.

The model is built without storage from the configuration and compared with the headers of the files. That needs no
weights and no metadata, so it is done before a weight is read; a configuration of absurd size ends here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from bitsandbytes.functional import get_4bit_type
from bitsandbytes.nn import Linear4bit
from torch import nn

from ..errors import InvalidRepository
from ..upstream.models_in_memory import exchange_layers, nf4_quantizer, persistent_tensors
from . import nf4_format as nf4
from .libraries import library_reading
from .meta_model import MetaParameters, TooManyParameters, meta_model, saved_names, tied_weights
from .record import StoredComponent
from .safetensors_io import DTYPES, StoredTensor, TensorSpec, read_chunks, read_tensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes
FLOATS = ("bfloat16", "float16", "float32")
# What a configuration has to say of its quantization; other settings don't matter to weights that are quantized
# already.
NF4_SETTINGS: dict[str, tuple[Any, ...]] = {
    "quant_method": ("bitsandbytes",),
    "load_in_4bit": (True,),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_compute_dtype": FLOATS,
    "bnb_4bit_quant_storage": ("uint8", None),
}
MAX_SETTINGS = 4096  # bytes of a quantization state's settings; real ones have some 200
MAX_TIED = 16  # parameters of a model that no file has, because they are tied to another one


@dataclass(frozen=True)
class Expected:
    """A tensor that the configuration asks for.

    Attributes:
        key: Its name in the model's state dict.
        shape: Its dimensions.
        floating: Whether its values are floating point numbers.
        quantized: Whether it is the weight of a layer that is stored as NF4.
    """

    key: str
    shape: tuple[int, ...]
    floating: bool
    quantized: bool


@dataclass(frozen=True)
class StoredNF4:
    """A weight in NF4, as it is stored.

    Attributes:
        parts: Its tensors by the suffix of their name, ``""`` for the codes.
        settings: The JSON of its quantization state.
    """

    parts: dict[str, StoredTensor]
    settings: dict[str, Any]


@dataclass
class StoredModel:
    """Which stored tensors go where in a component's model.

    Attributes:
        model: The model, on the meta device.
        quantizer: That put its NF4 layers there, None without any.
        nf4: Weights of these layers, by state dict key.
        plain: All other tensors, by state dict key.
        tied: Tensors that files have for keys that are tied to another one.
        problems: Where files and configuration don't fit each other, a sentence each.
    """

    model: nn.Module
    quantizer: Any
    nf4: dict[str, StoredNF4] = field(default_factory=dict)
    plain: dict[str, StoredTensor] = field(default_factory=dict)
    tied: dict[str, StoredTensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def of_transformers(self) -> bool:
        return isinstance(self.model, transformers.PreTrainedModel)


def check_structure(part: StoredComponent) -> None:
    """Refuse a component whose files and configuration don't fit each other.

    Raises:
        InvalidRepository: They don't. The message has the first problem.
    """
    match_tensors(part)


def structure_problems(part: StoredComponent, *, values: bool = False) -> list[str]:
    """Where the files of a component differ from what its configuration asks for, a sentence each.

    Args:
        part: The component. One without weights has no problems.
        values: Whether to read all values as well, and look for NaN, infinity and a strange NF4 table.

    Raises:
        InvalidRepository: The configuration describes no model, or a file can't be read.
        IncompatibleLibraries: The libraries can't build the model that the configuration describes.
    """
    if part.component.weights is None:
        return []
    problems = [*part.problems, *_matched(part).problems]
    return problems if problems or not values else _value_problems(part.tensors)


def match_tensors(part: StoredComponent, dtype: torch.dtype = torch.bfloat16) -> StoredModel:
    """Build the model of a component without storage, and find what is stored for each of its tensors.

    Args:
        part: The component, with weights.
        dtype: That the model will compute in.

    Raises:
        InvalidRepository: Files and configuration don't fit each other. The message has the first problem.
        IncompatibleLibraries: The libraries can't build the model that the configuration describes.
    """
    problems = [*part.problems]
    if not problems:
        found = _matched(part, dtype)
        problems = found.problems
    if problems:
        raise InvalidRepository(f"{problems[0]} Download the repository again, both configuration and weights.")
    return found


def _matched(part: StoredComponent, dtype: torch.dtype = torch.bfloat16) -> StoredModel:
    """As `match_tensors`, with all problems in the result."""
    model, quantizer = _built_model(part, dtype)
    with library_reading(part, part.config_file):
        expected, tied = _expected_tensors(model, part.tensors)
    settings, stored = _read_settings(part.tensors), part.tensors
    found = StoredModel(model, quantizer, tied={key: stored[key] for key in sorted(tied.keys() & stored)})
    used = set(tied)
    for key, tensor in found.tied.items():
        found.problems += _plain_problems(key, tied[key], tensor)
    for name, wanted in expected.items():
        if name not in stored:
            found.problems.append(f"{part.folder} has no tensor {name}.")
        elif wanted.quantized:
            parts = {suffix: stored[name + suffix] for suffix in nf4.SUFFIXES if name + suffix in stored}
            its_settings = settings.get(f"{name}.{nf4.QUANT_STATE}")
            found.problems += _nf4_problems(name, wanted, parts, its_settings)
            found.nf4[wanted.key] = StoredNF4(parts, its_settings or {})
            used |= {name + suffix for suffix in parts}
        else:
            found.problems += _plain_problems(name, wanted, stored[name])
            found.plain[wanted.key] = stored[name]
            used.add(name)
    found.problems += [
        f"{stored[name].file}: tensor {name} belongs to no layer." for name in sorted(stored.keys() - used)
    ]
    return found


def _built_model(part: StoredComponent, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The model of a component on the meta device, and the quantizer that put its NF4 layers there.

    A model of more parameters than the files have tensors is given up while it is built.
    """
    settings = _quantization_settings(part) if part.quantized else None
    with library_reading(part, part.config_file):
        try:
            model = meta_model(part.component, part.settings, limit=len(part.tensors) + MAX_TIED)
        except TooManyParameters:
            raise InvalidRepository(
                f"{part.config_file} asks for more tensors than the weight files have: download both again."
            ) from None
        if settings is None:
            return model, None
        quantizer = nf4_quantizer(part.component.library, settings)
        with MetaParameters():
            exchange_layers(model, quantizer, dtype)
    return model, quantizer


def _quantization_settings(part: StoredComponent) -> dict[str, Any]:
    settings = part.config["quantization_config"]
    if not isinstance(settings, dict) or any(settings.get(key) not in values for key, values in NF4_SETTINGS.items()):
        raise InvalidRepository(
            f"{part.config_file} is quantized in another way than NF4: make an NF4 repository with `quantize`."
        )
    return dict(settings)


def _expected_tensors(model: nn.Module, stored: Container[str]) -> tuple[dict[str, Expected], dict[str, Expected]]:
    """What a model asks for, by the names that are stored or else those it is saved under; and tied weights."""
    tensors = persistent_tensors(model)
    quantized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}

    def expected(key: str) -> Expected:
        return Expected(key, tuple(tensors[key].shape), tensors[key].is_floating_point(), key in quantized)

    names = saved_names(model, stored)
    return {names[key]: expected(key) for key in names}, {key: expected(key) for key in tied_weights(model)}


def _plain_problems(name: str, tensor: Expected, found: StoredTensor) -> list[str]:
    """What is wrong with a tensor that isn't quantized."""
    problems = []
    if found.spec.shape != tensor.shape:
        problems.append(
            f"{found.file}: tensor {name} has shape {list(found.spec.shape)}, expected {list(tensor.shape)}."
        )
    if DTYPES[found.spec.dtype].is_floating_point != tensor.floating or found.spec.dtype.startswith("F8"):
        kind = "BF16, F16 or F32" if tensor.floating else "whole numbers"
        problems.append(f"{found.file}: tensor {name} is {found.spec.dtype}, expected {kind}.")
    return problems


def _nf4_problems(name: str, tensor: Expected, parts: dict[str, StoredTensor], settings: dict | None) -> list[str]:
    """What is wrong with an NF4 weight and its quantization state, given by suffix, with the state's settings.

    bitsandbytes believes what it is given: on a CPU it reads past the end of a scale tensor that is too short.
    """
    file = parts[""].file
    settings_name = f".{nf4.QUANT_STATE}"
    if settings_name not in parts:
        return [f"{file}: tensor {name} has no quantization state ({settings_name} is missing)."]
    if settings is None:
        return [f"{file}: the quantization state of tensor {name} is unreadable."]
    wanted = {"quant_type": ["nf4"], "blocksize": BLOCK_SIZES, "dtype": FLOATS}
    wanted["shape"] = [list(tensor.shape)]
    nested = any(suffix.startswith(".nested") for suffix in parts)
    if nested:
        wanted |= {"nested_blocksize": [nf4.NESTED_BLOCK_SIZE], "nested_dtype": ["float32"]}
    problems = [
        f"{file}: tensor {name} was quantized with {key} {settings.get(key)!r}, "
        f"expected {' or '.join(map(str, values))}."
        for key, values in wanted.items()
        if settings.get(key) not in values
    ]
    offset = settings.get("nested_offset")
    if nested and not (type(offset) is float and math.isfinite(offset)):
        problems.append(f"{file}: tensor {name} has the offset {offset!r} of its scales, expected a number.")
    if problems:
        return problems
    specs = nf4.stored_specs(tensor.shape, torch.bfloat16, settings["blocksize"])
    if not nested:
        specs = {suffix: spec for suffix, spec in specs.items() if not suffix.startswith(".nested")}
        specs[".absmax"] = TensorSpec("F32", specs[".absmax"].shape)
    del specs[settings_name]
    for suffix, spec in specs.items():
        found = parts[suffix].spec if suffix in parts else None
        if found != spec:
            problems.append(f"{file}: tensor {name}{suffix} is {found or 'missing'}, expected {spec}.")
    return problems


def _read_settings(stored: dict[str, StoredTensor]) -> dict[str, dict | None]:
    """The settings of all quantization states, JSON text in tensors, by their names. None where they are none."""
    found: dict[str, dict | None] = {}
    states = [(name, tensor) for name, tensor in stored.items() if name.endswith(f".{nf4.QUANT_STATE}")]
    for file, group in itertools.groupby(states, lambda state: state[1].file):
        with file.open("rb") as stream:  # once: a component has hundreds of them
            for name, tensor in group:
                found[name] = None
                if tensor.spec.dtype == "U8" and len(tensor.spec.shape) == 1 and tensor.spec.bytes <= MAX_SETTINGS:
                    stream.seek(tensor.offset)
                    with contextlib.suppress(ValueError, RecursionError):
                        settings = json.loads(stream.read(tensor.spec.bytes))
                        found[name] = settings if isinstance(settings, dict) else None
    return found


def _value_problems(stored: dict[str, StoredTensor]) -> list[str]:
    """Where the values of tensors can't be right."""
    problems = []
    for name, tensor in stored.items():
        if not DTYPES[tensor.spec.dtype].is_floating_point:
            continue
        if not all(bool(chunk.isfinite().all()) for chunk in read_chunks(tensor)):
            problems.append(f"{tensor.file}: tensor {name} has NaN or infinite values.")
        elif name.endswith(".quant_map") and not torch.equal(read_tensor(tensor), get_4bit_type("nf4", device="cpu")):
            problems.append(f"{tensor.file}: tensor {name} isn't the table of NF4.")
    return problems
