"""What calibration needs of the original: predictions for a few pictures, and how sensitive they are to each layer.

All prompts are drawn at once, each along a schedule of its own: the steps whose predictions are wanted, and as few
between them as the way there needs. A pass of the transformer's blocks (`streamed_original`) takes a step of every
picture. The sensitivities are the gradients of predictions, found with one pass forward and one back for many of them:
every few blocks the tokens are kept, and the blocks between are computed anew on the way back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ..repository.metadata import Recommended
from ..upstream.models import use_math_attention
from .streamed_original import BlockInput, HostMemory, StreamedOriginal, TokenPool, enter_blocks, predict

PREDICTIONS = 256  # 280,000 tokens at 512x512. With guidance in pairs: with the prompt and with the empty one
MAX_SIZE = 512  # pixels a side: enough tokens, at a quarter of the time that 1024 takes
# Steps in which a whole picture is drawn; those whose predictions are wanted come on top.
DRAW_STEPS = 10
BACKWARD = 3  # time of a pass back through a block, forward passes included, in that of one without gradients
LAYERS = (
    "self_attention.to_q",
    "self_attention.to_k",
    "self_attention.to_v",
    "self_attention.to_out.0",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.linear_fc2",
)


Advance = Callable[[int], object]
"""Told how many samples went through a block since the last call, or did what takes as long."""


def ignore(_: int) -> None:
    """Show no progress."""


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


@dataclass(frozen=True)
class Drawing:
    """How one prompt is drawn.

    Attributes:
        steps: Steps of the full schedule that are taken, rising.
        recorded: Those whose predictions are samples.
    """

    steps: tuple[int, ...]
    recorded: tuple[int, ...]


def plan_drawings(prompts: int, steps: int, guided: bool) -> list[Drawing]:
    """Which steps of each prompt's picture are taken. The recorded ones take turns from prompt to prompt.

    Args:
        prompts: How many.
        steps: Of a picture, as the model recommends.
        guided: Whether a step takes two predictions.
    """
    each = min(-(-PREDICTIONS // (2 * prompts if guided else prompts)), steps)
    stride = max(steps // DRAW_STEPS, 1)
    drawings = []
    for number in range(prompts):
        recorded = sorted((number + place * steps // each) % steps for place in range(each))
        taken = {start + offset for start, end in _stretches(recorded) for offset in range(0, end - start, stride)}
        drawings.append(Drawing(tuple(sorted({*taken, recorded[-1]})), tuple(recorded)))
    return drawings


def _stretches(recorded: Sequence[int]) -> Iterator[tuple[int, int]]:
    """From the first step to the first recorded one, and from each of these to the next."""
    return itertools.pairwise([0, *recorded])


def schedule(config: dict, steps: int) -> tuple[list[float], list[float]]:
    """Timesteps, and sigmas with the last one, 0, as ``ErnieImagePipeline`` sets them."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.0, steps + 1)[:-1], device="cpu")
    return scheduler.timesteps.tolist(), scheduler.sigmas.tolist()


