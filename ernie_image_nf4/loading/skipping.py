"""Pictures for which less is computed (`fast.step_plan` says what): a layer between upstream's loop and the model.

Upstream's loop isn't copied. It calls ``self.transformer`` once a step and finds a `SteppedTransformer` there, which
computes, computes half of it, or gives the last prediction again. What it calls is the pipeline's transformer as it is:
memory modes, hooks, adapters, captured steps and products need not know of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ErnieImagePipeline

from ..fast.step_plan import Skipping, Step, plan_steps


class SteppedTransformer:
    """A pipeline's transformer for one call of the pipeline, which counts the steps. Attributes are the transformer's.

    Args:
        pipe: The pipeline, whose scheduler has its timesteps when the first step comes.
        skipping: What to leave out.
    """

    def __init__(self, pipe: ErnieImagePipeline, skipping: Skipping) -> None:
        self.pipe, self.transformer, self.skipping = pipe, pipe.transformer, skipping
        self.plan: Iterator[Step] | None = None
        self.prediction: torch.Tensor | None = None  # the last one that was computed
        self.prompts: tuple[torch.Tensor, torch.Tensor] | None = None  # text and lengths without the negative ones

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transformer, name)

    def __call__(
        self,
        *,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        text_bth: torch.Tensor,
        text_lens: torch.Tensor,
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        """The prediction of the next step, as upstream's loop wants it: of both halves, the negative prompts' first.

        Where guidance is over, both are the prompts': guidance between equal predictions changes nothing.
        """
        if self.plan is None:
            self.plan = iter(plan_steps(len(self.pipe.scheduler.timesteps), self.skipping))
        step, prediction = next(self.plan), self.prediction
        halved = self.pipe.do_classifier_free_guidance and not step.guided
        if halved:
            half = len(hidden_states) // 2
            hidden_states, timestep = hidden_states[half:], timestep[half:]
            text_bth, text_lens = self._prompts(text_bth, text_lens, half)
            prediction = prediction if prediction is None else prediction[-half:]
        if step.computed or prediction is None:
            (prediction,) = self.transformer(
                hidden_states=hidden_states,
                timestep=timestep,
                text_bth=text_bth,
                text_lens=text_lens,
                return_dict=False,
            )
        self.prediction = prediction
        return (torch.cat([prediction, prediction]) if halved else prediction,)

    def _prompts(self, text: torch.Tensor, lengths: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts' half of text and lengths, padded as a call without guidance pads them.

        Kept, as the transformer knows a picture by these very tensors.
        """
        if self.prompts is None:
            own = lengths[half:].clone()
            self.prompts = text[half:, : int(own.max())].contiguous(), own
        return self.prompts


class _Stepped:
    """Mixed into a pipeline's class for one call: upstream's loop finds a `SteppedTransformer`, all else the model."""

    turn: Any

    @property
    def transformer(self) -> SteppedTransformer:
        return self.turn.transformer

    @property
    def components(self) -> dict[str, Any]:
        """As upstream's, of which offloading hooks are made."""
        found: dict[str, Any] = super().components  # type: ignore[misc]
        return found | {"transformer": self.turn.transformer.transformer}


@functools.cache
def _stepped_class(pipeline_class: type) -> type:
    return type(pipeline_class.__name__, (_Stepped, pipeline_class), {})


@contextmanager
def stepped(pipe: Any, skipping: Skipping) -> Iterator[ErnieImagePipeline]:
    """The pipeline for one call: itself, or with something to skip one that shares all its attributes.

    Args:
        pipe: A `LoadedPipeline` whose turn the thread has.
        skipping: What to leave out.
    """
    if skipping.is_off:
        yield pipe
        return
    pipeline_class: Any = type(pipe)
    call: Any = object.__new__(_stepped_class(pipeline_class))
    call.__dict__ = pipe.__dict__
    pipe.turn.transformer = SteppedTransformer(pipe, skipping)
    try:
        yield call
    finally:
        pipe.turn.transformer = None
