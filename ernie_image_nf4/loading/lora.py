"""LoRAs of all trainers on a pipeline, through diffusers' and peft's own adapters.

``load_lora_weights`` of diffusers knows two trainers' names of tensors. Files of the others are read into these names
first (``repository/lora_file.py``).
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ErnieImagePipeline
from torch import nn

from ..errors import InvalidSettings
from ..repository.lora_file import convert_lora, describe_lora, read_lora
from ..repository.lora_source import find_lora

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

# Arguments of ``load_lora_weights`` that say where a LoRA is.
SOURCE_OPTIONS = ("weight_name", "revision", "token", "cache_dir", "local_files_only")
BASE_LAYER = ".base_layer"  # peft's name of a layer within its adapters


def load_lora(
    pipe: ErnieImagePipeline,
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    strength: float = 1.0,
    weight_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> str:
    """Add a LoRA to a pipeline's transformer, beside those that are there, which keep their strengths.

    Files of diffusers, peft, ai-toolkit, OneTrainer and kohya's scripts are known, DoRA included, with or without
    alphas. Only safetensors are opened. ``pipe.set_adapters`` changes strengths, ``pipe.delete_adapters`` takes one
    away.

    Args:
        pipe: A pipeline, as from `load`.
        source: A file, a folder, or a Hub id (``"user/name"``).
        name: Of the adapter in the pipeline; None takes the file's, with a number behind it if there is one already.
        strength: Factor of what the LoRA adds; may be negative.
        weight_name: Name of the file in a folder or Hub repository that holds several.
        revision: Branch, tag or commit of a Hub repository.
        token: Hub token, or True for the stored one.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Take what the Hub cache holds, without any network call.

    Returns:
        The adapter's name.

    Raises:
        InvalidLora: No such file, no LoRA, or one that doesn't fit the transformer.
        InvalidSettings: A name that is taken, or a strength that isn't a finite number; peft isn't installed.
        RepositoryNotFound: The Hub repository isn't there or can't be reached.
    """
    check_peft()
    if not abs(strength) < float("inf"):
        raise InvalidSettings(f"Strength {strength} of a LoRA is not a finite number: try 1.0.")
    file = find_lora(
        source,
        weight_name=weight_name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    before = strengths(pipe)
    chosen = _free_name(name, file, known_adapters(pipe))
    state = in_products_dtype(read_lora(file, layer_shapes(pipe.transformer)), pipe.transformer)
    if unused := describe_lora(file).unused:
        logger.warning("%s also holds a LoRA for a text encoder, which is not used: %s ...", file, unused[0])
    pipe.load_lora_weights(state, adapter_name=chosen)
    pipe.set_adapters([*before, chosen], [*before.values(), float(strength)])
    return chosen


def as_diffusers_lora(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor], transformer: nn.Module, **options: object
) -> Mapping[str, torch.Tensor]:
    """What ``load_lora_weights`` is given, of any trainer, in the names that diffusers takes.

    Args:
        source: Tensors by name, a file, a folder, or a Hub id.
        transformer: What they are for.
        **options: Of ``load_lora_weights``, those that `find_lora` takes.

    Raises:
        InvalidLora: As `load_lora`.
        RepositoryNotFound: See there.
    """
    layers = layer_shapes(transformer)
    if isinstance(source, Mapping):
        return in_products_dtype(convert_lora(source, layers), transformer)
    return in_products_dtype(read_lora(find_lora(source, **options), layers), transformer)  # type: ignore[arg-type]


def layer_shapes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear layer, by the name that it has without adapters."""
    return {
        name.removesuffix(BASE_LAYER): (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not is_adapter(name)
    }


def in_products_dtype(state: Mapping[str, torch.Tensor], transformer: nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA's tensors in the dtype that their layers multiply in, whatever the file has.

    peft would convert a layer's input instead, in every step, and multiply in the file's dtype.
    """
    dtypes = {
        name.removesuffix(BASE_LAYER): _product_dtype(module)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not is_adapter(name)
    }
    return {
        key: tensor.to(dtypes[key.removeprefix("transformer.").partition(".lora_")[0]]) for key, tensor in state.items()
    }


def _product_dtype(layer: nn.Linear) -> torch.dtype:
    return getattr(layer, "compute_dtype", None) or layer.weight.dtype  # NF4 weights are bytes


def is_adapter(name: str) -> bool:
    """Whether a module is part of what peft adds to a layer, by its name in the model."""
    return any(part.startswith("lora_") for part in name.split("."))


def known_adapters(pipe: ErnieImagePipeline) -> list[str]:
    """Names of all adapters of the transformer, active or not, in the order in which they were loaded."""
    return list(getattr(pipe.transformer, "peft_config", None) or {})


def strengths(pipe: ErnieImagePipeline) -> dict[str, float]:
    """Strengths of the active adapters of the transformer by name."""
    if not known_adapters(pipe):
        return {}
    from peft.tuners.lora import LoraLayer

    found: dict[str, float] = {}
    for layer in pipe.transformer.modules():
        if isinstance(layer, LoraLayer) and not layer.disable_adapters:
            for name in layer.active_adapters:
                if name in layer.scaling:
                    whole = layer.lora_alpha[name] / layer.r[name]
                    found.setdefault(name, layer.scaling[name] / whole if whole else 0.0)
    return found


@contextmanager
def switched(pipe: ErnieImagePipeline, wanted: Mapping[str, float] | None) -> Iterator[None]:
    """Use other adapters of a pipeline's transformer, and those that are on now again at the end.

    Args:
        pipe: The pipeline.
        wanted: Strengths by name; None for what the context itself sets.
    """
    before = {layer: (layer.active_adapters, layer.disable_adapters, dict(layer.scaling)) for layer in _layers(pipe)}
    if wanted is not None:
        for layer in _layers(pipe):
            layer.enable_adapters(True)
            layer.set_adapter(list(wanted))
            for name, strength in wanted.items():
                if name in layer.scaling:
                    layer.set_scale(name, strength)
    try:
        yield
    finally:
        for layer in _layers(pipe):
            active, disabled, scaling = before.get(layer, ([], False, {}))
            layer.set_adapter([name for name in active if name in known_adapters(pipe)])
            layer.enable_adapters(not disabled)
            layer.scaling.update({name: scale for name, scale in scaling.items() if name in layer.scaling})


def _layers(pipe: ErnieImagePipeline) -> list[Any]:
    """The layers that peft has put around the transformer's own."""
    if not known_adapters(pipe):
        return []
    from peft.tuners.lora import LoraLayer

    return [layer for layer in pipe.transformer.modules() if isinstance(layer, LoraLayer)]


@contextmanager
def without_adapters(pipe: ErnieImagePipeline) -> Iterator[list[str]]:
    """Take all adapters off a pipeline's transformer, and put them back at the end. Yields their names."""
    names = known_adapters(pipe)
    if not names:
        yield names
        return
    from peft import get_peft_model_state_dict

    active, transformer = strengths(pipe), pipe.transformer
    kept = [
        (name, transformer.peft_config[name], get_peft_model_state_dict(transformer, adapter_name=name))
        for name in names
    ]
    pipe.unload_lora_weights()
    try:
        yield names
    finally:
        for name, config, state in kept:
            transformer.load_lora_adapter(state, prefix=None, adapter_name=name, metadata=_as_metadata(config))
        if active:
            pipe.set_adapters(list(active), list(active.values()))
        else:
            pipe.disable_lora()


def _as_metadata(config: PeftConfig) -> dict[str, Any]:
    """peft's settings as diffusers takes them with a LoRA."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def check_peft() -> None:
    """Refuse LoRAs where peft isn't installed.

    Raises:
        InvalidSettings: It isn't.
    """
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise InvalidSettings("A LoRA needs peft, which isn't installed: `pip install peft`.")


def _free_name(name: str | None, file: Path, taken: list[str]) -> str:
    """The name asked for, or one by the file that isn't taken."""
    if name is not None:
        if name in taken:
            raise InvalidSettings(f"There is an adapter {name!r} already: name this one otherwise, or delete that one.")
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise InvalidSettings(f"An adapter can't be called {name!r} in torch: use another name, without a dot.")
        return name
    stem = file.stem.replace(".", "_")  # torch allows no dots in names of modules, and none of its own attributes
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(each for each in names if each not in taken and not hasattr(nn.ModuleDict, each))
