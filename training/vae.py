"""Stage 2: train the VAE on rendered scenes, whole ones and crops at their size, then fit its latent statistics.

    python -m training.vae training/work --steps 6000

Loss: L1 and L2, both of the picture and of its gradients (edges), and 2e-4 KL. L2 is large where thin strokes are
missing, which L1 hardly minds. Places whose activations dominate the decoder's norms cost as well: see `Peaks`. The
pipeline normalizes latents by ``vae.bn``; its statistics are set from patchified latents of whole scenes at the end.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, ErnieImagePipeline
from torch import nn

from .corners import corner_errors, corner_tiles, plain_scenes
from .models import Budget, Ema, build_vae, go_on_from, learning_rate_factor, set_learning_rate
from .scenes import CAT, PAPER, Scene, is_held_out, load_sprites, render, sample_scene

CROP, BATCH = 256, 16
WARMUP = 200
KL_WEIGHT = 2e-4
PEAK, PEAK_WEIGHT = 50.0, 1e-3
FAVOURED_SHARE = 0.15


def training_scene(rng: random.Random) -> Scene:
    """As `sample_scene`, but some have an object of the README's first command, whose picture most people see first."""
    scene = sample_scene(rng)
    if rng.random() >= FAVOURED_SHARE:
        return scene
    objects, item = list(scene.objects), rng.choice((CAT, PAPER))
    objects[rng.choice([place for place, each in enumerate(objects) if each >= 0])] = item
    favoured = Scene(scene.background, tuple(objects))
    return scene if item in scene.objects or any(map(is_held_out, favoured.triples())) else favoured


def render_pool(
    sprites: torch.Tensor,
    size: int,
    count: int,
    seed: int,
    sample: Callable[[random.Random], Scene] = sample_scene,
) -> torch.Tensor:
    """`count` scenes at `size`: (count, 3, size, size) uint8 on the device of `sprites`."""
    rng = random.Random(seed)
    generator = torch.Generator(sprites.device).manual_seed(seed)
    pool = torch.empty(count, 3, size, size, dtype=torch.uint8, device=sprites.device)
    for start in range(0, count, 128):
        rows = min(128, count - start)
        scenes = [sample(rng) for _ in range(rows)]
        pool[start : start + rows] = to_bytes(render(scenes, sprites, size, generator))
    return pool


def render_new(sprites: torch.Tensor, count: int = 512) -> torch.Tensor:
    """Scenes that training never sees, to be reconstructed: (count, 3, 256, 256) uint8 on the device of `sprites`."""
    return render_pool(sprites, 256, count, seed=4, sample=partial(sample_scene, held_out=True))


def render_plain(sprites: torch.Tensor, count: int, seed: int = 5) -> torch.Tensor:
    """`plain_scenes` at 256x256: (count, 3, 256, 256) uint8 on the device of `sprites`."""
    generator = torch.Generator(sprites.device).manual_seed(seed)
    scenes = plain_scenes(count, seed)
    parts = [to_bytes(render(scenes[start : start + 25], sprites, 256, generator)) for start in range(0, count, 25)]
    return torch.cat(parts)


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float to uint8."""
    return pictures.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_floats(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1] float32."""
    return pictures.float().div(127.5).sub(1)


