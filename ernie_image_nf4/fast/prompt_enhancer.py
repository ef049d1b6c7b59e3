"""The prompt enhancer with fast decoding and fewer small operations in its layers.

With one token, a step takes as long as starting its operations does, whatever they compute. So norms are one kernel
each, what depends on the positions alone is computed once a forward pass instead of in every layer, and queries and
keys are rotated together. All of it gives upstream's bits. Where kernels of its own can serve it, decoding takes these
instead of the modules (`decode_step`): they sum in another order.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Ministral3ForCausalLM, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3Attention,
    Ministral3RMSNorm,
    Ministral3RotaryEmbedding,
)

from ..upstream.models import (
    AttentionScale,
    attention_implementation,
    ministral_attention_scale,
    supports_custom_generate,
)
from . import decoder
from .decode_request import DecodeRequest, may_be_served, request_of
from .decoder_runtime import DecoderRuntime
from .ops import elementwise
from .random_state import drawing_from_caller
from .subclassing import become, named_as_upstream
from .unpickled import restore_nf4_weights

logger = logging.getLogger(__name__)

ATTENTION = "sdpa"  # the implementation that the fast attention and the captured step know


def make_prompt_enhancer_fast(pe: Ministral3ForCausalLM, *, exact: bool = False) -> None:
    """Make an upstream prompt enhancer a `FastPromptEnhancer`. Parts of other classes stay as they are.

    Args:
        pe: The prompt enhancer.
        exact: Whether steps are to be computed by its modules, which gives upstream's bits, and not by kernels of their
            own (`decode_step`).
    """
    if type(pe) not in (Ministral3ForCausalLM, FastPromptEnhancer):
        logger.info("The prompt enhancer is a %s, which has no fast decoding.", type(pe).__name__)
        return
    if type(pe) is Ministral3ForCausalLM:
        become(pe, FastPromptEnhancer)
    if pe.runtime is None or pe.runtime.exact != exact:
        pe.runtime = DecoderRuntime(exact)
    fast = {Ministral3RMSNorm: FastRMSNorm}
    if ministral_attention_scale() is not None:
        fast |= {Ministral3Attention: FastAttention, Ministral3RotaryEmbedding: FastRotaryEmbedding}
    for module in pe.modules():
        if type(module) in fast:
            become(module, fast[type(module)])


def is_fast(pe: object) -> bool:
    """Whether a prompt enhancer has fast decoding."""
    return isinstance(pe, FastPromptEnhancer) and pe.runtime is not None


def _needs_upstream() -> bool:
    """Whether a layer has to be upstream's: gradients are computed, or torch.compile traces it."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def is_autocast_to_another_dtype(pe: Ministral3ForCausalLM) -> bool:
    """Whether autocast would give keys and values another dtype than the cache's. Offloaded, `pe` is on the CPU."""
    dtype, kinds = decoder.activation_dtype(pe), {pe.device.type, "cuda"}
    return any(_is_autocast(kind) and torch.get_autocast_dtype(kind) != dtype for kind in kinds)


@named_as_upstream
class FastRMSNorm(Ministral3RMSNorm):
    """A norm in one kernel where there are kernels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As upstream's, of (..., width)."""
        if _needs_upstream():
            return super().forward(hidden_states)
        return elementwise.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class RotaryTables(tuple):
    """Upstream's (cosine, sine), (batch, length, head_dim) each, and what else depends on the positions alone.

    Attributes:
        signed_sine: Sine, negated in the first half of a head. Exchanged halves times it are upstream's ``rotate_half``
            times sine.
        attention_scale: Factor of the queries, as upstream broadcasts it; None before the first layer has computed it.
    """

    signed_sine: torch.Tensor | None = None  # also where a hook has copied the tuple without it
    attention_scale: torch.Tensor | None = None


