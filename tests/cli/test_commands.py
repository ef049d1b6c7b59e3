"""All commands: usage errors, what they say, and an import of the package that costs nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from conftest import CHECKOUT

import ernie_image_nf4
from ernie_image_nf4.cli import build, options
from ernie_image_nf4.cli.app import COMMANDS
from ernie_image_nf4.fast.products import PRODUCTS
from ernie_image_nf4.generation.image_file import FORMATS
from ernie_image_nf4.memory.placement import DTYPES, MEMORY_MODES
from ernie_image_nf4.quantization.synthetic import PRESETS
from ernie_image_nf4.repository.components import METADATA

# Usage


def test_usage_errors_exit_with_two(command):
    assert command("generate").code == 2
    assert command("generate", "a cat", "--steps", "many").code == 2
    assert command("generate", "a cat", "--prompts-file", "prompts.txt").code == 2
    assert command("generate", "a cat", "--format", "webp").code == 2
    assert command("paint").code == 2


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["generate", "a cat", "--memory", "swap"], MEMORY_MODES),
        (["generate", "a cat", "--dtype", "float64"], DTYPES),
        (["generate", "a cat", "--products", "int4"], PRODUCTS),
        (["generate", "--prompts-file", "-", "--out-dir", "out", "--format", "gif"], FORMATS),
        (["evaluate", "original", "nf4", "--memory", "swap"], MEMORY_MODES),
        (["synthesize", "folder", "--preset", "huge"], PRESETS),
    ],
)
def test_a_value_that_is_no_choice_names_the_choices(command, arguments, choices):
    result = command(*arguments)
    assert result.code == 2
    assert result.err.splitlines()[-1].endswith(f"is not one of {', '.join(map(repr, choices))}.")


def test_choices_are_those_of_the_functions_behind():
    assert get_args(options.Memory) == MEMORY_MODES
    assert get_args(options.Dtype) == tuple(DTYPES)
    assert get_args(options.Products) == PRODUCTS
    assert get_args(options.Format) == tuple(FORMATS)
    assert get_args(build.Preset) == PRESETS


def test_version(command):
    assert command("--version").out == f"{ernie_image_nf4.__version__}\n"


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(monkeypatch, place):
    arguments = ["info", "./nowhere"]
    arguments.insert(0 if place == "before" else 2, "--debug")
    monkeypatch.setattr(sys, "argv", ["ernie-image-nf4", *arguments])
    with pytest.raises(ernie_image_nf4.errors.RepositoryNotFound):
        ernie_image_nf4.cli.main()


# What they say


def test_info_says_what_a_repository_holds(command, repository):
    result = command("info", repository)
    assert result.code == 0
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert lines["name"] == "ERNIE-Tiny-NF4"
    assert lines["source"].startswith("ERNIE-Tiny")
    assert lines["transformer"].startswith("ErnieImageTransformer2DModel, quantized, ")
    assert lines["vae"].startswith("AutoencoderKLFlux2, unquantized, ")
    assert lines["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert "guidance" in lines["recommended"]
    assert lines["installed"].startswith(f"ernie-image-nf4 {ernie_image_nf4.__version__}, torch ")


def test_info_tells_how_the_weights_were_made(command, copy):
    metadata = json.loads((copy / METADATA).read_text())
    metadata["quantization"] |= {"scale_search": True, "calibration_prompts": 64, "calibration_source": "built in"}
    metadata["components"]["transformer"]["kept_modules"] = ["text_proj", "final_linear"]
    (copy / METADATA).write_text(json.dumps(metadata))
    out = command("info", copy).out
    assert "blocks of 64, scale search, calibrated with 64 prompts (built in)" in out
    assert "kept: text_proj, final_linear" in out
    metadata["quantization"] |= {"scale_search": False, "calibration_prompts": 0}
    (copy / METADATA).write_text(json.dumps(metadata))
    assert not re.search("scale search|calibrated", command("info", copy).out)


def test_info_without_weights_takes_sizes_from_the_metadata(command, copy):
    full = command("info", copy).out
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    assert command("info", copy).out.replace(", not here", "") == full


def test_verify_passes_on_what_quantize_wrote_and_names_a_changed_file(command, copy):
    assert command("verify", copy).code == 0
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = command("verify", copy)
    assert result.code == 1
    assert f"  {weights}" in result.out


def test_synthesize_and_quantize_make_a_repository(command, tmp_path):
    assert command("synthesize", tmp_path / "original", "--preset", "tiny", "--quiet").code == 0
    result = command("quantize", tmp_path / "original", tmp_path / "nf4", "--device", "cpu", "--quiet")
    assert (result.code, result.out) == (0, f"Wrote {tmp_path / 'nf4'}\n")
    assert command("verify", tmp_path / "nf4").code == 0


# The package


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["", *(command.__name__ for command in COMMANDS)])
def test_help_needs_neither_torch_nor_diffusers(name):
    code = f"""
import sys
sys.argv[1:] = {[name, "--help"] if name else ["--help"]}
from ernie_image_nf4.cli import main
try:
    main()
finally:
    print({{"torch", "diffusers", "transformers"}} & set(sys.modules))
"""
    lines = python(code).splitlines()
    assert lines[-1] == "set()"
    assert lines[0].startswith(f"Usage: ernie-image-nf4 {name or '[OPTIONS]'}")
    assert name or {command.__name__ for command in COMMANDS} <= {line.split()[0] for line in lines if line}


def test_the_package_runs_as_a_module():
    help_text = subprocess.run([sys.executable, "-m", "ernie_image_nf4", "--help"], cwd=CHECKOUT, capture_output=True)
    assert help_text.returncode == 0
    assert b"generate" in help_text.stdout


@pytest.mark.slow
def test_public_functions_are_functions_in_any_import_order():
    code = """
import ernie_image_nf4.quantization, ernie_image_nf4.repository
from ernie_image_nf4.repository.integrity import ComponentReport
import ernie_image_nf4
from ernie_image_nf4 import load, quantize, verify
import ernie_image_nf4.quantization.convert
for function in (load, quantize, verify, ernie_image_nf4.quantize, ernie_image_nf4.verify, ernie_image_nf4.load):
    print(type(function).__name__, function.__name__)
"""
    names = ["load", "quantize", "verify", "quantize", "verify", "load"]
    assert python(code).splitlines() == [f"function {name}" for name in names]


def test_the_package_has_no_other_lazy_names():
    assert isinstance(ernie_image_nf4.__version__, str)
    with pytest.raises(AttributeError, match="has no attribute 'paint'"):
        _ = ernie_image_nf4.paint


def test_the_command_is_installed():
    assert shutil.which("ernie-image-nf4", path=Path(sys.executable).parent)
