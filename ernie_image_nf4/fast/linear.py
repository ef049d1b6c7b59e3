"""Products of the transformer's blocks: as the layers compute them, or in 8 bits where a layer was chosen for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

from ..upstream.models import is_hooked
from .adapters import LowRank, SharedDown, low_rank_of
from .ops import eight_bit, elementwise
from .ops.eight_bit import FP8, INT8, Format, RoundedTokens
from .subclassing import named_as_upstream

DEQUANTIZER = "triton_nf4"
# With more rows bitsandbytes dequantizes a weight and multiplies as well, so that results are the same bits. With fewer
# ones a kernel of its own may do both: of a large weight, which all of the full-size blocks are, up to fewer rows.
ROWS, ROWS_OF_LARGE = 1536, 512
LARGE = 4 * 1024**2  # values
ALIGNMENT = 8  # columns of a matrix in 16 bits, for products of full speed


@named_as_upstream
class Int8Linear4bit(Linear4bit):
    """An NF4 layer whose products with a fast block are in int8. Called as a module, it is upstream's."""

    products: ClassVar[Format] = INT8


@named_as_upstream
class Fp8Linear4bit(Linear4bit):
    """An NF4 layer whose products with a fast block are in fp8. Called as a module, it is upstream's."""

    products: ClassVar[Format] = FP8


EightBitLayer = Int8Linear4bit | Fp8Linear4bit
LAYERS: dict[str, type[EightBitLayer]] = {layer.products.name: layer for layer in (Int8Linear4bit, Fp8Linear4bit)}


class WideTokens(NamedTuple):
    """Packed tokens with room behind each for what the adapters of their layers multiply.

    A product of these rows with weights that have ``lora_B`` behind each of theirs is base and low-rank product in one.

    Attributes:
        rows: (N, in + columns).
        width: in.
    """

    rows: torch.Tensor
    width: int

    @property
    def tokens(self) -> torch.Tensor:
        """(1, N, in), to be written to."""
        return self.rows[None, :, : self.width]


Tokens = torch.Tensor | RoundedTokens | WideTokens


def multiplies_in_eight_bits(layer: nn.Module) -> TypeGuard[EightBitLayer]:
    """Whether a layer's products are in 8 bits. One with hooks, which expect a call, isn't."""
    return isinstance(layer, EightBitLayer) and not is_hooked(layer)


def common_format(dtype: torch.dtype, *layers: nn.Module) -> Format | None:
    """The format in which all of these layers, or those below their adapters, multiply an input of a dtype."""
    found = set()
    for layer in layers:
        part = _low_rank(layer, dtype)
        base = layer if part is None else base_of(layer)
        found.add(base.products if multiplies_in_eight_bits(base) else None)
    return found.pop() if len(found) == 1 else None