def first_latents(channels: int, settings: Recommended, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Noise to begin a picture with, (1, channels, height / 16, width / 16)."""
    height, width = picture_size(settings)
    noise = torch.randn((1, channels, height // 16, width // 16), generator=torch.Generator("cpu").manual_seed(seed))
    return noise.to(dtype)


def picture_size(settings: Recommended) -> tuple[int, int]:
    """Height and width in pixels at which prompts are drawn."""
    return min(settings.height, MAX_SIZE), min(settings.width, MAX_SIZE)


@torch.no_grad()
def predict_all(
    original: StreamedOriginal,
    inputs: Sequence[tuple[torch.Tensor, float, torch.Tensor]],
    memory: HostMemory,
    advance: Advance = ignore,
) -> list[torch.Tensor]:
    """Predictions for latents, timesteps and texts, in one pass of the blocks."""
    memory.clear()
    given, pool = enter_blocks(original.model, inputs, memory)
    for (block,) in original.stream([number] for number in range(len(original.blocks))):
        for number, each in enumerate(given):
            pool[number] = each.through(block, pool[number])
        del block
        advance(len(given))
    return [predict(original.model, pool[number], *each) for number, each in enumerate(inputs)]


@torch.no_grad()
def draw_step(
    original: StreamedOriginal,
    latents: Sequence[torch.Tensor],
    texts: Sequence[Sequence[torch.Tensor]],
    moves: Sequence[tuple[float, float] | None],
    timesteps: Sequence[float],
    guidance: float,
    memory: HostMemory,
    advance: Advance = ignore,
) -> list[torch.Tensor]:
    """One step of every picture that isn't done: the latents after it, the same where there is nothing to do.

    Args:
        original: The transformer.
        latents: Of each picture, on the CPU.
        texts: Of each picture: the prompt's embedding, after that of the empty one with guidance.
        moves: Sigma before and after the step, None for a picture that is done.
        timesteps: Of each picture.
        guidance: Guidance scale.
        memory: For the tokens.
        advance: Told of samples that went through a block.
    """
    going = [number for number, move in enumerate(moves) if move is not None]
    inputs = [(latents[number], timesteps[number], text) for number in going for text in texts[number]]
    predictions = iter(predict_all(original, inputs, memory, advance))
    after = list(latents)
    for number in going:
        parts = [next(predictions) for _ in texts[number]]
        guided = parts[0] + guidance * (parts[1] - parts[0]) if len(parts) > 1 else parts[0]
        begin, end = moves[number] or (0.0, 0.0)
        moved = latents[number].to(original.device).float() + (end - begin) * guided.float()
        after[number] = moved.to(original.dtype).cpu()
    return after


def find_sensitivities(
    original: StreamedOriginal,
    samples: Sequence[Sample],
    seeds: Sequence[int],
    segment: int,
    memory: HostMemory,
    advance: Advance = ignore,
) -> list[torch.Tensor]:
    """For each sample the sensitivities of all blocks' `LAYERS`, float32 (layers, tokens).

    Per layer and token it is the mean square of the derivatives of the prediction's product with a random direction. On
    average over directions it is that of the whole prediction.

    Args:
        original: The transformer.
        samples: The predictions.
        seeds: Of the directions.
        segment: Blocks that are on the device at once, and computed anew from the tokens before them.
        memory: For the tokens.
        advance: Told of samples that went through a block.
    """
    memory.clear()
    numbers = range(len(original.blocks))
    segments = [list(numbers[start : start + segment]) for start in numbers[::segment]]
    with torch.no_grad():
        inputs = [(each.latents, each.timestep, each.text) for each in samples]
        given, first = enter_blocks(original.model, inputs, memory)
        pools, shapes = [first], [first[number].shape for number in range(len(samples))]
        for blocks in original.stream(segments):
            pools.append(TokenPool(shapes, original.dtype, memory))
            for number, each in enumerate(given):
                tokens = pools[-2][number]
                for block in blocks:
                    tokens = each.through(block, tokens)
                pools[-1][number] = tokens
            advance(len(blocks) * len(samples))
            del block, blocks
    gradients = pools[-1]
    for number, (sample, seed) in enumerate(zip(samples, seeds, strict=True)):
        gradients[number] = _gradient_of_prediction(original, gradients[number], sample, seed)
    pools.pop()
    found: list[list[torch.Tensor]] = [[] for _ in samples]
    for blocks in original.stream(reversed(segments)):
        tokens_before = pools.pop()
        if original.device.type == "cuda":  # whose other backward passes of attention add up in any order
            for block in blocks:
                use_math_attention(block.self_attention)
        squares = []
        for number, each in enumerate(given):
            gradient, rows = _backward(blocks, each, tokens_before[number], gradients[number])
            gradients[number] = gradient
            squares.append(rows)
        for rows, of_sample in zip(squares, found, strict=True):
            of_sample.insert(0, rows.cpu())
        advance(BACKWARD * len(blocks) * len(samples))
        del blocks
    return [torch.cat(rows) for rows in found]


def _gradient_of_prediction(
    original: StreamedOriginal, tokens: torch.Tensor, sample: Sample, seed: int
) -> torch.Tensor:
    """Of the prediction's product with a random direction, by the last block's output."""
    tokens = tokens.clone().requires_grad_()
    with torch.enable_grad():
        prediction = predict(original.model, tokens, sample.latents, sample.timestep, sample.text)
        direction = torch.randn(prediction.shape, generator=torch.Generator("cpu").manual_seed(seed))
        prediction.backward(sample.weight * direction.to(prediction))
    assert tokens.grad is not None
    return tokens.grad


def _backward(
    blocks: Sequence[nn.Module], given: BlockInput, tokens: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient by the tokens before some blocks, given that by those after them, and the layers' sensitivities."""
    squares: dict[str, torch.Tensor] = {}

    def watch(name: str, output: torch.Tensor) -> None:
        output.register_hook(lambda by_output: squares.__setitem__(name, by_output.float().square().mean(-1).view(-1)))

    watched = [
        (f"{number}.{name}", block.get_submodule(name)) for number, block in enumerate(blocks) for name in LAYERS
    ]
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: watch(name, output))
        for name, layer in watched
    ]
    before = tokens.clone().requires_grad_()
    try:
        with torch.enable_grad():
            after = before
            for block in blocks:
                after = given.through(block, after)
            after.backward(gradient)
    finally:
        for hook in hooks:
            hook.remove()
    assert before.grad is not None
    return before.grad, torch.stack([squares[name] for name, _ in watched])


def layer_names(blocks: int) -> list[str]:
    """The names of the rows of `find_sensitivities`."""
    return [f"layers.{number}.{name}" for number in range(blocks) for name in LAYERS]
