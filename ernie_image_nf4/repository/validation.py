"""Whether the weight files of a component hold exactly the tensors that its configuration asks for, each in its form.

The model is built without storage from the configuration, the headers of the files are read, and both are compared. That takes no
weights and no metadata, so it is done before the model gets any; a configuration of absurd size ends here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from bitsandbytes.functional import get_4bit_type
from bitsandbytes.nn import Linear4bit
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.initialization import no_init_weights
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from ..errors import InvalidRepository
from ..loading.assembly import NF4Weight
from . import nf4_format as nf4
from .components import Component
from .meta_model import saved_names, skeleton, state_tensors, tied_weights, upstream_lock
from .resolve import is_quantized, weight_files
from .safetensors_io import DTYPES, StoredTensor, TensorSpec, read_chunks, read_header, read_tensor
from .security import INDEX, library_reading, read_json

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those bitsandbytes has
FLOATS = ("bfloat16", "float16", "float32")
# What a component's configuration has to say about its quantization; other settings don't matter to weights that are quantized.
NF4_SETTINGS = {
    "quant_method": ("bitsandbytes",),
    "load_in_4bit": (True,),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_compute_dtype": FLOATS,
    "bnb_4bit_quant_storage": ("uint8", None),
}
MAX_SETTINGS = 4096  # bytes of a quantization state's settings; real ones have some 200
MAX_TIED = 16  # parameters that are registered, but share another one's storage


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


def check_structure(folder: Path, component: Component) -> None:
    """Refuse a component whose files and configuration don't fit each other. Reads headers and quantization settings only.

    Raises:
        InvalidRepository: They don't, or one of them can't be read. The message has the first problem.
    """
    _refuse(structure_problems(folder, component))


def structure_problems(folder: Path, component: Component, *, values: bool = False) -> list[str]:
    """Where the files of a component differ from what its configuration asks for, a sentence each.

    Args:
        folder: The repository.
        component: Its component. One without weights has no problems.
        values: Whether to read all values as well, and look for NaN, infinity and a strange NF4 table.

    Raises:
        InvalidRepository: The configuration describes no model, or a file can't be read.
    """
    if component.weights is None:
        return []
    stored, problems = _stored_tensors(folder, component)
    problems += _differences(folder, component, _built_model(folder, component, len(stored)), stored)
    if values and not problems:
        problems += _value_problems(stored)
    return problems


@contextmanager
def checked_loading(folder: Path, component: Component) -> Iterator[list[NF4Weight]]:
    """Let ``from_pretrained`` of a quantized component, in this context and thread, take weights only if they fit its model.

    Finds what `check_structure` finds, in the model that upstream builds, before it has storage: a second one would take Python as long.

    Yields:
        The component's NF4 weights; empty until they have been checked.

    Raises:
        InvalidRepository: As `check_structure`.
    """
    stored, problems = _stored_tensors(folder, component)
    _refuse(problems)
    quantizer_class, _, _ = _quantizer(folder, component)
    thread, weights = threading.get_ident(), []
    with upstream_lock, ExitStack() as building:
        own, upstream = vars(quantizer_class).get("preprocess_model"), quantizer_class.preprocess_model
        building.enter_context(_at_most(len(stored) + MAX_TIED, folder / component.name / component.config))

        def preprocess_model(self, model, *args, **kwargs):
            if threading.get_ident() != thread:
                return upstream(self, model, *args, **kwargs)
            building.close()  # its layers are replaced now, whose parameters count anew
            result = upstream(self, model, *args, **kwargs)
            _refuse(_differences(folder, component, model, stored, weights))
            return result

        quantizer_class.preprocess_model = preprocess_model
        try:
            yield weights
        finally:
            if own is None:
                del quantizer_class.preprocess_model
            else:
                quantizer_class.preprocess_model = own


@contextmanager
def bounded_loading(folder: Path, component: Component) -> Iterator[None]:
    """Give up a model that upstream builds in this context and thread if it has more parameters than a component's files.

    Raises:
        InvalidRepository: It has, or the files can't be read.
    """
    stored, problems = _stored_tensors(folder, component)
    _refuse(problems)
    with _at_most(len(stored) + MAX_TIED, folder / component.name / component.config):
        yield


def check_model(folder: Path, component: Component, model: torch.nn.Module) -> None:
    """As `check_structure`, by a model that has been loaded and isn't quantized."""
    stored, problems = _stored_tensors(folder, component)
    _refuse(problems + _differences(folder, component, model, stored))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise InvalidRepository(f"{problems[0]} Download the repository again, both configuration and weights.")