def input_for(like: torch.Tensor, *layers: nn.Module) -> Format | WideTokens | None:
    """In what these layers take their input: a format that it is rounded to, or memory to write it to.

    Args:
        like: Of the input's shape, (1, N, in), and dtype.
        layers: All of those that take this input.

    Returns:
        None for a tensor like any other.
    """
    if to := common_format(like.dtype, *layers):
        return to
    shared = _shared_down(like, layers)
    if shared is None:
        return None
    width = like.shape[-1]
    columns = -(-len(shared.data) // ALIGNMENT) * ALIGNMENT
    return WideTokens(like.new_empty(like.shape[1], width + columns), width)


def _shared_down(like: torch.Tensor, layers: Sequence[nn.Module]) -> SharedDown | None:
    """What all adapters of these layers share, if base and low-rank products of all that have some can be one."""
    adapted = [(layer, part) for layer in layers if (part := _low_rank(layer, like.dtype)) is not None and part.shared]
    bases = [base_of(layer) for layer, _ in adapted]
    if not all(_dequantizes(base, like) and _state_in(base, like.dtype) for base in bases):
        return None
    return adapted[0][1].shared if adapted else None


def apply_layers(x: Tokens, *layers: nn.Module, joined: bool = False) -> list[torch.Tensor]:
    """``[layer(x) for layer in layers]``. Those in 8 bits share one rounding of `x`, (..., in), adapters one product.

    Args:
        x: The input, in what `input_for` says.
        layers: The layers, all of those that take this input.
        joined: Whether their products may be one, which leaves fewer multiprocessors idle, but may round otherwise.
    """
    adapted = [_low_rank(layer, x.rows.dtype if isinstance(x, WideTokens) else x.dtype) for layer in layers]
    bases = [layer if part is None else base_of(layer) for layer, part in zip(layers, adapted, strict=True)]
    if isinstance(x, WideTokens):
        return _wide_products(x, adapted, bases, joined)
    if isinstance(x, RoundedTokens):
        rounded = {x.to: x.rounded}
    else:
        formats = {layer.products for layer in bases if multiplies_in_eight_bits(layer)}
        rounded = {each: eight_bit.quantize_rows(x.flatten(0, -2), each) for each in formats}
    inner = _inner_product(x, adapted, bases, rounded)
    together = None
    if joined and (inner is None or rounded):
        together = _joined_products(x, bases, rounded, inner, adapted)
    if together is not None:
        return [out.unflatten(0, x.shape[:-1]) for out in together]
    outputs = []
    for base, part in zip(bases, adapted, strict=True):
        low_rank = None if part is None or part.shared is None or inner is None else part.factors(inner)
        if multiplies_in_eight_bits(base):
            out = multiply(base, *rounded[base.products], x.dtype, low_rank)
        elif low_rank is not None:
            out = add_base_product(base, _tokens(x).flatten(0, -2), low_rank[0] @ low_rank[1].t())
        else:
            outputs.append(_call(base, _tokens(x)))
            continue
        outputs.append(out.unflatten(0, x.shape[:-1]))
    return outputs


def apply_to_rows(rows: Sequence[torch.Tensor], layer: nn.Module, *, alone: bool = False) -> torch.Tensor:
    """``layer`` of rows, (1, length, in) each, that lie apart: packed, (1, N, out).

    Args:
        rows: The rows.
        layer: The layer.
        alone: Whether each may have a product of its own, which may round otherwise.
    """
    lengths = [row.shape[1] for row in rows]
    weight = None
    if alone and len(rows) > 1 and not torch.is_grad_enabled():
        weight = _weight_in(layer, rows[0].dtype) if getattr(layer, "bias", None) is None else None
    if weight is None:
        return apply_layers(rows[0] if len(rows) == 1 else torch.cat(list(rows), 1), layer)[0]
    out = rows[0].new_empty(1, sum(lengths), weight.shape[0])
    for row, place in zip(rows, out.split(lengths, 1), strict=True):
        torch.mm(row[0], weight.t(), out=place[0])
    return out


def _tokens(x: Tokens) -> torch.Tensor:
    assert isinstance(x, torch.Tensor)  # what is rounded is for layers of a common format
    return x


def apply_to_gelu(gate: torch.Tensor, up: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """``layer(gelu(gate) * up)``, (..., out). For a layer in 8 bits, ``gelu(gate) * up`` is rounded once, to these."""
    part = _low_rank(layer, gate.dtype)
    base = layer if part is None else base_of(layer)
    if not multiplies_in_eight_bits(base):
        x = input_for(gate, layer)
        if isinstance(x, WideTokens):
            elementwise.gelu_times(gate, up, x.tokens)
            return apply_layers(x, layer)[0]
        return apply_layers(elementwise.gelu_times(gate, up), layer)[0]
    rounded = eight_bit.gelu_times_rows(gate.flatten(0, -2), up.flatten(0, -2), base.products)
    low_rank = None
    if part is not None and part.shared is not None:
        low_rank = part.factors(part.shared.product_in_eight_bits(*rounded, base.products, gate.dtype))
    out = multiply(base, *rounded, gate.dtype, low_rank)
    return out.unflatten(0, gate.shape[:-1])


def _wide_products(
    x: WideTokens, adapted: Sequence[LowRank | None], bases: Sequence[nn.Module], joined: bool
) -> list[torch.Tensor]:
    """``base(x)`` and what its adapters add, (1, N, out) each, in one product. Layers without adapters are called."""
    (shared, *_) = [part.shared for part in adapted if part is not None and part.shared is not None]
    inner = x.rows[:, x.width :]
    shared.write_product(x.tokens[0], inner)
    outputs: dict[int, torch.Tensor] = {}
    widened: list[tuple[int, Any, LowRank]] = []
    for number, (base, part) in enumerate(zip(bases, adapted, strict=True)):
        if part is None or part.shared is None:
            outputs[number] = _call(base, x.tokens)
        else:
            widened.append((number, base, part))
    together = joined and all(base.bias is None for _, base, _ in widened)
    for group in [widened] if together else [[each] for each in widened]:
        weight = _widened([(base, part) for _, base, part in group], x.rows.dtype, inner.shape[1])
        bias = group[0][1].bias
        out = F.linear(x.rows, weight, None if bias is None else bias.to(x.rows.dtype))[None]
        parts = out.split([base.weight.quant_state.shape[0] for _, base, _ in group], -1)
        outputs |= {number: part for (number, _, _), part in zip(group, parts, strict=True)}
    return [outputs[number] for number in range(len(bases))]


def _widened(layers: Sequence[tuple[Any, LowRank]], dtype: torch.dtype, columns: int) -> torch.Tensor:
    """NF4 weights, one below the other, and behind each the ``lora_B`` of its layer, in those of `columns` it has."""
    weights = [(base.weight, base.weight.quant_state) for base, _ in layers]
    matrix = dequantized(weights, dtype, columns)
    rows = [state.shape[0] for _, state in weights]
    _write_ups(matrix[:, matrix.shape[1] - columns :], [part for _, part in layers], rows)
    return matrix


def _write_ups(into: torch.Tensor, parts: Sequence[LowRank | None], rows: Sequence[int]) -> None:
    """``lora_B`` of layers with so many rows each, (sum of rows, columns): each in its own columns, zeros elsewhere."""
    if len(parts) > 1 or parts[0] is None or sum(up.shape[1] for _, up in parts[0].pieces) < into.shape[1]:
        into.zero_()
    for part, its_rows in zip(parts, into.split(list(rows)), strict=True):
        for own, up in () if part is None else part.pieces:
            its_rows[:, own] = up


def base_of(layer: nn.Module) -> nn.Module:
    """The layer that peft has put its own around."""
    return cast(nn.Module, layer.base_layer)


def _low_rank(layer: nn.Module, dtype: torch.dtype) -> LowRank | None:
    """What to do instead of calling a layer of peft's; None for another layer, and for one that has to be called."""
    part = low_rank_of(layer)
    if part is None or is_hooked(layer):
        return None
    return part if part.shared is None or part.shared.data.dtype == dtype else None


def _inner_product(
    x: torch.Tensor | RoundedTokens,
    adapted: Sequence[LowRank | None],
    bases: Sequence[nn.Module],
    rounded: Mapping[Format, eight_bit.Rounded],
) -> torch.Tensor | None:
    """`SharedDown.product` for layers that have adapters, in 8 bits if all of them are; None if none has."""
    both = [(part.shared, base) for part, base in zip(adapted, bases, strict=True) if part is not None and part.shared]
    if not both:
        return None
    shared, base = both[0]
    if all(multiplies_in_eight_bits(each) for _, each in both) and multiplies_in_eight_bits(base):
        return shared.product_in_eight_bits(*rounded[base.products], base.products, x.dtype)
    return shared.product(_tokens(x).flatten(0, -2))


def add_base_product(layer: nn.Module, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out + layer(x)``, (N, out), in the memory of `out`.

    The matrix product adds what is there already as it stores its sums, which costs less than to read and write the sum
    once more.
    """
    weight = _weight_in(layer, x.dtype)
    if weight is None or out.dtype != x.dtype:  # under autocast, which leaves products in place alone
        return out.add_(layer(x))
    out.addmm_(x, weight.t())
    bias = cast("torch.Tensor | None", layer.bias)
    return out if bias is None else out.add_(bias)


def _weight_in(layer: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight of a layer that multiplies in a dtype, (out, in); None for one that has to be called."""
    if type(layer) is nn.Linear and not is_hooked(layer):
        return layer.weight if layer.weight.dtype == dtype else None
    state = _state_in(layer, dtype)
    return None if state is None else dequantized([(layer.weight, state)], dtype)


def _state_in(layer: Any, dtype: torch.dtype) -> QuantState | None:
    """The state of an NF4 layer that multiplies in a dtype; None for one that has to be called."""
    state = getattr(layer.weight, "quant_state", None)
    if is_hooked(layer) or not isinstance(layer, Linear4bit) or state is None:
        return None
    if layer.compute_dtype not in (None, dtype) or getattr(state, "packing_format_for_cpu", False):
        return None
    return state


def dequantized(weights: Sequence[tuple[torch.Tensor, QuantState]], dtype: torch.dtype, more: int = 0) -> torch.Tensor:
    """NF4 weights of one width in a dtype, one below the other, with `more` columns behind them that hold anything."""
    codes, width = weights[0][0], weights[0][1].shape[1]
    kernels = elementwise.triton_kernels(codes, DEQUANTIZER)
    if kernels is None:
        assert not more  # as `_dequantizes` says
        return torch.cat([dequantize_4bit(codes, eight_bit.with_dtype(state, dtype)) for codes, state in weights])
    rows = [state.shape[0] for _, state in weights]
    out = torch.empty(sum(rows), width + more, dtype=dtype, device=codes.device)
    for (codes, state), part in zip(weights, out[:, :width].split(rows), strict=True):
        kernels.dequantize(codes, state, part)
    return out


def _dequantizes(layer: nn.Module, x: torch.Tensor) -> bool:
    if not isinstance(layer, Linear4bit):
        return False
    rows = ROWS if layer.in_features * layer.out_features < LARGE else ROWS_OF_LARGE
    return x.numel() > rows * x.shape[-1] and elementwise.triton_kernels(x, DEQUANTIZER) is not None


def _call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)``. With many rows an NF4 weight is dequantized in one pass, for which bitsandbytes takes three."""
    weight = _weight_in(layer, x.dtype) if _dequantizes(layer, x) else None
    if weight is None:
        return layer(x)
    bias = cast("torch.Tensor | None", layer.bias)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _joined_products(
    x: torch.Tensor | RoundedTokens,
    layers: Sequence[nn.Module],
    rounded: Mapping[Format, eight_bit.Rounded],
    inner: torch.Tensor | None,
    adapted: Sequence[LowRank | None],
) -> list[torch.Tensor] | None:
    """``layer(x)`` of each layer, (N, out) and parts of one matrix; None where they are of several kinds.

    In 8 bits with what their adapters make of `inner`, if that isn't None.
    """
    if len(layers) < 2 or len(set(map(type, layers))) > 1:
        return None
    if any(getattr(layer, "bias", None) is not None for layer in layers):
        return None
    in_eight_bits = all(map(multiplies_in_eight_bits, layers))
    if not in_eight_bits and not all(_dequantizes(layer, _tokens(x)) and _state_in(layer, x.dtype) for layer in layers):
        return None
    weights = [(layer.weight, layer.weight.quant_state) for layer in cast("Sequence[Linear4bit]", layers)]
    rows = [state.shape[0] for _, state in weights]
    if in_eight_bits:
        ((to, values),) = rounded.items()
        low_rank = None
        if inner is not None:
            low_rank = inner, inner.new_empty(sum(rows), inner.shape[1])
            _write_ups(low_rank[1], adapted, rows)
        out = eight_bit.scaled_product(*values, *eight_bit.quantize_weights(weights, to), x.dtype, low_rank)
    else:
        out = F.linear(_tokens(x).flatten(0, -2), dequantized(weights, x.dtype))
    return list(out.split(rows, dim=1))


def multiply(
    layer: EightBitLayer,
    x: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The layer's output, (N, out).

    Args:
        layer: The layer.
        x: (N, in) in the layer's format.
        scale: (N, 1) float32, scales of the rows of `x`.
        dtype: Of the output.
        low_rank: As of `eight_bit.scaled_product`.
    """
    weight, weight_scale = eight_bit.quantize_weight(layer.weight, layer.weight.quant_state, layer.products)
    out = eight_bit.scaled_product(x, scale, weight, weight_scale, dtype, low_rank)
    return out if layer.bias is None else out + layer.bias.to(dtype)
