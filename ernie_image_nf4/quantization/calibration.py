"""Calibrated rounding: the transformer's 4-bit codes, chosen for the error of what its layers give instead of that of its weights.

A few prompts are drawn with the original. What each linear layer then gets, x, and how much the prediction depends on each token
that it gives, g, say what an error of its weight W costs: the squares of (W x - Q y) g, where y is what the layer gets in the
quantized model. Rounding goes column by column and has the columns still to come make up for the error so far (GPTQ,
https://arxiv.org/abs/2210.17323; with y beside x GPTAQ, https://arxiv.org/abs/2504.02692; with g after GuidedQuant,
https://arxiv.org/abs/2505.07004). Then codes and scales are each set to their best, the others given, a few times over.

The result is NF4 like any other. The text encoder isn't calibrated: its share of the error of
pictures is small.

Of the original, the whole transformer is on the device for drawing and for g, as with offloading. Afterwards it comes block by
block: the original and the quantized block, and the sums over x and y of one of its layers. What goes into a block lies in host
memory.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_4bit, get_4bit_type
from diffusers import ErnieImagePipeline
from torch import nn
from tqdm import tqdm

from ..loading.pipeline import load
from ..repository import nf4_format as nf4
from ..repository.components import Component
from ..repository.meta_model import skeleton
from ..repository.metadata import Recommended
from ..repository.safetensors_io import read_tensor
from .layer_selection import WeightPlan

NF4Weight = tuple[torch.Tensor, QuantState]

SAMPLES = 128  # pairs of predictions, with the prompt and with the empty one: 280,000 tokens at 512x512
MAX_SIZE = 512  # pixels a side: tokens enough, at a quarter of the time that 1024 takes
TIMESTEPS = 201  # from 0 to 1000, for the layers that see nothing but the timestep
DAMPING = 0.01  # of the mean of x.x on its diagonal, as in GPTQ
TIME_DAMPING = 1e-4  # where x depends on a single number, so that there is little to fit and nothing to overfit
MARGIN = 1.1  # by which scales may grow beyond those of the scale search, as columns make up for each other
SWEEPS = 2
# The layers of a block in the order in which they are rounded: those on a line get the same input.
STAGES = (
    ("self_attention.to_q", "self_attention.to_k", "self_attention.to_v"),
    ("self_attention.to_out.0",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.linear_fc2",),
)


@dataclass
class Sample:
    """One prediction of the original.

    Attributes:
        latents: (1, channels, height / 16, width / 16), on the CPU, as is the text.
        timestep: As the transformer gets it, 1000 being pure noise.
        text: Embedding of the prompt, (tokens, text_in_dim).
        weight: Of this prediction in what guidance makes of it.
        sensitivity: Layer -> for each token, the mean square of the derivatives of the prediction by what the layer gives.
    """

    latents: torch.Tensor
    timestep: float
    text: torch.Tensor
    weight: float
    sensitivity: dict[str, torch.Tensor]


@dataclass
class Stream:
    """What goes into a block for one sample, in host memory but while it is used.

    Attributes:
        tokens: (image and text tokens, 1, hidden_size).
        rotary: Rotary embedding of the tokens' places.
        modulation: Shift, scale and gate of attention and feed-forward, each (1, 1, hidden_size).
        condition: Embedding of the timestep, (1, hidden_size).
    """

    tokens: torch.Tensor
    rotary: torch.Tensor
    modulation: tuple[torch.Tensor, ...]
    condition: torch.Tensor


@torch.no_grad()
def calibrate_transformer(
    folder: Path,
    component: Component,
    plan: WeightPlan,
    prompts: Sequence[str],
    settings: Recommended,
    *,
    device: torch.device,
    progress: bool = True,
) -> dict[str, NF4Weight]:
    """NF4 of the transformer's linear layers, rounded for what a few prompts need.

    Args:
        folder: The original repository.
        component: Its transformer.
        plan: What becomes of the transformer.
        prompts: What to draw, eight or more: those unlike each other calibrate best.
        settings: Size (at most 512 pixels a side are drawn), steps and guidance scale that the model is for.
        device: Where to compute.
        progress: Whether to show progress bars.

    Returns:
        Name of a weight in `plan` -> codes and quantization state, on the CPU. Those that are missing can't be calibrated: their
        rows aren't whole blocks, or no picture depends on them.

    Raises:
        torch.OutOfMemoryError: The device is too small to draw with the original.
    """
    samples = record_samples(folder, prompts, settings, device, progress)
    return round_layers(folder, component, plan, samples, device, progress)


# What the original does


def record_samples(
    folder: Path, prompts: Sequence[str], settings: Recommended, device: torch.device, progress: bool
) -> list[Sample]:
    """Predictions on the way to the prompts' pictures, at timesteps that take turns from prompt to prompt."""
    loading = logging.getLogger("ernie_image_nf4.loading.pipeline")  # which would say that the original isn't quantized
    level = loading.level
    loading.setLevel(logging.ERROR)
    try:
        memory = "resident" if device.type == "cpu" else "offload"
        pipe = load(folder, device=device, memory=memory, fast=False, prompt_enhancer=False)
    finally:
        loading.setLevel(level)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.enable_gradient_checkpointing()
    pipe.set_progress_bar_config(disable=True)
    guided = settings.guidance_scale > 1
    each = min(-(-SAMPLES // len(prompts)), settings.num_inference_steps)
    samples = []
    with tqdm(prompts, desc="draw", unit="prompt", disable=not progress) as bar:
        for number, prompt in enumerate(bar):
            steps = [(number + place * settings.num_inference_steps // each) for place in range(each)]
            steps = sorted(step % settings.num_inference_steps for step in steps)
            passes = _record_passes(pipe, prompt, settings, number, steps)
            for latents, timestep, texts in passes:
                weights = (1 - settings.guidance_scale, settings.guidance_scale) if guided else (1.0,)
                for text, weight in zip(texts, weights, strict=True):
                    samples.append(Sample(latents, timestep, text, weight, {}))
    with tqdm(samples, desc="sensitivity", unit="pass", disable=not progress) as bar:
        for number, sample in enumerate(bar):
            sample.sensitivity = _sensitivity(pipe, sample, number)
    del pipe
    clear_device_cache(garbage_collection=True)
    return samples


def _record_passes(
    pipe: ErnieImagePipeline, prompt: str, settings: Recommended, seed: int, steps: Sequence[int]
) -> list[tuple[torch.Tensor, float, list[torch.Tensor]]]:
    """Latents, timestep and texts (the empty one and the prompt's) that the transformer gets at some steps of a picture."""
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
            latents=latents.to(pipe._execution_device, pipe.transformer.dtype),
            use_pe=False,
            output_type="latent",
        )
    finally:
        hook.remove()
    return [passes[step] for step in steps]


def _sensitivity(pipe: ErnieImagePipeline, sample: Sample, seed: int) -> dict[str, torch.Tensor]:
    """Layer -> tokens' mean squared derivative of the prediction times a random one, which on average is that of the whole."""
    model, device = pipe.transformer, pipe._execution_device
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
            prediction = model(latents, *_conditions(sample, device, model.dtype), return_dict=False)[0]
            direction = torch.randn(prediction.shape, generator=torch.Generator("cpu").manual_seed(seed))
            prediction.backward(sample.weight * direction.to(prediction))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value.cpu() for name, value in found.items()}


def _conditions(
    sample: Sample, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Timestep, text and its length, as the transformer takes them."""
    timestep = torch.tensor([sample.timestep], device=device, dtype=dtype)
    return timestep, sample.text[None].to(device, dtype), torch.tensor([len(sample.text)], device=device)


def _block_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in model.named_modules():
        if name.startswith("layers.") and isinstance(layer, nn.Linear):
            yield name, layer


# Block by block


@torch.no_grad()
def round_layers(
    folder: Path,
    component: Component,
    plan: WeightPlan,
    samples: Sequence[Sample],
    device: torch.device,
    progress: bool = True,
) -> dict[str, NF4Weight]:
    """Rounds every layer that `plan` quantizes, each given what the layers before it have become."""
    model = skeleton(component, folder / component.name)
    dtype = samples[0].latents.dtype
    blocks, model.layers = model.layers, nn.ModuleList()
    _read_weights(model, "", plan, device, dtype)
    rounded: dict[str, NF4Weight] = {}

    def round_layer(
        owner: nn.Module, prefix: str, name: str, gram: torch.Tensor, cross: torch.Tensor, damping: float
    ) -> None:
        """Replaces the weight of a layer and notes its NF4."""
        key = f"{prefix}{name}.weight"
        layer = owner.get_submodule(name)
        original = read_tensor(plan.tensors[key]).to(device)
        made = round_weight(original, gram, cross, damping=damping) or nf4.quantize_nf4(original)
        layer.weight.data = _restored(*made, dtype)
        rounded[key] = move_weight(made, "cpu")

    with tqdm(total=len(blocks) + 1, desc="calibrate", unit="block", disable=not progress) as bar:
        original = copy.deepcopy(model)
        exact = [_embed(original, sample, device, dtype) for sample in samples]
        for name, inputs, quantized_inputs in _condition_layers(original, model, samples, dtype):
            if f"{name}.weight" in plan.quantized:
                x, y = inputs.flatten(0, -2).double(), quantized_inputs().flatten(0, -2).double()
                damping = DAMPING if name == "text_proj" else TIME_DAMPING
                round_layer(model, "", name, y.T @ y, x.T @ y, damping)
        streams = [_embed(model, sample, device, dtype) for sample in samples]
        bar.update()

        for number, block in enumerate(blocks):
            prefix = f"layers.{number}."
            reference = _read_weights(block, prefix, plan, device, dtype)
            block = copy.deepcopy(reference)
            for stage in STAGES:
                names = [name for name in stage if f"{prefix}{name}.weight" in plan.quantized]
                sums = _sums(reference, block, stage[0], names, prefix, exact, streams, samples)
                for name in names:
                    round_layer(block, prefix, name, *sums[name], DAMPING)
            for before, after in ((reference, exact), (block, streams)):
                for stream in after:
                    stream.tokens = _run(before, stream).cpu()
            blocks[number] = nn.Identity()  # frees the block
            del reference, block
            bar.update()

    if "final_linear.weight" in plan.quantized:
        gram = cross = 0
        for stream, quantized, sample in zip(exact, streams, samples, strict=True):
            image = sample.latents.shape[-2:].numel()
            x = _to_final_linear(original, stream, device)[:image].double()
            y = _to_final_linear(model, quantized, device)[:image].double()
            gram, cross = gram + y.T @ y * sample.weight**2, cross + x.T @ y * sample.weight**2
        round_layer(model, "", "final_linear", gram, cross, DAMPING)
    return rounded


def _read_weights(
    module: nn.Module, prefix: str, plan: WeightPlan, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Gives a module without storage the original's weights."""
    for name in dict(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        value = read_tensor(plan.tensors[prefix + name]).to(device, dtype)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
    return module


def _embed(model: nn.Module, sample: Sample, device: torch.device, dtype: torch.dtype) -> Stream:
    """What a model without blocks would give to its first one."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.final_norm.register_forward_pre_hook(lambda _, given: seen.update(tokens=given[0], condition=given[1])),
        model.pos_embed.register_forward_hook(lambda _, given, output: seen.update(rotary=output)),
        model.adaLN_modulation.register_forward_hook(lambda _, given, output: seen.update(modulation=output)),
    ]
    try:
        model(sample.latents.to(device, dtype), *_conditions(sample, device, dtype), return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    modulation = tuple(part[None].cpu() for part in seen["modulation"].chunk(6, dim=-1))
    return Stream(seen["tokens"].cpu(), seen["rotary"].cpu(), modulation, seen["condition"].cpu())


def _condition_layers(
    original: nn.Module, model: nn.Module, samples: Sequence[Sample], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]]:
    """Each layer outside the blocks but the last: its name, what the original gives it, and a function for what the model does.

    All but the first get nothing but the timestep, so what they may get is known.
    """
    device = next(model.parameters()).device
    steps = torch.tensor([sample.timestep for sample in samples])
    timesteps = torch.cat([steps, torch.linspace(0, 1000, TIMESTEPS)]).to(device, dtype)
    waves = model.time_proj(timesteps).to(dtype)
    texts = torch.cat([sample.text for sample in samples]).to(device, dtype)

    def hidden(of: nn.Module) -> torch.Tensor:
        return of.time_embedding.act(of.time_embedding.linear_1(waves))

    def condition(of: nn.Module) -> torch.Tensor:
        return of.time_embedding.linear_2(hidden(of))

    yield "text_proj", texts, lambda: texts
    yield "time_embedding.linear_1", waves, lambda: waves
    yield "time_embedding.linear_2", hidden(original), lambda: hidden(model)
    yield (
        "adaLN_modulation.1",
        original.adaLN_modulation[0](condition(original)),
        lambda: model.adaLN_modulation[0](condition(model)),
    )
    yield "final_norm.linear", condition(original), lambda: condition(model)


def _sums(
    reference: nn.Module,
    block: nn.Module,
    layer: str,
    names: Sequence[str],
    prefix: str,
    exact: Sequence[Stream],
    streams: Sequence[Stream],
    samples: Sequence[Sample],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For layers with the same input, the sums of y y' and x y' over all tokens, each times its sensitivity."""
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for stream, quantized, sample in zip(exact, streams, samples, strict=True) if names else ():
        x, y = _input_of(reference, layer, stream), _input_of(block, layer, quantized)
        for name in names:
            weighted = y * sample.sensitivity[prefix + name].to(y.device)[:, None]
            gram, cross = sums.get(name, (0, 0))
            sums[name] = gram + weighted.T @ y, cross + x.T @ weighted
    return sums


class _Reached(Exception):
    """A pass through a block came to the layer in question."""


def _input_of(block: nn.Module, layer: str, stream: Stream) -> torch.Tensor:
    """What one of a block's layers gets, float32 (tokens, in_features)."""
    seen = []

    def stop(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[0].flatten(0, -2).float())
        raise _Reached

    hook = block.get_submodule(layer).register_forward_pre_hook(stop)
    try:
        _run(block, stream)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


def _run(block: nn.Module, stream: Stream) -> torch.Tensor:
    device = next(block.parameters()).device
    modulation = [part.to(device) for part in stream.modulation]
    return block(stream.tokens.to(device), stream.rotary.to(device), modulation, None)


def _to_final_linear(model: nn.Module, stream: Stream, device: torch.device) -> torch.Tensor:
    return model.final_norm(stream.tokens.to(device), stream.condition.to(device)).flatten(0, 1)


def _restored(packed: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The weight as the quantized model multiplies with it."""
    return dequantize_4bit(packed, state).to(dtype)


def move_weight(weight: NF4Weight, device: torch.device | str) -> NF4Weight:
    """Codes and quantization state on another device."""
    packed, state = weight
    state.to(device)
    return packed.to(device), state


# One layer


def round_weight(
    weight: torch.Tensor,
    gram: torch.Tensor,
    cross: torch.Tensor,
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> NF4Weight | None:
    """NF4 of a weight for the least squared error of its products.

    That of W x - Q y is, up to a constant, that of (T - Q) y for T = W xy' / yy': the weight that makes the most of the other
    input. So the layer makes up for some of the error of those before it.

    Args:
        weight: (out_features, in_features), on the device that does the work.
        gram: Sum of y y', (in_features, in_features).
        cross: Sum of x y'. The same as `gram` if both inputs are.
        damping: Of the mean of the gram matrix' diagonal, added to it.
        sweeps: How often codes and scales are set to their best after the first rounding.

    Returns:
        As `nf4.quantize_nf4`, or None if that can't be bettered: rows aren't whole blocks, the inputs are zero or not finite,
        or its error of the products is no larger.
    """
    columns, size = weight.shape[1], nf4.BLOCK_SIZE
    scale = gram.diagonal().double().mean()
    if columns % size or not scale > 0 or not cross.isfinite().all() or not gram.isfinite().all():
        return None
    ridge = torch.eye(columns, dtype=torch.float64, device=weight.device) * (damping * scale)
    gram = gram.double() + ridge
    target = torch.linalg.solve(
        gram, (weight.double() @ (cross.double() + ridge)).T
    ).float()  # (columns, rows) from here
    stock = nf4.quantize_nf4(weight)
    units = _group_scales(weight.float())

    # Columns of most weight go first, block by block: what comes last has none left to make up for it.
    order = torch.arange(columns, device=weight.device).view(-1, size)
    diagonal = gram.diagonal()[order]
    order = order.gather(1, diagonal.argsort(dim=1, descending=True, stable=True))
    order = order[diagonal.sum(1).argsort(descending=True, stable=True)]
    columns_in_order, blocks_in_order = order.flatten(), order[:, 0] // size
    gram, target = gram[columns_in_order][:, columns_in_order], target[columns_in_order]
    unit = units.repeat_interleave(nf4.NESTED_BLOCK_SIZE)[: weight.numel() // size].view(len(weight), -1)
    unit = unit.T[blocks_in_order].contiguous()

    codes, levels = _feed_back(target, gram, unit)
    gram = gram.float()
    for _ in range(sweeps):
        _improve(codes, levels, target, gram, unit)

    def error(values: torch.Tensor) -> float:
        difference = target - values
        return (difference * (gram @ difference)).sum().item()

    searched = dequantize_4bit(*stock).float().T[columns_in_order]
    if not error(_values(codes, levels, unit)) < error(searched):
        return None
    placed = torch.empty_like(codes)
    placed[columns_in_order] = codes
    placed_levels = torch.empty_like(levels)
    placed_levels[blocks_in_order] = levels
    return nf4.assemble(placed.T.contiguous(), placed_levels.T.flatten(), units, weight.dtype)


def _group_scales(weight: torch.Tensor) -> torch.Tensor:
    """What the scales of each group of 256 blocks will be multiples of: the largest that the search finds, and some room."""
    blocks = weight.reshape(-1, nf4.BLOCK_SIZE)
    largest, ideal, _, error = nf4.search_scales(blocks, nf4.code_sums(True).to(weight.device))
    best = ideal.gather(1, error.argmin(1, keepdim=True)).mul_(largest).abs_().view(-1)
    missing = -len(best) % nf4.NESTED_BLOCK_SIZE
    groups = nn.functional.pad(best, (0, missing)).view(-1, nf4.NESTED_BLOCK_SIZE).amax(1)
    return (groups * MARGIN).clamp_min_(nf4.TINY)


def _feed_back(target: torch.Tensor, gram: torch.Tensor, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First codes and scales: column by column, the error of each carried over to those after it.

    Args:
        target: (columns, rows), in the order in which columns are rounded.
        gram: float64, in the same order.
        unit: What the 8-bit scales are multiples of, (blocks, rows).

    Returns:
        Codes, int32 of the shape of `target`, and levels, int32 of the shape of `unit`.
    """
    sums, map_, table = _tables(target.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    values = target.clone()
    codes = torch.empty_like(values, dtype=torch.int32)
    levels = torch.empty_like(unit, dtype=torch.int32)
    for number, start in enumerate(range(0, len(values), nf4.BLOCK_SIZE)):
        part = slice(start, start + nf4.BLOCK_SIZE)
        block, within = values[part], factor[part, part]
        found = nf4.search_scales(block.T.contiguous(), sums)
        levels[number] = nf4.choose_levels(*found, unit[number][:, None], map_)
        scale = map_[levels[number]] * unit[number]
        errors = torch.empty_like(block)
        for column in range(nf4.BLOCK_SIZE):
            codes[start + column] = _nearest(block[column], scale, table)
            errors[column] = (block[column] - table[codes[start + column]] * scale) / within[column, column]
            block[column + 1 :] -= within[column, column + 1 :, None] * errors[column]
        values[part.stop :] -= factor[part, part.stop :].T @ errors
    return codes, levels


def _improve(
    codes: torch.Tensor, levels: torch.Tensor, target: torch.Tensor, gram: torch.Tensor, unit: torch.Tensor
) -> None:
    """Sets each block's scale and then each of its codes to the best, all others given. The error never grows."""
    _, map_, table = _tables(target.device)
    slope = gram @ (target - _values(codes, levels, unit))
    for number, start in enumerate(range(0, len(codes), nf4.BLOCK_SIZE)):
        part = slice(start, start + nf4.BLOCK_SIZE)
        near, within = slope[part].clone(), gram[part, part]
        numbers = table[codes[part]]
        scale = map_[levels[number]] * unit[number]
        before = numbers * scale
        curvature = (numbers * (within @ numbers)).sum(0)
        best = scale + (numbers * near).sum(0) / curvature.clamp_min(nf4.TINY)
        level = nf4.nearest(best / unit[number], map_)
        levels[number] = torch.where(curvature > 0, level, levels[number])
        scale = map_[levels[number]] * unit[number]
        near -= within @ (numbers * scale - before)
        for column in range(nf4.BLOCK_SIZE):
            old = table[codes[start + column]] * scale
            code = _nearest(old + near[column] / within[column, column], scale, table)
            codes[start + column] = code
            near -= within[:, column, None] * (table[code] * scale - old)
        slope -= gram[:, part] @ (table[codes[part]] * scale - before)


def _values(codes: torch.Tensor, levels: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    _, map_, table = _tables(codes.device)
    return table[codes] * (map_[levels] * unit).repeat_interleave(nf4.BLOCK_SIZE, 0)


def _nearest(values: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return nf4.nearest(values / scale.where(scale != 0, torch.inf), table)


def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The search's sums, the map of the 8-bit scales, and the 16 numbers of NF4."""
    return nf4.code_sums(True).to(device), create_dynamic_map().to(device), get_4bit_type("nf4", device=device)
