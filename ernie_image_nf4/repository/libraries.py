"""What is to blame when a library can't use a component: its files if a check finds a fault, otherwise the versions.

The checks of `security`, `record` and `validation` come before a library reads a file. What it raises all the same
comes out of a file that only the library understands, or of a library in another version than the code here knows.
Nobody is to download 9 GB again for the latter.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from ..errors import ErnieImageNF4Error, IncompatibleLibraries, InvalidRepository
from .components import METADATA
from .metadata import changed_files
from .record import StoredComponent
from .security import DOWNLOAD_AGAIN, first_line, unreadable

# The oldest version (that of pyproject.toml) and the newest that the tests have passed with.
TESTED = {
    "torch": ("2.11", "2.14"),
    "diffusers": ("0.38", "0.42"),
    "transformers": ("5.0", "5.24"),
    "tokenizers": ("0.22.1", "0.23"),
    "bitsandbytes": ("0.50", "0.50"),
}
OF_A_DEVICE = ("OutOfMemoryError", "AcceleratorError")  # of torch, by name: `--help` does without torch


@contextmanager
def library_reading(part: StoredComponent, file: Path | None = None) -> Iterator[None]:
    """Turn whatever a library raises while it uses a component into one clear error.

    The only place where every exception is caught: what diffusers, transformers, tokenizers and bitsandbytes raise for
    senseless settings is undocumented and of any type (KeyError, ZeroDivisionError, AttributeError ...). Only calls
    into those libraries may stand inside; the original error is kept as the cause. Errors of a device are passed on.

    Args:
        part: The component.
        file: The file of it that is used, if it is one.

    Raises:
        InvalidRepository: A file is broken or was changed.
        IncompatibleLibraries: None is, as far as can be told.
    """
    try:
        yield
    except (ErnieImageNF4Error, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ in OF_A_DEVICE:
            raise
        raise explain(part, error, file) from error


def explain(part: StoredComponent, error: Exception, file: Path | None = None) -> ErnieImageNF4Error:
    """The error to raise instead of a library's, arguments as for `library_reading`."""
    where, said = file or part.folder, f"{type(error).__name__}: {first_line(error)}"
    if not isinstance(error, ImportError):
        if isinstance(error, OSError) and error.strerror:
            return unreadable(error.filename or where, error)
        if fault := _fault(part):
            return InvalidRepository(f"{where} can't be loaded ({said}). {fault} {DOWNLOAD_AGAIN.capitalize()}.")
    names = _libraries(part)
    installed = {name: importlib.metadata.version(name) for name in names}
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    files = (
        f"its files are those of {METADATA}"
        if part.record
        else f"no check found a fault in its files (which {METADATA} would tell for sure)"
    )
    return IncompatibleLibraries(f"{where} can't be loaded with {versions} ({said}), but {files}: {_cure(installed)}.")


def _fault(part: StoredComponent) -> str | None:
    """What is wrong with a component's files, a sentence. Weights' values are left out: no library looks at them."""
    if part.record:
        return next(iter(changed_files(part.folder, part.record, weights=False)), None)
    vocabulary = part.folder / "tokenizer.json"
    if vocabulary.is_file():
        try:
            tokenizers.Tokenizer.from_file(str(vocabulary))
        except Exception as error:  # it raises no other class
            return f"{vocabulary} is no vocabulary of the tokenizers library ({first_line(error)})."
    return None


def _libraries(part: StoredComponent) -> tuple[str, ...]:
    """The libraries that load a component."""
    if part.component.weights:
        return (part.component.library, *(["bitsandbytes"] if part.quantized else []), "torch")
    return ("transformers", "tokenizers") if part.component.library == "transformers" else ("diffusers",)


def _cure(installed: dict[str, str]) -> str:
    """What to do about the versions that are installed."""
    others = {
        name: TESTED[name][1]
        for name, version in installed.items()
        if not f"{version}.".startswith(f"{TESTED[name][1]}.")
    }
    others.pop("torch", None)  # which comes in builds; what it breaks shows elsewhere
    if not others:
        return "this package was tested with these versions, so please report it with what --debug shows"
    command = " ".join(f'"{name}=={newest}.*"' for name, newest in others.items())
    return f"install versions that this package was tested with, pip install {command}"
