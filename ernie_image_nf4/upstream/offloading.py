"""Where accelerate and diffusers keep the hook of an offloaded module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.utils.hooks import RemovableHandle

# Attribute of a module that holds its hook: accelerate 0.17 to 1.15, diffusers 0.38 to 0.42.
HOOK = "_hf_hook"


def hook_of(module: object) -> ModelHook | None:
    """Offloading hook of a component: ours, accelerate's or that of ``enable_model_cpu_offload``; None without one.

    Reaches for the attribute `HOOK`, for which neither library has a public function. Gone: None, and `hooks_are_found`
    says so.
    """
    return getattr(module, HOOK, None)


def hooks_are_found() -> bool:
    """Whether accelerate keeps a module's hook where `TorchModelHook.attach` puts it.

    Asked before offloading: diffusers would else neither compute on the hook's device nor onload the VAE to decode.
    False leads to diffusers' own ``enable_model_cpu_offload``.
    """
    return isinstance(getattr(add_hook_to_module(nn.Identity(), ModelHook()), HOOK, None), ModelHook)


@contextmanager
def kept_on_device(module: nn.Module) -> Iterator[None]:
    """Put a module with a `TorchModelHook` on its device, and keep other threads from taking it off meanwhile."""
    hook = hook_of(module)
    with hook.keeping(module) if isinstance(hook, TorchModelHook) else nullcontext():
        yield


class TorchModelHook(ModelHook):
    """An accelerate hook that torch calls before the forward pass. Subclasses override ``pre_forward``.

    accelerate's ``add_hook_to_module`` replaces ``module.forward`` by a wrapper that holds the bound method. The
    module then refers to itself, so that only the garbage collector frees it, and its copies compute with the
    original's weights. Here torch's public ``register_forward_pre_hook`` does the call. The hook also stands in the
    attribute `HOOK`, where both libraries look for it: ``pipe._execution_device``, ``remove_all_hooks``,
    ``vae.decode``.

    A copy or a pickle of the module gets a plain `TorchModelHook`, which does nothing.
    """

    _handle: RemovableHandle | None = None

    def attach(self, module: nn.Module) -> None:
        """Put the hook on a module that has none. accelerate's ``remove_hook_from_module`` removes it."""
        self.init_hook(module)
        setattr(module, HOOK, self)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called by accelerate, too, where it chains this hook with another one."""
        self._handle = module.register_forward_pre_hook(self)
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called by ``remove_hook_from_module``, which then deletes the attribute."""
        if self._handle is not None:
            self._handle.remove()
        return module

    @contextmanager
    def keeping(self, module: nn.Module) -> Iterator[None]:
        """See `kept_on_device`. Subclasses override it."""
        yield

    @torch.compiler.disable  # traced, it would move weights while the graph is made, and never again
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """As a forward pre-hook of torch."""
        self.pre_forward(module)

    def __reduce__(self) -> tuple:
        return TorchModelHook, ()
