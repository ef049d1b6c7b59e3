"""How an upstream model or pipeline becomes one of ours: by a change of its class.

`isinstance`, `save_pretrained`, copies and pickles take it for what it was.
"""

from __future__ import annotations

from typing import TypeVar

from diffusers import DiffusionPipeline
from torch import nn

Class = TypeVar("Class", bound=type)


class Runtime:
    """Base of what a model keeps beside its weights: graphs, streams, caches, locks.

    A copy or a pickle of the model gets a new one. Nothing in a runtime may refer to the model: a cycle would keep the
    weights until the next garbage collection.
    """

    def __reduce__(self) -> tuple:
        """The class, and the settings that copies and pickles keep."""
        return type(self), ()


def named_as_upstream(cls: Class) -> Class:
    """Give a subclass its base's ``__name__``, by which diffusers, transformers and peft know a model's class.

    Pickles find the subclass by ``__module__`` and ``__qualname__``, which stay its own.
    """
    cls.__name__ = _base(cls).__name__
    return cls


def is_ours(cls: type, base: type) -> bool:
    """Whether a class is one of this package that objects of the class `base` may `become`."""
    return _base(cls) is base and cls.__module__.startswith(__package__)


def become(module: nn.Module | DiffusionPipeline, cls: type) -> None:
    """Make an object of an upstream class one of its subclass `cls`. Weights, buffers and hooks stay.

    Call it before anything wraps ``module.forward`` (accelerate's hooks do), as the wrapper keeps calling the method
    that it found.

    Args:
        module: The object.
        cls: A direct subclass of its class.

    Raises:
        TypeError: The object is of another class.
    """
    base = _base(cls)
    if type(module) is not base:
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__} is for {base.__module__}.{base.__qualname__}, "
            f"not for {type(module).__module__}.{type(module).__qualname__}."
        )
    # diffusers' model_index.json has a component's library from the object's __module__.
    module.__module__ = base.__module__
    module.__class__ = cls


def _base(cls: type) -> type:
    return cls.__bases__[0]
