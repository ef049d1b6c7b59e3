"""Compares Triton kernels of 8-bit products and of calibration with plain torch on a CPU, by Triton's interpreter.

To be run with TRITON_INTERPRET=1, which Triton reads when it is imported: in a process of its own.
"""

from __future__ import annotations

import itertools

import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

from ernie_image_nf4.fast.ops import (
    eight_bit,
    elementwise,
    nf4_panels,
    triton_eight_bit,
    triton_elementwise,
    triton_int8,
    triton_nf4,
    triton_nf4_panels,
)
from ernie_image_nf4.fast.ops.eight_bit import FP8, INT8, Format

CAPABILITIES = ((7, 5), (9, 0))  # without tensor cores, as far as Triton knows, and with them
# Columns, dtype of activations, block size of weights.
CASES = ((64, torch.bfloat16, 64), (384, torch.float32, 32), (1536, torch.float16, 128))


def main() -> None:
    for capability, (width, dtype, block_size) in itertools.product(CAPABILITIES, CASES):
        torch.cuda.get_device_capability = lambda device=None, capability=capability: capability
        compare_rows(width, dtype)
        for nested in (True, False):
            compare_weight(width, nested, block_size)
        for packed in (True, False):
            compare_norms(width, dtype, packed)
    compare_rows_that_are_apart()
    compare_product()
    compare_numbers_that_are_none()
    compare_panels()


def compare_rows(width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, width) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    x[2] = 0
    up = torch.randn(width, 5).to(dtype).t()  # not contiguous
    product = torch.nn.functional.gelu(x.float()) * up.float()
    for to in (INT8, FP8):
        compare(triton_eight_bit.quantize_rows(x, to), eight_bit.round_rows(x.float(), to), to)
        compare(triton_eight_bit.gelu_times_rows(x, up, to), eight_bit.round_rows(product, to), to)


def compare_norms(width: int, dtype: torch.dtype, packed: bool) -> None:
    x, branch = ((torch.randn(1 if packed else 2, 6, width) * size).to(dtype) for size in (8, 0.5))
    gate, scale, shift = (torch.randn(2, 3 * width).to(dtype)[:, :width] for _ in range(3))
    weight, rows = torch.rand(width).to(dtype), torch.tensor([0, 0, 1, 1, 1, 0]) if packed else None
    modulation = (weight, scale, shift, 1e-5, rows)
    for to in (INT8, FP8):
        _, found = triton_eight_bit.gated_add_norm_rows(x, None, None, *modulation, to)
        compare(found, eight_bit.modulated_norm_rows(x, *modulation, to).rounded, to)
        total, found = triton_eight_bit.gated_add_norm_rows(x, branch, gate, *modulation, to)
        expected, _ = eight_bit.gated_add_norm_rows(x, branch, gate, *modulation, to)
        slack = 2.0**-6 if dtype == torch.bfloat16 else 0.0  # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(total, expected, rtol=slack, atol=slack)
        compare(found, eight_bit.modulated_norm_rows(total, *modulation, to).rounded, to)


def compare_rows_that_are_apart() -> None:
    """Kernels that write to a part of each row of a larger matrix."""
    x, branch = torch.randn(1, 5, 192), torch.randn(1, 5, 192)
    gate, scale, shift = (torch.randn(2, 192) for _ in range(3))
    modulation = torch.rand(192), scale, shift, 1e-5, torch.tensor([0, 0, 1, 1, 1])
    for kernel, plain, arguments in (
        (triton_elementwise.modulated_norm, elementwise.modulated_norm, (x, *modulation)),
        (triton_elementwise.gated_add_norm, elementwise.gated_add_norm, (x, branch, gate, *modulation)),
        (triton_elementwise.gelu_times, elementwise.gelu_times, (x, branch)),
    ):
        whole = torch.full((1, 5, 200), 7.0)
        found, expected = kernel(*arguments, whole[..., :192]), plain(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole[..., :192], expected[1] if isinstance(expected, tuple) else expected)
        assert (whole[..., 192:] == 7).all()
    codes, state = quantize_4bit(torch.randn(6, 192), quant_type="nf4", compress_statistics=True, blocksize=64)
    matrix = torch.full((6, 200), 7.0)
    triton_nf4.dequantize(codes, state, matrix[:, :192])
    assert torch.equal(matrix[:, :192], dequantize_4bit(codes, state))
    assert (matrix[:, 192:] == 7).all()


