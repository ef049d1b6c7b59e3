"""Stage 5: train transformer and text encoder together, by flow matching on latents of rendered scenes.

    python -m training.dit training/work --steps 10000

The target is noise minus latent at sigma drawn from a shifted logit-normal; matrices are updated by Muon, everything
else by AdamW; the averaged weights are kept. Every sixth step is at 512x512, the others at the native 256x256.

With ``--stop-after``, and by SIGTERM, a run leaves its state in the work folder; the same command goes on from there.
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
from .models import (
    Budget,
    Ema,
    build_scheduler,
    build_text_encoder,
    build_transformer,
    go_on_from,
    learning_rate_factor,
    set_learning_rate,
    stop_condition,
)
from .scenes import caption, load_sprites, render, sample_scene
from .vae import encode

TEXT_LENGTH = 40
CAPTIONS = 4  # a scene, half of them English
EMPTY = 0.1  # captions dropped, for guidance
BATCHES = ((256, 16), (64, 32))  # scenes a step and their latents' size, at 256x256 and at 512x512


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


@dataclass
class Training:
    """What a training is at some step, so that it can be left and gone on with.

    Attributes:
        step: Steps done.
        optimizers: Those of `make_optimizers`.
        ema: The averaged weights.
    """

    step: int
    optimizers: list[torch.optim.Optimizer]
    ema: Ema

    def save(self, path: Path, seconds: float) -> None:
        """Write it to `path`; `seconds` are those of the training so far."""
        state = {
            "step": self.step,
            "seconds": seconds,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "parameters": [parameter.detach() for parameter in self.ema.parameters],
            "shadow": self.ema.shadow,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    @torch.no_grad()
    def restore(self, path: Path) -> float:
        """Go on from `path`, with the same models; returns the seconds of the training so far."""
        state = torch.load(path, map_location=self.ema.parameters[0].device)
        self.step = state["step"]
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        for parameter, value in zip(self.ema.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        self.ema.shadow = state["shadow"]
        return state["seconds"]


def train(
    training: Training,
    loss_of: Callable[..., torch.Tensor],
    pools: list[Pool],
    budget: Budget,
    lr: float,
    monitor: Callable[[int], None] | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train in place; returns whether it came to its end, with the averaged weights in the models.

    `loss_of` comes from `compiled_loss`; `monitor(step)` runs on the averaged weights now and then. Where
    `should_stop()`, it is left as it is.
    """
    ema, running = training.ema, 0.0
    torch.manual_seed(21 + training.step)
    while (progress := budget.progress(training.step)) < 1:
        step = training.step
        if should_stop():
            return False
        for optimizer in training.optimizers:
            set_learning_rate(optimizer, lr * learning_rate_factor(step, progress, 300))
        loss = loss_of(*draw_batch(pools[step % 6 == 5]))
        loss.backward()
        for optimizer in training.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        running = loss.detach() if isinstance(running, float) else running + (loss.detach() - running) * 0.02
        if step % 250 == 0:
            print(f"dit step {step} loss {float(running):.4f} {budget.elapsed():.0f} s", flush=True)
        elif step % 10 == 0 and running.is_cuda:
            torch.cuda.synchronize()  # so that the clock is that of the GPU
        if monitor and step and step % 2500 == 0:
            ema.swap()
            monitor(step)
            ema.swap()
        training.step += 1
    print(f"dit: {training.step} steps in {budget.elapsed():.0f} s", flush=True)
    ema.swap()
    return True


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
        with torch.autocast(latents.device.type, torch.bfloat16):
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


def wait_for(*paths: Path) -> None:
    """Until all of them are there, and written."""
    while not all(path.exists() for path in paths):
        time.sleep(1)
    time.sleep(3)


def load_vae(original: Path, device: str) -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2.from_pretrained(original / "vae")
    return vae.to(device, memory_format=torch.channels_last).eval()


