"""LoRAs in a fast transformer: what peft holds is multiplied beside the base product, without peft's own layers.

peft's layer calls the base layer, and its two small ones after it. The fast blocks have reasons to do it themselves:

- layers that take the same input (query, key and value) share one product with all of their ``lora_A``, which lie one
  below the other in one tensor. peft's parameters are its rows: there is no second copy;
- the strengths are a tensor. A captured step reads them, and changes of them capture nothing anew;
- base and low-rank product are stored once. In 16 bits, with many tokens, they are one matrix product: what ``lora_A``
  gives lies behind each token, ``lora_B`` behind each row of the dequantized weight. In int8 one kernel adds both.

An adapter that is switched off leaves the base product alone, to the bit. DoRA, layers beside the blocks and whatever
else peft knows go through peft's layers; a captured step is then captured with their strengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .ops import eight_bit
from .ops.eight_bit import MULTIPLE, Format
from .subclassing import Runtime

# Layers of a block that take the same input: their parent, and their names in it.
SHARING = (
    ("self_attention", ("to_q", "to_k", "to_v")),
    ("self_attention", ("to_out.0",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("linear_fc2",)),
)
ATTRIBUTE = "low_rank"  # of a layer of peft's


class SharedDown:
    """``lora_A`` of layers that take the same input, and the strengths of its rows.

    Attributes:
        parameters: peft's, which are rows of `data`.
        strengths: (rows,) float32, on the device of the computation.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.parameters = tuple(parameters)
        ends = list(itertools.accumulate(map(len, parameters)))
        self._rows = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self.strengths: torch.Tensor | None = None
        with torch.inference_mode(False):
            self.data = torch.cat([parameter.data.to(device) for parameter in parameters])

    @property
    def data(self) -> torch.Tensor:
        """(rows, in). Set, it lets peft's parameters be its rows."""
        return self._data

    @data.setter
    def data(self, tensor: torch.Tensor) -> None:
        self._data = tensor
        for parameter, rows in zip(self.parameters, self._rows, strict=True):
            parameter.data = tensor[rows]

    def holds_parameters(self) -> bool:
        """Whether peft's parameters are still its rows, which ``.to`` and the like end."""
        return all(map(self._holds, self.parameters, self._rows))

    def let_go(self, kept: set[int]) -> None:
        """Give parameters whose ids aren't in `kept` memory of their own."""
        for parameter, rows in zip(self.parameters, self._rows, strict=True):
            if id(parameter) not in kept and self._holds(parameter, rows):
                parameter.data = parameter.data.clone()

    def _holds(self, parameter: nn.Parameter, rows: slice) -> bool:
        return parameter.device == self._data.device and parameter.data_ptr() == self._data[rows].data_ptr()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(N, rows) of (N, in): the inputs of the layers' ``lora_B``, strengths included."""
        return F.linear(x, self.data).mul_(self._strengths())

    def write_product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """`product` into the first columns of `out`, (N, columns), and zeros into the others."""
        rows = len(self.data)
        torch.mul(F.linear(x, self.data), self._strengths(), out=out[:, :rows])
        out[:, rows:].zero_()

    def product_in_eight_bits(
        self, x: torch.Tensor, scale: torch.Tensor, to: Format, dtype: torch.dtype
    ) -> torch.Tensor:
        """`product` of rows that were rounded for the base product, (N, in) and (N, 1), in this dtype."""
        down, down_scale = eight_bit.quantize_rows(self.data, to)
        rows = len(down)
        if missing := -rows % MULTIPLE:  # of ranks that the product doesn't take
            down, down_scale = (F.pad(each, (0, 0, 0, missing)) for each in (down, down_scale))
        return eight_bit.scaled_product(x, scale, down, down_scale, dtype)[:, :rows].mul_(self._strengths())

    def _strengths(self) -> torch.Tensor:
        assert self.strengths is not None  # as `Adapters.prepare` gives it
        return self.strengths


