"""The transformer's layers rounded block by block, each given what the layers before it have become.

On the device are the original's block, the same block quantized, and the sums over the inputs of one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from diffusers import ErnieImageTransformer2DModel
from torch import nn

from ..repository.nf4_format import SUFFIXES, NF4Weight, quant_state_tensors
from ..repository.safetensors_io import StoredTensor, read_tensor
from .calibration_data import Advance, Sample, ignore
from .gptq import PERCDAMP, round_weights
from .layer_selection import WeightPlan
from .layer_sums import LayerSums
from .resumable_output import Checkpoints
from .scale_search import quantize_nf4
from .streamed_original import BlockInput, HostMemory, StreamedOriginal, TokenPool, enter_blocks, predict

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
ROUNDING = 10  # time of rounding a block, for each sample, in that of a sample's pass through a block
BEFORE, AFTER = "before-blocks", "after-blocks"


def block_name(number: int) -> str:
    """Name of the checkpoint of a block."""
    return f"block-{number:02d}"


@torch.no_grad()
def round_layers(
    original: StreamedOriginal,
    plan: WeightPlan,
    samples: Sequence[Sample],
    kept: Checkpoints,
    memory: HostMemory,
    advance: Advance = ignore,
) -> None:
    """Round every layer that `plan` quantizes. What is rounded is kept block by block.

    Blocks that an earlier run kept aren't rounded again, but the samples go through them.

    Args:
        original: The original's transformer.
        plan: What becomes of it.
        samples: Predictions, with their sensitivities.
        kept: Where the NF4 of finished blocks is kept.
        memory: For the tokens of all samples, of the original and of the quantized model.
        advance: Told of samples that went through a block.
    """
    rounding = LayerRounding(plan, kept, original.device, original.dtype)
    memory.clear()
    model = copy.deepcopy(original.model)
    with rounding.keeping(BEFORE, model, "") as missing:
        if missing:
            _round_condition_layers(rounding, original, model, samples)
    inputs = [(sample.latents, sample.timestep, sample.text) for sample in samples]
    given, exact = enter_blocks(original.model, inputs, memory)
    given_quantized, quantized = enter_blocks(model, inputs, memory)
    walk = BlockWalk(samples, given, given_quantized, exact, quantized)
    blocks = original.stream([number] for number in range(len(original.blocks)))
    for number in range(len(original.blocks)):  # enumerate would hold the last block while the next one comes
        (block,) = next(blocks)
        made, prefix = copy.deepcopy(block), f"layers.{number}."
        passed = False
        with rounding.keeping(block_name(number), made, prefix) as missing:
            if missing:
                passed = _round_block(rounding, block, made, prefix, walk)
        walk.leave(block if not passed else None, made)
        del block, made
        advance(ROUNDING * len(samples))
    with rounding.keeping(AFTER, model, "") as missing:
        if missing and "final_linear.weight" in plan.quantized:
            _round_final_linear(rounding, original, model, walk)


class BlockWalk:
    """All samples on their way through the blocks, in the original and in the quantized model.

    Attributes:
        samples: The samples.
        given: What goes into the original's blocks beside the tokens.
        given_quantized: The same of the quantized model.
        exact: Tokens in the original.
        quantized: Tokens in the quantized model.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        given: Sequence[BlockInput],
        given_quantized: Sequence[BlockInput],
        exact: TokenPool,
        quantized: TokenPool,
    ) -> None:
        self.samples, self.given, self.given_quantized = samples, given, given_quantized
        self.exact, self.quantized = exact, quantized

    def leave(self, block: nn.Module | None, made: nn.Module) -> None:
        """Take all samples through the original's block, unless it is None, and through the quantized one."""
        for number, (given, given_quantized) in enumerate(zip(self.given, self.given_quantized, strict=True)):
            if block is not None:
                self.exact[number] = given.through(block, self.exact[number])
            self.quantized[number] = given_quantized.through(made, self.quantized[number])


