"""LoRAs of pictures: ``FILE:STRENGTH`` is found before a model is loaded, and switched on for the pictures that ask.

Files are known by their SHA-256, which stands in the pictures' settings. Adapters of a run have names by it, so that
those that the pipeline has already are left alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidLora, InvalidSettings
from ..repository.lora_source import find_lora
from ..repository.metadata import file_record
from .settings import LoraUse, Settings, adapter_of

if TYPE_CHECKING:
    from diffusers import ErnieImagePipeline

STRENGTH = re.compile(r"(?P<source>.+):(?P<strength>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE | re.DOTALL)
HUB_FILE = re.compile(r"(?P<repository>[^/\\:]+/[^/\\:]+)/(?P<file>[^\\:]+\.safetensors)")


def parse_lora(text: str) -> tuple[str, float]:
    """A LoRA's source and strength, from ``FILE`` or ``FILE:STRENGTH``.

    Only a number behind the last colon is a strength: paths of Windows have colons too. A file of that very name wins.

    Raises:
        InvalidSettings: There is no source, or the strength is too large for a number.
    """
    match = None if os.path.isfile(os.path.expanduser(text)) else STRENGTH.fullmatch(text)
    source, strength = (match["source"], float(match["strength"])) if match else (text, 1.0)
    if not source.strip():
        raise InvalidSettings(f"LoRA {text!r} names no file: use FILE or FILE:STRENGTH.")
    if not math.isfinite(strength):
        raise InvalidSettings(f"LoRA {text!r} has a strength that is no finite number: use one such as 0.8.")
    return source, strength


def find_lora_file(source: str, *, local_files_only: bool = False) -> Path:
    """The file that a source means: a file, a folder, ``user/name`` or ``user/name/FILE``.

    Raises:
        InvalidLora: It isn't there.
        RepositoryNotFound: The Hub repository isn't there or can't be reached.
    """
    weight_name = None
    if not os.path.exists(os.path.expanduser(source)) and (match := HUB_FILE.fullmatch(source)):
        source, weight_name = match["repository"], match["file"]
    return find_lora(source, weight_name=weight_name, local_files_only=local_files_only)


def lora_in(path: Path) -> LoraUse:
    """The LoRA of a file, at strength 1."""
    return LoraUse(path.name, 1.0, file_record(path).sha256)


class LoraFiles:
    """The LoRA files of a run, each looked for and hashed once.

    Attributes:
        paths: By their SHA-256.
    """

    def __init__(self, paths: Mapping[str, Path] | None = None, *, local_files_only: bool = False) -> None:
        self.paths: dict[str, Path] = dict(paths or {})
        self._local_files_only = local_files_only
        self._found: dict[str, LoraUse] = {}  # at strength 1, by source

    def find(self, texts: Iterable[str]) -> tuple[LoraUse, ...]:
        """The LoRAs that these mean, each a file, a folder, ``user/name`` or ``user/name/FILE``, with ``:STRENGTH``.

        Raises:
            InvalidSettings: No file is named, or one twice.
            InvalidLora: It isn't there, or no LoRA.
            RepositoryNotFound: The Hub repository isn't there or can't be reached.
        """
        uses = []
        for text in texts:
            source, strength = parse_lora(text)
            if source not in self._found:
                self._found[source] = self._look_for(source)
            uses.append(replace(self._found[source], strength=strength))
        for number, use in enumerate(uses):
            if any(use.sha256 == other.sha256 for other in uses[:number]):
                raise InvalidSettings(f"LoRA {use.file} is named twice for one picture: add up its strengths.")
        return tuple(uses)

    def load(self, pipe: ErnieImagePipeline, wanted: Iterable[LoraUse]) -> None:
        """Put LoRAs into a pipeline, without effect yet, and remove those of this run that aren't wanted.

        Raises:
            InvalidLora: One doesn't fit the pipeline's transformer, or its file is another one by now.
        """
        from ..loading.lora import known_adapters, load_lora, noted_file, switched

        names = {use.adapter: use for use in wanted}
        there = [name for name in known_adapters(pipe) if name in {adapter_of(sha256) for sha256 in self.paths}]
        if missing := names.keys() - set(there):
            with switched(pipe, None):
                for name in sorted(missing):
                    path = self.paths[names[name].sha256]
                    load_lora(pipe, path, name=name)
                    if noted_file(pipe, name) != (path.name, names[name].sha256):  # which the pictures would note
                        self._remove(pipe, [name])
                        raise InvalidLora(f"{path} has changed meanwhile: start again to draw with what it is now.")
        self._remove(pipe, [name for name in there if name not in names])

    def unload(self, pipe: ErnieImagePipeline) -> None:
        """Remove all LoRAs of this run from a pipeline."""
        self.load(pipe, ())

    def check(self, pipe: ErnieImagePipeline) -> None:
        """Refuse files that don't fit a pipeline.

        Raises:
            InvalidLora: One doesn't.
        """
        from ..loading.lora import layer_shapes
        from ..repository.lora_file import check_lora

        layers = layer_shapes(pipe.transformer) if self.paths else {}
        for path in self.paths.values():
            check_lora(path, layers)

    def _remove(self, pipe: ErnieImagePipeline, names: Sequence[str]) -> None:
        from ..loading.lora import known_adapters

        if not names:
            return
        if set(names) == set(known_adapters(pipe)):
            pipe.unload_lora_weights()  # leaves nothing of peft behind
        else:
            pipe.delete_adapters(list(names))

    def _look_for(self, source: str) -> LoraUse:
        from ..repository.lora_file import describe_lora

        path = find_lora_file(source, local_files_only=self._local_files_only)
        describe_lora(path)  # refuses what is no LoRA
        use = lora_in(path)
        self.paths[use.sha256] = path
        return use


def active_uses(pipe: ErnieImagePipeline) -> tuple[LoraUse, ...]:
    """The LoRAs that are on in a pipeline, as pictures that name none of their own note them."""
    from ..loading.lora import active_loras

    return tuple(LoraUse(each.name, each.strength, each.sha256, each.from_file) for each in active_loras(pipe))


def noting(settings: Settings, active: tuple[LoraUse, ...]) -> Settings:
    """The settings as they are noted: with those LoRAs that are on in the pipeline, if they name none."""
    return settings if settings.lora else replace(settings, lora=active)


@contextmanager
def loras_as(pipe: ErnieImagePipeline, uses: Sequence[LoraUse]) -> Iterator[None]:
    """Draw with just these LoRAs, which `LoraFiles.load` has put there. None: with what is on in the pipeline."""
    if not uses:
        yield
        return
    from ..loading.lora import switched

    with switched(pipe, {use.adapter: use.strength for use in uses}):
        yield
