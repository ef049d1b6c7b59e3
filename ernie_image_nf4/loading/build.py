"""`build_pipeline`: the components of a repository, loaded and put together as a pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import nn

from ..errors import InvalidRepository
from ..memory.host_embeddings import enable_host_embeddings, unused_modules
from ..memory.placement import Placement
from ..repository import nf4_format as nf4
from ..repository.chat_template import check_chat_template
from ..repository.libraries import library_reading
from ..repository.record import Repository, StoredComponent
from ..repository.safetensors_io import DTYPES, StoredTensor
from ..upstream.triton_cache import prepare_triton
from .assembly import TensorSource, assemble, keep_as_stored, move_rest
from .device_reader import DeviceReader
from .from_pretrained import load_plain
from .loaded_pipeline import make_pipeline_take_turns
from .tokenizers import load_tokenizer


def build_pipeline(repository: Repository, placement: Placement) -> diffusers.ErnieImagePipeline:
    """Load all components of a repository and make a pipeline of them.

    The quantized components are on the device if ``placement.memory`` is ``"resident"``, all others on the CPU.

    Raises:
        InvalidRepository: A component is damaged, or doesn't fit the others.
        IncompatibleLibraries: The installed libraries can't load a component that is sound.
    """
    with ThreadPoolExecutor(2) as pool, _tensor_source(repository, placement) as source:
        if placement.fast:
            pool.submit(prepare_triton)
        parts: dict[str, Any] = {}
        template = None
        if pe_tokenizer := repository.components.get("pe_tokenizer"):
            parts["pe_tokenizer"] = load_tokenizer(pe_tokenizer)
            # Renders in a process of its own, for which there is no need to wait.
            template = pool.submit(check_chat_template, parts["pe_tokenizer"])
        for name, part in repository.components.items():
            if name not in parts:
                parts[name] = _load_component(part, placement, source)
        source.wait()
        pipe = diffusers.ErnieImagePipeline(**parts)
        if template:
            template.result()
    make_pipeline_take_turns(pipe)
    pipe.register_to_config(_name_or_path=str(repository.folder))
    _check_agreement(pipe, repository)
    return pipe


@contextmanager
def _tensor_source(repository: Repository, placement: Placement) -> Iterator[TensorSource]:
    """Where tensors come from. Weights that go to the device without upstream's help are on their way there at once."""
    if not placement.moves:
        yield TensorSource()
        return
    with DeviceReader(placement.device) as reader:
        reader.start(
            stored
            for part in repository.components.values()
            if part.component.quantized
            for stored in _to_be_read(part, placement)
        )
        yield TensorSource(reader)


def _to_be_read(part: StoredComponent, placement: Placement) -> list[StoredTensor]:
    """The tensors of a component that come to the device as they are stored; others are converted on the host first."""
    of_nf4 = {
        name.removesuffix(".absmax") + suffix
        for name in part.tensors
        if name.endswith(".absmax")
        for suffix in nf4.SUFFIXES
    }
    return [
        stored
        for name, stored in part.device_tensors(placement.fast).items()
        if name in of_nf4 or DTYPES[stored.spec.dtype] == _weight_dtype(part, name, stored, placement)
    ]


def _weight_dtype(part: StoredComponent, name: str, stored: StoredTensor, placement: Placement) -> torch.dtype:
    return placement.precision.of_weight(part.component.name, name, len(stored.spec.shape))


def _load_component(part: StoredComponent, placement: Placement, source: TensorSource) -> Any:
    """One component. Models with NF4 weights are on the device that they are loaded to, all else is on the CPU."""
    component = part.component
    if component.weights is None:
        return load_tokenizer(part) if component.library == "transformers" else _load_scheduler(part)
    if component.quantized and placement.load_device.type != "cpu":
        return load_plain(part, placement)
    model = assemble(part, source, placement.precision)
    if placement.device.type == "cpu":
        keep_as_stored(model)
    if placement.fast and component.quantized:
        _leave_unused_on_host(model, part, placement)
    return model


def _leave_unused_on_host(model: nn.Module, part: StoredComponent, placement: Placement) -> None:
    """Move all of a model to the device that isn't there yet, but what text-to-image doesn't need there."""
    unused: list[nn.Module] = []
    if part.component.unused:
        enable_host_embeddings(model, part.component.unused, wide=placement.mixed)
        unused = unused_modules(model, part.component.unused)
    if placement.moves:
        move_rest(model, placement.device, unused)


def _load_scheduler(part: StoredComponent) -> Any:
    with library_reading(part):
        return getattr(diffusers, part.class_name).from_config(part.config)


def _check_agreement(pipe: diffusers.ErnieImagePipeline, repository: Repository) -> None:
    """Refuse components that are sound by themselves, but don't fit each other.

    Raises:
        InvalidRepository: A size differs, or a tokenizer has more tokens than its model.
    """
    sizes = {
        "values a token of the text": (
            pipe.text_encoder.config.text_config.hidden_size,
            pipe.transformer.config.text_in_dim,
        ),
        "channels of the latents": (
            pipe.vae.config.latent_channels * math.prod(pipe.vae.config.patch_size),
            pipe.transformer.config.in_channels,
        ),
    }
    for what, (given, taken) in sizes.items():
        if given != taken:
            raise InvalidRepository(
                f"{repository.folder}: of {what}, the transformer takes {taken} and is given {given}: "
                "use components of one release."
            )
    for tokenizer, model in ((pipe.tokenizer, pipe.text_encoder), (pipe.pe_tokenizer, pipe.pe)):
        if model is not None and len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
            raise InvalidRepository(
                f"{tokenizer.name_or_path} has {len(tokenizer)} tokens, its model knows {rows}: "
                "use components of one release."
            )
