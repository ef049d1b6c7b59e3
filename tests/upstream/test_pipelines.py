"""Private names of diffusers' pipelines: what they give, and that upstream's own way is taken once they are gone."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import DiffusionPipeline

from ernie_image_nf4 import load
from ernie_image_nf4.fast.prompt_enhancer import make_prompt_enhancer_fast
from ernie_image_nf4.fast.random_state import SeededDraws
from ernie_image_nf4.generation import enhancement
from ernie_image_nf4.generation.enhancement import enhance, enhance_all
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.memory.offload import OffloadHook, enable_offload
from ernie_image_nf4.upstream import gone, pipelines
from ernie_image_nf4.upstream.offloading import hook_of
from ernie_image_nf4.upstream.pipelines import enhance_prompt, execution_device

CPU = torch.device("cpu")
SETTINGS = [Settings("a cat", "", 32, 48, 1, 1.0, seed=3), Settings("一只猫", "", 32, 32, 1, 1.0, seed=4)]


def test_the_execution_device_is_that_of_the_weights_where_diffusers_has_no_other(pipe, monkeypatch):
    assert execution_device(pipe) == CPU
    monkeypatch.delattr(DiffusionPipeline, "_execution_device")
    assert execution_device(pipe) == CPU


def test_components_have_a_hook_while_they_are_offloaded(repository):
    pipe = load(repository, device="cpu")
    assert hook_of(pipe.pe) is None
    enable_offload(pipe, CPU)
    assert isinstance(hook_of(pipe.pe), OffloadHook)
    del pipe.pe._hf_hook  # as if accelerate kept it elsewhere
    assert hook_of(pipe.pe) is None


def test_the_enhancer_is_asked_as_a_call_of_the_pipeline_asks_it(pipe):
    settings = SETTINGS[0]
    with SeededDraws(settings.seed):
        expected = pipe("a cat", height=32, width=48, num_inference_steps=1, guidance_scale=1.0).revised_prompts[0]
    assert enhance(pipe, settings) == expected


def test_another_generate_changes_neither_the_pipeline_nor_the_enhancer(pipe):
    before, enhancer, asked = dict(vars(pipe)), dict(vars(pipe.pe)), []

    def generate(**options: object) -> torch.Tensor:
        asked.append(options)
        return torch.cat([options["input_ids"], pipe.pe_tokenizer("a dog", return_tensors="pt").input_ids], 1)

    text = enhance_prompt(pipe, "a cat", CPU, width=48, height=32, generate=generate)
    assert text == "a dog"
    assert [options["max_new_tokens"] for options in asked] == [pipe.pe_tokenizer.model_max_length]
    assert vars(pipe) == before
    assert vars(pipe.pe) == enhancer


def test_without_its_method_prompts_are_enhanced_to_the_same_texts(repository, monkeypatch, caplog):
    pipe = load(repository, device="cpu")
    latents = pipe("a cat", height=32, width=32, num_inference_steps=1, output_type="latent")
    if isinstance(latents, torch.Tensor):
        pytest.skip("this diffusers has the method, and gives no texts beside latents")
    make_prompt_enhancer_fast(pipe.pe)
    expected = [enhance(pipe, settings) for settings in SETTINGS]
    caplog.set_level(logging.INFO, logger=gone.logger.name)
    monkeypatch.setattr(enhancement, "find_decode_slots", lambda pipe: 2)
    monkeypatch.setattr(pipelines, "ENHANCE_PROMPT", "_renamed")
    assert [enhance(pipe, settings) for settings in SETTINGS] == expected
    assert enhance_all(pipe, SETTINGS) == expected
    messages = [record.message for record in caplog.records if record.name == gone.logger.name]
    assert messages == ["ErnieImagePipeline._renamed is gone from this version: prompts are enhanced one by one."]
