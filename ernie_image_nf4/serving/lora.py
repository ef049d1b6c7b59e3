"""The adapters (LoRA) that a server offers by name. They are files on its own side; a request only names them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidSettings

if TYPE_CHECKING:
    from diffusers import ErnieImagePipeline

PACKAGE = __package__.partition(".")[0]


def named_loras(options: Iterable[str]) -> dict[str, str]:
    """Name to offer -> file or Hub id, from ``NAME=SOURCE`` or from a source alone, whose stem is its name.

    Raises:
        InvalidSettings: A name is no plain word, or stands for two sources.
    """
    found: dict[str, str] = {}
    for option in options:
        name, separator, source = option.rpartition("=")
        name = name if separator else Path(source).stem
        if not re.fullmatch(r"[\w-]+", name):
            raise InvalidSettings(f"LoRA name {name!r} is no plain word: give one, NAME={source}.")
        if name in found:
            raise InvalidSettings(f"Two LoRAs are called {name}: give one another name, NAME={source}.")
        found[name] = source
    return found


def find_load_lora() -> Callable[..., Any]:
    """The package's ``load_lora``.

    Raises:
        InvalidSettings: This version has none.
    """
    package = importlib.import_module(PACKAGE)
    if "load_lora" not in package.__all__:
        raise InvalidSettings("This version of ernie-image-nf4 can't load a LoRA: leave --lora out.")
    return package.load_lora


class Adapters:
    """Which adapters a pipeline has, one set at a time. Without any it is as if none had ever been loaded."""

    def __init__(self, pipe: ErnieImagePipeline, sources: Mapping[str, str]) -> None:
        """Load each once, so that a bad one shows before the first request.

        Args:
            pipe: The pipeline that gets them.
            sources: Name -> file or Hub id.

        Raises:
            ErnieImageNF4Error: One can't be loaded.
        """
        self._pipe = pipe
        self._sources = sources
        self._used: tuple[tuple[str, float], ...] = ()
        for name in sources:
            self.use(((name, 1.0),))
        self.use(())

    def use(self, wanted: tuple[tuple[str, float], ...]) -> None:
        """Let the pipeline have these adapters, and no others.

        Args:
            wanted: Names and strengths.

        Raises:
            ErnieImageNF4Error: One can't be loaded. The pipeline has none then.
        """
        if wanted == self._used:
            return
        if self._used:
            self._pipe.unload_lora_weights()
            self._used = ()
        if not wanted:
            return
        load_lora = find_load_lora()
        try:
            for name, strength in wanted:
                load_lora(self._pipe, self._sources[name], name=name, strength=strength)
            self._used = wanted
        finally:
            if not self._used:
                self._pipe.unload_lora_weights()
