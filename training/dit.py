"""Stage 5: train transformer and text encoder together, by flow matching on latents of rendered scenes.

    python -m training.dit training/work --steps 12000

The target is noise minus latent at sigma drawn from a shifted logit-normal; matrices are updated by Muon, everything
else by AdamW; the averaged weights are kept. Every sixth step is at 512x512, the others at the native 256x256.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, ErnieImagePipeline
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .classifier import SceneClassifier, accuracies, classify, load_classifier
from .models import Ema, build_scheduler, build_text_encoder, build_transformer, learning_rate_factor
from .scenes import caption, load_sprites, render, sample_scene
from .vae import encode

TEXT_LENGTH = 40
CAPTIONS = 4  # a scene, half of them English
EMPTY = 0.1  # captions dropped, for guidance


@dataclass
class Pool:
    """Scenes as normalized latents with captions.

    Attributes:
        latents: (count, 128, size / 16, size / 16) bfloat16.
        ids: (count, CAPTIONS, TEXT_LENGTH) int16, padded with 0.
        batch: Scenes a step.
        shift: Of the training sigmas; larger pictures need more noise to hide their layout.
    """

    latents: torch.Tensor
    ids: torch.Tensor
    batch: int
    shift: float


def caption_pool(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> tuple[list, torch.Tensor]:
    """`count` training scenes and their captions' token ids."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    texts = [caption(scene, ("en", "zh")[number % 2], rng) for scene in scenes for number in range(CAPTIONS)]
    ids = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="np")[
        "input_ids"
    ]
    return scenes, torch.from_numpy(ids).to(torch.int16).view(count, CAPTIONS, TEXT_LENGTH)


@torch.no_grad()
def latent_pool(vae: AutoencoderKLFlux2, sprites: torch.Tensor, scenes: list, size: int, seed: int) -> torch.Tensor:
    """Normalized latents of `scenes` at `size`, bfloat16 on the GPU."""
    generator = torch.Generator(sprites.device).manual_seed(seed)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = (vae.bn.running_var.view(1, -1, 1, 1) + 1e-5).sqrt()
    latents = torch.empty(len(scenes), 128, size // 16, size // 16, dtype=torch.bfloat16, device=sprites.device)
    batch = 256 * 256 * 256 // size**2
    for start in range(0, len(scenes), batch):
        part = encode(vae, render(scenes[start : start + batch], sprites, size, generator))
        latents[start : start + len(part)] = (part - mean) / std
    return latents


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with the update size matched to AdamW's (Liu et al. 2025, arXiv:2502.16982).

    ``torch.optim.Muon`` does the same one matrix at a time; here matrices of one shape are orthogonalized as one
    batch, which makes its cost negligible for a model of many small matrices.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            self.shapes.setdefault(parameter.shape, []).append(parameter)

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for shape, parameters in self.shapes.items():
            gradients = torch.stack([parameter.grad for parameter in parameters])
            state = self.state[parameters[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1 - group["momentum"])
            update = orthogonalize(gradients.lerp(state["momentum"], group["momentum"]))
            scale = group["lr"] * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.to(gradients.dtype).unbind()), alpha=-scale)


