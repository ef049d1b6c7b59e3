"""A model argument (None, a folder, or a Hub id) becomes a local folder; a Hub repository is downloaded first."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DiskFull, InvalidSettings, RepositoryNotFound
from .components import COMPONENTS, METADATA, MODEL_INDEX
from .disk import is_full
from .security import first_line

# Tokenizers come as tokenizer.json, or as a SentencePiece model or BPE merges beside it; chat templates as .jinja.
CONFIG_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")
WEIGHT_PATTERN = "*.safetensors"


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
        The folder; `record.open_repository` tells whether it is complete.

    Raises:
        RepositoryNotFound: No such folder or Hub repository, or the Hub can't be reached.
        DiskFull: The disk of the Hub cache has no room for it.
        InvalidSettings: A revision was asked of a local folder.
    """
    if model is None:
        folder = _own_repository()
    # os.path's functions take any text; pathlib's raise for some. Path("") would be the working directory.
    elif os.fspath(model) and os.path.isdir(os.path.expanduser(model)):
        folder = Path(os.path.expanduser(model))
    else:
        _refuse_missing_path(model)
        return download_snapshot(
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
    if text and os.path.exists(os.path.expanduser(text)):
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


def download_snapshot(repo_id: str, *, revision: str | None, local_files_only: bool, **options) -> Path:
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
        if is_full(error):
            where = options.get("cache_dir") or constants.HF_HUB_CACHE
            raise DiskFull(
                f"The disk of {where} is full, {repo_id}{at_revision} has no room there: free some space, or name "
                "another disk by HF_HOME (load's cache_dir), and try again; whole files are kept."
            ) from error
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
            raise RepositoryNotFound(
                f"The Hub doesn't accept your token for {repo_id}: log in again with `hf auth login`, "
                "or pass another token."
            ) from error
        raise RepositoryNotFound(
            f"Downloading {repo_id}{at_revision} failed ({first_line(error)}): try again, what is there is kept."
        ) from error
