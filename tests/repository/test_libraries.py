"""An error out of a library blames the files if a check finds a fault in them, and the library's version otherwise."""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import json
import sys
from pathlib import Path

import bitsandbytes
import diffusers
import pytest
import torch
import transformers
from conftest import CHECKOUT

from ernie_image_nf4 import load, quantize, verify
from ernie_image_nf4.errors import ErnieImageNF4Error, IncompatibleLibraries, InvalidRepository
from ernie_image_nf4.repository.components import COMPONENTS, METADATA, MODEL_INDEX, Component
from ernie_image_nf4.repository.libraries import TESTED

if sys.version_info >= (3, 11):
    import tomllib

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
every_component = pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
# What another version of a library raises where it is used in the way of this one.
OTHER_VERSION = [
    ImportError("cannot import name 'thing' from 'library'"),
    ModuleNotFoundError("No module named 'thing'"),
    TypeError("__init__() got an unexpected keyword argument 'thing'"),
    AttributeError("'Config' object has no attribute 'thing'"),
    KeyError("thing"),
]


def break_library(monkeypatch: pytest.MonkeyPatch, component: Component, error: Exception) -> None:
    """Let the class that loads a component raise an error when it is used."""

    kind = getattr(LIBRARIES[component.library], component.class_name)

    @functools.wraps(kind.__init__)  # diffusers asks for its arguments
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(kind, "__init__", fail)


def problem(folder: Path, kind: type[ErnieImageNF4Error]) -> str:
    """The line that `load` ends in."""
    with pytest.raises(kind) as caught:
        load(folder, device="cpu")
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The library


@every_component
@pytest.mark.parametrize("error", OTHER_VERSION, ids=lambda error: type(error).__name__)
def test_a_library_of_another_version_is_not_the_repositorys_fault(repository, monkeypatch, component, error):
    break_library(monkeypatch, component, error)
    message = problem(repository, IncompatibleLibraries)
    assert f"{component.library} {importlib.metadata.version(component.library)}" in message
    assert component.name in message
    assert f"{type(error).__name__}: " in message
    assert "thing" in message
    assert f"its files are those of {METADATA}" in message
    assert "download" not in message.lower()


def test_the_libraries_that_are_involved_are_named(repository, monkeypatch):
    with monkeypatch.context() as patch:
        break_library(patch, COMPONENTS[0], TypeError("thing"))
        versions = problem(repository, IncompatibleLibraries)
    for name in ("diffusers", "bitsandbytes", "torch"):
        assert f"{name} {importlib.metadata.version(name)}" in versions
    break_library(monkeypatch, COMPONENTS[-1], TypeError("thing"))
    versions = problem(repository, IncompatibleLibraries)
    for name in ("transformers", "tokenizers"):
        assert f"{name} {importlib.metadata.version(name)}" in versions
    assert "bitsandbytes" not in versions


def test_bitsandbytes_of_another_version(repository, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise TypeError("unexpected keyword argument 'device'")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "__init__", fail)
    assert f"bitsandbytes {importlib.metadata.version('bitsandbytes')}" in problem(repository, IncompatibleLibraries)


def test_without_metadata_the_line_says_what_is_not_known(copy, monkeypatch):
    (copy / METADATA).unlink()
    break_library(monkeypatch, COMPONENTS[0], TypeError("thing"))
    assert f"no check found a fault in its files (which {METADATA} would tell for sure)" in problem(
        copy, IncompatibleLibraries
    )


def test_versions_that_were_not_tested_are_to_be_exchanged(repository, monkeypatch):
    versions = {"transformers": "6.1.0", "tokenizers": TESTED["tokenizers"][1] + ".9"}
    break_library(monkeypatch, COMPONENTS[-1], TypeError("thing"))
    monkeypatch.setattr(importlib.metadata, "version", versions.get)
    message = problem(repository, IncompatibleLibraries)
    assert "transformers 6.1.0" in message
    assert message.endswith(f'pip install "transformers=={TESTED["transformers"][1]}.*".')


