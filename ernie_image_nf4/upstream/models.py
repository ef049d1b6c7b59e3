"""Private parts of the models' libraries (torch, diffusers, transformers), one function each.

A name that is gone leads to upstream's own way and one line at INFO, never to an error while drawing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .gone import note_gone
from .offloading import HOOK, hook_of

MINISTRAL = "transformers.models.ministral3.modeling_ministral3"
ATTENTION_DISPATCH = "diffusers.models.attention_dispatch"
INT8_ROWS = 32  # that CUDA's product of int8 takes; not fewer than 17


# torch: modules and tensors


def is_hooked(module: nn.Module, *, except_offload: bool = False) -> bool:
    """Whether hooks of torch, diffusers or accelerate want to know when a module is called.

    Reaches for ``_forward_hooks`` and ``_forward_pre_hooks`` (torch 2.11 to 2.13), ``_diffusers_hook`` (diffusers 0.38
    to 0.42) and ``_hf_hook``: none of the libraries has a public way to ask. It allows skipping ``module(...)`` where
    nobody listens. Torch's names gone: every module counts as hooked, is called as a module, and is not captured. The
    others': ``forward`` wrapped on the instance, as both libraries do it, counts as well.

    Args:
        module: The module.
        except_offload: Whether accelerate's hook may be there. It is called by a wrapped ``forward`` or as a forward
            pre-hook, before the module computes.
    """
    try:
        after, before = module._forward_hooks, module._forward_pre_hooks
    except AttributeError:
        note_gone("torch.nn.Module._forward_hooks", "modules count as hooked, no denoising step is captured")
        return True
    attributes = vars(module)  # `getattr` of what isn't there would take most of the time
    if after or "_diffusers_hook" in attributes:
        return True
    if except_offload:
        hook = hook_of(module)
        return any(hook is None or getattr(each, "__self__", each) is not hook for each in before.values())
    return bool(before) or attributes.get(HOOK) is not None or "forward" in attributes


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` has been called, as ``compile_repeated_blocks`` does for blocks.

    Reaches for ``_compiled_call_impl`` (torch 2.11 to 2.13), the only trace that it leaves. Gone: False, and the fast
    block is what is compiled.
    """
    try:
        return module._compiled_call_impl is not None
    except AttributeError:
        note_gone("torch.nn.Module._compiled_call_impl", "compiled blocks keep the fast forward pass")
        return False


def version_of(tensor: torch.Tensor) -> object:
    """A value that changes when a tensor is written to in place. None for inference tensors, which count no versions.

    Reaches for ``_version`` (torch 2.11 to 2.13); autograd has no public counter. With it, what depends on a tensor's
    values is kept from step to step without reading them, which would wait for the GPU. Gone: a value that equals no
    other, so nothing is kept.
    """
    if tensor.is_inference():
        return None
    try:
        return tensor._version
    except AttributeError:
        note_gone("torch.Tensor._version", "nothing is kept from one denoising step to the next")
        return object()


# torch: products


