"""torch's choice of an attention kernel, made in one thread."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .gone import note_gone

EFFICIENT_ATTENTION = "_scaled_dot_product_efficient_attention"
ALIGNMENT = 8  # of the mask's rows, in values


class EfficientAttention(TorchFunctionMode):
    """While active, in this thread, attention with a mask of numbers is by torch's memory-efficient kernel.

    cuDNN's, which torch prefers on some GPUs, in PyTorch 2.11 on an H100 now and then gave other last bits for the same
    decode step. ``torch.nn.attention.sdpa_kernel`` would choose the kernel for all threads.

    Reaches for ``aten._scaled_dot_product_efficient_attention`` (torch 2.11 to 2.13). Gone: torch chooses.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and (output := _efficient_attention(*args, **kwargs)) is not None:
            return output
        return func(*args, **kwargs)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """``scaled_dot_product_attention`` with a mask of numbers, as `EfficientAttention` chooses its kernel."""
    output = _efficient_attention(query, key, value, mask, scale=scale)
    return scaled_dot_product_attention(query, key, value, mask, scale=scale) if output is None else output


def _efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """``scaled_dot_product_attention`` of these arguments, or None if torch is to choose."""
    kernel = getattr(torch.ops.aten, EFFICIENT_ATTENTION, None)
    if kernel is None:
        note_gone(f"aten.{EFFICIENT_ATTENTION}", "a decode step may differ from another one in its last bits")
        return None
    if (
        not query.is_cuda
        or attn_mask is None
        or attn_mask.dtype != query.dtype
        or attn_mask.shape[-1] % ALIGNMENT
        or query.shape[-1] % ALIGNMENT
        or (enable_gqa and query.shape[1] != key.shape[1])
    ):
        return None
    bias = attn_mask.expand(*query.shape[:3], key.shape[2])
    return kernel(query, key, value, bias, False, dropout_p, is_causal, scale=scale)[0]
