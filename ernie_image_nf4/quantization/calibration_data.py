"""What calibration needs of the original: predictions for a few pictures, and how sensitive they are to each layer.

The whole transformer is on the device for this, as in drawing with offloading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import ErnieImagePipeline
from torch import nn
from tqdm import tqdm

from ..loading.pipeline import load_opened
from ..repository.metadata import Recommended
from ..repository.record import Repository
from ..upstream.pipelines import execution_device

SAMPLES = 128  # pairs of predictions, with the prompt and with the empty one: 280,000 tokens at 512x512
MAX_SIZE = 512  # pixels a side: enough tokens, at a quarter of the time that 1024 takes


@dataclass
class Sample:
    """One prediction of the original.

    Attributes:
        latents: (1, channels, height / 16, width / 16), on the CPU, as are the other tensors.
        timestep: As the transformer gets it; 1000 is pure noise.
        text: Embedding of the prompt, (tokens, text_in_dim).
        weight: Factor of this prediction in the guided one.
        sensitivity: Layer -> mean square of the derivatives of the prediction by the layer's output, for each token:
            (tokens,).
    """

    latents: torch.Tensor
    timestep: float
    text: torch.Tensor
    weight: float
    sensitivity: dict[str, torch.Tensor]


@torch.no_grad()
def record_samples(
    source: Repository, prompts: Sequence[str], settings: Recommended, device: torch.device, progress: bool
) -> list[Sample]:
    """Predictions on the way to the prompts' pictures, at timesteps that take turns from prompt to prompt.

    Args:
        source: The original repository.
        prompts: What to draw.
        settings: Size (at most `MAX_SIZE` pixels a side are drawn), steps and guidance scale.
        device: Where to draw.
        progress: Whether to show progress bars.
    """
    pipe = _load_original(source, device)
    guidance = settings.guidance_scale
    weights = (1 - guidance, guidance) if guidance > 1 else (1.0,)
    each = min(-(-SAMPLES // len(prompts)), settings.num_inference_steps)
    samples = []
    with tqdm(prompts, desc="draw", unit="prompt", disable=not progress) as bar:
        for number, prompt in enumerate(bar):
            steps = [number + place * settings.num_inference_steps // each for place in range(each)]
            steps = sorted(step % settings.num_inference_steps for step in steps)
            for latents, timestep, texts in _record_steps(pipe, prompt, settings, number, steps):
                for text, weight in zip(texts, weights, strict=True):
                    samples.append(Sample(latents, timestep, text, weight, {}))
    with tqdm(samples, desc="sensitivity", unit="pass", disable=not progress) as bar:
        for number, sample in enumerate(bar):
            sample.sensitivity = _sensitivity(pipe, sample, number)
    del pipe
    clear_device_cache(garbage_collection=True)
    return samples


def conditions(
    sample: Sample, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Timestep (1,), text (1, tokens, text_in_dim) and its length (1,), as the transformer takes them."""
    timestep = torch.tensor([sample.timestep], device=device, dtype=dtype)
    return timestep, sample.text[None].to(device, dtype), torch.tensor([len(sample.text)], device=device)


def _load_original(source: Repository, device: torch.device) -> ErnieImagePipeline:
    memory = "resident" if device.type == "cpu" else "offload"
    pipe = load_opened(source.without_prompt_enhancer(), device=device, memory=memory)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.enable_gradient_checkpointing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _record_steps(
    pipe: ErnieImagePipeline, prompt: str, settings: Recommended, seed: int, steps: Sequence[int]
) -> list[tuple[torch.Tensor, float, list[torch.Tensor]]]:
    """Latents, timestep and texts (with guidance the empty one first) of the transformer at some steps of a picture."""
    passes = []

    def record(module: nn.Module, arguments: tuple, inputs: dict[str, torch.Tensor]) -> None:
        texts = [text[:length].cpu() for text, length in zip(inputs["text_bth"], inputs["text_lens"], strict=True)]
        passes.append((inputs["hidden_states"][:1].cpu(), inputs["timestep"][0].item(), texts))

    height, width = (min(size, MAX_SIZE) for size in (settings.height, settings.width))
    shape = (1, pipe.transformer.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    latents = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    hook = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pipe(
            prompt,
            height=height,
            width=width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            latents=latents.to(execution_device(pipe), pipe.transformer.dtype),
            use_pe=False,
            output_type="latent",
        )
    finally:
        hook.remove()
    return [passes[step] for step in steps]


def _sensitivity(pipe: ErnieImagePipeline, sample: Sample, seed: int) -> dict[str, torch.Tensor]:
    """Layer -> mean square, for each token, of the derivatives of the prediction's product with a random direction.

    On average over directions it is that of the whole prediction.
    """
    model, device = pipe.transformer, execution_device(pipe)
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: found.__setitem__(name, gradient.float().square().mean(-1).view(-1)))

    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: watch(name, output))
        for name, layer in _block_layers(model)
    ]
    try:
        with torch.enable_grad():
            latents = sample.latents.to(device, model.dtype).requires_grad_()
            prediction = model(latents, *conditions(sample, device, model.dtype), return_dict=False)[0]
            direction = torch.randn(prediction.shape, generator=torch.Generator("cpu").manual_seed(seed))
            prediction.backward(sample.weight * direction.to(prediction))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value.cpu() for name, value in found.items()}


def _block_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in model.named_modules():
        if name.startswith("layers.") and isinstance(layer, nn.Linear):
            yield name, layer
