"""Calibration: the transformer's layers rounded for the error of the prediction instead of that of their weights.

A few prompts are drawn with the original (`calibration_data`). They give each linear layer's inputs in the original, x,
and how much the prediction depends on each token of its output, the sensitivity g. The layer's inputs y in the
quantized model are found block by block, each block after the blocks before it are quantized. An error of the weight W
costs the squares of (W x - Q y) g, for which `gptq` rounds it.

The text encoder isn't calibrated: its share of the error of pictures is small.

On the device are one block of the original, the same block quantized, and the sums over x and y of a few layers. The
inputs of blocks wait in host memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.functional import dequantize_4bit
from diffusers import ErnieImageTransformer2DModel
from torch import nn
from tqdm import tqdm

from ..repository.meta_model import meta_model
from ..repository.metadata import Recommended
from ..repository.nf4_format import NF4Weight
from ..repository.record import Repository, StoredComponent
from ..repository.safetensors_io import read_tensor
from .calibration_data import Sample, conditions, record_samples
from .gptq import PERCDAMP, round_weight
from .layer_selection import WeightPlan
from .scale_search import quantize_nf4

TIMESTEPS = 201  # from 0 to 1000, for the layers whose input is the timestep alone
# For these layers: inputs that depend on a single number leave little to fit and nothing to overfit.
TIMESTEP_PERCDAMP = 1e-4
# The layers of a block in the order of rounding; those of a stage get the same input.
STAGES = (
    ("self_attention.to_q", "self_attention.to_k", "self_attention.to_v"),
    ("self_attention.to_out.0",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.linear_fc2",),
)


@torch.no_grad()
def calibrate_transformer(
    source: Repository,
    plan: WeightPlan,
    prompts: Sequence[str],
    settings: Recommended,
    *,
    device: torch.device,
    progress: bool = True,
) -> dict[str, NF4Weight]:
    """NF4 of the transformer's linear layers, rounded for what a few prompts need.

    Args:
        source: The original repository.
        plan: What becomes of the transformer.
        prompts: What to draw, eight or more: those unlike each other calibrate best.
        settings: Size (at most 512 pixels a side are drawn), steps and guidance scale that the model is for.
        device: Where to compute.
        progress: Whether to show progress bars.

    Returns:
        Name of a weight in `plan` -> codes and quantization state, on the CPU. The scale search alone chooses the codes
        of layers whose rows aren't whole blocks, or on which no picture depends.

    Raises:
        torch.OutOfMemoryError: The device is too small to draw with the original.
    """
    samples = record_samples(source, prompts, settings, device, progress)
    return round_layers(_transformer(source), plan, samples, device, progress)


def _transformer(source: Repository) -> StoredComponent:
    return next(part for part in source.components.values() if part.component.streamed)


@torch.no_grad()
def round_layers(
    part: StoredComponent,
    plan: WeightPlan,
    samples: Sequence[Sample],
    device: torch.device,
    progress: bool = True,
) -> dict[str, NF4Weight]:
    """Round every layer that `plan` quantizes, each given what the layers before it have become."""
    dtype = samples[0].latents.dtype
    rounding = LayerRounding(plan, device, dtype)
    model: ErnieImageTransformer2DModel = meta_model(part.component, part.settings)
    blocks, model.layers = model.layers, nn.ModuleList()
    rounding.read_weights(model, "")
    original = copy.deepcopy(model)
    with tqdm(total=len(blocks) + 1, desc="calibrate", unit="block", disable=not progress) as bar:
        exact = [embed(original, sample, device, dtype) for sample in samples]
        _round_condition_layers(rounding, original, model, samples)
        quantized = [embed(model, sample, device, dtype) for sample in samples]
        bar.update()
        for number in range(len(blocks)):
            _round_block(rounding, blocks[number], f"layers.{number}.", exact, quantized, samples)
            blocks[number] = nn.Identity()  # frees the block
            bar.update()
    _round_final_linear(rounding, original, model, exact, quantized, samples)
    return rounding.rounded


class LayerRounding:
    """Reads original weights of the transformer, and replaces those of single layers by their NF4.

    Attributes:
        plan: What becomes of the transformer.
        device: Where to compute.
        dtype: Of the computation.
        rounded: Name of a weight -> its NF4, on the CPU.
    """

    def __init__(self, plan: WeightPlan, device: torch.device, dtype: torch.dtype) -> None:
        self.plan, self.device, self.dtype = plan, device, dtype
        self.rounded: dict[str, NF4Weight] = {}

    def read_weights(self, module: nn.Module, prefix: str) -> nn.Module:
        """Give a module without storage the original's weights. Their names begin with `prefix`."""
        for name in dict(module.named_parameters()):
            owner = module.get_submodule(name.rpartition(".")[0])
            value = read_tensor(self.plan.tensors[prefix + name]).to(self.device, self.dtype)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
        return module

    def round_layer(
        self,
        owner: nn.Module,
        prefix: str,
        name: str,
        hessian: torch.Tensor,
        cross: torch.Tensor,
        percdamp: float = PERCDAMP,
    ) -> None:
        """Replace the weight of layer `name` in `owner` by what its NF4 is read as, and keep the NF4."""
        key = f"{prefix}{name}.weight"
        weight = read_tensor(self.plan.tensors[key]).to(self.device)
        made = round_weight(weight, hessian, cross, percdamp=percdamp) or quantize_nf4(weight)
        owner.get_parameter(f"{name}.weight").data = dequantize_4bit(*made).to(self.dtype)
        self.rounded[key] = move_weight(made, "cpu")


