"""The generated model card: valid front matter, and no figure that isn't in the files."""

from __future__ import annotations

import ast
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ernie_image_nf4.quantization.model_card import describe_source, license_file, model_card
from ernie_image_nf4.repository.components import COMPONENTS, QUANTIZED
from ernie_image_nf4.repository.metadata import Metadata, Source, read_metadata


@pytest.fixture
def metadata(repository: Path) -> Metadata:
    return read_metadata(repository)


@pytest.fixture
def card(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def table(card: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without the header row."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_front_matter_passes_the_hub_library(metadata: Metadata) -> None:
    source = Source("baidu/ERNIE-Image", "0123456789abcdef", "apache-2.0")
    data = ModelCard(model_card(replace(metadata, source=source))).data
    assert data.base_model == "baidu/ERNIE-Image"
    assert data.base_model_relation == "quantized"
    assert data.license == "apache-2.0"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert {"nf4", "bitsandbytes", "ernie-image"} <= set(data.tags)


def test_a_folder_is_not_named_as_a_base_model(card: str) -> None:
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "NF4 weights of the folder `ERNIE-Tiny`" in card


def test_a_licence_that_nothing_tells_is_unknown(metadata: Metadata) -> None:
    card = model_card(replace(metadata, source=replace(metadata.source, license=None)))
    assert ModelCard(card).data.license == "unknown"


def test_sizes_are_those_of_the_files(card: str, original: Path, repository: Path) -> None:
    rows = table(card, "Sizes")
    assert [row[0] for row in rows] == [component.name for component in COMPONENTS if component.weights]
    for name, _, _, original_size, size, ratio in rows:
        sizes = [
            sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
            for folder in (original, repository)
        ]
        assert [int(original_size), int(size)] == sizes
        assert float(ratio.rstrip("%")) == pytest.approx(100 * sizes[1] / sizes[0], abs=0.05)


def test_total_sizes_are_those_of_the_files(card: str, original: Path, repository: Path) -> None:
    size, original_size = (
        sum(file.stat().st_size for file in folder.glob("*/*.safetensors")) / 1e6 for folder in (repository, original)
    )
    assert f": {size:.2f} MB instead of {original_size:.2f} MB." in card


def test_weight_errors_are_those_of_the_metadata(card: str, metadata: Metadata) -> None:
    rows = table(card, "Quality")
    assert [row[0] for row in rows] == [component.name for component in QUANTIZED]
    for name, error in rows:
        assert float(error) == pytest.approx(metadata.components[name].relative_weight_error, abs=5e-5)
    assert "Not measured: the pictures." in card


def test_no_placeholder_is_left(card: str) -> None:
    assert not re.search(r"\$\w", card)


def test_its_code_is_python_that_loads_what_is_there(card: str, metadata: Metadata) -> None:
    package, plain = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(package)
    loaded = {
        call.func.value.id
        for call in ast.walk(ast.parse(plain))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
    }
    assert loaded == {"ErnieImagePipeline", *(component.class_name for component in QUANTIZED)}
    for code in (package, plain):
        arguments = {
            keyword.arg: keyword.value.value
            for call in ast.walk(ast.parse(code))
            if isinstance(call, ast.Call)
            for keyword in call.keywords
            if isinstance(keyword.value, ast.Constant)
        }
        assert arguments["num_inference_steps"] == metadata.recommended.num_inference_steps
        assert arguments["guidance_scale"] == metadata.recommended.guidance_scale
        assert (arguments["height"], arguments["width"]) == (metadata.recommended.height, metadata.recommended.width)


def test_kept_layers_are_listed(metadata: Metadata) -> None:
    record = replace(metadata.components["transformer"], kept_modules=["final_linear"])
    card = model_card(replace(metadata, components=metadata.components | {"transformer": record}))
    assert "keep their original precision: `transformer.final_linear`." in card


def test_the_licence_is_that_of_the_source(original: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(original, tmp_path / "source"))
    assert describe_source(source) == Source("source", None, "apache-2.0")
    assert "Apache License" in license_file(source, "apache-2.0").read_text()
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    assert describe_source(source) == Source("source", None, None)
    assert license_file(source, None) is None
    (source / "LICENSE.txt").write_text("Do as you like.")
    assert license_file(source, "other").read_text() == "Do as you like."