class LowRank(Runtime):
    """What a fast block does instead of calling a layer of peft's. A copy of the layer has to be prepared anew.

    Attributes:
        shared: Of the layer's active adapters; None if there are none, which leaves the base layer.
        pieces: For each adapter, its columns in the product of `shared`, and ``lora_B``, (out, rank).
        is_known: Whether it was prepared for this very layer.
    """

    def __init__(
        self,
        shared: SharedDown | None = None,
        pieces: Sequence[tuple[slice, nn.Parameter]] = (),
        is_known: bool = False,
    ) -> None:
        self.shared, self.pieces, self.is_known = shared, tuple(pieces), is_known

    def factors(self, inner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, rank) and (out, rank): what the adapters add is the first times the second's transpose.

        Args:
            inner: `SharedDown.product`, in which a layer's columns are beside each other.
        """
        columns = inner[:, self.pieces[0][0].start : self.pieces[-1][0].stop]
        ups: list[torch.Tensor] = [up for _, up in self.pieces]
        return columns, ups[0] if len(ups) == 1 else torch.cat(ups, 1)


class Adapters(Runtime):
    """What a fast transformer knows of the adapters that peft has put into it, by `prepare` and `bring_strengths`."""

    def __init__(self) -> None:
        self.stacks: list[SharedDown] = []
        self._is_changed = False  # since strengths were brought
        self._clear()

    def _clear(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._config: tuple[dict, tuple] | None = None
        self._layers: list[Any] = []
        self._structure: tuple | None = None
        self._strengths: tuple[float, ...] = ()
        self._baked: tuple = ()
        self._sources: list[tuple[Any, str, int]] = []  # layer, adapter and rank of each piece, in order

    def is_current(self, transformer: nn.Module, *, exact: bool = False) -> bool:
        """Whether peft's calls have changed nothing but strengths since `prepare`."""
        config = getattr(transformer, "peft_config", None)
        if not config or not self._knows(config):
            return not config and self._structure is None
        structure = (exact, *map(_structure_of, self._layers))
        return structure == self._structure and all(stack.holds_parameters() for stack in self.stacks)

    def prepare(self, transformer: nn.Module, *, exact: bool = False) -> None:
        """Take note of what peft's calls have changed, strengths aside.

        Args:
            transformer: The fast transformer.
            exact: Whether all goes through peft's layers.
        """
        if self.is_current(transformer, exact=exact):
            return
        self._is_changed = True
        config = getattr(transformer, "peft_config", None)
        if not config:
            self._forget()
            return
        if not self._knows(config):
            self._find_layers(transformer, config)
        self._structure = (exact, *map(_structure_of, self._layers))
        self._stack(transformer, exact)

    def bring_strengths(self, device: torch.device) -> bool:
        """Write the strengths to where products on this device read them.

        Returns:
            Whether a step that was captured before is no longer right. Other strengths of adapters that are multiplied
            here leave it so; those that are multiplied by peft's layers were captured with it.
        """
        baked = tuple(tuple(layer.scaling.items()) for layer in self._layers if ATTRIBUTE not in vars(layer))
        changed = self._is_changed or baked != self._baked
        self._is_changed, self._baked = False, baked
        strengths = tuple(float(layer.scaling[name]) for layer, name, _ in self._sources)
        if self._buffer is None or self._buffer.device != device:
            self._buffer = self._empty_buffer(device)
            changed, self._strengths = True, ()
        if strengths != self._strengths:
            self._buffer.copy_(torch.tensor(self._by_row(strengths)))
            self._strengths = strengths
        return changed

    def _knows(self, config: dict) -> bool:
        """Whether these are the adapters whose layers were looked for. Settings are told apart by identity."""
        if self._config is None or self._config[0] is not config or len(self._config[1]) != len(config):
            return False
        return all(
            name == known and each is it
            for (known, it), (name, each) in zip(self._config[1], config.items(), strict=True)
        )

    def _find_layers(self, transformer: nn.Module, config: dict) -> None:
        from peft.tuners.lora import LoraLayer

        self._forget()
        self._config = config, tuple(config.items())
        self._layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]

    def _stack(self, transformer: Any, exact: bool) -> None:
        before, self.stacks, self._sources = self.stacks, [], []
        for layer in self._layers:
            vars(layer).pop(ATTRIBUTE, None)
        for block in () if exact else transformer.layers.children():
            for parent, names in SHARING:
                layers = [block.get_submodule(f"{parent}.{name}") for name in names]
                self._stack_group([layer for layer in layers if layer in self._layers and _is_plain(layer)])
        kept = {id(parameter) for stack in self.stacks for parameter in stack.parameters}
        for stack in before:
            stack.let_go(kept)
        self._buffer = None

    def _stack_group(self, layers: Sequence[Any]) -> None:
        """Prepare layers that take the same input. Those in different dtypes stay with peft."""
        downs = [layer.lora_A[name].weight for layer in layers for name in _active(layer)]
        if len({down.dtype for down in downs}) > 1:
            return
        # peft puts a new adapter where its layer is at the moment; others may have moved since.
        shared = SharedDown(downs, layers[0].get_base_layer().weight.device) if downs else None
        if shared is not None:
            self.stacks.append(shared)
        start = 0
        for layer in layers:
            pieces = []
            for name in _active(layer):
                up = layer.lora_B[name].weight
                pieces.append((slice(start, start + up.shape[1]), up))
                self._sources.append((layer, name, up.shape[1]))
                start += up.shape[1]
            setattr(layer, ATTRIBUTE, LowRank(shared if pieces else None, pieces, is_known=True))

    def _empty_buffer(self, device: torch.device) -> torch.Tensor:
        """Memory for the strengths of all rows, of which each stack gets its part."""
        sizes = [len(stack.data) for stack in self.stacks]
        with torch.inference_mode(False):
            buffer = torch.zeros(sum(sizes), device=device)
        for stack, part in zip(self.stacks, buffer.split(sizes), strict=True):
            stack.strengths = part
        return buffer

    def _by_row(self, strengths: Sequence[float]) -> list[float]:
        pairs = zip(strengths, self._sources, strict=True)
        return [strength for strength, (_, _, rank) in pairs for _ in range(rank)]

    def _forget(self) -> None:
        for layer in self._layers:
            vars(layer).pop(ATTRIBUTE, None)
        for stack in self.stacks:
            stack.let_go(set())
        self.stacks = []
        self._clear()


