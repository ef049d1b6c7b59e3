"""`verify` finds every byte that isn't as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.repository.components import COMPONENTS, METADATA, MODEL_INDEX, Component
from ernie_image_nf4.repository.integrity import ComponentReport, verify

WITH_WEIGHTS = [component for component in COMPONENTS if component.weights]


def only_failure(folder: Path) -> ComponentReport:
    (failed,) = [report for report in verify(folder) if not report.ok]
    return failed


def test_an_untouched_repository_passes(repository: Path) -> None:
    reports = verify(repository)
    assert [report.name for report in reports] == [component.name for component in COMPONENTS]
    assert all(report.ok and not report.problems for report in reports)
    assert reports[0].summary.startswith(
        "transformer: ErnieImageTransformer2DModel, NF4, 0.4 MB, relative weight error 0.08"
    )
    assert all("\n" not in report.summary for report in reports)


@pytest.mark.parametrize("component", WITH_WEIGHTS, ids=lambda component: component.name)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_changed_byte_of_a_weight_file_is_found(component: Component, copy: Path, place: float) -> None:
    file = copy / component.name / component.weights
    content = bytearray(file.read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    report = only_failure(copy)
    assert report.name == component.name
    assert report.problems == [f"{file} was changed: its SHA-256 isn't the recorded one."]
    assert report.summary.endswith(" files wrong")


def test_a_missing_file_is_named(copy: Path) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    file.unlink()
    assert only_failure(copy).problems == [f"{file} is missing."]


def test_a_truncated_file_is_named_with_both_sizes(copy: Path) -> None:
    file = copy / "vae" / "config.json"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    assert only_failure(copy).problems == [f"{file} has {size - 1} bytes, expected {size}."]


def test_a_file_that_was_added_is_named(copy: Path) -> None:
    file = copy / "pe" / "model-00002-of-00002.safetensors"
    file.touch()
    assert only_failure(copy).problems == [f"{file} isn't in {METADATA}."]


def test_an_index_that_disagrees_about_a_class_is_named(copy: Path) -> None:
    index = json.loads((copy / MODEL_INDEX).read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (copy / MODEL_INDEX).write_text(json.dumps(index))
    assert only_failure(copy).name == "vae"


def test_without_index_there_is_nothing_to_check(copy: Path) -> None:
    (copy / MODEL_INDEX).unlink()
    with pytest.raises(InvalidRepository, match=f"has no {MODEL_INDEX}"):
        verify(copy)


def test_without_metadata_the_weights_are_compared_with_their_configurations(copy: Path) -> None:
    (copy / METADATA).unlink()
    reports = verify(copy)
    assert [report.name for report in reports] == [component.name for component in COMPONENTS]
    assert all(report.ok for report in reports)
    assert reports[0].summary == "transformer: ErnieImageTransformer2DModel, complete, no digests to compare"