def compare_weight(width: int, nested: bool, block_size: int) -> None:
    weight = (torch.randn(4, width) * torch.logspace(-2, 2, 4)[:, None]).bfloat16()
    weight[1] = 0
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=block_size)
    outer = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize) if nested else ()
    for to in (INT8, FP8):
        found = eight_bit.empty_rows(codes, 4, width, to)
        triton_eight_bit.quantize_weight(codes, state.absmax, found, block_size, to, *outer)
        compare(found, eight_bit.quantize_weight(codes, state, to), to)


def compare(found: eight_bit.Rounded, expected: eight_bit.Rounded, to: Format) -> None:
    """Scales to the last bits of float32, values to the next number: sums and erf may end in another bit."""
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
    mine, theirs = found[0].float(), expected[0].float()
    if to is INT8:
        assert (mine - theirs).abs().max() <= 1
        assert (mine != theirs).float().mean() < 1e-3
    else:  # the interpreter's own conversion to fp8 drops the carry of numbers that are rounded up to a power of two
        assert (mine == theirs).float().mean() > 0.7


def compare_product() -> None:
    for rows, columns, width in ((37, 48, 192), (300, 16, 384)):
        x, weight = (torch.randint(-127, 128, (count, width), dtype=torch.int8) for count in (rows, columns))
        scale, weight_scale = torch.rand(rows, 1), torch.rand(columns, 1)
        for dtype in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off
            found = triton_int8.scaled_product(x, scale, weight, weight_scale, dtype)
            assert torch.equal(found, eight_bit.scaled_product(x, scale, weight, weight_scale, dtype))
            for rank in (3, 16, 20):
                inner, up = torch.randn(rows, rank + 5, dtype=dtype)[:, 2:-3], torch.randn(columns, rank, dtype=dtype)
                arguments = x, scale * 1e-4, weight, weight_scale, dtype, (inner, up)
                found, expected = triton_int8.scaled_product(*arguments), eight_bit.scaled_product(*arguments)
                assert (found - expected).norm() < (1e-6 if dtype == torch.float32 else 2e-3) * expected.norm()


def compare_numbers_that_are_none() -> None:
    x = torch.ones(3, 128)
    x[1, 5], x[2, 5] = torch.nan, torch.inf
    for to in (INT8, FP8):
        rounded, scale = triton_eight_bit.quantize_rows(x, to)
        finite = (rounded.float() * scale).isfinite().all(1)
        assert finite.tolist() == [True, False, False]


def compare_panels() -> None:
    """Sums in another order may choose another of two numbers as near, and then all that comes after differs."""
    rows, table = 37, get_4bit_type("nf4", device="cpu")
    target, adjusted, slope = (torch.randn(64, rows) for _ in range(3))
    scale = torch.rand(rows) + 0.5
    scale[3], scale[4] = 0, -scale[4]
    mix = torch.randn(64, 64) / 64
    within = mix @ mix.T + torch.eye(64)
    codes, errors = triton_nf4_panels.round_panel(target, adjusted, mix, scale, table)
    expected, its_errors = nf4_panels.round_panel(target, adjusted, mix, scale, table)
    same = (codes == expected).all(0)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(errors[:, same], its_errors[:, same], rtol=1e-5, atol=1e-6)
    new, changes = triton_nf4_panels.descend_panel(slope, within, scale, expected, table)
    others, their_changes = nf4_panels.descend_panel(slope, within, scale, expected, table)
    assert (new != expected).any()
    same = (new == others).all(0)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(changes[:, same], their_changes[:, same], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main()
