"""Commands that look at a repository without loading it: ``verify`` and ``info``."""

from __future__ import annotations

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

    if model is not None and Path(model).expanduser().is_file():
        for line in describe_adapter(Path(model).expanduser()):
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
