"""The adapters (LoRA) that a server offers by name. They are files on its own side; a request only names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import InvalidSettings
from ..generation.loras import find_lora_file, lora_in
from ..generation.settings import LoraUse


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


def find_loras(
    sources: Mapping[str, str], *, local_files_only: bool = False
) -> tuple[dict[str, LoraUse], dict[str, Path]]:
    """Find the files of LoRAs. What is in them, the workers see: that takes torch.

    Args:
        sources: Name -> file, folder or Hub id.
        local_files_only: Take what the Hub cache holds, without any network call.

    Returns:
        Name -> the LoRA at strength 1, and SHA-256 -> file.

    Raises:
        InvalidLora: One isn't there.
        RepositoryNotFound: Its Hub repository isn't there or can't be reached.
        InvalidSettings: Two names stand for one file, which a picture can't have twice.
    """
    found: dict[str, LoraUse] = {}
    paths: dict[str, Path] = {}
    for name, source in sources.items():
        path = find_lora_file(source, local_files_only=local_files_only)
        use = lora_in(path)
        if use.sha256 in paths:
            (other,) = (other for other, its in found.items() if its.sha256 == use.sha256)
            raise InvalidSettings(f"LoRAs {other} and {name} are the same file: offer it under one name.")
        found[name], paths[use.sha256] = use, path
    return found, paths
