"""Mutated repositories, files and values work or are refused with a message; `benchmarks/fuzz.py` does thousands."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import MUTATIONS, mutate, run
from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.repository.components import METADATA
from ernie_image_nf4.repository.metadata import Metadata, read_metadata, to_json
from ernie_image_nf4.repository.safetensors_io import DTYPES, read_header, read_tensor
from ernie_image_nf4.repository.security import is_plain_name, read_json

CASES = 25  # other seeds than those of the long run, and few enough for every run of the tests
FIRST = 1_000_000

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs each case in a forked process")
def test_mutated_repositories_work_or_are_refused(repository):
    report = run(repository, FIRST, CASES, progress=False)
    assert report["violations"] == []
    assert {name: sum(outcomes.values()) for name, outcomes in report["outcomes"].items()} == {
        "verify": CASES,
        "info": CASES,
        "load": CASES,
    }


def test_every_kind_of_mutation_can_be_made_again_from_its_seed(repository, tmp_path):
    kinds = set()
    for seed in range(60):
        made = []
        for name in ("one", "two"):
            folder = shutil.copytree(
                repository, tmp_path / f"{name}-{seed}", ignore=shutil.ignore_patterns("ernie_image_nf4")
            )
            made.append(mutate(folder, seed))
        assert made[0] == made[1]
        kinds |= {mutation.split()[0] for mutation in made[0]}
        shutil.rmtree(tmp_path / f"one-{seed}")
        shutil.rmtree(tmp_path / f"two-{seed}")
    assert kinds >= {mutation.__name__ for mutation in MUTATIONS}


# The parsers


def attempt(function: Callable[..., Any], *arguments: object) -> Any:
    """What the function returns, or the only error it may raise."""
    try:
        return function(*arguments)
    except InvalidRepository as error:
        return error


@pytest.mark.slow
@quick
@given(content=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_json(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    result = attempt(read_json, tmp_path, path)
    assert str(path) in str(result) if isinstance(result, InvalidRepository) else result == json.loads(content)


tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "C64"]) | scalars,
        "shape": st.lists(st.integers(-2, 6) | scalars, max_size=3) | scalars,
        "data_offsets": st.lists(st.integers(-8, 64) | scalars, min_size=1, max_size=3) | scalars,
    }
)
headers = st.binary(max_size=60) | (st.dictionaries(st.text(max_size=6), tensors | values, max_size=4) | values).map(
    lambda value: json.dumps(value).encode()
)


@pytest.mark.slow
@quick
@given(header=headers, lie=st.just(0) | st.integers(-8, 2**62), data=st.binary(max_size=64))
def test_any_bytes_as_a_safetensors_file(tmp_path, header, lie, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", max(len(header) + lie, 0)) + header + data)
    result = attempt(read_header, path)
    if isinstance(result, InvalidRepository):
        assert str(path) in str(result)
        return
    assert sum(tensor.spec.bytes for tensor in result.values()) <= len(data)
    assert all(isinstance(read_tensor(tensor), torch.Tensor) for tensor in result.values())


@pytest.mark.slow
@quick
@given(data=st.data())
def test_any_change_of_the_metadata(repository, tmp_path, data):
    value = json.loads((repository / METADATA).read_text())
    inner, key = value, None
    while isinstance(inner, dict | list) and inner:
        outer = inner
        key = data.draw(st.sampled_from(sorted(outer) if isinstance(outer, dict) else range(len(outer))))
        inner = outer[key]
        if data.draw(st.booleans()):
            break
    outer[key] = data.draw(values)
    (tmp_path / METADATA).write_text(json.dumps(value))
    result = attempt(read_metadata, tmp_path)
    if isinstance(result, InvalidRepository):
        assert METADATA in str(result)
        return
    assert isinstance(result, Metadata)
    (tmp_path / METADATA).write_text(to_json(result))
    assert read_metadata(tmp_path) == result


@given(name=st.text(max_size=12))
def test_a_plain_name_stays_in_its_folder(name):
    if is_plain_name(name):
        with tempfile.TemporaryDirectory() as folder:
            assert (Path(folder) / name).parent == Path(folder)
            assert os.path.dirname(os.path.normpath(os.path.join(folder, name))) == folder
