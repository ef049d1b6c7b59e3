"""A decode step of a prompt enhancer in NF4 by kernels of its own, five a layer.

The same step through the model's modules is many more, which take longer to start than to read the weights. Rows of a
step are texts that don't depend on each other: each has its position, its part of the cache and its settings, shares
the reads of the weights, and gets the bits that it gets alone.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3Attention,
    Ministral3DecoderLayer,
    Ministral3MLP,
    Ministral3RMSNorm,
)

from ..upstream.models import is_hooked, ministral_attention_scale
from .ops.elementwise import triton_kernels
from .subclassing import is_ours

if TYPE_CHECKING:
    from .decoder import DecodeBuffers

PRODUCTS, KERNELS = "triton_nf4_rows", "triton_decode"
CAPABILITY = (8, 0)  # from which GPUs compute in bfloat16
MOST_TEXTS = 4  # of a batch: each takes registers


class LayerNorms(NamedTuple):
    """Weights of a layer's norms, copied into planes."""

    attention: torch.Tensor
    mlp: torch.Tensor


class DecodeStep(NamedTuple):
    """What a step is computed by. NF4 weights stay the model's alone: once they have moved, nothing here keeps them.

    Attributes:
        products: ``ops.triton_nf4_rows``.
        kernels: ``ops.triton_decode``.
        norms: Of each layer.
    """

    products: ModuleType
    kernels: ModuleType
    norms: tuple[LayerNorms, ...]


def find_step(model: PreTrainedModel) -> DecodeStep | None:
    """How to decode with kernels, or None where only the model's modules serve it.

    Args:
        model: A fast prompt enhancer, on its device.
    """
    weight = model.model.norm.weight
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < CAPABILITY:
        return None
    products, kernels = triton_kernels(weight, PRODUCTS), triton_kernels(weight, KERNELS)
    return None if products is None or kernels is None else step_by(model, products, kernels)


def step_by(model: PreTrainedModel, products: ModuleType, kernels: ModuleType) -> DecodeStep | None:
    """How to decode with these modules of kernels, or None if they don't know all of the model."""
    layers, tables = model.model.layers, (model.model.embed_tokens, model.model.norm)
    if not (_is_known(model.config) and _is_plain(model.lm_head)) or is_disturbed(model):
        return None
    if any(each.weight.dtype != torch.bfloat16 for each in tables):
        return None
    if not all(_is_served(layer, products) for layer in layers):
        return None
    norms = ((each.input_layernorm.weight, each.post_attention_layernorm.weight) for each in layers)
    in_planes = tuple(LayerNorms(*(products.in_planes(norm.detach()) for norm in pair)) for pair in norms)
    return DecodeStep(products, kernels, in_planes)


def is_disturbed(model: PreTrainedModel) -> bool:
    """Whether somebody waits for calls of the modules, which kernels and captured steps don't make."""
    return any(map(is_hooked, (*model.model.modules(), *model.lm_head.modules())))


def forward(model: PreTrainedModel, step: DecodeStep, buffers: DecodeBuffers) -> torch.Tensor:
    """Logits behind the newest token, (rows, vocabulary) bfloat16. Its keys and values go into the cache."""
    products = step.products
    x = model.model.embed_tokens(buffers.token)
    cosine, sine = (each[:, 0] for each in model.model.rotary_emb(x, buffers.position)[:2])
    scale = query_scale(model, buffers.position).to(x.dtype)
    position = buffers.position.flatten()
    x = products.in_planes(x[:, 0])
    for layer, norms, cache in zip(model.model.layers, step.norms, buffers.cache.layers, strict=True):
        eps, mlp_eps = layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon
        packed = [products.pack(each.weight, each.weight.quant_state) for each in projections(layer)]
        output, gate, up, down = packed[3:]
        qkv = products.products(x, norms.attention, eps, packed[:3])
        attended = step.kernels.attention(
            qkv, cosine, sine, scale, position, cache.keys, cache.values, layer.self_attn.scaling
        )
        x = products.added_product(attended, x, output)
        inner = products.gated_products(x, norms.mlp, mlp_eps, gate, up)
        x = products.added_product(inner, x, down)
    return step.kernels.head_product(model.model.norm(products.in_order(x)), model.lm_head.weight)


def sample(step: DecodeStep, buffers: DecodeBuffers, logits: torch.Tensor) -> torch.Tensor:
    """The next tokens, (rows, 1) int64, each by its row's settings."""
    generators = buffers.generators
    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    # A generator's part is drawn as it is alone. Without generators all rows are greedy, which takes no noise.
    for part, generator in zip(noise.chunk(len(generators) or 1), generators, strict=False):
        part.exponential_(generator=generator)
    # What top-k leaves depends on the values alone, however many of them are looked up.
    ranked = logits.topk(buffers.largest_top_k).values if buffers.largest_top_k else None
    return step.kernels.sample(logits, noise, ranked, buffers.temperature, buffers.top_k, buffers.top_p)


def _is_known(config: Any) -> bool:
    return (
        config.hidden_act == "silu"
        and getattr(config, "sliding_window", None) is None
        and config.num_attention_heads % config.num_key_value_heads == 0
        and config.head_dim & (config.head_dim - 1) == 0
        and config.head_dim >= 16
        and ministral_attention_scale() is not None
    )


def _is_plain(head: nn.Module) -> bool:
    """Whether the head is nothing but a product in bfloat16, which the kernels can compute."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and head.weight.dtype == torch.bfloat16
        and head.weight.is_contiguous()
    )


def projections(layer: Any) -> list[Any]:
    """A layer's linear layers: of query, key, value, output, gate, up and down."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj,
        mlp.down_proj,
    ]  # fmt: skip


def _is_served(layer: Any, products: ModuleType) -> bool:
    """Whether a layer computes what the kernels do: its parts are upstream's or the fast ones, its weights fit."""
    parts = (
        (layer, Ministral3DecoderLayer),
        (layer.self_attn, Ministral3Attention),
        (layer.mlp, Ministral3MLP),
        (layer.input_layernorm, Ministral3RMSNorm),
        (layer.post_attention_layernorm, Ministral3RMSNorm),
    )
    if not all(type(part) is kind or is_ours(type(part), kind) for part, kind in parts):
        return False
    if any(norm.weight.dtype != torch.bfloat16 for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
        return False
    if layer.self_attn.training and layer.self_attn.attention_dropout:
        return False
    return all(_is_product(each, products) for each in projections(layer))


def _is_product(layer: Any, products: ModuleType) -> bool:
    """Whether a layer is nothing but an NF4 product, without bias or adapter."""
    return (
        type(layer) is Linear4bit
        and layer.bias is None
        and getattr(layer.weight, "quant_state", None) is not None
        and products.fits(layer.weight, layer.weight.quant_state)
    )


def query_scale(model: PreTrainedModel, position: torch.Tensor) -> torch.Tensor:
    """Factors of the queries at these positions, flattened."""
    rope, scale = model.config.rope_parameters, ministral_attention_scale()
    assert scale is not None  # as `_is_known` saw
    found = scale.compute(position, rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings"))
    return found.flatten()
