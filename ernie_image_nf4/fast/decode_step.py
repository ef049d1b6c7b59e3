"""A decode step of a prompt enhancer in NF4 by kernels of its own, five a layer.

The same step through the model's modules is many more, which take longer to start than to read the weights.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ..upstream.models import is_hooked, ministral_attention_scale
from .decode_request import DecodeRequest
from .ops.elementwise import triton_kernels

if TYPE_CHECKING:
    from .decoder import DecodeBuffers

PRODUCTS, KERNELS = "triton_nf4_rows", "triton_decode"
CAPABILITY = (8, 0)  # from which GPUs compute in bfloat16
MOST_TEXTS = 4  # of a batch: each takes registers


class LayerWeights(NamedTuple):
    """A layer's NF4 weights, as the kernels read them, by what multiplies with them at once."""

    query_key_value: tuple[Any, ...]
    output: Any
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
    if model.model.norm.weight.dtype != torch.bfloat16 or not _is_known(model.config):
        return None
    layers = [_weights_of(layer, products) for layer in model.model.layers]
    return None if None in layers else DecodeStep(products, kernels, tuple(each for each in layers if each is not None))


def forward(model: PreTrainedModel, step: DecodeStep, buffers: DecodeBuffers) -> torch.Tensor:
    """Logits behind the newest token, (batch, vocabulary) bfloat16. Its keys and values go into the cache."""
    products, position = step.products, buffers.position.repeat(len(buffers.token), 1)
    x = model.model.embed_tokens(buffers.token)
    cosine, sine = (each[:, 0] for each in model.model.rotary_emb(x, position)[:2])
    scale = _query_scale(model, position).to(x.dtype)
    x = x[:, 0]
    for layer, weights, cache in zip(model.model.layers, step.layers, buffers.cache.layers, strict=True):
        norm, mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        qkv = products.products(x, norm.weight, norm.variance_epsilon, weights.query_key_value)
        attended = step.kernels.attention(
            qkv, cosine, sine, scale, position.flatten(), cache.keys, cache.values, layer.self_attn.scaling
        )
        x = products.added_product(attended, x, weights.output)
        inner = products.gated_products(x, mlp_norm.weight, mlp_norm.variance_epsilon, weights.gate, weights.up)
        x = products.added_product(inner, x, weights.down)
    return model.lm_head(model.model.norm(x))


def sample(step: DecodeStep, buffers: DecodeBuffers, logits: torch.Tensor, request: DecodeRequest) -> torch.Tensor:
    """The next tokens, (batch, 1) int64, of a request whose `nucleus` is known."""
    found = nucleus(request.warpers)
    assert found is not None
    temperature, top_p = found
    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    noise.exponential_(generator=buffers.generator)
    return step.kernels.sample(logits, noise, buffers.end, buffers.count, buffers.minimum, temperature, top_p)


def nucleus(warpers: LogitsProcessorList) -> tuple[float, float] | None:
    """Temperature and top-p, or None if these warpers do something else."""
    temperature, top_p = 1.0, 1.0
    for number, warper in enumerate(warpers):
        if type(warper) is TemperatureLogitsWarper and number == 0:
            temperature = warper.temperature
        elif type(warper) is TopPLogitsWarper and number == len(warpers) - 1 and warper.min_tokens_to_keep == 1:
            top_p = float(warper.top_p)
        else:
            return None
    return temperature, top_p


def _is_known(config: Any) -> bool:
    return (
        config.hidden_act == "silu"
        and getattr(config, "sliding_window", None) is None
        and config.num_attention_heads % config.num_key_value_heads == 0
        and config.head_dim & (config.head_dim - 1) == 0
        and config.head_dim >= 16
        and ministral_attention_scale() is not None
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
    return LayerWeights(tuple(packed[:3]), *packed[3:])


def _is_served(layer: Any, products: ModuleType) -> bool:
    """Whether a layer is nothing but an NF4 product, without bias, hook or adapter."""
    return (
        type(layer) is Linear4bit
        and layer.bias is None
        and not is_hooked(layer)
        and getattr(layer.weight, "quant_state", None) is not None
        and products.fits(layer.weight, layer.weight.quant_state)
    )


def _query_scale(model: PreTrainedModel, position: torch.Tensor) -> torch.Tensor:
    """Factors of the queries, (batch,)."""
    rope, scale = model.config.rope_parameters, ministral_attention_scale()
    assert scale is not None  # as `_is_known` saw
    found = scale.compute(position, rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings"))
    return found.flatten()
