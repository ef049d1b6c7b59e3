"""Commands that look at a repository without loading it: ``verify`` and ``info``."""

from __future__ import annotations

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


def info(model: ModelArgument = None, revision: RevisionOption = None, offline: OfflineOption = False) -> None:
    """Say what a repository holds, without loading it."""
    from ..repository.describe import describe
    from ..repository.record import open_repository
    from ..repository.resolve import find_repository

    folder = find_repository(model, weights=False, revision=revision, local_files_only=offline)
    for line in describe(open_repository(folder, weights=False)):
        typer.echo(line)