def move_weight(weight: NF4Weight, device: torch.device | str) -> NF4Weight:
    """Codes and quantization state on another device; the state itself is changed."""
    packed, state = weight
    state.to(device)
    return packed.to(device), state


# The layers before the blocks


def _round_condition_layers(
    rounding: LayerRounding,
    original: ErnieImageTransformer2DModel,
    model: ErnieImageTransformer2DModel,
    samples: Sequence[Sample],
) -> None:
    """Round the projection of the text, and the layers that see the timestep alone."""
    for name, x, quantized_input in _condition_layers(original, model, samples, rounding.device, rounding.dtype):
        if f"{name}.weight" in rounding.plan.quantized:
            x, y = x.flatten(0, -2).double(), quantized_input().flatten(0, -2).double()
            percdamp = PERCDAMP if name == "text_proj" else TIMESTEP_PERCDAMP
            rounding.round_layer(model, "", name, y.T @ y, x.T @ y, percdamp)


def _condition_layers(
    original: ErnieImageTransformer2DModel,
    model: ErnieImageTransformer2DModel,
    samples: Sequence[Sample],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]]:
    """Each linear layer before the blocks: name, input in the original, and a function for that in the quantized model.

    All inputs but the text are functions of the timestep, and taken at `TIMESTEPS` of them beside the samples'.
    """
    steps = torch.tensor([sample.timestep for sample in samples])
    timesteps = torch.cat([steps, torch.linspace(0, 1000, TIMESTEPS)]).to(device, dtype)
    waves = model.time_proj(timesteps).to(dtype)
    texts = torch.cat([sample.text for sample in samples]).to(device, dtype)

    def hidden(of: ErnieImageTransformer2DModel) -> torch.Tensor:
        return of.time_embedding.act(of.time_embedding.linear_1(waves))

    def condition(of: ErnieImageTransformer2DModel) -> torch.Tensor:
        return of.time_embedding.linear_2(hidden(of))

    def activated(of: ErnieImageTransformer2DModel) -> torch.Tensor:
        return of.adaLN_modulation[0](condition(of))

    yield "text_proj", texts, lambda: texts
    yield "time_embedding.linear_1", waves, lambda: waves
    yield "time_embedding.linear_2", hidden(original), lambda: hidden(model)
    yield "adaLN_modulation.1", activated(original), lambda: activated(model)
    yield "final_norm.linear", condition(original), lambda: condition(model)


# Block by block


@dataclass
class BlockInput:
    """What goes into a block for one sample. It waits in host memory.

    Attributes:
        tokens: (image and text tokens, 1, hidden_size).
        rotary: Rotary embedding of the tokens' positions.
        modulation: Shift, scale and gate of attention and of feed-forward, six of (1, 1, hidden_size).
        condition: Embedding of the timestep, (1, hidden_size).
    """

    tokens: torch.Tensor
    rotary: torch.Tensor
    modulation: tuple[torch.Tensor, ...]
    condition: torch.Tensor


