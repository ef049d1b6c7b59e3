"""ERNIE-Image with pre-quantized NF4 weights: load it, make it, check it.

>>> from ernie_image_nf4 import load
>>> load()("an orange cat on a wooden desk").images[0].save("cat.png")
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from . import local_import

if TYPE_CHECKING:
    from .batch import generate_batch
    from .loading import load
    from .quantize import quantize
    from .verify import verify

__all__ = ["__version__", "generate_batch", "load", "quantize", "verify"]
__version__ = "0.1.0"

# function -> module
_PUBLIC = {"generate_batch": "batch", "load": "loading", "quantize": "quantize", "verify": "verify"}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for: torch and diffusers take seconds, ``--help`` needs neither."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


class _Package(types.ModuleType):
    """This package, in which ``quantize`` and ``verify`` are always the functions.

    Importing a submodule binds it as an attribute of its package, which would hide the function of the same name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
local_import.install()
