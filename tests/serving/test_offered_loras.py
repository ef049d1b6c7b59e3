"""LoRAs that a server offers: drawn and noted as `generate --lora` does, and bad ones seen before the first request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT
from lora_files import keyed, write, write_lora
from running import events_of, request, running_engine, running_loop, until

from ernie_image_nf4.errors import DrawingFailed, ErnieImageNF4Error, InvalidLora, InvalidSettings
from ernie_image_nf4.generation.image_file import read_settings
from ernie_image_nf4.generation.loras import lora_in
from ernie_image_nf4.serving.engine import Engine, Picture

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory) -> dict[str, Path]:
    """Two LoRAs that show in the pixels."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_lora(folder / f"{name}.safetensors", pipe, seed=seed, size=40.0)
        for seed, name in enumerate(("ink", "oil"), 1)
    }


@pytest.fixture(scope="module")
def loop():
    with running_loop() as loop:
        yield loop


@pytest.fixture(scope="module")
def engine(loop, repository, files):
    loras = {"style": str(files["ink"]), "oil": str(files["oil"])}
    with running_engine(loop, repository, loras=loras) as engine:
        yield engine


def drawn(loop, engine: Engine, *lora: tuple[str, float]) -> bytes:
    events = loop.run(events_of(engine.draw(request("a cat", lora=lora, seed=3))))
    (picture,) = [event for event in events if isinstance(event, Picture)]
    return picture.png


def test_a_picture_with_loras_is_that_of_generate_and_says_so(loop, engine, command, repository, files, tmp_path):
    size = ("--model", repository, "--height", 32, "--width", 32, "--steps", 2, "--guidance", 3, "--device", "cpu")
    loras = ("--lora", f"{files['oil']}:0.5", "--lora", files["ink"])
    for name, options in (("plain", ()), ("both", loras)):
        assert command("generate", "a cat", "--seed", 3, "-o", tmp_path / f"{name}.png", *size, *options).code == 0
    plain, both = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "both"))
    assert drawn(loop, engine, ("oil", 0.5), ("style", 1)) == both
    assert drawn(loop, engine) == plain  # a worker takes them out again
    assert drawn(loop, engine, ("oil", 0.5), ("style", 1.0)) == both
    noted = read_settings(tmp_path / "both.png")["lora"]
    digests = {name: lora_in(path).sha256 for name, path in files.items()}
    assert noted == f"oil.safetensors:0.5 (sha256 {digests['oil']}); ink.safetensors:1 (sha256 {digests['ink']})"


def test_loras_that_arent_there_or_are_one_are_refused_before_anything_is_loaded(repository, files):
    with pytest.raises(InvalidLora, match="There is no file"):
        Engine(str(repository), loras={"ink": "nowhere.safetensors"})
    with pytest.raises(InvalidSettings, match="LoRAs ink and style are the same file"):
        Engine(str(repository), loras={name: str(files["ink"]) for name in ("ink", "style")})


def test_a_lora_that_doesnt_fit_shows_at_the_start(loop, pipe, repository, tmp_path):
    import torch

    wide = {"layers.0.self_attention.to_q": (torch.ones(4, 3), torch.ones(3, 4))}
    path = write(tmp_path / "wide.safetensors", keyed("diffusers", wide))
    engine = Engine(str(repository), devices=("cpu",), loras={"wide": str(path)})
    with pytest.raises(ErnieImageNF4Error, match=r"wide\.safetensors doesn't fit"):
        loop.run(engine.start())


@pytest.mark.slow
def test_a_file_that_is_replaced_while_the_server_runs_is_not_drawn_with(loop, repository, files, tmp_path):
    path = tmp_path / "ink.safetensors"
    path.write_bytes(files["ink"].read_bytes())
    with running_engine(loop, repository, loras={"ink": str(path)}) as engine:
        path.write_bytes(files["oil"].read_bytes())
        with pytest.raises(DrawingFailed, match="has changed"):
            drawn(loop, engine, ("ink", 1.0))
        until(lambda: engine.workers[0].idle)
        plain = drawn(loop, engine)
        os.kill(engine.workers[0].process.pid, signal.SIGKILL)
        # The next one starts without it.
        assert drawn(loop, engine) == plain
        with pytest.raises(DrawingFailed, match="has changed"):
            drawn(loop, engine, ("ink", 1.0))


def test_the_server_itself_never_imports_torch(repository, files):
    code = """if True:
        import sys
        import ernie_image_nf4.serving.application
        from ernie_image_nf4.serving.engine import Engine
        Engine(sys.argv[1], loras={"ink": sys.argv[2]})
        print([name for name in ("torch", "diffusers", "peft") if name in sys.modules])
    """
    arguments = [sys.executable, "-c", code, str(repository), str(files["ink"])]
    result = subprocess.run(arguments, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
