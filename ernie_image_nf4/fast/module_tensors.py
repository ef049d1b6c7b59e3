"""The tensors of a module, those of quantization states included, and what else a captured step hangs on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..upstream.models import is_hooked, version_of


def tensors_of(module: nn.Module, excluded: Iterable[nn.Module] = ()) -> Iterator[tuple[object, str]]:
    """Owner and attribute of every distinct parameter, buffer and tensor of a quantization state below `module`.

    Those of `excluded` modules are left out, unless they are another module's as well.
    """
    seen = set()
    skipped = {id(part) for each in excluded for part in each.modules()}
    for part in module.modules():
        if id(part) in skipped:
            continue
        for tensor in itertools.chain(part.parameters(recurse=False), part.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield tensor, "data"
            state = getattr(tensor, "quant_state", None)
            nested = getattr(state, "state2", None)
            for owner, names in ((state, ("absmax", "code", "offset")), (nested, ("absmax", "code"))):
                yield from (
                    (owner, name) for name in names if owner is not None and torch.is_tensor(getattr(owner, name))
                )


def captured_state(model: nn.Module) -> tuple:
    """What a captured step of a model hangs on. Where it is another one, the step is no longer right.

    That is where tensors are, what is in vectors (weights of norms, which kernels read in another order), which modules
    have hooks, whether the model is trained, and which of peft's adapters are on, with their strengths.
    """
    found = list(tensors_of(model))
    addresses = tuple(getattr(owner, name).data_ptr() for owner, name in found)
    versions = tuple(version_of(owner) for owner, _ in found if isinstance(owner, nn.Parameter) and owner.ndim == 1)
    return addresses, versions, tuple(map(is_hooked, model.modules())), model.training, _adapters_of(model)


def _adapters_of(model: nn.Module) -> tuple:
    if not getattr(model, "peft_config", None):
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return tuple(
        (
            layer.disable_adapters,
            layer.training,
            *map(tuple, (layer.active_adapters, layer.merged_adapters, getattr(layer, "scaling", {}).items())),
        )
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    )
