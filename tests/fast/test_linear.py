"""Products of a fast block's layers that stay in 16 bits: what is called, and which bits come out."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit

from ernie_image_nf4.fast import linear


def nf4_layer(device: str, dtype: torch.dtype, bias: bool) -> Linear4bit:
    layer = Linear4bit(128, 64, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=bias)
    torch.manual_seed(0)
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    return layer.to(device, dtype).requires_grad_(False)


@pytest.fixture
def dequantized(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of weights that the kernel dequantized; on a CPU bitsandbytes does it in its place."""
    shapes: list[tuple[int, ...]] = []
    find = linear.elementwise.triton_kernels

    def dequantize(codes: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
        shapes.append(tuple(state.shape))
        own = find(codes, linear.DEQUANTIZER)
        return own.dequantize(codes, state, dtype) if own else dequantize_4bit(codes, state)

    def kernels(x: torch.Tensor, module: str) -> ModuleType | SimpleNamespace | None:
        return SimpleNamespace(dequantize=dequantize) if module == linear.DEQUANTIZER else find(x, module)

    monkeypatch.setattr(linear.elementwise, "triton_kernels", kernels)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
)
def test_with_many_rows_the_kernel_dequantizes_and_the_bits_are_bitsandbytes(dequantized, device, dtype, bias):
    layer = nf4_layer(device, dtype, bias)
    with torch.no_grad():
        for rows, expected in ((linear.ROWS, []), (linear.ROWS + 1, [(64, 128)])):
            x = torch.randn(1, rows, 128, device=device, dtype=dtype)
            (found,) = linear.apply_layers(x, layer)
            assert dequantized == expected
            assert torch.equal(found, layer(x))


def test_a_layer_with_a_hook_is_called_with_many_rows_too(dequantized):
    layer = nf4_layer("cpu", torch.float32, bias=False)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    linear.apply_layers(torch.randn(linear.ROWS + 1, 128), layer)
    assert (calls, dequantized) == ([1], [])
