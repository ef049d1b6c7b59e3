"""examples/train_lora.py: what it writes is a LoRA, it learns, and an interrupted run goes on as if it hadn't been."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import CHECKOUT
from PIL import Image
from safetensors.torch import load_file

from ernie_image_nf4 import load, load_lora
from ernie_image_nf4.repository.lora_file import describe_lora

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_lora", CHECKOUT / "examples" / "train_lora.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 32 + 16 * number), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"all {colour}\n", encoding="utf-8")
    return folder


def run(script: ModuleType, pictures: Path, repository: Path, output: Path, *more: object) -> Path:
    options = ("--model", repository, "--resolution", 32, "--rank", 2, "--learning-rate", 0.01, "--warm-up", 0)
    samples = ("--sample", "all red", "--sample-steps", 1, "--save-every", 2, "--device", "cpu")
    return script.train(
        script.parse_arguments([str(each) for each in (pictures, "-o", output, *options, *samples, *more)])
    )


@pytest.fixture(scope="module")
def whole(script, pictures, repository, tmp_path_factory) -> Path:
    """The LoRA of a run of four steps."""
    return run(script, pictures, repository, tmp_path_factory.mktemp("whole") / "style", "--steps", 4)


def test_it_writes_a_lora_and_pictures(whole, repository):
    assert whole.name == "style.safetensors"
    assert sorted(path.name for path in (whole.parent / "samples").iterdir()) == ["000002-1.png", "000004-1.png"]
    found = describe_lora(whole)
    assert (found.format, found.ranks, found.is_dora) == ("diffusers", (2,), False)
    pipe = load(repository, device="cpu", dtype="float32", prompt_enhancer=False)
    before = pipe.transformer.layers[1].mlp.up_proj.weight.clone()
    assert load_lora(pipe, whole.parent) == "style"  # the only LoRA of its folder
    layers = {name.partition(".lora_")[0] for name, _ in pipe.transformer.named_parameters() if ".lora_" in name}
    assert len(layers) == 7 * len(pipe.transformer.layers)
    assert torch.equal(pipe.transformer.layers[1].mlp.up_proj.get_base_layer().weight, before)
    assert all(tensor.any() for tensor in load_file(whole).values())


def test_an_interrupted_run_goes_on(script, whole, pictures, repository, tmp_path):
    run(script, pictures, repository, tmp_path / "style", "--steps", 2)
    encoded = tmp_path / "style" / "run" / "encoded.safetensors"
    written = encoded.stat().st_mtime_ns
    again = run(script, pictures, repository, tmp_path / "style", "--steps", 4)
    assert encoded.stat().st_mtime_ns == written
    found, expected = (load_file(path.parent / "run" / "state.safetensors") for path in (again, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    with pytest.raises(SystemExit, match="of a run with other settings"):
        run(script, pictures, repository, tmp_path / "style", "--steps", 6, "--rank", 4)


def test_the_lora_is_never_older_than_the_state(script, whole, pictures, repository, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(script, pictures, repository, tmp_path / "style", "--steps", 4, "--save-every", 4)
    monkeypatch.undo()
    result = tmp_path / "style" / "style.safetensors"
    expected = load_file(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(result).items())
    run(script, pictures, repository, tmp_path / "style", "--steps", 4)
    result.unlink()
    assert run(script, pictures, repository, tmp_path / "style", "--steps", 4) == result  # with nothing left to do
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(result).items())


def test_what_goes_on_is_the_same_run_with_files_that_are_whole(script, pictures, repository, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    output = tmp_path / "style"
    run(script, folder, repository, output, "--steps", 2)
    (folder / "red.txt").write_text("all blue", encoding="utf-8")
    with pytest.raises(SystemExit, match="of a run with other settings"):
        run(script, folder, repository, output, "--steps", 4)
    (folder / "red.txt").write_text("all red", encoding="utf-8")
    (output / "run" / "encoded.safetensors").write_bytes(b"damaged")  # is made anew
    run(script, folder, repository, output, "--steps", 4)
    (output / "run" / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"state\.safetensors is damaged .* remove it to begin anew"):
        run(script, folder, repository, output, "--steps", 6)
    (output / "run" / "state.safetensors").unlink()

    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "save_file", fill)
    with pytest.raises(SystemExit, match=r"can't be written .*No space left"):
        run(script, folder, repository, output, "--steps", 2)
    assert not list(output.glob(".*"))


def test_it_learns(script, pictures, repository, tmp_path, monkeypatch):
    """The same noise and caption again and again: the loss falls."""
    losses: list[float] = []
    loss_of = script.loss_of

    def same(model, values, rows, options, shift, generator, dtype, device):
        generator = torch.Generator().manual_seed(0)
        loss = loss_of(model, values, [0], options, shift, generator, dtype, device)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(script, "loss_of", same)
    run(script, pictures, repository, tmp_path / "style", "--steps", 8, "--no-caption", 0, "--accumulate", 2)
    assert len(losses) == 16
    assert losses[0] == losses[1]  # no step between the passes of one
    assert losses[-1] < losses[0]
    assert all(one > other for one, other in zip(losses[::2], losses[2::2], strict=False))


def test_latents_are_what_the_pipeline_decodes(script, repository, pictures):
    pipe = load(repository, device="cpu", dtype="float32", prompt_enhancer=False)
    latents = script.encode_picture(pipe, pictures / "red.png", 32)[None]
    shown = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **options: (shown.append(z), decode(z, **options))[1]
    embeds = pipe.encode_prompt("all red", torch.device("cpu"))
    pipe(prompt_embeds=embeds, latents=latents, height=32, width=32, num_inference_steps=0, guidance_scale=1.0)
    pixels = torch.from_numpy(np.array(Image.open(pictures / "red.png").resize((32, 32)))).permute(2, 0, 1)[None]
    expected = pipe.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
    assert torch.allclose(shown[0], expected, atol=1e-5)


def test_captions_in_one_file_and_none(script, pictures, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match=r"a\.png and 0 more have no caption"):
        script.read_pictures(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "black"}) + "\n")
    assert script.read_pictures(tmp_path) == [(tmp_path / "a.png", "black")]
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="holds no pictures"):
        script.read_pictures(tmp_path / "none")


def test_each_picture_comes_once_before_any_comes_again(script):
    rows = [row for step in range(6) for row in script.rows_of_step(step, 4, 2, seed=1)]
    assert [sorted(rows[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert rows[:4] != rows[4:8] or rows[4:8] != rows[8:]


def test_help_says_how_to_start_it(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--help"])
    assert "examples/train_lora.py PICTURES --model" in capsys.readouterr().out
    assert "train_lora" not in sys.modules


@pytest.mark.parametrize(
    "options",
    [
        ("--resolution", 100),
        ("--resolution", 0),
        ("--rank", 0),
        ("--steps", 0),
        ("--save-every", 0),
        ("--learning-rate", "nan"),
        ("--learning-rate", 0),
        ("--no-caption", 1.5),
    ],
)
def test_numbers_that_cannot_work_are_refused_at_once(script, options, capsys):
    with pytest.raises(SystemExit) as refused:
        script.parse_arguments(["pictures", "-o", "style", *map(str, options)])
    assert refused.value.code == 2
    assert f"error: {options[0]} " in capsys.readouterr().err


def test_pictures_that_are_not_there_have_their_line(script, tmp_path):
    with pytest.raises(SystemExit, match="There is no folder"):
        script.read_pictures(tmp_path / "none")
    listed = tmp_path / "metadata.jsonl"
    for row, message in (
        ({"file": "a.png"}, "Object 1 of .* lacks file_name or text"),
        ({"file_name": "a.png", "text": None}, "lacks file_name or text"),
        (["a.png"], "lacks file_name or text"),
        ({"file_name": "a.png", "text": ""}, "isn't there"),
    ):
        listed.write_text(json.dumps(row), encoding="utf-8")
        with pytest.raises(SystemExit, match=message):
            script.read_pictures(tmp_path)
    listed.write_text('{"file_name": "a.png",', encoding="utf-8")
    with pytest.raises(SystemExit, match="write a JSON object on each line"):
        script.read_pictures(tmp_path)


def test_files_that_cannot_be_read_have_their_line(script, pictures, tmp_path):
    whole = (pictures / "red.png").read_bytes()
    for content in (b"no picture", whole[:60], b""):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(SystemExit, match=r"a\.png is no picture that can be read"):
            script.read_picture(tmp_path / "a.png", 32)
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\n".encode())
    assert script.read_pictures(tmp_path) == [(tmp_path / "a.png", "a cat")]
    (tmp_path / "a.txt").write_bytes("eine Mütze".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"a\.txt is not in UTF-8"):
        script.read_pictures(tmp_path)


def test_what_load_refuses_has_its_line_and_pictures_come_first(script, pictures, tmp_path, capsys):
    output = tmp_path / "style"
    with pytest.raises(SystemExit, match="There is no folder"):
        script.main([str(tmp_path / "none"), "-o", str(output)])
    assert not output.exists()
    with pytest.raises(SystemExit, match=r"^Error: "):
        script.main([str(pictures), "-o", str(output), "--model", str(tmp_path / "model"), "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"^Error: .*'foo'"):
        script.main([str(pictures), "-o", str(output), "--device", "foo"])
    shutil.rmtree(output)
    output.write_text("")
    with pytest.raises(SystemExit):
        script.main([str(pictures), "-o", str(output)])
    assert "is a file: name a folder" in capsys.readouterr().err