def test_versions_that_were_tested_are_to_be_reported(repository, monkeypatch):
    break_library(monkeypatch, COMPONENTS[-1], TypeError("thing"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: TESTED[name][1] + ".0")
    assert problem(repository, IncompatibleLibraries).endswith("please report it with what --debug shows.")


def test_a_missing_package_is_never_the_repositorys_fault(copy, monkeypatch):
    edit(copy / "vae" / "config.json", comment="changed")
    vae = next(component for component in COMPONENTS if component.name == "vae")
    break_library(monkeypatch, vae, ModuleNotFoundError("No module named 'thing'"))
    assert "No module named 'thing'" in problem(copy, IncompatibleLibraries)


def test_the_first_line_of_a_message_that_begins_with_an_empty_one(repository, monkeypatch):
    break_library(monkeypatch, COMPONENTS[-1], ImportError("\n  Install thing:\n\n pip install thing"))
    assert "(ImportError: Install thing:)" in problem(repository, IncompatibleLibraries)


def test_verify_says_it_of_the_component_and_that_its_files_are_right(repository, monkeypatch):
    break_library(monkeypatch, COMPONENTS[0], TypeError("thing"))
    reports = verify(repository)
    assert [report.ok for report in reports] == [False] + [True] * (len(COMPONENTS) - 1)
    assert reports[0].summary.endswith("2 files ok, but 1 problems")
    assert "can't be loaded with diffusers" in reports[0].problems[0]


def test_quantize_says_it_of_a_source(original, tmp_path, monkeypatch):
    break_library(monkeypatch, COMPONENTS[0], TypeError("thing"))
    with pytest.raises(IncompatibleLibraries, match="can't be loaded with diffusers"):
        quantize(original, tmp_path / "out", device="cpu", progress=False)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), MemoryError()], ids=lambda error: type(error).__name__
)
def test_an_error_of_the_machine_is_passed_on(repository, monkeypatch, error):
    break_library(monkeypatch, COMPONENTS[0], error)
    with pytest.raises(type(error)):
        load(repository, device="cpu")


def test_the_oldest_tested_versions_are_those_of_the_package():
    if sys.version_info < (3, 11):
        pytest.skip("no tomllib")
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    oldest = dict(line.split(">=") for line in project["dependencies"])
    assert {name: versions[0] for name, versions in TESTED.items()} == {name: oldest[name] for name in TESTED}
    for versions in TESTED.values():
        assert [*map(int, versions[0].split("."))] <= [*map(int, versions[1].split("."))]


# The files


def test_a_changed_configuration_that_a_library_fails_at_is_named(copy):
    edit(copy / "vae" / "config.json", norm_num_groups=0)
    message = problem(copy, InvalidRepository)
    assert "vae/config.json can't be loaded (ZeroDivisionError" in message
    assert "Download the repository again" in message
    assert "has" in message
    assert "expected" in message


@every_component
def test_a_changed_file_is_named_whatever_the_library_raises(copy, monkeypatch, component):
    paths = [copy / part.name / part.config for part in COMPONENTS if part.class_name == component.class_name]
    for path in paths:
        path.write_text(path.read_text() + " ")
    break_library(monkeypatch, component, TypeError("thing"))
    message = problem(copy, InvalidRepository)
    assert any(
        f"{path} has {path.stat().st_size} bytes, expected {path.stat().st_size - 1}. Download" in message
        for path in paths
    )


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("class_name", ["TokenizersBackend", "LlamaTokenizerFast"])
def test_a_vocabulary_that_only_the_library_understands(copy, class_name, recorded):
    if not recorded:
        (copy / METADATA).unlink()
    edit(copy / MODEL_INDEX, tokenizer=["transformers", class_name])
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-20])
    message = problem(copy, InvalidRepository)
    assert (f"{path} has" if recorded else f"{path} is no vocabulary of the tokenizers library") in message
    assert "Download the repository again" in message


def test_a_sound_vocabulary_that_an_older_library_does_not_know(repository, monkeypatch):
    """By its digest it is the one that was published."""
    break_library(monkeypatch, COMPONENTS[-1], Exception("data did not match any variant of untagged enum"))
    assert "can't be loaded with transformers" in problem(repository, IncompatibleLibraries)


def test_a_file_that_can_not_be_read(repository, monkeypatch):
    path = repository / "vae" / "config.json"
    break_library(monkeypatch, COMPONENTS[0], OSError(errno.EIO, "Input/output error", str(path)))
    assert problem(repository, InvalidRepository) == (
        f"{path} can't be read (Input/output error): check disk and permissions."
    )