@torch.compile(dynamic=False)
def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of a batch, by five quintic Newton-Schulz iterations in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def make_optimizers(transformer: nn.Module, text_encoder: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the repeated layers, AdamW for embeddings, norms, ends and modulation."""
    layers = [*transformer.layers.named_parameters(), *text_encoder.language_model.layers[:-1].named_parameters()]
    matrices = [parameter for _, parameter in layers if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    # The pipeline reads hidden_states[-2]: the last text layer, its norm and the vision tower are never used.
    rest = [*transformer.parameters(), *text_encoder.language_model.embed_tokens.parameters()]
    rest += text_encoder.language_model.layers[:-1].parameters()
    others = [parameter for parameter in rest if id(parameter) not in chosen]
    return [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    transformer: nn.Module,
    text_encoder: nn.Module,
    loss_of: Callable[..., torch.Tensor],
    pools: list[Pool],
    steps: int,
    lr: float,
    monitor: Callable[[int], None],
) -> None:
    """Train in place; the averaged weights are left in the models.

    `loss_of` comes from `compiled_loss`; `monitor(step)` runs on the averaged weights now and then.
    """
    optimizers = make_optimizers(transformer, text_encoder, lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, 300))
        for optimizer in optimizers
    ]
    ema = Ema(transformer, text_encoder, decay=0.9985)
    started, running = time.time(), 0.0
    torch.manual_seed(21)
    for step in range(steps):
        pool = pools[step % 6 == 5]
        loss = loss_of(*draw_batch(pool))
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        running = running + (loss.detach() - running) * 0.02
        if step % 250 == 0 or step == steps - 1:
            print(f"dit step {step} loss {float(running):.4f} {time.time() - started:.0f} s", flush=True)
        if step and step % 2500 == 0:
            ema.swap()
            monitor(step)
            ema.swap()
    ema.swap()


def draw_batch(pool: Pool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random latents of a pool, one of their captions (or the empty one), and sigmas: see `Pool`."""
    device = pool.latents.device
    rows = torch.randint(len(pool.latents), (pool.batch,), device=device)
    ids = pool.ids[rows, torch.randint(CAPTIONS, (pool.batch,), device=device)].long()
    empty = torch.rand(pool.batch, 1, device=device) < EMPTY
    ids[:, 1:] = ids[:, 1:].masked_fill(empty, 0)  # the beginning-of-text token alone, as the pipeline encodes ""
    sigma = torch.sigmoid(torch.randn(pool.batch, device=device))
    sigma = pool.shift * sigma / (1 + (pool.shift - 1) * sigma)
    return pool.latents[rows].float(), ids, sigma


def compiled_loss(transformer: nn.Module, text_encoder: nn.Module) -> Callable[..., torch.Tensor]:
    """A compiled function (latents, ids, sigma) -> loss."""
    decoder = text_encoder.language_model

    @torch.compile(dynamic=False)
    def loss_of(latents: torch.Tensor, ids: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(latents)
        weight = sigma.view(-1, 1, 1, 1)
        noisy = latents * (1 - weight) + noise * weight
        with torch.autocast("cuda", torch.bfloat16):
            text = decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
            prediction = transformer(
                hidden_states=noisy,
                timestep=sigma * 1000,
                text_bth=text,
                text_lens=(ids != 0).sum(1),
                return_dict=False,
            )[0]
        return F.mse_loss(prediction.float(), noise - latents)

    return loss_of


def make_monitor(pipe: ErnieImagePipeline, classifier: SceneClassifier) -> Callable[[int], None]:
    """A function that draws 150 held-out scenes at 256x256 and prints how many the classifier recognizes."""
    rng = random.Random(31)
    scenes = [sample_scene(rng, held_out=True) for _ in range(150)]
    texts = [caption(scene, ("en", "zh")[number % 2], rng) for number, scene in enumerate(scenes)]

    @torch.no_grad()
    def monitor(step: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            pictures = pipe(
                texts,
                height=256,
                width=256,
                num_inference_steps=25,
                guidance_scale=4.0,
                output_type="pt",
                use_pe=False,
                generator=torch.Generator("cuda").manual_seed(1),
            ).images
        print(f"dit step {step} {accuracies(classify(classifier, pictures.float() * 2 - 1), scenes)}", flush=True)

    return monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=160_000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    original = arguments.work / "original"
    sprites = load_sprites(arguments.work / "sprites.npz", "cuda")
    tokenizer = AutoTokenizer.from_pretrained(original / "tokenizer")
    transformer, text_encoder = build_transformer().cuda(), build_text_encoder().cuda()
    small, small_ids = caption_pool(tokenizer, arguments.scenes, seed=22)
    large, large_ids = caption_pool(tokenizer, arguments.scenes // 8, seed=23)
    print("dit: captions ready", flush=True)

    # Compiling takes a minute and needs no data: it goes on while the VAE is still training.
    loss_of = compiled_loss(transformer, text_encoder)
    for batch, size in ((256, 16), (64, 32)):
        ids = small_ids[:batch, 0].long().cuda()
        loss_of(torch.randn(batch, 128, size, size, device="cuda"), ids, torch.rand(batch, device="cuda")).backward()
    transformer.zero_grad(set_to_none=True)
    text_encoder.zero_grad(set_to_none=True)
    print("dit: compiled", flush=True)

    finished = original / "vae" / "config.json", arguments.work / "classifier.safetensors"
    while not all(path.exists() for path in finished):
        time.sleep(1)
    time.sleep(3)
    vae = AutoencoderKLFlux2.from_pretrained(original / "vae").cuda().to(memory_format=torch.channels_last).eval()
    started = time.time()
    pools = [
        Pool(latent_pool(vae, sprites, small, 256, seed=24), small_ids.cuda(), batch=256, shift=2.5),
        Pool(latent_pool(vae, sprites, large, 512, seed=25), large_ids.cuda(), batch=64, shift=4.0),
    ]
    print(f"dit: latents ready in {time.time() - started:.0f} s", flush=True)
    pipe = ErnieImagePipeline(
        transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=build_scheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    monitor = make_monitor(pipe, load_classifier(arguments.work / "classifier.safetensors", "cuda"))
    train(transformer, text_encoder, loss_of, pools, arguments.steps, arguments.lr, monitor)
    monitor(arguments.steps)
    transformer.to(torch.bfloat16).save_pretrained(original / "transformer")
    text_encoder.to(torch.bfloat16).save_pretrained(original / "text_encoder")
    pipe.scheduler.save_pretrained(original / "scheduler")
    print("dit: saved", flush=True)


if __name__ == "__main__":
    main()