class LayerRounding:
    """Replaces the weights of single layers by their NF4.

    Attributes:
        plan: What becomes of the transformer.
        kept: Where the NF4 is kept.
        device: Where to compute.
        dtype: Of the computation.
        rounded: NF4 of the layers that were rounded since the last checkpoint, by the names of their tensors.
    """

    def __init__(self, plan: WeightPlan, kept: Checkpoints, device: torch.device, dtype: torch.dtype) -> None:
        self.plan, self.kept, self.device, self.dtype = plan, kept, device, dtype
        self.rounded: dict[str, torch.Tensor] = {}

    def keeping(self, name: str, module: nn.Module, prefix: str) -> _Keeping:
        """A context in which layers of `module` are rounded. At its end they are kept as checkpoint `name`.

        Its value is whether there is something to do: if an earlier run kept the checkpoint, the module's layers get
        their NF4 from it.
        """
        return _Keeping(self, name, module, prefix)

    def round_layers(
        self,
        owner: nn.Module,
        prefix: str,
        names: Sequence[str],
        hessian: torch.Tensor,
        difference: torch.Tensor | None,
        percdamp: float = PERCDAMP,
    ) -> None:
        """Round layers with the same input: replace their weights in `owner` by what their NF4 is read as.

        Args:
            owner: Whose layers they are.
            prefix: With which their names in the plan begin.
            names: Their names in `owner`.
            hessian: As for `round_weights`.
            difference: Sum of (x - y) y', (in_features, in_features). Empty afterwards.
            percdamp: As for `round_weights`.
        """
        keys = [f"{prefix}{name}.weight" for name in names]
        weights = [read_tensor(self.plan.tensors[key]).to(self.device) for key in keys]
        shift = None
        if difference is not None:
            shift = torch.cat([weight.to(difference.dtype) @ difference for weight in weights])
            difference.data = difference.new_empty(0)  # its memory is needed
        made = round_weights(weights, hessian, shift, percdamp=percdamp)
        for key, name, weight, found in zip(keys, names, weights, made, strict=True):
            nf4 = found or quantize_nf4(weight)
            self._replace(owner, name, nf4)
            self.rounded |= nf4_tensors(key, nf4)

    def replace_by_kept(self, owner: nn.Module, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        """Replace weights in `owner` by what their NF4 in a checkpoint is read as."""
        for key in weights_in(tensors):
            name = key.removeprefix(prefix).removesuffix(".weight")
            self._replace(owner, name, nf4_weight(key, tensors.__getitem__, self.device))

    def _replace(self, owner: nn.Module, name: str, made: NF4Weight) -> None:
        owner.get_parameter(f"{name}.weight").data = dequantize_4bit(*made).to(self.dtype)


class _Keeping:
    def __init__(self, rounding: LayerRounding, name: str, module: nn.Module, prefix: str) -> None:
        self.rounding, self.name, self.module, self.prefix = rounding, name, module, prefix
        self.found: dict[str, torch.Tensor] | None = None

    def __enter__(self) -> bool:
        self.found = self.rounding.kept.find(self.name)
        if self.found is not None:
            self.rounding.replace_by_kept(self.module, self.prefix, self.found)
        return self.found is None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.found is None:
            self.rounding.kept.keep(self.name, self.rounding.rounded)
            self.rounding.rounded = {}


def nf4_tensors(name: str, made: NF4Weight) -> dict[str, torch.Tensor]:
    """What is stored of a weight, by name, on the host."""
    packed, state = made
    tensors = {name: packed} | {f"{name}.{key}": value for key, value in quant_state_tensors(state).items()}
    return {key: value.cpu() for key, value in tensors.items()}


def weights_in(tensors: Iterable[str]) -> list[str]:
    """Names of the NF4 weights among stored tensors, sorted."""
    return sorted(name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax"))


def nf4_weight(name: str, get: Callable[[str], torch.Tensor], device: torch.device) -> NF4Weight:
    """The NF4 of a weight on a device, given a function that reads stored tensors."""
    state = {f"{name}{suffix}": get(f"{name}{suffix}") for suffix in SUFFIXES if suffix}
    state = {key.removeprefix(f"{name}."): value for key, value in state.items()}
    return get(name).to(device), QuantState.from_dict(state, device)


def stored_weight(name: str, tensors: dict[str, StoredTensor], device: torch.device) -> NF4Weight:
    """The NF4 of a weight in a file, on a device."""
    return nf4_weight(name, lambda key: read_tensor(tensors[key]), device)


# The layers before the blocks


def _round_condition_layers(
    rounding: LayerRounding,
    original: StreamedOriginal,
    model: ErnieImageTransformer2DModel,
    samples: Sequence[Sample],
) -> None:
    """Round the projection of the text, and the layers that see the timestep alone."""
    for name, x, quantized_input in _condition_layers(original, model, samples):
        if f"{name}.weight" in rounding.plan.quantized:
            x, y = x.flatten(0, -2).double(), quantized_input().flatten(0, -2).double()
            percdamp = PERCDAMP if name == "text_proj" else TIMESTEP_PERCDAMP
            rounding.round_layers(model, "", [name], y.T @ y, (x - y).T @ y, percdamp)


def _condition_layers(
    original: StreamedOriginal, model: ErnieImageTransformer2DModel, samples: Sequence[Sample]
) -> Iterator[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]]:
    """Each linear layer before the blocks: name, input in the original, and a function for that in the quantized model.

    All inputs but the text are functions of the timestep, and taken at `TIMESTEPS` of them beside the samples'.
    """
    device, dtype = original.device, original.dtype
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
    yield "time_embedding.linear_2", hidden(original.model), lambda: hidden(model)
    yield "adaLN_modulation.1", activated(original.model), lambda: activated(model)
    yield "final_norm.linear", condition(original.model), lambda: condition(model)


# The layers of a block


def _round_block(rounding: LayerRounding, block: nn.Module, made: nn.Module, prefix: str, walk: BlockWalk) -> bool:
    """Round the layers of one block, those of `made`. Returns whether the original's tokens went through it already."""
    passed = False
    for stage in STAGES:
        names = [name for name in stage if f"{prefix}{name}.weight" in rounding.plan.quantized]
        for group in sharing(names):
            last = stage is STAGES[-1]
            sums = _layer_sums(block, made, group, prefix, walk, last)
            rounding.round_layers(made, prefix, group, *sums.taken())
            passed = passed or last
    return passed


def sharing(names: Sequence[str]) -> list[list[str]]:
    """The layers of a stage in groups that are rounded together."""
    return [list(names)] if names else []


def _layer_sums(
    block: nn.Module, made: nn.Module, names: Sequence[str], prefix: str, walk: BlockWalk, last: bool
) -> LayerSums:
    """Sums over the inputs of layers that get the same, weighted by their sensitivities.

    For the last layer the original's tokens go through the whole block: they aren't needed before it any more.
    """
    weights = token_weights(walk.samples, [prefix + name for name in names])
    layer = names[0]
    sums = LayerSums(block.get_parameter(f"{layer}.weight").shape[1], next(block.parameters()).device)
    for number, weight in enumerate(weights):
        x, after = _input_of(block, layer, walk.given[number], walk.exact[number], whole=last)
        y, _ = _input_of(made, layer, walk.given_quantized[number], walk.quantized[number])
        sums.add(x, y, weight)
        if after is not None:
            walk.exact[number] = after
    return sums


def token_weights(samples: Sequence[Sample], names: Sequence[str]) -> list[torch.Tensor]:
    """For each sample the weight of its tokens in the sums of layers with the same input, (tokens,).

    That is the sensitivity, on average over the layers, each of which counts the same: over all tokens its own have the
    mean 1.
    """
    means = [sum(float(each.sensitivity[name].double().sum()) for each in samples) for name in names]
    tokens = sum(len(samples[number].sensitivity[names[0]]) for number in range(len(samples)))
    weights = []
    for sample in samples:
        parts = [
            sample.sensitivity[name] * (tokens / mean if mean > 0 else 0)
            for name, mean in zip(names, means, strict=True)
        ]
        weights.append(torch.stack(parts).mean(0))
    return weights


class _Reached(Exception):
    """A pass through a block came to the layer in question."""


def _input_of(
    block: nn.Module, layer: str, given: BlockInput, tokens: torch.Tensor, *, whole: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What one of a block's layers gets, (tokens, in_features), and if `whole` the tokens after the block."""
    seen = []

    def stop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2))
        if not whole:
            raise _Reached

    hook = block.get_submodule(layer).register_forward_pre_hook(stop)
    after = None
    try:
        after = given.through(block, tokens)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0], after


# The layer after the blocks


def _round_final_linear(
    rounding: LayerRounding, original: StreamedOriginal, model: ErnieImageTransformer2DModel, walk: BlockWalk
) -> None:
    """Round the projection to the prediction, for the image's tokens alone; the text's are dropped after it."""
    sums = LayerSums(model.final_linear.in_features, rounding.device)
    for number, sample in enumerate(walk.samples):
        image = sample.latents.shape[-2:].numel() // model.config.patch_size**2
        x = _final_input(original.model, walk.exact[number], sample)[:image]
        y = _final_input(model, walk.quantized[number], sample)[:image]
        sums.add(x, y, torch.full((image,), float(sample.weight) ** 2))
    rounding.round_layers(model, "", ["final_linear"], *sums.taken())


def _final_input(model: ErnieImageTransformer2DModel, tokens: torch.Tensor, sample: Sample) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.final_linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    try:
        predict(model, tokens, sample.latents, sample.timestep, sample.text)
    finally:
        hook.remove()
    return seen[0]
