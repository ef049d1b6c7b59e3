"""The model that a component's configuration describes, without storage: names, shapes and configs.

Which names weights have in files and which are tied are questions that diffusers and transformers answer themselves here.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from .components import Component

# Torch's device contexts and both libraries' loaders set global state and restore it: two threads at once would restore each
# other's, and leave the process on the meta device.
upstream_lock = threading.RLock()


def skeleton(component: Component, folder: Path) -> torch.nn.Module:
    """The model that a component's configs describe, on the meta device: names, shapes and configs without storage."""
    if component.library == "diffusers":
        model_class = getattr(diffusers, component.class_name)
        with upstream_lock, torch.device("meta"), _without_warnings():
            return model_class.from_config(model_class.load_config(folder))
    model_class = getattr(transformers, component.class_name)
    with upstream_lock, torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(folder))
    if model.can_generate():
        own = (folder / transformers.utils.GENERATION_CONFIG_NAME).is_file()
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            folder, **({} if own else {"config_file_name": component.config, "_from_model_config": True})
        )
    return model


def saved_names(model: torch.nn.Module, stored: Container[str] = ()) -> dict[str, str]:
    """State dict key -> name under which ``save_pretrained`` writes it. Weights tied to another one are left out.

    A key that is among `stored` names is taken as it is, as both libraries do: transformers is slow at finding another one.
    """
    tied = tied_weights(model)
    names = {key: key for key in state_tensors(model) if key not in tied}
    keys = [key for key in names if key not in stored]
    if not keys or not isinstance(model, transformers.PreTrainedModel):
        return names
    # All in one call, because each looks through all conversions anew. Each stand-in's length is
    # the number of its key.
    numbered = {key: torch.empty(number, device="meta") for number, key in enumerate(keys)}
    saved = revert_weight_conversion(model, numbered)
    names |= {keys[len(tensor)]: name for name, tensor in saved.items()}
    return names if len(set(names.values())) == len(names) else saved_names(model)


def state_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What ``model.state_dict()`` has, before it is quantized: the tensors themselves, which is faster."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps diffusers from saying that it ignores config keys, which the published configs have and it saves all the same."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def tied_weights(model: torch.nn.Module) -> dict[str, str]:
    """State dict key of a tied weight -> key of the weight that it shares."""
    return dict(getattr(model, "all_tied_weights_keys", {}))