def int8_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight`` of int8 matrices, (N, in) and (in, out), with exact sums: int32 (N, out).

    Reaches for ``torch._int_mm`` (torch 2.11 to 2.13), cuBLAS's product of int8, which no public function gives. On
    CUDA it takes more than 16 rows, and sides that are multiples of 8. Gone: the same in float64, exact and slow.
    """
    try:
        matmul = torch._int_mm
    except AttributeError:
        note_gone("torch._int_mm", "int8 is multiplied in float64 where there is no Triton")
        return (x.double() @ weight.double()).int()
    missing = INT8_ROWS - len(x)
    if missing <= 0 or not x.is_cuda:
        return matmul(x, weight)
    return matmul(torch.nn.functional.pad(x, (0, 0, 0, missing)), weight)[: len(x)]


# diffusers: attention of the transformer


def attention_dispatch() -> Callable[..., torch.Tensor] | None:
    """diffusers' function that computes attention with the backend that was set on a model, or None.

    Reaches into ``diffusers.models.attention_dispatch`` (0.38 to 0.42), which isn't exported. With it,
    ``set_attention_backend`` and ``DIFFUSERS_ATTN_BACKEND`` keep working in the fast forward pass. Gone: None, and the
    transformer stays upstream's.
    """
    try:
        return importlib.import_module(ATTENTION_DISPATCH).dispatch_attention_fn
    except (ImportError, AttributeError):
        note_gone(f"{ATTENTION_DISPATCH}.dispatch_attention_fn", "the transformer keeps upstream's forward pass")
        return None


def attention_backend(attention: nn.Module) -> dict[str, Any]:
    """Arguments ``backend`` and ``parallel_config`` for `attention_dispatch`, as set on an attention module.

    Reaches for ``processor._attention_backend`` and ``_parallel_config`` (diffusers 0.38 to 0.42), where
    ``set_attention_backend`` and ``enable_parallelism`` put them. Gone: None each, diffusers' default.
    """
    processor = attention.processor
    return {
        "backend": getattr(processor, "_attention_backend", None),
        "parallel_config": getattr(processor, "_parallel_config", None),
    }


def use_math_attention(attention: Any) -> None:
    """Let an attention module compute by plain products and a softmax, whose gradients are the same in every run.

    Reaches for ``processor._attention_backend`` (diffusers 0.38 to 0.42): the public ``set_attention_backend`` would
    change what every other model of the process uses. Gone: the attribute stays unread, and gradients may differ in
    their last bits from run to run.
    """
    if not hasattr(attention.processor, "_attention_backend"):
        note_gone("processor._attention_backend", "gradients may differ in their last bits from run to run")
    attention.processor._attention_backend = "_native_math"


# transformers: the prompt enhancer


def attention_implementation(config: Any) -> str | None:
    """Name of the attention that a model of this configuration computes, such as ``"sdpa"``.

    Reaches for ``config._attn_implementation`` (transformers 5.0 to 5.24); only the setter is public. Gone: None, and
    the prompt enhancer goes through upstream's ``generate``.
    """
    try:
        return config._attn_implementation
    except AttributeError:
        note_gone("PreTrainedConfig._attn_implementation", "the prompt enhancer goes through upstream's generate")
        return None


def cache_argument(forward: Callable) -> str | None:
    """Name of the argument by which a ``forward`` of transformers takes the key/value cache, or None.

    ``past_key_values`` in 5.0 to 5.23, ``cache`` since 5.24. Neither: None, and the prompt enhancer goes through
    upstream's ``generate``.
    """
    names = inspect.signature(forward).parameters
    for name in ("cache", "past_key_values"):
        if name in names:
            return name
    note_gone("The key/value cache's argument", "the prompt enhancer goes through upstream's generate")
    return None


def supports_custom_generate(generate: Callable) -> bool:
    """Whether ``generate`` takes a decoding method as ``custom_generate`` (transformers 5.0 to 5.24).

    Gone: False, and the prompt enhancer goes through upstream's ``generate``.
    """
    if "custom_generate" in inspect.signature(generate).parameters:
        return True
    note_gone("generate's argument custom_generate", "the prompt enhancer goes through upstream's generate")
    return False


# Arguments of Ministral3Attention.forward in transformers 5.0 to 5.24.
ATTENTION_ARGUMENTS = {
    "self", "hidden_states", "position_embeddings", "attention_mask", "position_ids", "cache_position", "cache",
    "past_key_values", "kwargs",
}  # fmt: skip


class AttentionScale(NamedTuple):
    """How Ministral 3's attention scales its queries, to reach beyond the trained length (as llama 4).

    Attributes:
        compute: Of positions, beta and trained length, a factor that broadcasts over queries.
        positions: Argument of the attention that the positions are in.
    """

    compute: Callable[..., torch.Tensor]
    positions: str


@functools.cache
def ministral_attention_scale() -> AttentionScale | None:
    """Upstream's attention scale of Ministral 3, or None.

    Reaches for ``get_llama_4_attn_scale`` of transformers' modeling file (``_get_llama_4_attn_scale`` in 5.0 to 5.3,
    where it takes ``cache_position``, later ``position_ids``). With it, the scale is computed once a forward pass
    instead of in every layer: most of a decode step's time is starting kernels. Gone, or an attention with arguments
    that aren't known here: None, and the attention stays upstream's.
    """
    modeling = importlib.import_module(MINISTRAL)
    arguments = inspect.signature(modeling.Ministral3Attention.forward).parameters.keys()
    if arguments <= ATTENTION_ARGUMENTS and "position_embeddings" in arguments:
        for name in ("get_llama_4_attn_scale", "_get_llama_4_attn_scale"):
            if hasattr(modeling, name):
                positions = "position_ids" if "position_ids" in arguments else "cache_position"
                return AttentionScale(getattr(modeling, name), positions)
    note_gone(f"{MINISTRAL}: attention as in 5.0 to 5.24", "the prompt enhancer's attention stays upstream's")
    return None
