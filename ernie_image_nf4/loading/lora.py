"""LoRAs of all trainers on a pipeline, through diffusers' and peft's own adapters.

``load_lora_weights`` of diffusers knows two trainers' names of tensors. Files of the others are read into these names
first (``repository/lora_file.py``).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ErnieImagePipeline
from torch import nn

from ..errors import InvalidSettings
from ..repository.lora_file import convert_lora, describe_lora, read_lora
from ..repository.lora_source import find_lora
from ..repository.metadata import file_record

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

# Arguments of ``load_lora_weights`` that say where a LoRA is.
SOURCE_OPTIONS = ("weight_name", "revision", "token", "cache_dir", "local_files_only")
BASE_LAYER = ".base_layer"  # peft's name of a layer within its adapters
NOTED_FILE = "ernie_image_nf4_file"  # attribute of an adapter's settings


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
    try:
        factor = float(strength)
    except (TypeError, ValueError, OverflowError):
        factor = math.nan
    if not math.isfinite(factor):
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
    note_file(pipe, [chosen], file)
    pipe.set_adapters([*before, chosen], [*before.values(), factor])
    return chosen


def as_diffusers_lora(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor], transformer: nn.Module, **options: object
) -> tuple[Mapping[str, torch.Tensor], Path | None]:
    """What ``load_lora_weights`` is given, of any trainer, in the names that diffusers takes, and its file if any.

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
        return in_products_dtype(convert_lora(source, layers), transformer), None
    file = find_lora(source, **options)  # type: ignore[arg-type]
    return in_products_dtype(read_lora(file, layers), transformer), file


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
                    # Without the last digits, in which the product with a part of the rank has rounded.
                    found.setdefault(name, float(f"{layer.scaling[name] / whole:.12g}") if whole else 0.0)
    return found


@dataclass(frozen=True)
class ActiveLora:
    """An adapter that is on.

    Attributes:
        name: Of its file, or without one the adapter's.
        strength: Factor of what it adds; of the first layer, if it has several.
        sha256: Digest of the file, or of its tensors and of its strengths in all layers.
        from_file: Whether it was read from a file, at one strength. Training that went on since isn't seen.
    """

    name: str
    strength: float
    sha256: str
    from_file: bool


def active_loras(pipe: ErnieImagePipeline) -> list[ActiveLora]:
    """The adapters of the transformer that are on, with what tells them from others."""
    found = []
    for name, strength in strengths(pipe).items():
        noted = noted_file(pipe, name)
        everywhere = all(math.isclose(factor, strength * whole) for factor, whole in _factors(pipe, name).values())
        if noted is not None and everywhere:
            found.append(ActiveLora(noted[0], strength, noted[1], from_file=True))
        else:
            found.append(ActiveLora(name, strength, _tensors_digest(pipe, name), from_file=False))
    return found


def note_file(pipe: ErnieImagePipeline, names: Iterable[str], file: Path | None) -> None:
    """Keep name and SHA-256 of the file that adapters came from in their settings, with which they go."""
    noted = None if file is None else (file.name, file_record(file).sha256)
    for name in names:
        setattr(pipe.transformer.peft_config[name], NOTED_FILE, noted)


def noted_file(pipe: ErnieImagePipeline, name: str) -> tuple[str, str] | None:
    """Name and SHA-256 of the file that an adapter came from, if it is known."""
    return getattr(pipe.transformer.peft_config[name], NOTED_FILE, None)


def _factors(pipe: ErnieImagePipeline, name: str) -> dict[str, tuple[float, float]]:
    """What an active adapter is multiplied by in each layer, and what it would be at strength 1."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for key, layer in pipe.transformer.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            on = name in layer.active_adapters and not layer.disable_adapters
            found[key] = layer.scaling[name] if on else 0.0, layer.lora_alpha[name] / layer.r[name]
    return found


def _tensors_digest(pipe: ErnieImagePipeline, name: str) -> str:
    """SHA-256 of an adapter's tensors, and of the factors that stand before them."""
    from peft import get_peft_model_state_dict

    digest = hashlib.sha256(repr(_factors(pipe, name)).encode())
    for key, tensor in sorted(get_peft_model_state_dict(pipe.transformer, adapter_name=name).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
            setattr(transformer.peft_config[name], NOTED_FILE, getattr(config, NOTED_FILE, None))
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


def check_name(name: object) -> None:
    """Refuse a name for an adapter that torch doesn't take for a module.

    Raises:
        InvalidSettings: It is none.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise InvalidSettings(f"An adapter can't be called {name!r} in torch: use another name, without a dot.")


def _free_name(name: str | None, file: Path, taken: list[str]) -> str:
    """The name asked for, or one by the file that isn't taken."""
    if name is not None:
        if name in taken:
            raise InvalidSettings(f"There is an adapter {name!r} already: name this one otherwise, or delete that one.")
        check_name(name)
        return name
    stem = file.stem.replace(".", "_")  # torch allows no dots in names of modules, and none of its own attributes
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(each for each in names if each not in taken and not hasattr(nn.ModuleDict, each))
