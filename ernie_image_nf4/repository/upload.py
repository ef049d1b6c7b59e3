"""A finished repository -> the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..errors import InvalidSettings, UploadFailed
from .security import first_line

# Status of a request without the right to it (what one may not see is not found), and of one too many.
REFUSED, BUSY = (401, 403, 404), (408, 429)


def create_repository(repo_id: str, token: str | bool | None = None) -> None:
    """Creates a model repository unless it is there, so that a missing right shows before the work and not after.

    Raises:
        InvalidSettings: That can't be the name of a repository.
        UploadFailed: The Hub refuses it, or can't be reached.
    """
    with _clear_errors(repo_id, "repeat the command"):
        HfApi(token=token).create_repo(repo_id, exist_ok=True)


def upload(folder: Path, repo_id: str, token: str | bool | None = None) -> None:
    """Uploads a folder as one commit.

    Raises:
        UploadFailed: The Hub refuses it, or can't be reached. The folder is complete.
    """
    with _clear_errors(repo_id, f"publish the folder, which is complete, with `hf upload {repo_id} {folder}`"):
        HfApi(token=token).upload_folder(repo_id=repo_id, folder_path=folder, commit_message="NF4 weights")


@contextmanager
def _clear_errors(repo_id: str, then: str) -> Iterator[None]:
    """Say why publishing failed, what to mend, and what to do `then`."""
    try:
        yield
    except HFValidationError as error:
        raise InvalidSettings(f"{repo_id!r} can't be the name of a Hub repository: {error}") from None
    except (HTTPError, OSError, RuntimeError) as error:  # the last one from Xet, the Hub's other transfer protocol
        reason = getattr(error, "server_message", None) or first_line(error)
        raise UploadFailed(f"Publishing to {repo_id} failed ({reason}): {_cure(error)}, then {then}.") from error


def _cure(error: Exception) -> str:
    """What to mend, by the kind of error."""
    if isinstance(error, OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in REFUSED or isinstance(error, LocalTokenNotFoundError):
        return "log in with `hf auth login` to an account that may write there"
    if status is None:
        return "see to the connection"
    return "wait until the Hub is well again" if status in BUSY or status >= 500 else "mend that"
