"""The tensors of a module, those of quantization states included."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn


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
