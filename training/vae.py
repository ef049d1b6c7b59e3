"""Stage 2: train the VAE on crops of rendered scenes, then fit its latent statistics.

    python -m training.vae training/work --steps 9000

Loss: L1, L1 of the image gradients (edges), a little L2 (the PSNR), and 2e-4 KL. The pipeline normalizes latents by
``vae.bn``; its statistics are set from patchified latents of whole scenes at the end.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, ErnieImagePipeline

from .models import Ema, build_vae, learning_rate_factor
from .scenes import load_sprites, render, sample_scene

CROP, BATCH = 128, 64
LEARNING_RATE, WARMUP = 1.2e-3, 200
KL_WEIGHT = 2e-4


def render_pool(sprites: torch.Tensor, size: int, count: int, seed: int, *, held_out: bool = False) -> torch.Tensor:
    """`count` scenes at `size`: (count, 3, size, size) uint8 on the device of `sprites`."""
    rng = random.Random(seed)
    generator = torch.Generator(sprites.device).manual_seed(seed)
    pool = torch.empty(count, 3, size, size, dtype=torch.uint8, device=sprites.device)
    for start in range(0, count, 128):
        rows = min(128, count - start)
        scenes = [sample_scene(rng, held_out=held_out) for _ in range(rows)]
        pool[start : start + rows] = to_bytes(render(scenes, sprites, size, generator))
    return pool


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float to uint8."""
    return pictures.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_floats(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1] float32."""
    return pictures.float().div(127.5).sub(1)


def random_crops(pool: torch.Tensor, count: int) -> torch.Tensor:
    """`count` random CROP x CROP crops of random pictures of the pool, uint8."""
    rows = torch.randint(len(pool), (count,), device=pool.device)
    span = pool.shape[-1] - CROP + 1
    y, x = torch.randint(span, (2, count, 1), device=pool.device)
    offset = torch.arange(CROP, device=pool.device)
    return pool[rows[:, None, None], :, (y + offset)[:, :, None], (x + offset)[:, None, :]].permute(0, 3, 1, 2)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + L1 of horizontal and vertical gradients + L2 of pictures in [-1, 1]."""
    loss = F.l1_loss(output, target) + 4 * F.mse_loss(output, target)
    for axis in (-1, -2):
        loss = loss + F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def train(vae: AutoencoderKLFlux2, sprites: torch.Tensor, steps: int) -> None:
    """Train in place; the averaged weights are left in `vae`."""
    pools = [render_pool(sprites, 256, 16_000, seed=1), render_pool(sprites, 512, 2_000, seed=2)]
    # foreach/fused AdamW with a short horizon: the whole run is a few minutes.
    optimizer = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, WARMUP))
    ema = Ema(vae, decay=0.998)
    vae.to(memory_format=torch.channels_last)

    @torch.compile(dynamic=False)
    def loss_of(target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return reconstruction_loss(output.float(), target) + KL_WEIGHT * kl, F.mse_loss(output.float(), target)

    started = time.time()
    for step in range(steps):
        pool = pools[step % 4 == 3]
        target = to_floats(random_crops(pool, BATCH)).contiguous(memory_format=torch.channels_last)
        loss, mse = loss_of(target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        if step % 250 == 0 or step == steps - 1:
            print(
                f"vae step {step} loss {loss.item():.4f} psnr {psnr(mse.item()):.2f} dB {time.time() - started:.0f} s",
                flush=True,
            )
    ema.swap()


def psnr(mse: float) -> float:
    """dB, for pictures in [-1, 1]."""
    return 10 * torch.log10(torch.tensor(4.0 / mse)).item()


@torch.no_grad()
def fit_statistics(vae: AutoencoderKLFlux2, sprites: torch.Tensor, count: int = 2048) -> None:
    """Set ``vae.bn`` to mean and variance of patchified latents of `count` scenes."""
    latents = torch.cat([encode(vae, to_floats(batch)) for batch in render_pool(sprites, 256, count, seed=3).split(64)])
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """Patchified, not yet normalized latents of [-1, 1] pictures: (batch, 128, size / 16, size / 16) float32."""
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
        mean = vae.encode(pictures).latent_dist.mean
    return ErnieImagePipeline._patchify_latents(mean.float().contiguous())


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> float:
    """Mean PSNR in dB of decode(encode(picture)), for uint8 pictures, in the dtype of `vae`."""
    values = []
    for batch in pictures.split(32):
        target = to_floats(batch)
        output = vae.decode(vae.encode(target.to(vae.dtype)).latent_dist.mean).sample
        mse = (to_floats(to_bytes(output)) - target).square().mean((1, 2, 3))
        values += [psnr(value) for value in mse.tolist()]
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=9000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sprites = load_sprites(arguments.work / "sprites.npz", "cuda")
    vae = build_vae().cuda()
    train(vae, sprites, arguments.steps)
    fit_statistics(vae, sprites)
    vae = vae.to(torch.bfloat16)
    vae.save_pretrained(arguments.work / "original" / "vae")
    held_out = render_pool(sprites, 256, 512, seed=4, held_out=True)
    print(f"vae: {reconstruction_psnr(vae, held_out):.2f} dB on 512 new scenes, bfloat16", flush=True)


if __name__ == "__main__":
    main()
