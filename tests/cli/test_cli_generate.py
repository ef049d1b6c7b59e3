"""``generate``: pictures that say how they were made, refusals before anything is loaded, one line for an error."""

from __future__ import annotations

import importlib.metadata
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKOUT
from hub_server import serve
from PIL import Image

import ernie_image_nf4
from ernie_image_nf4.generation.image_file import output_paths, read_settings
from ernie_image_nf4.generation.manifest import locked
from ernie_image_nf4.generation.seeding import initial_latents
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw
from ernie_image_nf4.loading import pipeline
from ernie_image_nf4.repository.metadata import read_metadata

SMALL = ("--height", 32, "--width", 48, "--steps", 2, "--device", "cpu")


@pytest.fixture
def generate(command, repository, tmp_path):
    """Runs ``generate`` on the tiny repository, into ``out.png`` of `tmp_path`."""

    def run(prompt: str, *options: object):
        return command("generate", prompt, "--model", repository, "-o", tmp_path / "out.png", *SMALL, *options)

    return run


def chunks(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# Pictures


@pytest.mark.parametrize(("options", "fast"), [((), True), (("--exact",), "exact")])
def test_upstreams_bits_are_an_option(generate, monkeypatch, options, fast):
    given, load = [], pipeline.load

    def noted(model, **arguments):
        given.append(arguments["fast"])
        return load(model, **arguments)

    monkeypatch.setattr(pipeline, "load", noted)
    assert generate("a cat", *options).code == 0
    assert given == [fast]


def test_draws_a_png_that_says_how_it_was_made(generate, tmp_path):
    result = generate("a cat", "--seed", 7, "--guidance", 3, "--negative", "dogs", "--dtype", "float32")
    assert result.code == 0
    assert pixels(tmp_path / "out.png").shape == (32, 48, 3)
    text = chunks(tmp_path / "out.png")
    # As pip names it: torch.__version__ also has the build ("+cu130"), which the metadata of some builds leave out
    versions = f"ernie-image-nf4 {ernie_image_nf4.__version__}, torch {importlib.metadata.version('torch')}, diffusers "
    assert text.pop("versions").startswith(versions)
    assert text.pop("revised_prompt")
    assert text == {
        "prompt": "a cat",
        "negative_prompt": "dogs",
        "seed": "7",
        "steps": "2",
        "guidance_scale": "3.0",
        "width": "48",
        "height": "32",
        "model": "ERNIE-Tiny-NF4",
        "dtype": "float32",
    }


def test_says_what_it_made(generate, tmp_path):
    out = generate("a cat", "--seed", 7).out
    assert out.startswith("Revised prompt: ")
    assert f"{tmp_path / 'out.png'}: 48x32, " in out
    assert "seed 7" in out


def test_prompts_in_any_script_survive_in_the_png(generate, tmp_path):
    generate("一只橙色的小猫 🐱", "--no-pe", "--negative", "Ünschärfe")
    text = chunks(tmp_path / "out.png")
    assert (text["prompt"], text["negative_prompt"]) == ("一只橙色的小猫 🐱", "Ünschärfe")
    assert "revised_prompt" not in text


def test_a_seed_makes_the_whole_picture_repeatable(generate, tmp_path):
    drawn = []
    for seed in (3, 4, 3):
        generate("a cat", "--seed", seed)
        drawn.append((pixels(tmp_path / "out.png"), chunks(tmp_path / "out.png")["revised_prompt"]))
    (first, first_prompt), (_, other_prompt), (again, again_prompt) = drawn
    assert np.array_equal(first, again)
    assert first_prompt == again_prompt != other_prompt


def test_without_a_seed_it_takes_one_and_notes_it(generate, tmp_path):
    seeds = set()
    for _ in range(2):
        out = generate("a cat", "--no-pe").out
        seeds.add(chunks(tmp_path / "out.png")["seed"])
        assert f"seed {chunks(tmp_path / 'out.png')['seed']}\n" in out
    assert len(seeds) == 2


def test_several_pictures_count_their_seeds_up(generate, tmp_path):
    generate("a cat", "--seed", 5, "--count", 2, "--no-pe")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-1.png", "out-2.png"]
    assert [chunks(tmp_path / f"out-{number}.png")["seed"] for number in (1, 2)] == ["5", "6"]
    second = pixels(tmp_path / "out-2.png")
    generate("a cat", "--seed", 6, "--no-pe")
    assert np.array_equal(pixels(tmp_path / "out.png"), second)


def test_names_of_many_pictures_sort_well():
    assert [path.name for path in output_paths(Path("x/out.png"), 10)][::9] == ["out-01.png", "out-10.png"]


def test_size_steps_and_guidance_default_to_what_the_repository_recommends(command, copy, repository, tmp_path):
    metadata = (copy / "quantization_metadata.json").read_text()
    recommended = read_metadata(repository).recommended
    for old, new in (
        (f'"height": {recommended.height}', '"height": 32'),
        (f'"width": {recommended.width}', '"width": 64'),
        (f'"num_inference_steps": {recommended.num_inference_steps}', '"num_inference_steps": 1'),
        (f'"guidance_scale": {recommended.guidance_scale}', '"guidance_scale": 1.5'),
    ):
        assert old in metadata
        metadata = metadata.replace(old, new)
    (copy / "quantization_metadata.json").write_text(metadata)
    command("generate", "a cat", "-m", copy, "-o", tmp_path / "out.png", "--device", "cpu", "--no-pe")
    text = chunks(tmp_path / "out.png")
    assert (text["height"], text["width"], text["steps"], text["guidance_scale"]) == ("32", "64", "1", "1.5")


def test_a_file_that_is_there_is_replaced_and_nothing_else_is_left(generate, tmp_path):
    (tmp_path / "out.png").write_text("old")
    generate("a cat", "--no-pe")
    assert pixels(tmp_path / "out.png").shape == (32, 48, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_drawing_leaves_the_global_random_state_alone(pipe):
    state = torch.get_rng_state()
    draw(pipe, Settings("a cat", "", 32, 32, 1, 1.0, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_means_the_same_noise_in_every_dtype(pipe, repository):
    settings = Settings("a cat", "", 32, 32, 1, 1.0, seed=0)
    other = ernie_image_nf4.load(repository, device="cpu", dtype="bfloat16", prompt_enhancer=False)
    assert torch.equal(initial_latents(other, settings), initial_latents(pipe, settings).to(torch.bfloat16))


def test_a_seed_means_the_same_noise_whatever_the_default_device(pipe):
    settings = Settings("a cat", "", 32, 32, 1, 1.0, seed=0)
    expected = initial_latents(pipe, settings)
    with torch.device("meta"):
        assert torch.equal(initial_latents(pipe, settings), expected)


@pytest.mark.parametrize("name", ["out.jpg", "out.jpeg", "out.webp"])
def test_the_ending_of_the_output_is_its_format(command, repository, tmp_path, name):
    result = command("generate", "一只猫", "-m", repository, "-o", tmp_path / name, *SMALL, "--seed", 7, "--count", 2)
    assert result.code == 0
    first, second = (tmp_path / name.replace("out", f"out-{number}") for number in (1, 2))
    assert pixels(first).shape == (32, 48, 3)
    with Image.open(first) as image:
        assert image.format == ("WEBP" if name.endswith("webp") else "JPEG")
    assert [read_settings(path)["seed"] for path in (first, second)] == ["7", "8"]
    settings = read_settings(first)
    assert (settings["prompt"], settings["model"]) == ("一只猫", "ERNIE-Tiny-NF4")
    assert f"Revised prompt: {settings['revised_prompt']}\n" in result.out
    assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dtype_asked_for_is_the_one_it_draws_in(generate, repository, tmp_path, dtype):
    assert generate("a cat", "--seed", 7, "--no-pe", "--dtype", dtype).code == 0
    pipe = ernie_image_nf4.load(repository, device="cpu", dtype=dtype, prompt_enhancer=False)
    guidance = float(chunks(tmp_path / "out.png")["guidance_scale"])
    expected = draw(pipe, Settings("a cat", "", 32, 48, 2, guidance, seed=7, use_pe=False))
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected.image))


@pytest.mark.parametrize(("guidance", "said"), [(1, True), (0.5, True), (3, False)])
def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(generate, caplog, guidance, said):
    assert generate("a cat", "--no-pe", "--negative", "dogs", "--guidance", guidance).code == 0
    message = f"The negative prompt has no effect at guidance scale {float(guidance)}: use one above 1 (--guidance 4)."
    assert (message in [record.getMessage() for record in caplog.records]) == said
    caplog.clear()
    assert generate("a cat", "--no-pe", "--guidance", guidance).code == 0
    assert "negative" not in caplog.text


def test_prompts_come_from_standard_input(command, repository, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a cat\n一只猫\n".encode())))
    options = ("--prompts-file", "-", "--out-dir", tmp_path / "out", "-m", repository, *SMALL, "--no-pe")
    result = command("generate", *options, "--format", "webp")
    assert result.out == f"{tmp_path / 'out'}: 2 pictures, 0 failed, see manifest.jsonl\n"
    assert {path.name for path in (tmp_path / "out").glob("*.webp")} == {"0001-a-cat.webp", "0002-一只猫.webp"}


def test_a_lora_of_a_row_that_is_not_there_is_told_of_before_anything_is_loaded(command, tmp_path):
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text('{"prompt": "a cat", "lora": ["nowhere.safetensors"]}')
    result = command("generate", "--prompts-file", prompts, "--out-dir", tmp_path / "out", "-m", "user/never-asked-for")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"Error: {prompts}, line 1, lora: There is no file or folder 'nowhere.safetensors'")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_run_draws_into_is_refused_before_anything_is_loaded(command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat")
    options = ("--prompts-file", tmp_path / "prompts.txt", "--out-dir", tmp_path / "out", "--device", "cpu")
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        result = command("generate", *options, "-m", "user/never-asked-for")
    assert (result.code, result.out) == (1, "")
    message = f"Error: Another run is drawing into {tmp_path / 'out'}: wait for it, or name another folder.\n"
    assert result.err == message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_revision_of_the_hub_with_and_without_network(copy, tmp_path):
    """The model of revision v1 is another one than that of main."""

    def generate(endpoint: str, *options: str) -> str:
        command = [sys.executable, "-m", "ernie_image_nf4", "generate", "a cat", "-o", tmp_path / "out.png", *SMALL]
        command += ["-m", "user/model", "--revision", "v1", "--no-pe", "--seed", 7, *options]
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        result = subprocess.run(list(map(str, command)), cwd=CHECKOUT, env=os.environ | settings, capture_output=True)
        assert result.returncode == 0, result.stderr
        return read_settings(tmp_path / "out.png")["revision"]

    with serve() as hub:
        commit = hub.add("user/model", copy)
        hub.repositories["user/model"].refs["v1"] = commit
        (copy / "scheduler" / "scheduler_config.json").write_text("{}")
        assert hub.add("user/model", copy) != commit
        assert generate(hub.endpoint) == commit
    assert generate("http://127.0.0.1:9", "--offline") == commit


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", 100], "Height 100 is not a positive multiple of 16: try 96."),
        (["--width", 24], "Width 24 is not a positive multiple of 16: try 32."),
        (["--height", 0], "Height 0 is not a positive multiple of 16: try 16."),
        (["--width", -16], "Width -16 is not a positive multiple of 16: try 16."),
        (["--steps", 0], "0 is too few for steps: use 1 or more."),
        (["--count", 0], "0 is too few for count: use 1 or more."),
        (["--seed", -1], "Seed -1 is out of range"),
        (["--guidance", "nan"], "Guidance nan is not a finite number"),
        (["-o", "nowhere/out.png"], "Output folder nowhere doesn't exist"),
        (["-o", "out.gif"], "Output out.gif is none of PNG (.png), JPEG (.jpg, .jpeg) and WebP (.webp): name it so."),
        (["-o", "out"], "Output out is none of PNG (.png), JPEG (.jpg, .jpeg) and WebP (.webp): name it so."),
        (["-o", "a" * 250 + ".png"], f"Output {'a' * 250}.png can't be written (File name too long): use a shorter"),
        (["-m", CHECKOUT, "--revision", "v1"], "Revision 'v1' was asked for, but"),
    ],
)
def test_settings_that_cannot_work(command, options, message):
    result = command("generate", "a cat", "--model", "user/never-asked-for", *options)
    assert result.code == 1
    assert result.err.startswith(f"Error: {message}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(command, prompt):
    result = command("generate", prompt, "--model", "user/never-asked-for")
    assert (result.code, result.err) == (1, "Error: The prompt is empty: say what to draw.\n")


def test_an_output_that_is_a_folder(command, tmp_path):
    (tmp_path / "out.png").mkdir()
    assert "is a folder: name a picture's file in it" in command("generate", "a cat", "-o", tmp_path / "out.png").err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root can't write to")
def test_an_output_folder_that_cannot_be_written_to(command):
    result = command("generate", "a cat", "--model", "user/never-asked-for", "-o", "/proc/self/out.png")
    assert result.code == 1
    assert "Output folder /proc/self can't be written to" in result.err


def test_a_model_that_does_not_exist(command, tmp_path):
    result = command("generate", "a cat", "--model", tmp_path / "nowhere", "-o", tmp_path / "out.png")
    assert result.code == 1
    assert result.err.startswith("Error: There is no folder")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_where_there_is_none(command, tmp_path):
    result = command(
        "generate", "a cat", "--model", "user/never-asked-for", "--device", "cuda", "-o", tmp_path / "out.png"
    )
    assert result.code == 1
    assert "'cuda' was asked for" in result.err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Handle Ctrl-C as in a terminal: a process started in the background ignores it, and the test would never end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_no_half_picture(generate, tmp_path):
    done = threading.Event()

    def interrupt() -> None:
        while not done.wait(5):  # Repeatedly: torch can take the first for an error of its own
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        result = generate("a cat", "--steps", 1000000)
    finally:
        done.set()
        thread.join()
    assert result.code == 130
    assert result.err.endswith("Interrupted.\n")
    assert list(tmp_path.iterdir()) == []
