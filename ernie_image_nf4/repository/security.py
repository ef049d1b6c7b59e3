"""What is refused of a folder before a library reads it: code, paths that lead out of it, files of absurd size.

A repository may come from a stranger, and diffusers and transformers read more of it than this package names: any of
several JSON files of a component, templates, adapters, shards. So every file of a component is checked, not just those
expected.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from ..errors import InvalidRepository

DOWNLOAD_AGAIN = "download the repository again, e.g. with `hf download user/name --local-dir FOLDER`"
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER = 1024  # bytes; the specification demands fewer

# Bytes. The largest published ones: an index of shards with 0.3 MB, a tokenizer with 17 MB, chat templates of some 10
# kB.
MAX_JSON = 1 << 24
MAX_VOCABULARY = 1 << 25
MAX_TEMPLATE = 1 << 16
# The largest whole number in a published configuration is 262,144 (positions). Some become the length of a list at
# once.
MAX_NUMBER = 1 << 20

WEIGHTS = ".safetensors"
INDEX = ".index.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model", "tekken.json")
# A PEFT adapter names the folder or Hub repository of another base model, which would be loaded instead.
ADAPTER = "adapter_config.json"
# Settings by which diffusers and transformers find code beside the weights, or weights in other files than the usual
# ones.
CODE = ("auto_map", "custom_pipelines", "custom_pipeline", "custom_code", "custom_generate", "trust_remote_code")
OTHER_FILES = ("_file", "_files", "_weights")
# A name with a slash is a kernel from the Hub.
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def read_json(folder: Path, path: Path) -> dict[str, Any]:
    """The object in a JSON file of a repository.

    Args:
        folder: The repository.
        path: The file in it.

    Raises:
        InvalidRepository: It is missing, outside of the folder, too large, a Git LFS pointer, or no JSON object.
    """
    if not path.is_file():
        raise InvalidRepository(f"File {path} is missing: {DOWNLOAD_AGAIN}.")
    check_inside(folder, path)
    data = _read(path, MAX_JSON)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands deep
        raise InvalidRepository(f"{path} is not JSON ({error}): {DOWNLOAD_AGAIN}.") from error
    if not isinstance(value, dict):
        raise InvalidRepository(f"{path} holds no JSON object: {DOWNLOAD_AGAIN}.")
    return value


def read_component_files(folder: Path, place: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Check every file of a component, and read its JSON files and chat templates.

    Args:
        folder: The repository.
        place: The component's folder in it.

    Returns:
        Content of each JSON file but vocabularies, and text of each template, by their paths in `place`.

    Raises:
        InvalidRepository: A file leads out of the repository, is code, names code or other files, or is absurdly large.
    """
    settings, templates = {}, {}
    for path in sorted(place.rglob("*")):
        check_inside(folder, path)
        if not path.exists():
            raise InvalidRepository(f"{path} is a link to nothing: {DOWNLOAD_AGAIN}.")
        if path.suffix == ".py" or path.name == ADAPTER:
            raise InvalidRepository(
                f"{path} would change what is loaded, and how: no code or adapter of a repository is used. "
                "Remove the file if you trust the rest; an adapter goes to load_lora."
            )
        name = path.relative_to(place).as_posix()
        if path.name in VOCABULARIES:
            _check_size(path, MAX_VOCABULARY)
        elif path.suffix == ".jinja":
            templates[name] = _read_template(path)
        elif path.suffix == ".json":
            settings[name] = _checked_settings(path, read_json(folder, path))
    return settings, templates


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a path that, its links followed, lies outside of the repository.

    The Hub cache is made of links: ``snapshots/COMMIT/`` points into ``blobs/`` beside it, which counts as inside.

    Raises:
        InvalidRepository: It lies elsewhere.
    """
    # Path.resolve raises for links in a circle.
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(Path(os.path.realpath(home.parent.parent / "blobs")))
    if not any(target.is_relative_to(parent) for parent in allowed):
        raise InvalidRepository(f"{path} leads out of the repository, to {target}: put the file itself there.")


def is_plain_name(name: object) -> bool:
    """Whether something from a JSON file is the name of a file in the same folder, and no path."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse a file that git left as a pointer. One that is too large to be a pointer isn't opened.

    Raises:
        InvalidRepository: It is one, or can't be read.
    """
    if path.stat().st_size > MAX_POINTER:
        return
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS_POINTER))
    except OSError as error:
        raise unreadable(path, error) from error
    refuse_pointer(path, start)


def refuse_pointer(path: Path, content: bytes) -> None:
    """Refuse a file that git left as a pointer, by how it begins.

    Raises:
        InvalidRepository: It is one.
    """
    if content.startswith(GIT_LFS_POINTER):
        raise InvalidRepository(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs install && git lfs pull` there, "
            "or get the repository with `hf download`."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message that isn't empty, or its kind if there is none."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)


def _read(path: Path, limit: int) -> bytes:
    """The content of a file of at most so many bytes."""
    _check_size(path, limit)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    refuse_pointer(path, data)
    return data


def _read_template(path: Path) -> str:
    """The text of a chat template, its line ends as Python reads them."""
    try:
        return io.TextIOWrapper(io.BytesIO(_read(path, MAX_TEMPLATE)), "utf-8").read()
    except UnicodeDecodeError as error:
        raise InvalidRepository(f"{path} is no text in UTF-8 ({error}): {DOWNLOAD_AGAIN}.") from error


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise InvalidRepository(
            f"{path} has {size:,} bytes, such a file has at most {limit:,} here: {DOWNLOAD_AGAIN}, or don't trust it."
        )


def _checked_settings(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, known to name no code, no files elsewhere, and no number that no model has."""
    if f"{WEIGHTS}.index." in path.name:
        return settings  # of shards, also of a variant: keys are names of tensors
    pending: list[tuple[str, Any]] = list(settings.items())
    while pending:
        key, value = pending.pop()
        if key in CODE and value:
            raise InvalidRepository(
                f"{path} asks for code from the repository ({key}): none is ever run. Use a release that does without."
            )
        if key in IMPLEMENTATIONS and "/" in str(value):
            raise InvalidRepository(f"{path} asks for code from the Hub ({key}: {value!r}): none is ever run.")
        if key.endswith(OTHER_FILES):
            names = value if isinstance(value, list) else [value]
            if not all(name is None or isinstance(name, bool) or is_plain_name(name) for name in names):
                raise InvalidRepository(
                    f"{path} names files outside of its folder ({key}: {value!r}): remove that line."
                )
        if type(value) is int and abs(value) > MAX_NUMBER and "tokenizer" not in path.name and "theta" not in key:
            raise InvalidRepository(
                f"{path} has {key}: {value}, no model has more than {MAX_NUMBER:,}: {DOWNLOAD_AGAIN}."
            )
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value if isinstance(item, dict | int) and not isinstance(item, bool)]
    return settings


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def unreadable(path: str | Path, error: OSError) -> InvalidRepository:
    """What to raise when the system can't read a file."""
    return InvalidRepository(f"{path} can't be read ({error.strerror}): check disk and permissions.")
