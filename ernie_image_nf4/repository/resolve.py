"""A model argument (None, a folder, or a Hub id) -> a local folder that is known to be a sound ERNIE-Image repository.

Finding and checking read headers and small JSON files only, so that every complaint comes before a weight is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidRepository, InvalidSettings, RepositoryNotFound
from .components import COMPONENT, COMPONENTS, METADATA, MODEL_INDEX, PIPELINE_CLASS, PROMPT_ENHANCER, Component
from .security import (
    DOWNLOAD_AGAIN,
    INDEX,
    WEIGHTS,
    check_files,
    first_line,
    is_plain_name,
    read_json,
    refuse_lfs_pointer,
)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Tokenizers come as tokenizer.json, or as a SentencePiece model or BPE merges beside it; chat templates as .jinja.
CONFIG_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")
WEIGHT_PATTERN = "*.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def find_repository(
    model: str | os.PathLike[str] | None = None,
    *,
    prompt_enhancer: bool = True,
    weights: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder that `model` means; a Hub repository is downloaded into the Hub cache first.

    Args:
        model: A folder, a Hub id (``"user/name"``), or None for the repository in which this package stands.
            An existing folder wins over a Hub id of the same spelling, and costs no network call.
        prompt_enhancer: Whether the files of the prompt enhancer are wanted (Hub only).
        weights: Whether the weight files are wanted, not just the configuration (Hub only).
        revision: Branch, tag or commit of a Hub repository.
        token: Hub token, or True for the stored one.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Take what the Hub cache holds, without any network call. ``HF_HUB_OFFLINE=1`` does the same.

    Returns:
        The folder; `check_repository` tells whether it is complete.

    Raises:
        RepositoryNotFound: No such folder or Hub repository, or the Hub can't be reached.
        InvalidSettings: A revision was asked of a local folder.
    """
    if model is None:
        folder = _own_repository()
    elif os.fspath(model) and Path(model).expanduser().is_dir():  # Path("") would be the working directory
        folder = Path(model).expanduser()
    else:
        _refuse_missing_path(model)
        return _download(
            str(model),
            allow_patterns=_hub_patterns(prompt_enhancer, weights),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    if revision is not None:
        raise InvalidSettings(
            f"Revision {revision!r} was asked for, but {folder} is a local folder, which has just one: "
            "drop the revision, check it out there with git, or name a Hub id instead."
        )
    return folder


def check_repository(folder: Path, *, prompt_enhancer: bool = True) -> tuple[Component, ...]:
    """Check that a folder holds all that the pipeline needs, and say which components it has.

    Reads ``model_index.json``, the presence of configurations, and the header of every weight file against its size.

    Args:
        folder: A repository folder, as from `find_repository`.
        prompt_enhancer: Whether the prompt enhancer is wanted. Without it its files are not looked at.

    Returns:
        The components to load, in the order of the layout. The prompt enhancer is left out if the repository has none.

    Raises:
        InvalidRepository: A part is missing, truncated, corrupt, a Git LFS pointer, a pickle, of another pipeline, or holds what
            `guard` refuses.
    """
    index = read_model_index(folder)
    present = []
    for component in COMPONENTS:
        if component.optional and not prompt_enhancer:
            continue
        if component_class(index, component) is not None:
            check_component(folder, index, component)
            present.append(component)
        elif not component.optional:
            raise InvalidRepository(f"{folder / MODEL_INDEX} names no {component.name!r}: {DOWNLOAD_AGAIN}.")
    enhancer = [component.name for component in present if component.optional]
    if prompt_enhancer and enhancer and len(enhancer) < len(PROMPT_ENHANCER):
        raise InvalidRepository(
            f"Of {' and '.join(PROMPT_ENHANCER)}, {folder / MODEL_INDEX} names only {enhancer[0]!r}: "
            f"load without the prompt enhancer (prompt_enhancer=False, --no-pe), or {DOWNLOAD_AGAIN}."
        )
    return tuple(present)


def check_component(folder: Path, index: dict, component: Component) -> None:
    """Check one component: its line in ``model_index.json``, its files, and the headers of its weights.

    Args:
        folder: A repository folder.
        index: Its ``model_index.json``.
        component: One that is not left out.

    Raises:
        InvalidRepository: As `check_repository`.
    """
    place, entry = folder / component.name, index.get(component.name)
    tokenizer = component.config == TOKENIZER_CONFIG and "Token" in str(entry[1])
    if entry[0] != component.library or (entry[1] != component.class_name and not tokenizer):
        raise InvalidRepository(
            f"{folder / MODEL_INDEX}: {component.name} is {entry}, expected {[component.library, component.class_name]}: "
            "only the classes of ERNIE-Image are loaded, and no code from a repository."
        )
    if not place.is_dir():
        raise InvalidRepository(f"Folder {place} is missing: {DOWNLOAD_AGAIN}.")
    config = read_json(folder, place / component.config)
    if (
        config.get("_class_name", component.class_name) != component.class_name
    ):  # diffusers; transformers has architectures
        raise InvalidRepository(
            f"{place / component.config} is of a {config['_class_name']}, expected {component.class_name}: {DOWNLOAD_AGAIN}."
        )
    if component.config == TOKENIZER_CONFIG:
        tokenizer_files = [place / name for name in TOKENIZER_FILES if (place / name).is_file()]
        if not tokenizer_files:
            raise InvalidRepository(f"File {place / TOKENIZER_FILES[0]} is missing: {DOWNLOAD_AGAIN}.")
        for path in tokenizer_files:
            refuse_lfs_pointer(path)
    check_files(folder, place)
    if component.weights is None:
        return
    files = weight_files(folder, component)
    if not files:
        pickles = sorted(path.name for path in place.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise InvalidRepository(
                f"{place} has its weights as a pickle only ({pickles[0]}), which can run code when loaded: "
                f"expected {component.weights}; use a safetensors release, or convert it with save_pretrained."
            )
        raise InvalidRepository(f"Weight file {place / component.weights} is missing: {DOWNLOAD_AGAIN}.")
    from .safetensors_io import read_header  # needs torch, which finding a repository does without

    for path in files:
        read_header(path)


def read_model_index(folder: Path) -> dict:
    """``model_index.json`` of a repository, known to be of an ``ErnieImagePipeline``.

    Raises:
        InvalidRepository: It is missing, not JSON, or of another pipeline class.
    """
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise InvalidRepository(f"{folder} has no {MODEL_INDEX}: name a folder or Hub id of an {PIPELINE_CLASS}.")
    index = read_json(folder, path)
    if (found := index.get("_class_name")) != PIPELINE_CLASS:
        raise InvalidRepository(
            f"{path} is of a {found}, this package loads {PIPELINE_CLASS}: "
            "name an ERNIE-Image repository, or load this one with diffusers.DiffusionPipeline."
        )
    unknown = [name for name, entry in index.items() if isinstance(entry, list) and name not in COMPONENT]
    if unknown:  # the libraries would import what it names
        raise InvalidRepository(f"{path} has a component {unknown[0]!r}, {PIPELINE_CLASS} has none: remove that line.")
    return index


def component_class(index: dict, component: Component) -> str | None:
    """The class that ``model_index.json`` names for a component, None if it was left out (``[null, null]``, or no line)."""
    entry = index.get(component.name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def weight_files(folder: Path, component: Component) -> list[Path]:
    """The safetensors files of a component: the one file, or the shards that its index names. Empty if there are none.

    Raises:
        InvalidRepository: The index of the shards isn't one, names files elsewhere, or stands beside the one file.
    """
    if component.weights is None:
        return []
    single = folder / component.name / component.weights
    index = single.with_name(f"{single.name}{INDEX}")
    if not index.exists():
        return [single] if single.exists() else []
    if single.exists():  # transformers would read the one, diffusers the other
        raise InvalidRepository(f"{single} stands beside {index.name}: remove the one that isn't meant.")
    weight_map = read_json(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidRepository(f"{index} lists no weight files: {DOWNLOAD_AGAIN}.")
    if strange := [name for name in weight_map.values() if not is_plain_name(name) or not name.endswith(WEIGHTS)]:
        raise InvalidRepository(f"{index} names {strange[0]!r}, expected a {WEIGHTS} file beside it: {DOWNLOAD_AGAIN}.")
    return [single.with_name(name) for name in sorted(set(weight_map.values()))]


def total_bytes(files: Iterable[Path]) -> int:
    """Size of some files together."""
    return sum(path.stat().st_size for path in files)


def is_quantized(folder: Path, component: Component) -> bool:
    """Whether a component's configuration says that its weights are stored quantized."""
    return "quantization_config" in read_json(folder, folder / component.name / component.config)


def _own_repository() -> Path:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / MODEL_INDEX).is_file():
        raise RepositoryNotFound(
            f"No model was named, and the package in {folder} stands in no model repository: "
            'name a folder or a Hub id, e.g. load("user/ERNIE-Image-NF4") or --model user/ERNIE-Image-NF4.'
        )
    return folder


def _refuse_missing_path(model: str | os.PathLike[str]) -> None:
    """Raise if `model`, which is no folder, can't be a Hub id either: then a network call could only mislead."""
    text = os.fspath(model)
    if text and Path(text).expanduser().exists():
        raise RepositoryNotFound(f"{text} is a file: name the folder that holds {MODEL_INDEX}, or a Hub id.")
    looks_like_path = isinstance(model, os.PathLike) or text.startswith((".", "/", "~")) or "\\" in text
    if looks_like_path or text.count("/") != 1 or text.endswith("/"):
        raise RepositoryNotFound(
            f"There is no folder {text!r}, and a Hub id has the form 'user/name': check the spelling, "
            f"or download one with `hf download user/name --local-dir {text or 'FOLDER'}`."
        )


def _hub_patterns(prompt_enhancer: bool, weights: bool) -> list[str]:
    """What to download: never images, READMEs, pickles or weights in other formats."""
    patterns = [MODEL_INDEX, METADATA]
    for component in COMPONENTS:
        if component.optional and not prompt_enhancer:
            continue
        patterns += [f"{component.name}/{pattern}" for pattern in CONFIG_PATTERNS]
        if component.weights and weights:
            patterns.append(f"{component.name}/{WEIGHT_PATTERN}")
    return patterns


def _download(repo_id: str, *, revision: str | None, local_files_only: bool, **options) -> Path:
    """`huggingface_hub.snapshot_download` with its errors as one line that names the cure."""
    from huggingface_hub import constants, errors, get_token, snapshot_download

    at_revision = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=local_files_only, **options))
    except errors.HFValidationError as error:
        raise RepositoryNotFound(f"There is no folder {repo_id!r}, and it is no Hub id either: {error}") from error
    except errors.GatedRepoError as error:
        raise RepositoryNotFound(
            f"Access to {repo_id} is restricted: accept its terms on https://huggingface.co/{repo_id}, "
            "then log in with `hf auth login` or pass a token."
        ) from error
    except errors.RepositoryNotFoundError as error:
        if options.get("token") is not False and (options.get("token") or get_token()):
            who, cure = "your token may read", "take a token of an account that may"
        else:
            who, cure = "anyone may read", "log in with `hf auth login` or pass a token"
        raise RepositoryNotFound(
            f"There is no folder {repo_id!r} and no Hub repository of that name that {who}: "
            f"check the spelling; for a private one {cure}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RepositoryNotFound(
            f"{repo_id} has no revision {revision!r}: see https://huggingface.co/{repo_id}/commits for those it has."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = local_files_only or constants.HF_HUB_OFFLINE
        found = "is not (wholly) in the Hub cache, and the network is off" if offline else "could not be downloaded"
        raise RepositoryNotFound(
            f"{repo_id}{at_revision} {found}: download it while online with "
            f"`hf download {repo_id} --local-dir X`, then load 'X'."
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise RepositoryNotFound(
            f"{repo_id} was asked for with a token, and none is stored: `hf auth login`."
        ) from error
    except (OSError, errors.HTTPError) as error:  # lost connections, errors of the server, a full disk
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
            raise RepositoryNotFound(
                f"The Hub doesn't accept your token for {repo_id}: log in again with `hf auth login`, or pass another token."
            ) from error
        raise RepositoryNotFound(
            f"Downloading {repo_id}{at_revision} failed ({first_line(error)}): try again, what is there is kept."
        ) from error