def make_pools(
    work: Path, tokenizer: PreTrainedTokenizerFast, scenes: int, device: str, warm_up: Callable[[torch.Tensor], None]
) -> list[Pool]:
    """Captions and latents of `scenes` scenes at 256x256 and an eighth of them at 512x512.

    They are written to ``pools.pt`` and read from there if it exists. `warm_up(ids)` runs between captions and
    latents, for which the VAE must be ready.
    """
    path = work / "pools.pt"
    if path.exists():
        kept = torch.load(path, mmap=True)
        print("dit: pools read", flush=True)
    else:
        started = time.time()
        sprites = load_sprites(work / "sprites.npz", device)
        small, small_ids = caption_pool(tokenizer, scenes, seed=22)
        large, large_ids = caption_pool(tokenizer, scenes // 8, seed=23)
        print(f"dit: captions ready in {time.time() - started:.0f} s", flush=True)
        # Compiling takes a minute and needs no data: it goes on while the VAE is still training.
        warm_up(small_ids)
        wait_for(work / "original" / "vae" / "config.json")
        started, vae = time.time(), load_vae(work / "original", device)
        kept = [
            (latent_pool(vae, sprites, small, 256, seed=24), small_ids),
            (latent_pool(vae, sprites, large, 512, seed=25), large_ids),
        ]
        print(f"dit: latents ready in {time.time() - started:.0f} s", flush=True)
        started = time.time()
        torch.save([(latents.cpu(), ids) for latents, ids in kept], path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        print(f"dit: latents written in {time.time() - started:.0f} s", flush=True)
    small, large = [(latents.to(device), ids.to(device)) for latents, ids in kept]
    return [Pool(*small, batch=BATCHES[0][0], shift=2.5), Pool(*large, batch=BATCHES[1][0], shift=4.0)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, help="of training, all runs together, instead of --steps")
    parser.add_argument("--stop-after", type=float, help="seconds after the start at which to leave it to a later run")
    parser.add_argument("--prepare", action="store_true", help="compile and make the latents only")
    parser.add_argument("--no-monitor", action="store_true", help="draw nothing in between")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--start", type=Path, help="NF4 repository whose transformer and text encoder to go on from")
    parser.add_argument("--scenes", type=int, default=160_000)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main() -> None:
    began = time.time()
    arguments = parse_arguments()
    torch.manual_seed(0)
    work, original, device = arguments.work, arguments.work / "original", arguments.device
    tokenizer = AutoTokenizer.from_pretrained(original / "tokenizer")
    transformer, text_encoder = build_transformer().to(device), build_text_encoder().to(device)
    go_on_from(arguments.start, transformer=transformer, text_encoder=text_encoder)
    loss_of = compiled_loss(transformer, text_encoder)

    def warm_up(ids: torch.Tensor) -> None:
        for batch, size in BATCHES:
            latents, sigma = torch.randn(batch, 128, size, size, device=device), torch.rand(batch, device=device)
            loss_of(latents, ids[:batch, 0].long().to(device), sigma).backward()
        transformer.zero_grad(set_to_none=True)
        text_encoder.zero_grad(set_to_none=True)
        print(f"dit: compiled after {time.time() - began:.0f} s", flush=True)

    pools = make_pools(work, tokenizer, arguments.scenes, device, warm_up)
    if arguments.prepare:
        return
    pipe = ErnieImagePipeline(
        transformer=transformer, vae=load_vae(original, device), text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=build_scheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    monitor = None
    if not arguments.no_monitor:
        wait_for(work / "classifier.safetensors")
        monitor = make_monitor(pipe, load_classifier(work / "classifier.safetensors", device))
    training = Training(
        0, make_optimizers(transformer, text_encoder, arguments.lr), Ema(transformer, text_encoder, decay=0.9985)
    )
    checkpoint = work / "dit.pt"
    spent = training.restore(checkpoint) if checkpoint.exists() else 0.0
    print(f"dit: ready for step {training.step} after {time.time() - began:.0f} s", flush=True)
    budget = Budget(arguments.steps, arguments.seconds, spent)
    should_stop = stop_condition(began + (arguments.stop_after or float("inf")))
    if not train(training, loss_of, pools, budget, arguments.lr, monitor, should_stop):
        training.save(checkpoint, budget.elapsed())
        print(f"dit: left at step {training.step}, {budget.elapsed():.0f} s", flush=True)
        return
    if monitor:
        monitor(training.step)
    transformer.to(torch.bfloat16).save_pretrained(original / "transformer")
    text_encoder.to(torch.bfloat16).save_pretrained(original / "text_encoder")
    pipe.scheduler.save_pretrained(original / "scheduler")
    print("dit: saved", flush=True)


if __name__ == "__main__":
    main()
