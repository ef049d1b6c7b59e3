"""LoRAs of pictures: ``FILE:STRENGTH`` is found before a model is loaded, and switched on for the pictures that ask.

Files are known by their SHA-256, which stands in the pictures' settings. Adapters of a run have names by it, so that
those that the pipeline has already are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidSettings
from ..repository.lora_file import describe_lora
from ..repository.lora_source import find_lora
from ..repository.metadata import file_record
from .settings import LoraUse, adapter_of

if TYPE_CHECKING:
    from diffusers import ErnieImagePipeline

STRENGTH = re.compile(r"(?P<source>.+):(?P<strength>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE | re.DOTALL)
HUB_FILE = re.compile(r"(?P<repository>[^/\\:]+/[^/\\:]+)/(?P<file>[^\\:]+\.safetensors)")


def parse_lora(text: str) -> tuple[str, float]:
    """A LoRA's source and strength, from ``FILE`` or ``FILE:STRENGTH``.

    Only a number behind the last colon is a strength: paths of Windows have colons too. A file of that very name wins.

    Raises:
        InvalidSettings: There is no source.
    """
    match = None if Path(text).expanduser().is_file() else STRENGTH.fullmatch(text)
    source, strength = (match["source"], float(match["strength"])) if match else (text, 1.0)
    if not source.strip():
        raise InvalidSettings(f"LoRA {text!r} names no file: use FILE or FILE:STRENGTH.")
    return source, strength


class LoraFiles:
    """The LoRA files of a run, each looked for and hashed once.

    Attributes:
        paths: By their SHA-256.
    """

    def __init__(self, *, local_files_only: bool = False) -> None:
        self.paths: dict[str, Path] = {}
        self._local_files_only = local_files_only
        self._found: dict[str, tuple[str, str]] = {}  # name of the file and SHA-256, by source

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
            uses.append(LoraUse(self._found[source][0], strength, self._found[source][1]))
        for number, use in enumerate(uses):
            if any(use.sha256 == other.sha256 for other in uses[:number]):
                raise InvalidSettings(f"LoRA {use.file} is named twice for one picture: add up its strengths.")
        return tuple(uses)

    def load(self, pipe: ErnieImagePipeline, wanted: Iterable[LoraUse]) -> None:
        """Put LoRAs into a pipeline, without effect yet, and remove those of this run that aren't wanted.

        Raises:
            InvalidLora: One doesn't fit the pipeline's transformer.
        """
        from ..loading.lora import known_adapters, load_lora, switched

        names = {use.adapter: use for use in wanted}
        there = [name for name in known_adapters(pipe) if name in {adapter_of(sha256) for sha256 in self.paths}]
        if missing := names.keys() - set(there):
            with switched(pipe, None):
                for name in sorted(missing):
                    load_lora(pipe, self.paths[names[name].sha256], name=name)
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

    def _look_for(self, source: str) -> tuple[str, str]:
        weight_name = None
        if not Path(source).expanduser().exists() and (match := HUB_FILE.fullmatch(source)):
            source, weight_name = match["repository"], match["file"]
        path = find_lora(source, weight_name=weight_name, local_files_only=self._local_files_only)
        describe_lora(path)  # refuses what is no LoRA
        sha256 = file_record(path).sha256
        self.paths[sha256] = path
        return path.name, sha256


@contextmanager
def loras_as(pipe: ErnieImagePipeline, uses: Sequence[LoraUse]) -> Iterator[None]:
    """Draw with just these LoRAs, which `LoraFiles.load` has put there. None: with what is on in the pipeline."""
    if not uses:
        yield
        return
    from ..loading.lora import switched

    with switched(pipe, {use.adapter: use.strength for use in uses}):
        yield
