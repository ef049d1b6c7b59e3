"""Tiny repositories of the real classes, made once a session by the package's own commands, and the `gpu` marker."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import ErnieImagePipeline
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

from ernie_image_nf4 import cli, load
from ernie_image_nf4.loading import pipeline
from ernie_image_nf4.memory.placement import DTYPES
from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.synthetic import synthesize
from ernie_image_nf4.repository.components import Component
from ernie_image_nf4.repository.meta_model import meta_model
from ernie_image_nf4.repository.record import StoredComponent, open_component, read_model_index

CHECKOUT = Path(__file__).parent.parent

# Threads that wait for each other cost tiny models more than they give: 23 s instead of 111 s on two busy cores.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dtype", choices=[*DTYPES], help="What load() takes where a test asks for no dtype, on every device."
    )


def pytest_configure(config: pytest.Config) -> None:
    if default := config.getoption("--dtype"):
        find = pipeline.find_dtype
        pipeline.find_dtype = lambda requested, device, **options: find(requested or default, device, **options)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if config.getoption("--dtype") not in (None, "bfloat16") and "fp8" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="fp8 is for bfloat16"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original-precision repository with random weights."""
    return synthesize(tmp_path_factory.mktemp("tiny") / "ERNIE-Tiny", preset="tiny", progress=False)


@pytest.fixture(scope="session")
def repository(original: Path) -> Path:
    """The NF4 repository of `original`."""
    return quantize(original, original.with_name("ERNIE-Tiny-NF4"), device="cpu", progress=False)


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoredComponent]:
    """The components of the full-size repository, headers without values."""
    from full_size import full_size_components  # which imports this module

    return full_size_components(tmp_path_factory.mktemp("full-size"))


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """A copy of `repository` to damage."""
    return Path(shutil.copytree(repository, tmp_path / "copy"))


@pytest.fixture(scope="session")
def pipe(repository: Path) -> ErnieImagePipeline:
    """`repository`, loaded on the CPU. Not to be changed."""
    return load(repository, device="cpu")


class QuantizerForCPUs(BnB4BitDiffusersQuantizer):
    """diffusers' NF4 quantizer without its demand for a GPU, which bitsandbytes no longer has."""

    def validate_environment(self, *args, **kwargs) -> None:
        pass

    def update_device_map(self, device_map):
        return device_map


@contextmanager
def diffusers_nf4_on_cpus() -> Iterator[None]:
    """Let diffusers' own `from_pretrained` load and make NF4 weights on a CPU, to compare with."""
    mapping = AUTO_QUANTIZER_MAPPING
    upstream = mapping["bitsandbytes_4bit"]
    mapping["bitsandbytes_4bit"] = QuantizerForCPUs
    try:
        yield
    finally:
        mapping["bitsandbytes_4bit"] = upstream


def skeleton(component: Component, folder: Path) -> torch.nn.Module:
    """The model that the configuration in a folder describes, without storage."""
    return meta_model(component, {component.config: json.loads((folder / component.config).read_text())})


def stored(folder: Path, component: Component) -> StoredComponent:
    """A component of a repository that has been opened."""
    return open_component(folder, read_model_index(folder), component)


def weight_files(folder: Path, component: Component) -> list[Path]:
    return list(stored(folder, component).files)


def captured(transformer: torch.nn.Module) -> weakref.ref[torch.Tensor]:
    """Gives a fast transformer memory of a captured step, as on a GPU, and tells whether it is still there."""
    step = transformer.runtime.captured_step
    step.output = torch.zeros(4)
    return weakref.ref(step.output)


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs the command line in this process: ``command("info", folder) -> Run(code, out, err)``."""

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["ernie-image-nf4", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        if isinstance(exit.value.code, str):  # what the interpreter does with the text given to sys.exit
            return Run(1, out, f"{err}{exit.value.code}\n")
        return Run(exit.value.code or 0, out, err)

    return run