def embed(model: ErnieImageTransformer2DModel, sample: Sample, device: torch.device, dtype: torch.dtype) -> BlockInput:
    """The input of the first block, found with a model that has no blocks."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.final_norm.register_forward_pre_hook(lambda _, given: seen.update(tokens=given[0], condition=given[1])),
        model.pos_embed.register_forward_hook(lambda _, given, output: seen.update(rotary=output)),
        model.adaLN_modulation.register_forward_hook(lambda _, given, output: seen.update(modulation=output)),
    ]
    try:
        model(sample.latents.to(device, dtype), *conditions(sample, device, dtype), return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    modulation = tuple(part[None].cpu() for part in seen["modulation"].chunk(6, dim=-1))
    return BlockInput(seen["tokens"].cpu(), seen["rotary"].cpu(), modulation, seen["condition"].cpu())


def _round_block(
    rounding: LayerRounding,
    block: nn.Module,
    prefix: str,
    exact: Sequence[BlockInput],
    quantized: Sequence[BlockInput],
    samples: Sequence[Sample],
) -> None:
    """Round the layers of one block, and take all inputs, the original's and the quantized model's, through it."""
    original = rounding.read_weights(block, prefix)
    block = copy.deepcopy(original)
    for stage in STAGES:
        names = [name for name in stage if f"{prefix}{name}.weight" in rounding.plan.quantized]
        sums = _layer_sums(original, block, stage[0], names, prefix, exact, quantized, samples)
        for name in names:
            rounding.round_layer(block, prefix, name, *sums[name])
    for module, inputs in ((original, exact), (block, quantized)):
        for each in inputs:
            each.tokens = _run(module, each).cpu()


def _layer_sums(
    original: nn.Module,
    block: nn.Module,
    layer: str,
    names: Sequence[str],
    prefix: str,
    exact: Sequence[BlockInput],
    quantized: Sequence[BlockInput],
    samples: Sequence[Sample],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For layers with the same input, the sums of y y' and x y' over all tokens, each times its sensitivity."""
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    if not names:
        return sums
    for before, after, sample in zip(exact, quantized, samples, strict=True):
        x, y = _input_of(original, layer, before), _input_of(block, layer, after)
        for name in names:
            weighted = y * sample.sensitivity[prefix + name].to(y.device)[:, None]
            hessian, cross = sums.get(name, (torch.zeros(()), torch.zeros(())))
            sums[name] = hessian + weighted.T @ y, cross + x.T @ weighted
    return sums


class _Reached(Exception):
    """A pass through a block came to the layer in question."""


def _input_of(block: nn.Module, layer: str, given: BlockInput) -> torch.Tensor:
    """What one of a block's layers gets, float32 (tokens, in_features)."""
    seen = []

    def stop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2).float())
        raise _Reached

    hook = block.get_submodule(layer).register_forward_pre_hook(stop)
    try:
        _run(block, given)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


def _run(block: nn.Module, given: BlockInput) -> torch.Tensor:
    device = next(block.parameters()).device
    modulation = [part.to(device) for part in given.modulation]
    return block(given.tokens.to(device), given.rotary.to(device), modulation, None)


# The layer after the blocks


def _round_final_linear(
    rounding: LayerRounding,
    original: ErnieImageTransformer2DModel,
    model: ErnieImageTransformer2DModel,
    exact: Sequence[BlockInput],
    quantized: Sequence[BlockInput],
    samples: Sequence[Sample],
) -> None:
    """Round the projection to the prediction, for the image's tokens alone; the text's are dropped after it."""
    if "final_linear.weight" not in rounding.plan.quantized:
        return
    hessian = cross = torch.zeros(())
    for before, after, sample in zip(exact, quantized, samples, strict=True):
        image = sample.latents.shape[-2:].numel()
        x = _final_input(original, before, rounding.device)[:image].double()
        y = _final_input(model, after, rounding.device)[:image].double()
        hessian, cross = hessian + y.T @ y * sample.weight**2, cross + x.T @ y * sample.weight**2
    rounding.round_layer(model, "", "final_linear", hessian, cross)


def _final_input(model: ErnieImageTransformer2DModel, given: BlockInput, device: torch.device) -> torch.Tensor:
    return model.final_norm(given.tokens.to(device), given.condition.to(device)).flatten(0, 1)