@named_as_upstream
class FastRotaryEmbedding(Ministral3RotaryEmbedding):
    """A rotary embedding that hands more than cosine and sine to the layers."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | RotaryTables:
        """Cosine and sine, (batch, length, head_dim) each in the dtype of `x`, for positions (batch, length)."""
        cosine, sine = super().forward(x, position_ids, **kwargs)
        if kwargs or _needs_upstream() or attention_implementation(self.config) != ATTENTION:
            return cosine, sine
        tables = RotaryTables((cosine, sine))
        first, second = sine.chunk(2, -1)
        tables.signed_sine = torch.cat([-first, second], -1)
        return tables


@named_as_upstream
class FastAttention(Ministral3Attention):
    """Attention that takes `RotaryTables`. Without them, or with a cache other than `StaticCache`, it is upstream's."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As upstream's: the output, (batch, length, width), and None for attention weights, which sdpa hasn't."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name since and before transformers 5.24
        scale = None if args else self._scale_if_served(hidden_states, position_embeddings, cache, kwargs)
        if scale is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, key, position_embeddings[0], position_embeddings.signed_sine)
        if position_embeddings.attention_scale is None:
            rope = self.config.rope_parameters
            position_embeddings.attention_scale = scale.compute(
                kwargs[scale.positions], rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
            ).to(query.dtype)
        query = query * position_embeddings.attention_scale
        if cache is not None:
            # The dictionary is for transformers 5.0 to 5.3. Later versions take and ignore it.
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        output, weights = ALL_ATTENTION_FUNCTIONS[ATTENTION](
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self.config, "sliding_window", None),
            **{name: kwargs[name] for name in kwargs.keys() - {"cache", "past_key_values"}},
        )
        return self.o_proj(output.flatten(2).contiguous()), weights

    @staticmethod
    def _scale_if_served(
        hidden_states: torch.Tensor, position_embeddings: Any, cache: Any, kwargs: dict[str, Any]
    ) -> AttentionScale | None:
        """How to scale the queries, or None if `forward` doesn't do all that upstream's does for these arguments."""
        if (
            _needs_upstream()
            or not isinstance(position_embeddings, RotaryTables)
            or position_embeddings.signed_sine is None
            or not (cache is None or type(cache) is StaticCache)
            or _is_autocast(hidden_states.device.type)
        ):
            return None
        scale = ministral_attention_scale()
        return scale if scale is not None and kwargs.get(scale.positions) is not None else None


def rotate(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, signed_sine: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Upstream's ``apply_rotary_pos_emb`` for queries and keys, (batch, heads, length, head_dim), in one go."""
    both = torch.cat([query, key], 1)
    exchanged = both.roll(both.shape[-1] // 2, -1)
    both = both * cosine.unsqueeze(1) + exchanged * signed_sine.unsqueeze(1)
    return both.split([query.shape[1], key.shape[1]], 1)


@named_as_upstream
class FastPromptEnhancer(Ministral3ForCausalLM):
    """A prompt enhancer whose ``generate`` decodes with a captured step what that serves, and all else as upstream.

    Greedy decoding gives upstream's tokens, unless rounding decides between two that are about equally likely. Sampling
    draws from the same distribution and from torch's global random state, though not the same draws.
    """

    runtime: DecoderRuntime | None = None  # of a model built by this class itself: its layers are upstream's

    @functools.wraps(Ministral3ForCausalLM.to)
    def to(self, *args: Any, **kwargs: Any) -> Any:
        before, moved = self.device, super().to(*args, **kwargs)
        if self.runtime is not None and self.device != before:
            with self.runtime.turn.take(before):
                self.runtime.release()
        return moved

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        restore_nf4_weights(self)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's."""
        request = None if args else self.decode_request(**kwargs)
        if request is None or self.runtime is None:
            with drawing_from_caller():
                return super().generate(*args, **kwargs)
        return self.runtime.generate(self, request)

    def decode_request(self, **kwargs: Any) -> DecodeRequest | None:
        """What ``generate(**kwargs)`` asks for, or None if only upstream's ``generate`` serves it. Decodes nothing."""
        if (
            self.runtime is None
            or not may_be_served(kwargs)
            or decoder.CACHE_ARGUMENT is None
            or attention_implementation(self.config) != ATTENTION
            or getattr(self.config, "sliding_window", None) is not None  # its cache is shorter than the buffers
            or is_autocast_to_another_dtype(self)
            or not supports_custom_generate(super().generate)
        ):
            return None
        ids = kwargs["input_ids"]
        # Upstream warns of inputs on another device than the weights', which wait on the CPU while offloaded.
        tensors = {name: value.to(self.device) for name, value in kwargs.items() if torch.is_tensor(value)}
        request = super().generate(**kwargs | tensors, custom_generate=_decoding_method)
        return None if request is None else replace(request, input_ids=ids)

    def generate_together(
        self, requests: Sequence[DecodeRequest], seeds: Sequence[int], count: int
    ) -> list[torch.Tensor]:
        """What ``generate`` returns for each request after ``torch.manual_seed(seed)``, in order.

        Args:
            requests: From `decode_request`.
            seeds: One for each request.
            count: Texts that are decoded at a time; each takes a part of a cache or one of its own.

        Raises:
            RuntimeError: Too little memory.
        """
        if self.runtime is None:
            raise TypeError("make_prompt_enhancer_fast hasn't been called for this prompt enhancer.")
        return self.runtime.generate_together(self, requests, seeds, count)


def _decoding_method(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> DecodeRequest | None:
    """For upstream's ``custom_generate``: instead of decoding, says what is to be decoded."""
    vocabulary = model.config.vocab_size
    return request_of(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, vocabulary)
