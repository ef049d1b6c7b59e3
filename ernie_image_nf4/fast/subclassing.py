"""How an upstream model becomes a fast one: by a change of its class, which `isinstance`, `save_pretrained`, copies and pickles agree with."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Class = TypeVar("Class", bound=type[nn.Module])


class Runtime:
    """Base of what a model keeps beside its weights: graphs, streams, caches, locks.

    A copy or a pickle of the model gets a new, empty one. Nothing in it may refer to the model: a cycle would keep the
    weights until the next garbage collection.
    """

    def __deepcopy__(self, memo: dict) -> Runtime:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


def named_as_upstream(cls: Class) -> Class:
    """Give a subclass its base's ``__name__``, by which diffusers, transformers and peft write and look up a model's class.

    Pickles find the subclass by ``__module__`` and ``__qualname__``, which stay its own.
    """
    cls.__name__ = cls.__base__.__name__
    return cls


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make an object of an upstream class one of its subclass `cls`, weights, buffers and hooks as they are."""
    if type(module) is not cls.__base__:
        raise TypeError(f"{type(module).__name__} of {type(module).__module__} is no {cls.__base__}")
    # A pipeline notes the library of a component by the component's own __module__.
    module.__module__ = cls.__base__.__module__
    module.__class__ = cls
