"""A finished repository -> the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from ..errors import InvalidSettings, RepositoryNotFound
from .security import first_line


def create_repository(repo_id: str, token: str | bool | None = None) -> None:
    """Creates a model repository unless it is there, so that a missing right shows before the work and not after.

    Raises:
        InvalidSettings: That can't be the name of a repository.
        RepositoryNotFound: The Hub refuses it, or can't be reached.
    """
    with _clear_errors(repo_id):
        HfApi(token=token).create_repo(repo_id, exist_ok=True)


def upload(folder: Path, repo_id: str, token: str | bool | None = None) -> None:
    """Uploads a folder as one commit.

    Raises:
        RepositoryNotFound: The Hub refuses it, or can't be reached.
    """
    with _clear_errors(repo_id, f" (the folder is complete: `hf upload {repo_id} {folder}` tries again)"):
        HfApi(token=token).upload_folder(repo_id=repo_id, folder_path=folder, commit_message="NF4 weights")


@contextmanager
def _clear_errors(repo_id: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise InvalidSettings(f"{repo_id!r} can't be the name of a Hub repository: {error}") from None
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = getattr(error, "server_message", None) or first_line(error)
        raise RepositoryNotFound(
            f"Publishing to {repo_id} failed: {reason}: log in with `hf auth login` to an account that may write "
            f"there{hint}."
        ) from error
