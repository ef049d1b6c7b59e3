"""The mini's training: scenes, captions and prompts mean what they say, and the evaluation's scenes are really new."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2

from ernie_image_nf4 import load
from training.classifier import Seen, accuracies
from training.dit import CAPTIONS, Pool, Training, train
from training.export import name_rotary_embedding_as_release
from training.models import (
    TEXT_WIDTH,
    Budget,
    Ema,
    build_text_encoder,
    build_transformer,
    go_on_from,
    stop_condition,
)
from training.prompts import EN_STYLE, ZH_STYLE, PromptWriter, caption_en, caption_zh
from training.scenes import BACKGROUNDS, CAT, OBJECTS, PAPER, PLACES, Scene, caption, is_held_out, render, sample_scene
from training.vae import FAVOURED_SHARE, psnr, random_crops, reconstruction_loss, to_bytes, to_floats, training_scene

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(scope="module")
def sprites() -> torch.Tensor:
    """Premultiplied stand-ins for the emoji: each a square of its own colour."""
    colors = torch.rand(len(OBJECTS), 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    sprites = torch.zeros(len(OBJECTS), 4, 32, 32)
    sprites[:, :3, 2:-2, 2:-2] = colors
    sprites[:, 3, 2:-2, 2:-2] = 1
    return sprites


def test_a_tenth_of_all_combinations_is_held_out_and_never_trained_on():
    triples = [(o, b, p) for o in range(len(OBJECTS)) for b in range(len(BACKGROUNDS)) for p in range(len(PLACES))]
    assert 0.09 < sum(map(is_held_out, triples)) / len(triples) < 0.11
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(300):
            scene = sample_scene(rng, held_out=held_out)
            assert {is_held_out(triple) for triple in scene.triples()} == {held_out}


def test_the_vae_sees_the_objects_of_the_first_command_more_often_but_nothing_that_is_held_out():
    rng = random.Random(0)
    scenes = [training_scene(rng) for _ in range(3000)]
    assert not any(is_held_out(triple) for scene in scenes for triple in scene.triples())
    assert all(len({item for item in scene.objects if item >= 0}) == len(scene.triples()) for scene in scenes)
    for item in (CAT, PAPER):
        share = sum(item in scene.objects for scene in scenes) / len(scenes)
        assert 0.35 * FAVOURED_SHARE < share < 0.65 * FAVOURED_SHARE


def test_training_goes_on_from_an_nf4_repository():
    checkout = TRAINING.parent
    trained = load(checkout, device="cpu", dtype=torch.float32, fast=False)
    transformer, vae = build_transformer(), AutoencoderKLFlux2.from_config(trained.vae.config)
    go_on_from(checkout, transformer=transformer, vae=vae)
    noisy, text = torch.randn(1, 128, 4, 4), torch.randn(1, 5, TEXT_WIDTH)
    inputs = {"hidden_states": noisy, "timestep": torch.tensor([500.0]), "text_bth": text, "return_dict": False}
    with torch.no_grad():
        ours, theirs = (each(text_lens=torch.tensor([5]), **inputs)[0] for each in (transformer, trained.transformer))
        assert (ours - theirs).norm() < 0.01 * theirs.norm()  # CPUs with bfloat16 multiply NF4 weights in it
        torch.testing.assert_close(vae.decode(noisy[:, :32]).sample, trained.vae.decode(noisy[:, :32]).sample)
    assert torch.equal(vae.bn.running_var, trained.vae.bn.running_var)
    before = vae.state_dict()["decoder.conv_in.weight"].clone()
    go_on_from(None, vae=vae)
    assert torch.equal(vae.decoder.conv_in.weight, before)
    deeper = AutoencoderKLFlux2.from_config(trained.vae.config, layers_per_block=2)
    with pytest.raises(SystemExit, match=r"The vae of .* has other layers than the one to train: leave --start out"):
        go_on_from(checkout, vae=deeper)


def test_a_training_that_is_asked_to_end_is_gone_on_with(tmp_path: Path):
    pools = [Pool(torch.zeros(4, 2, 1, 1), torch.zeros(4, CAPTIONS, 3, dtype=torch.int16), batch=2, shift=1.0)] * 2
    seen: list[int] = []

    def begin(end: int | None) -> tuple[Training, bool]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(1, 1)
        training = Training(0, [torch.optim.AdamW(layer.parameters(), 0.1)], Ema(layer, decay=0.9))
        file = tmp_path / "dit.pt"
        spent = training.restore(file) if file.exists() else 0.0

        def loss_of(latents, ids, sigma):
            seen.append(training.step)
            if training.step == end:
                os.kill(os.getpid(), signal.SIGTERM)
            return layer(sigma[:, None]).square().mean()

        ended = train(training, loss_of, pools, Budget(6, spent=spent), 0.1, None, stop_condition(float("inf")))
        if not ended:
            training.save(file, 1.0)
        return training, ended

    before = signal.getsignal(signal.SIGTERM)
    try:
        stopped, ended = begin(end=2)
        assert (stopped.step, ended) == (3, False)
        assert begin(end=None)[1]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert stop_condition(0.0)()
    signal.signal(signal.SIGTERM, before)


def test_the_exported_text_encoder_names_its_vision_rotary_embedding_as_the_release(tmp_path: Path):
    model = build_text_encoder()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["rope_parameters"]["rope_type"] = "axial"  # as later versions of transformers write it
    path.write_text(json.dumps(config))
    name_rotary_embedding_as_release(tmp_path)
    assert json.loads(path.read_text())["vision_config"]["rope_parameters"]["rope_type"] == "default"
    assert type(model).from_pretrained(tmp_path).config.text_config.hidden_size == model.config.text_config.hidden_size


def test_captions_name_what_the_scene_shows():
    scene = Scene(BACKGROUNDS.index("wooden desk"), (CAT, -1, PAPER))
    rng = random.Random(1)
    for _ in range(50):
        english, chinese = caption(scene, "en", rng), caption(scene, "zh", rng)
        assert "cat" in english
        assert "left" in english or english.index("cat") < english.index("paper")
        assert "wooden desk" in english
        assert "猫" in chinese
        assert "纸" in chinese
        assert "木桌" in chinese


def test_plain_captions_are_the_enhancers_answers():
    assert caption_en([CAT, PAPER], "wooden desk") == (
        "an orange cat on the left and a white sheet of paper on the right, on a wooden desk"
    )
    assert caption_zh([CAT], "white", "right") == "右边是橙色的猫,白色背景"


def test_objects_are_150_to_250_and_no_name_is_used_twice():
    assert 150 <= len(OBJECTS) <= 250
    for language in ("en", "zh"):
        names = [name for item in OBJECTS for name in item[language] + item[f"also_{language}"]]
        assert len(names) == len(set(names))


def test_prompts_are_messages_of_the_pipeline_and_hold_the_answers_object():
    writer = PromptWriter({"en": ["zig"], "zh": ["啦"]}, random.Random(3))
    hits = 0
    for _ in range(500):
        message, answer = writer.write()
        message = json.loads(message)
        assert set(message) == {"prompt", "width", "height"}
        shown = [i for i in OBJECTS if i["en"][-1] in answer or i["zh"][-1] in answer]
        names = [
            name.lower()
            for item in shown
            for key in item
            if key[-3:] in ("_en", "_zh", "en", "zh")
            for name in item[key]
            if isinstance(item[key], list)
        ]
        hits += any(name in message["prompt"].lower() for name in names)
    assert hits / 500 > 0.9  # a few are meant to name nothing


@pytest.mark.parametrize(("file", "count"), [("free_form_prompts.json", 50), ("free_form_prompts_dev.json", 100)])
def test_hand_written_prompts_are_in_two_languages_with_known_objects(file: str, count: int):
    entries = json.loads((TRAINING / file).read_text(encoding="utf-8"))
    names = {item["en"][0] for item in OBJECTS}
    assert len({entry["prompt"] for entry in entries}) == count
    assert {entry["language"] for entry in entries} == {"en", "zh"}
    assert all(set(entry["objects"]) <= names and entry["objects"] for entry in entries)
    assert not {entry["prompt"] for entry in entries} & {*EN_STYLE, *ZH_STYLE}


@pytest.mark.parametrize("background", range(len(BACKGROUNDS)))
def test_rendering_puts_the_object_where_the_scene_says(sprites: torch.Tensor, background: int):
    generator = torch.Generator().manual_seed(background)
    for place in range(3):
        objects = [-1, -1, -1]
        objects[place] = 5
        picture = render([Scene(background, tuple(objects))], sprites, 64, generator)[0]
        assert picture.shape == (3, 64, 64)
        assert picture.abs().max() <= 1
        color = (sprites[5, :3, 16, 16] * 2 - 1).view(3, 1, 1)
        near = (picture - color).abs().sum(0) < 0.05
        columns = torch.nonzero(near)[:, 1].float()
        assert abs(columns.mean() / 64 - (0.26, 0.5, 0.74)[place]) < 0.06


def test_accuracies_count_background_place_and_object():
    scenes = [Scene(0, (1, -1, 2)), Scene(3, (-1, 4, -1))]
    seen = Seen([0, 2], [(1, -1, 7), (-1, 4, -1)])
    assert accuracies(seen, scenes) == {"background": 0.5, "place": 1.0, "object": 2 / 3}
    assert accuracies(Seen([0, 3], [(1, 5, 2), (-1, 4, -1)]), scenes)["place"] == 0.5


def test_pictures_survive_bytes_and_the_loss_is_zero_only_for_equal_ones():
    pool = torch.randint(0, 256, (4, 3, 160, 160), dtype=torch.uint8)
    crops = random_crops(pool, 6, 128)
    assert crops.shape == (6, 3, 128, 128)
    assert torch.equal(to_bytes(to_floats(crops)), crops)
    target = to_floats(crops)
    assert reconstruction_loss(target, target) == 0
    assert reconstruction_loss(target.roll(1, -1), target) > 0.1
    assert psnr(4e-3) == pytest.approx(30)
