"""Where a LoRA's file is: a file, a folder, or a Hub repository, of which only safetensors are downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InvalidLora
from .resolve import download_snapshot

SUFFIX = ".safetensors"
PEFT_CONFIG = "adapter_config.json"
MANY = 10  # files that an error lists


def find_lora(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file of a LoRA.

    Args:
        source: A file, a folder, or a Hub id (``"user/name"``). A file or folder of that name wins over the Hub.
        weight_name: Name of the file in the folder or repository; may be left out if there is only one.
        revision: Branch, tag or commit of a Hub repository.
        token: Hub token, or True for the stored one.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Take what the Hub cache holds, without any network call.

    Raises:
        InvalidLora: No such file or folder, or several files to choose from.
        RepositoryNotFound: The Hub repository isn't there or can't be reached.
    """
    path = Path(os.path.expanduser(source))  # os.path's functions take any text; pathlib's raise for some
    if os.path.isfile(path):
        return path
    if not os.fspath(source) or not os.path.isdir(path):  # Path("") would be the working directory
        _refuse_missing_path(source)
        # Files of the repository's top level: the LoRAs of a training's steps lie in folders below.
        wanted = [weight_name or f"*{SUFFIX}", PEFT_CONFIG]
        path = download_snapshot(
            str(source),
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=wanted,
            ignore_patterns=None if weight_name else ["*/*"],
            token=token,
            cache_dir=cache_dir,
        )
    if weight_name is not None:
        if not (path / weight_name).is_file():
            raise InvalidLora(f"{source} has no file {weight_name!r}: {_choice(path)}.")
        return path / weight_name
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) != 1:
        found = "no" if not files else str(len(files))
        raise InvalidLora(f"{source} has {found} {SUFFIX} files, where one LoRA is wanted: {_choice(path)}.")
    return files[0]


def _choice(folder: Path) -> str:
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob(f"*{SUFFIX}"))
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    some = f"{', '.join(names[:MANY])}{more}"
    return f"name one of {some} by its path, or as weight_name" if names else "name the file of a LoRA"


def _refuse_missing_path(source: str | os.PathLike[str]) -> None:
    """Raise if `source`, which isn't there, can't be a Hub id either."""
    text = os.fspath(source)
    looks_like_path = isinstance(source, os.PathLike) or text.startswith((".", "/", "~")) or "\\" in text
    if looks_like_path or text.count("/") != 1 or text.endswith(("/", SUFFIX)):
        raise InvalidLora(
            f"There is no file or folder {text!r}, and a Hub id has the form 'user/name': check the spelling."
        )