def low_rank_of(layer: nn.Module) -> LowRank | None:
    """What to do instead of calling a layer; None for one to be called."""
    found = vars(layer).get(ATTRIBUTE)
    return found if found is not None and found.is_known else None


def stacks_in(module: nn.Module, excluded: Container[int] = ()) -> Iterator[SharedDown]:
    """The tensors of adapters below a module that hold several of peft's parameters.

    Args:
        module: The module.
        excluded: Ids of modules whose adapters are left out.
    """
    seen = set()
    for part in module.modules():
        if id(part) in excluded:
            continue
        found = low_rank_of(part)
        if found is not None and found.shared is not None and id(found.shared) not in seen:
            seen.add(id(found.shared))
            yield found.shared


def _active(layer: Any) -> list[str]:
    """Adapters of a layer of peft's that are on."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def _structure_of(layer: Any) -> tuple:
    """What of a layer's adapters, but for strengths, a captured step hangs on."""
    names = _active(layer)
    weights = [id(part[name].weight) for name in names for part in (layer.lora_A, layer.lora_B)]
    return tuple(names), tuple(layer.merged_adapters), tuple(weights), layer.training


def _is_plain(layer: Any) -> bool:
    """Whether a layer of peft's adds nothing but ``lora_B(lora_A(x)) * scaling`` to a linear layer."""
    if not isinstance(layer.get_base_layer(), nn.Linear) or layer.merged or getattr(layer, "fan_in_fan_out", False):
        return False
    return not any(
        name in getattr(layer, "lora_variant", {})
        or layer.use_dora.get(name)
        or layer.lora_B[name].bias is not None
        or (layer.training and not isinstance(layer.lora_dropout[name], nn.Identity))
        for name in _active(layer)
    )
