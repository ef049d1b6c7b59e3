"""The model that a component's configuration describes, without storage: classes, names, shapes and configs.

Which names weights have in files, and which are tied, are questions that diffusers and transformers answer themselves
here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Container
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion

from ..upstream.models_in_memory import persistent_tensors
from .components import Component

GENERATION_CONFIG = transformers.utils.GENERATION_CONFIG_NAME


# By which modules make their buffers.
FACTORIES = {torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros}


INITIALIZERS = ("torch.nn.init", "transformers.initialization")  # the latter takes the former's place while it is used


class TooManyParameters(Exception):
    """A model under construction has more parameters than it may have."""


class MetaParameters(TorchFunctionMode):
    """While active, in this thread, modules get parameters without storage or initial values, and buffers on the CPU.

    PyTorch's layers make their parameters by ``torch.empty`` and fill them by ``torch.nn.init``.
    (``torch.device("meta")`` would take the values of buffers too, which no file has.)

    Args:
        limit: `TooManyParameters` is raised at the first parameter beyond so many: a number of layers may be in the
            billions.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit, self.made = limit, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            self.made += 1
            if self.limit is not None and self.made > self.limit:
                raise TooManyParameters
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__module__", None) in INITIALIZERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in FACTORIES and kwargs.get("device") is None:  # whatever the caller's default device is
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def meta_model(component: Component, settings: dict[str, dict[str, Any]], *, limit: int | None = None) -> nn.Module:
    """Build the model of a component with its parameters on the meta device, and its buffers on the CPU.

    Args:
        component: The component.
        settings: Content of the JSON files in its folder, by name.
        limit: As for `MetaParameters`.

    Raises:
        TooManyParameters: See `limit`.
        Exception: Whatever the libraries raise for a configuration that makes no sense.
    """
    config = copy.deepcopy(settings[component.config])
    with MetaParameters(limit):
        if component.library == "diffusers":
            return _diffusers_model(getattr(diffusers, component.class_name), config)
        model_class = getattr(transformers, component.class_name)
        model = model_class(model_class.config_class.from_dict(_without_dtypes(config)))
    if model.can_generate():
        model.generation_config = _generation_config(component, settings)
    return model


def _diffusers_model(model_class: Any, config: dict[str, Any]) -> nn.Module:
    """``model_class.from_config(config)``, without its warning about settings that it keeps and doesn't use."""
    known = inspect.signature(model_class.__init__).parameters.keys()
    unused = {key: config.pop(key) for key in [*config] if key not in known and not key.startswith("_")}
    model = model_class.from_config(config)
    model.register_to_config(**unused)
    return model


def _without_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that names no dtype, for which transformers would change torch's default, in all threads."""
    return {
        key: _without_dtypes(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("dtype", "torch_dtype")
    }


def _generation_config(component: Component, settings: dict[str, dict[str, Any]]) -> transformers.GenerationConfig:
    if GENERATION_CONFIG in settings:
        return transformers.GenerationConfig.from_dict(copy.deepcopy(settings[GENERATION_CONFIG]))
    return transformers.GenerationConfig.from_model_config(copy.deepcopy(settings[component.config]))


def saved_names(model: nn.Module, stored: Container[str] = ()) -> dict[str, str]:
    """State dict key -> name under which ``save_pretrained`` writes it. Weights tied to another one are left out.

    A key that is among `stored` names is taken as it is, as both libraries do: transformers is slow at finding another
    one.
    """
    tied = tied_weights(model)
    names = {key: key for key in persistent_tensors(model) if key not in tied}
    keys = [key for key in names if key not in stored]
    if not keys or not isinstance(model, transformers.PreTrainedModel):
        return names
    # One call for all, because each call goes through all conversions anew. The length of a stand-in is the number of
    # its key.
    numbered = {key: torch.empty(number, device="meta") for number, key in enumerate(keys)}
    saved = revert_weight_conversion(model, numbered)
    names |= {keys[len(tensor)]: name for name, tensor in saved.items()}
    return names if len(set(names.values())) == len(names) else saved_names(model)


def tied_weights(model: nn.Module) -> dict[str, str]:
    """State dict key of a tied weight -> key of the weight that it shares."""
    return dict(getattr(model, "all_tied_weights_keys", {}))
