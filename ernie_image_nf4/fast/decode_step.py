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

from ..upstream.models import is_hooked, ministral_attention_scale
from .ops.elementwise import triton_kernels

if TYPE_CHECKING:
    from .decoder import DecodeBuffers

PRODUCTS, KERNELS = "triton_nf4_rows", "triton_decode"
CAPABILITY = (8, 0)  # from which GPUs compute in bfloat16
MOST_TEXTS = 4  # of a batch: each takes registers


class LayerWeights(NamedTuple):
    """A layer's weights, as the kernels read them: norms in planes, NF4 by what multiplies with it at once."""

    norm: torch.Tensor
    query_key_value: tuple[Any, ...]
    output: Any
    mlp_norm: torch.Tensor
    gate: Any
    up: Any
    down: Any


class DecodeStep(NamedTuple):
    """What a step is computed by.

    Attributes:
        products: ``ops.triton_nf4_rows``.
        kernels: ``ops.triton_decode``.
        layers: Weights of each layer.
    """

    products: ModuleType
    kernels: ModuleType
    layers: tuple[LayerWeights, ...]


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
    if model.model.norm.weight.dtype != torch.bfloat16 or not (_is_known(model.config) and _is_plain(model.lm_head)):
        return None
    if any(map(is_hooked, model.model.modules())):  # somebody waits for calls of the modules
        return None
    layers = [_weights_of(layer, products) for layer in model.model.layers]
    return None if None in layers else DecodeStep(products, kernels, tuple(each for each in layers if each is not None))


def forward(model: PreTrainedModel, step: DecodeStep, buffers: DecodeBuffers) -> torch.Tensor:
    """Logits behind the newest token, (rows, vocabulary) bfloat16. Its keys and values go into the cache."""
    products = step.products
    x = model.model.embed_tokens(buffers.token)
    cosine, sine = (each[:, 0] for each in model.model.rotary_emb(x, buffers.position)[:2])
    scale = _query_scale(model, buffers.position).to(x.dtype)
    position = buffers.position.flatten()
    x = products.in_planes(x[:, 0])
    for layer, weights, cache in zip(model.model.layers, step.layers, buffers.cache.layers, strict=True):
        eps, mlp_eps = layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon
        qkv = products.products(x, weights.norm, eps, weights.query_key_value)
        attended = step.kernels.attention(
            qkv, cosine, sine, scale, position, cache.keys, cache.values, layer.self_attn.scaling
        )
        x = products.added_product(attended, x, weights.output)
        inner = products.gated_products(x, weights.mlp_norm, mlp_eps, weights.gate, weights.up)
        x = products.added_product(inner, x, weights.down)
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
        and not is_hooked(head)
        and head.weight.dtype == torch.bfloat16
        and head.weight.is_contiguous()
    )


def _weights_of(layer: Any, products: ModuleType) -> LayerWeights | None:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj,
        mlp.down_proj,
    ]  # fmt: skip
    if not all(_is_served(each, products) for each in projections):
        return None
    packed = [products.pack(each.weight, each.weight.quant_state) for each in projections]
    norm, mlp_norm = (
        products.in_planes(each.weight.detach()) for each in (layer.input_layernorm, layer.post_attention_layernorm)
    )
    return LayerWeights(norm, tuple(packed[:3]), packed[3], mlp_norm, *packed[4:])


def _is_served(layer: Any, products: ModuleType) -> bool:
    """Whether a layer is nothing but an NF4 product, without bias or adapter."""
    return (
        type(layer) is Linear4bit
        and layer.bias is None
        and getattr(layer.weight, "quant_state", None) is not None
        and products.fits(layer.weight, layer.weight.quant_state)
    )


def _query_scale(model: PreTrainedModel, position: torch.Tensor) -> torch.Tensor:
    """Factors of the queries, (batch,)."""
    rope, scale = model.config.rope_parameters, ministral_attention_scale()
    assert scale is not None  # as `_is_known` saw
    found = scale.compute(position, rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings"))
    return found.flatten()