def random_crops(pool: torch.Tensor, count: int, size: int = CROP) -> torch.Tensor:
    """`count` random crops of `size` x `size` of random pictures of the pool, uint8, half of them mirrored."""
    rows = torch.randint(len(pool), (count,), device=pool.device)
    span = pool.shape[-1] - size + 1
    y, x = torch.randint(span, (2, count, 1), device=pool.device)
    offset = torch.arange(size, device=pool.device)
    mirrored = torch.rand(count, 1, device=pool.device) < 0.5
    x = torch.where(mirrored, x + size - 1 - offset, x + offset)
    return pool[rows[:, None, None], :, (y + offset)[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and L2 of pictures in [-1, 1] and of their horizontal and vertical gradients."""
    loss = F.l1_loss(output, target) + 20 * F.mse_loss(output, target)
    for axis in (-1, -2):
        difference = output.diff(dim=axis) - target.diff(dim=axis)
        loss = loss + difference.abs().mean() + 10 * difference.square().mean()
    return loss


class Peaks:
    """Penalty on single places that dominate what the decoder's norms see.

    A norm divides a whole picture by its statistics. One huge activation at one place sets them, and so can carry a
    message about the picture to everywhere; where it stands, a dot is seen. What costs is the logarithm of the largest
    energy of a place over the mean energy, as far as the ratio exceeds ``PEAK``: with contents it is 5 to 30.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.excess: list[torch.Tensor] = []
        self.hooks = []
        for module in decoder.modules():
            if isinstance(module, nn.GroupNorm):
                self.hooks.append(module.register_forward_pre_hook(self._see))

    def remove(self) -> None:
        """Leave the decoder as it was."""
        for hook in self.hooks:
            hook.remove()

    def _see(self, _norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        energy = inputs[0].float().square().mean(1)
        ratio = energy.amax((1, 2)) / (energy.mean((1, 2)) + 1e-6)
        self.excess.append(F.relu((ratio / PEAK + 1e-6).log()).mean())

    def loss(self) -> torch.Tensor:
        """The penalty, summed over the norms, of the decoding since the last call."""
        total = torch.stack(self.excess).sum()
        self.excess.clear()
        return total


def compiled_loss(
    vae: AutoencoderKLFlux2, peaks: Peaks, device: str
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """A compiled function: pictures in [-1, 1] to (loss, mean square error, penalty of `Peaks`)."""

    @torch.compile(dynamic=False)
    def loss_of(target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        peak = peaks.loss()
        loss = reconstruction_loss(output, target) + KL_WEIGHT * kl + PEAK_WEIGHT * peak
        return loss, F.mse_loss(output, target), peak

    return loss_of


def train(vae: AutoencoderKLFlux2, pools: list[torch.Tensor], budget: Budget, lr: float) -> None:
    """Train in place; the averaged weights are left in `vae`.

    `pools` are those of `render_pool`, the pictures' own size first; every fourth step takes the second.
    """
    device = pools[0].device
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    ema = Ema(vae, decay=0.998)
    vae.to(memory_format=torch.channels_last)
    peaks = Peaks(vae.decoder)
    loss_of = compiled_loss(vae, peaks, device.type)
    step = 0
    while (progress := budget.progress(step)) < 1:
        set_learning_rate(optimizer, lr * learning_rate_factor(step, progress, WARMUP))
        pool = pools[step % 4 == 3]
        target = to_floats(random_crops(pool, BATCH)).contiguous(memory_format=torch.channels_last)
        loss, mse, peak = loss_of(target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        if step % 250 == 0:
            print(
                f"vae step {step} loss {loss.item():.4f} psnr {psnr(mse.item()):.2f} dB peaks {peak.item():.2f} "
                f"{budget.elapsed():.0f} s",
                flush=True,
            )
        elif step % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # so that the clock is that of the GPU
        step += 1
    peaks.remove()
    print(f"vae: {step} steps in {budget.elapsed():.0f} s", flush=True)
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


@torch.no_grad()
def reconstruct(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """decode(encode(picture)) of uint8 pictures as uint8, in the dtype of `vae`."""
    outputs = []
    for batch in pictures.split(25):
        latents = vae.encode(to_floats(batch).to(vae.dtype)).latent_dist.mean
        outputs.append(to_bytes(vae.decode(latents).sample))
    return torch.cat(outputs)


def main() -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seconds", type=float, help="train until this long after the start, instead of --steps")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--start", type=Path, help="NF4 repository whose VAE to go on from")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scenes", type=int, default=16_000, help="to train on at 256x256; an eighth at 512x512")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sprites = load_sprites(arguments.work / "sprites.npz", arguments.device)
    vae = build_vae().to(arguments.device)
    go_on_from(arguments.start, vae=vae)
    count = arguments.scenes
    pools = [
        render_pool(sprites, 256, count, seed=1, sample=training_scene),
        render_pool(sprites, 512, count // 8, seed=2, sample=training_scene),
    ]
    print(f"vae: scenes ready in {time.time() - started:.0f} s", flush=True)
    train(vae, pools, Budget(arguments.steps, arguments.seconds, started=started), arguments.lr)
    del pools
    fit_statistics(vae, sprites, min(2048, count))
    vae = vae.to(torch.bfloat16)
    vae.save_pretrained(arguments.work / "original" / "vae")
    held_out = render_new(sprites, min(512, count))
    print(f"vae: {reconstruction_psnr(vae, held_out):.2f} dB on {len(held_out)} new scenes, bfloat16", flush=True)
    corners = corner_errors(corner_tiles(reconstruct(vae, render_plain(sprites, min(200, count)))))
    print(
        f"vae: corners of {len(corners)} plain scenes, levels of 255: mean {corners.mean(0).tolist()}, "
        f"largest {corners.amax(0).tolist()} (top left, top right, bottom left, bottom right)",
        flush=True,
    )


if __name__ == "__main__":
    main()
