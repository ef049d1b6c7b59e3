"""ERNIE-Image with pre-quantized NF4 weights: load it, make it, check it.

>>> from ernie_image_nf4 import load
>>> load()("an orange cat on a wooden desk").images[0].save("cat.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .upstream import local_import

if TYPE_CHECKING:
    from .generation.batch import generate_batch
    from .generation.prompt_file import Row
    from .loading.loaded_pipeline import set_skipping
    from .loading.lora import load_lora
    from .loading.pipeline import load
    from .quantization.convert import quantize
    from .repository.integrity import verify

__all__ = ["Row", "__version__", "generate_batch", "load", "load_lora", "quantize", "set_skipping", "verify"]
__version__ = "0.1.0"

# public name -> module
_PUBLIC = {
    "Row": "generation.prompt_file",
    "generate_batch": "generation.batch",
    "load": "loading.pipeline",
    "load_lora": "loading.lora",
    "quantize": "quantization.convert",
    "set_skipping": "loading.loaded_pipeline",
    "verify": "repository.integrity",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and diffusers take seconds, and ``--help`` needs neither."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


local_import.install()
