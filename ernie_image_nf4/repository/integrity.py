"""A repository against its ``quantization_metadata.json``, byte by byte, and against its own configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import IncompatibleLibraries, InvalidRepository
from .components import COMPONENTS, METADATA, MODEL_INDEX, Component
from .metadata import ComponentRecord, changed_files, read_metadata
from .record import Repository, component_class, open_component, read_model_index
from .security import DOWNLOAD_AGAIN
from .validation import structure_problems


@dataclass(frozen=True)
class ComponentReport:
    """What was found of one component.

    Attributes:
        name: Its folder.
        summary: One line to print.
        ok: Whether nothing is wrong with it.
        problems: One line for each thing that is, naming the file.
    """

    name: str
    summary: str
    ok: bool
    problems: list[str]


def verify(folder: str | Path, *, components: Sequence[Component] = COMPONENTS) -> list[ComponentReport]:
    """Read every component file of a repository and compare it with what it should be.

    Where there is metadata, each file is compared with its recorded digest. Then weights are compared with their
    configuration: every tensor there and none too many, each with its shape, dtype and whole quantization state, all
    values finite.

    Args:
        folder: The repository.
        components: Those to look at.

    Returns:
        A report for each of them that the repository has.

    Raises:
        InvalidRepository: The folder can't be examined: it has no ``model_index.json`` (it isn't finished), or that or
            the metadata can't be read.
    """
    folder = Path(folder)
    index, metadata = read_model_index(folder), read_metadata(folder)
    reports = []
    for component in components:
        record = metadata.components.get(component.name) if metadata else None
        if record is None and component.optional and component_class(index, component) is None:
            continue
        changed = _recorded_problems(folder, index, component, record) if record else []
        if metadata and not record:
            changed.append(f"{METADATA} says nothing of {component.name}.")
        problems = changed or _own_problems(folder, index, component, record)
        summary = _summary(component, record, changed, problems)
        reports.append(ComponentReport(component.name, summary, not problems, problems))
    return reports


def check_integrity(repository: Repository) -> None:
    """`verify` of a repository that has been opened, with an error instead of a report.

    Raises:
        InvalidRepository: Something is wrong. The message has the first problem and the number of all.
        IncompatibleLibraries: The installed libraries can't build a model by its configuration.
    """
    if repository.metadata_problem:
        raise repository.metadata_problem
    problems = []
    for part in repository.components.values():
        record = repository.metadata.components.get(part.name) if repository.metadata else None
        if repository.metadata and not record:
            problems.append(f"{METADATA} says nothing of {part.name}.")
            continue
        found = _recorded_problems(repository.folder, repository.index, part.component, record) if record else []
        problems += found or structure_problems(part, values=True)
    if problems:
        more = f" (and {len(problems) - 1} more, see `ernie-image-nf4 verify`)" if len(problems) > 1 else ""
        raise InvalidRepository(f"{problems[0]}{more} {DOWNLOAD_AGAIN.capitalize()}.")


def _recorded_problems(folder: Path, index: dict, component: Component, record: ComponentRecord) -> list[str]:
    """Where the files of one component aren't as they were recorded."""
    problems = changed_files(folder / component.name, record)
    if component_class(index, component) != record.class_name:
        problems.append(
            f"{MODEL_INDEX} says {index.get(component.name)} of {component.name}, {METADATA} {record.class_name}."
        )
    return problems


def _own_problems(folder: Path, index: dict, component: Component, record: ComponentRecord | None) -> list[str]:
    """Where a component contradicts itself, or why the libraries here can't tell."""
    if component_class(index, component) is None:
        return [f"{MODEL_INDEX} has no line for {component.name}."]
    try:
        return structure_problems(open_component(folder, index, component, record=record), values=True)
    except (InvalidRepository, IncompatibleLibraries) as error:
        return [str(error)]


def _summary(component: Component, record: ComponentRecord | None, changed: list[str], problems: list[str]) -> str:
    if record is None:
        state = f"{len(problems)} problems" if problems else "complete, no digests to compare"
        return f"{component.name}: {component.class_name}, {state}"
    kind = "NF4" if record.quantized else "original precision"
    size = f"{record.bytes / 1e6:.1f} MB, " if record.bytes else ""
    error = (
        "" if record.relative_weight_error is None else f"relative weight error {record.relative_weight_error:.4f}, "
    )
    files = f"{len(changed)} of {len(record.files)} files wrong" if changed else f"{len(record.files)} files ok"
    unusable = f", but {len(problems)} problems" if problems and not changed else ""
    return f"{component.name}: {record.class_name}, {kind}, {size}{error}{files}{unusable}"