def _stored_tensors(folder: Path, component: Component) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors in the files of a component, and where its index of shards is wrong about them."""
    files = weight_files(folder, component)
    stored, problems = {}, []
    for file in files:
        tensors = read_header(file)
        problems += [f"{file}: tensor {name} is in another file as well." for name in sorted(stored.keys() & tensors)]
        stored |= tensors
    index = folder / component.name / f"{component.weights}{INDEX}"
    if index.exists():
        listed = read_json(folder, index)["weight_map"]
        if listed != {name: tensor.file.name for name, tensor in stored.items()}:
            problems.append(f"{index} doesn't list the tensors of its files.")
    return stored, problems


def _built_model(folder: Path, component: Component, count: int) -> torch.nn.Module:
    """The model of a component without storage, as the libraries build it before they load weights.

    Args:
        folder: The repository.
        component: Its component.
        count: How many tensors it has. A model of more parameters is given up while it is built.
    """
    place = folder / component.name
    with upstream_lock, no_init_weights():  # which takes time even without storage
        with library_reading(place / component.config), _at_most(count + MAX_TIED, place / component.config):
            model = skeleton(component, place)
        if is_quantized(folder, component):
            quantizer_class, config_class, settings = _quantizer(folder, component)
            with library_reading(place / component.config):
                quantizer = quantizer_class(config_class.from_dict(settings), pre_quantized=True)
                quantizer.preprocess_model(
                    model, config=model.config, dtype=torch.bfloat16, device_map=None, keep_in_fp32_modules=[]
                )
    return model


def _quantizer(folder: Path, component: Component) -> tuple[type, type, dict]:
    """The classes of quantizer and settings by which a component's library loads NF4, and the settings.

    Raises:
        InvalidRepository: They ask for something else than NF4.
    """
    file = folder / component.name / component.config
    settings = read_json(folder, file)["quantization_config"]
    if not isinstance(settings, dict) or any(settings.get(key) not in values for key, values in NF4_SETTINGS.items()):
        raise InvalidRepository(f"{file} is quantized in another way than NF4: make an NF4 repository with `quantize`.")
    if component.library == "diffusers":
        return BnB4BitDiffusersQuantizer, diffusers.BitsAndBytesConfig, settings
    return Bnb4BitHfQuantizer, transformers.BitsAndBytesConfig, settings


def _differences(
    folder: Path,
    component: Component,
    model: torch.nn.Module,
    stored: dict[str, StoredTensor],
    weights: list[NF4Weight] | None = None,
) -> list[str]:
    """Where stored tensors differ from those that a model without storage asks for. NF4 weights are added to `weights`."""
    place = folder / component.name
    with library_reading(place / component.config):
        expected, tied = _expected_tensors(model, stored)
    settings = _read_settings(stored)
    used, problems = set(tied), []
    for name in sorted(tied.keys() & stored):
        problems += _plain_problems(name, tied[name], stored[name])
    for name, tensor in expected.items():
        if name not in stored:
            problems.append(f"{place} has no tensor {name}.")
            continue
        if tensor.quantized:
            parts = {other.removeprefix(name): stored[other] for other in _with_state(name, stored)}
            its_settings = settings.get(f"{name}.{nf4.QUANT_STATE}")
            problems += _nf4_problems(name, tensor, parts, its_settings)
            if weights is not None:
                weights.append(NF4Weight(name, tensor.key, parts, its_settings))
            used |= {name + suffix for suffix in parts}
        else:
            problems += _plain_problems(name, tensor, stored[name])
            used.add(name)
    return [
        *problems,
        *(f"{stored[name].file}: tensor {name} belongs to no layer." for name in sorted(stored.keys() - used)),
    ]


def _expected_tensors(
    model: torch.nn.Module, stored: Container[str]
) -> tuple[dict[str, Expected], dict[str, Expected]]:
    """What a model asks for, by the names that are stored or else those under which it is saved, and tied weights, which may be left out."""
    state = state_tensors(model)
    quantized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}

    def expected(key: str) -> Expected:
        tensor = state[key]
        return Expected(key, tuple(tensor.shape), tensor.is_floating_point(), key in quantized)

    names = saved_names(model, stored)
    return {names[key]: expected(key) for key in names}, {key: expected(key) for key in tied_weights(model)}


@contextmanager
def _at_most(count: int, config: Path) -> Iterator[None]:
    """Give up building a model, in this thread, at the first parameter beyond `count`: a number of layers may be in the billions."""
    thread, seen = threading.get_ident(), 0

    def look(*_: object) -> None:
        nonlocal seen
        if threading.get_ident() == thread:
            seen += 1
            if seen > count:
                raise InvalidRepository(
                    f"{config} asks for more tensors than the weight files have: download both again."
                )

    hook = register_module_parameter_registration_hook(look)
    try:
        yield
    finally:
        hook.remove()


def _with_state(name: str, stored: dict[str, StoredTensor]) -> list[str]:
    """The names of a weight and of its quantization state, as far as they are there."""
    return [name + suffix for suffix in nf4.SUFFIXES if name + suffix in stored]


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
        f"{file}: tensor {name} was quantized with {key} {settings.get(key)!r}, expected {' or '.join(map(str, values))}."
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
