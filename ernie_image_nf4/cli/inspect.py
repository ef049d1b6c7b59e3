"""Commands that look at a repository without loading it: ``verify`` and ``info``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .options import ModelArgument, OfflineOption, RevisionOption


def verify(model: ModelArgument = None, revision: RevisionOption = None, offline: OfflineOption = False) -> None:
    """Check every file of a repository against its metadata."""
    from ..repository.integrity import verify
    from ..repository.resolve import find_repository

    reports = verify(find_repository(model, revision=revision, local_files_only=offline))
    for report in reports:
        typer.echo(report.summary)
        for problem in report.problems:
            typer.echo(f"  {problem}")
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def info(
    model: ModelArgument = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    device: Annotated[
        str | None, typer.Option(help="Say what load() would take on this device, and why: auto, cuda, cuda:1, cpu ...")
    ] = None,
) -> None:
    """Say what a repository holds, or what a LoRA's file is, without loading it."""
    from ..repository.describe import describe, describe_adapter
    from ..repository.record import open_repository
    from ..repository.resolve import find_repository

    if model is not None and _is_lora(model):
        from ..generation.loras import find_lora_file

        for line in describe_adapter(find_lora_file(model, local_files_only=offline)):
            typer.echo(line)
        return
    folder = find_repository(model, weights=False, revision=revision, local_files_only=offline)
    repository = open_repository(folder, weights=False)
    for line in describe(repository):
        typer.echo(line)
    if device is not None:
        from ..loading.cards import describe_device

        for line in describe_device(repository, None if device == "auto" else device):
            typer.echo(line)


def _is_lora(model: str) -> bool:
    """Whether a LoRA is meant: a file, one of the Hub, or a folder of files that is no repository."""
    from ..repository.components import MODEL_INDEX
    from ..repository.lora_source import SUFFIX

    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return not (path / MODEL_INDEX).exists() and any(path.glob(f"*{SUFFIX}"))
    return model.endswith(SUFFIX) or os.path.isfile(path)
