"""What a call of ``generate`` asks for, where the fast decoder can serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ARGUMENTS = {
    "attention_mask", "do_sample", "eos_token_id", "input_ids", "max_new_tokens", "min_new_tokens", "pad_token_id",
    "temperature", "top_k", "top_p",
}  # fmt: skip
# They compute from the logits and constants, so they can be captured. Minimum lengths are part of the step itself.
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
MINIMUM = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
STOPPING = (EosTokenCriteria, MaxLengthCriteria)
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Sampling(NamedTuple):
    """How tokens are sampled, where no more than this is asked for.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Likeliest tokens to sample from; 0 for all.
        top_p: Least mass of those that are sampled from, among the `top_k`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class DecodeRequest:
    """A call of ``generate`` that the fast decoder can serve.

    Attributes:
        input_ids: (batch, length) int64, no padding.
        max_new_tokens: Most tokens to generate.
        min_new_tokens: Tokens before which no end token may come.
        do_sample: Whether to sample from the warped distribution; else the likeliest token is taken.
        warpers: Upstream's temperature, top-k and top-p, in upstream's order.
        eos_token_ids: Tokens that end a text; may be empty.
        pad_token_id: Follows the end token where other rows of the batch go on.
    """

    input_ids: torch.Tensor
    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    warpers: LogitsProcessorList
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def settings(self) -> tuple:
        """All that a captured step depends on, apart from the cache's size."""
        warpers = tuple((type(item).__name__, *sorted(vars(item).items())) for item in self.warpers)
        return len(self.input_ids), self.do_sample, warpers, self.eos_token_ids, self.pad_token_id

    @property
    def sampling(self) -> Sampling | None:
        """What the warpers do, None if it is something else or in another order."""
        if not self.do_sample:
            return Sampling(temperature=0.0)
        kinds = [type(warper) for warper in self.warpers]
        if kinds != [kind for kind in WARPERS if kind in kinds]:
            return None
        found = Sampling()
        for warper in self.warpers:
            if type(warper) is TemperatureLogitsWarper:
                found = found._replace(temperature=float(warper.temperature))
            elif type(warper) is TopKLogitsWarper:
                found = found._replace(top_k=int(warper.top_k))
            elif type(warper) is TopPLogitsWarper and warper.min_tokens_to_keep == 1:
                found = found._replace(top_p=float(warper.top_p))
            else:
                return None
        return found


def may_be_served(kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a call are ones that `request_of` may find a request in. Costs nothing."""
    ids = kwargs.get("input_ids")
    return ARGUMENTS.issuperset(kwargs) and ids is not None and ids.ndim == 2 and 0 not in ids.shape


def request_of(
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    vocabulary: int,
) -> DecodeRequest | None:
    """The request in what ``generate`` hands to a decoding method, or None if the fast decoder doesn't know it.

    Args:
        input_ids: (batch, length) int64.
        logits_processor: As upstream has prepared them.
        stopping_criteria: As upstream has prepared them.
        config: The call's settings, the model's own included.
        model_kwargs: Further arguments of the model's ``forward``.
        vocabulary: Tokens that the model knows.
    """
    mask, length = model_kwargs.get("attention_mask"), input_ids.shape[1]
    if (
        (mask is not None and not bool(mask.all()))
        or any(not isinstance(item, (*WARPERS, *MINIMUM)) for item in logits_processor)
        or any(not isinstance(item, STOPPING) for item in stopping_criteria)
        or config.get_generation_mode() not in MODES
        or config.max_new_tokens is None
        or config.pad_token_id is None
        or (config.num_return_sequences or 1) > 1
        or config.return_dict_in_generate
    ):
        return None
    warpers = [item for item in logits_processor if isinstance(item, WARPERS)]
    eos = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
    # Some configurations say -1 for none, which upstream compares with and, for one text, never looks up.
    if not all(0 <= token < vocabulary for token in (*eos, int(config.pad_token_id))):
        return None
    return DecodeRequest(
        input_ids=input_ids,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=max(config.min_new_tokens or 0, (config.min_length or 0) - length),
        do_sample=bool(config.do_sample),
        warpers=LogitsProcessorList(warpers if config.do_sample else []),
        eos_token_ids=tuple(eos),
        pad_token_id=int(config.pad_token_id),
    )
