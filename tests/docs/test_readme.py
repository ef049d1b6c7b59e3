"""README and training notes: valid for the Hub, and every figure in them is that of a file beside them."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from test_synthetic import hollow_file
from typer.main import get_command

from ernie_image_nf4.cli.app import app
from ernie_image_nf4.loading.pipeline import device_bytes
from ernie_image_nf4.memory.placement import GIB, choose_memory, mode_bytes, working_bytes
from ernie_image_nf4.quantization.layer_selection import DEFAULT_KEEP, plan_weights
from ernie_image_nf4.quantization.synthetic import tensor_specs
from ernie_image_nf4.repository.components import COMPONENTS
from ernie_image_nf4.repository.meta_model import skeleton

CHECKOUT = Path(__file__).parents[2]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
REPORT = json.loads((CHECKOUT / "training" / "report.json").read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_front_matter_is_a_model_card_of_the_hub():
    data = ModelCard(README).data
    assert data.license == "apache-2.0"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert data.base_model is None, "the mini is not derived from ERNIE-Image"


def test_the_minis_figures_are_those_of_the_report():
    table = README.split("<!-- mini-figures -->")[1].split("<!-- /mini-figures -->")[0]
    rows = dict(re.findall(r"`(\w+)` \| [^|]+ \| ([\d.]+)", table))
    assert rows == {key: f"{value:g}" for key, value in REPORT["figures"].items()}


def test_the_table_of_memory_is_what_auto_takes_at_full_size(tmp_path: Path):
    with as_file(files("ernie_image_nf4") / "quantization" / "configs" / "full") as configs:
        shutil.copytree(configs, tmp_path, dirs_exist_ok=True)
    weights = {}
    for component in COMPONENTS:
        if component.weights:
            file = tmp_path / component.name / component.weights
            hollow_file(file, tensor_specs(skeleton(component, tmp_path / component.name), duplicate_lm_head=False))
            if component.quantized:
                hollow_file(file, plan_weights(tmp_path, component, DEFAULT_KEEP).specs())
            weights[component.name] = device_bytes(tmp_path, component, fast=True)
    rows = re.findall(r"^\| ([\d.]+) GiB \([^|]*\) \| `(\w+)` \| ([^|]*) \|$", README, re.MULTILINE)
    assert [mode for _, mode, _ in rows] == ["resident", "offload", "stream"]
    room = working_bytes(1024**2, fast=True)
    for free, mode, host in rows:
        least = (mode_bytes(weights)[mode] + room) / GIB
        assert least <= float(free) < least + 0.1
        chosen, _ = choose_memory(
            "auto", torch.device("cuda", 0), weight_bytes=weights, free_bytes=int(float(free) * GIB), working_bytes=room
        )
        assert chosen == mode
        assert mode == "resident" or host == f"{sum(weights.values()) / GIB:.1f} GiB, pinned"
    assert f"saves {weights['pe'] / GIB:.1f} GiB in `resident`" in README


def test_sample_grid_and_linked_files_exist():
    for target in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (CHECKOUT / target).exists(), target


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_are_python(code: str):
    ast.parse(code)


def test_commands_in_the_readme_exist_with_their_options():
    commands = get_command(app).commands
    lines = [part for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]
    ours = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("ernie-image-nf4 ")]
    assert len(ours) >= 6
    for _, name, *arguments in ours:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= known
