"""Kernels of a decode step, used once they have worked: other GPUs and versions of Triton may refuse them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .decode_step import DecodeStep, find_step
from .decoder import CACHE_STEP, decode_one_token, empty_buffers, prefill

logger = logging.getLogger(__name__)

TOP_K = 50  # transformers' default: the trial compiles what the first text needs


class TriedStep:
    """Finds the kernels of a model's steps, and None for ever after these have failed for it once.

    Args:
        find: Finds them.
    """

    def __init__(self, find: Callable[[PreTrainedModel], DecodeStep | None] = find_step) -> None:
        self._find = find
        self._works: bool | None = None

    def __call__(self, model: PreTrainedModel) -> DecodeStep | None:
        step = None if self._works is False else self._find(model)
        if step is None or self._works:
            return step
        try:
            _try_out(model, step)
        except torch.OutOfMemoryError:  # of the GPU, which others may free
            raise
        # Triton and its compiler raise classes of their own, and the modules are right after any of them.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            logger.info("Kernels of decode steps don't work here (%s): the modules decode.", reason)
            self._works = False
            return None
        self._works = True
        return step


def _try_out(model: PreTrainedModel, step: DecodeStep) -> None:
    """Prefill a text of two tokens and decode one."""
    buffers = empty_buffers(model, 1, CACHE_STEP, TOP_K, ())
    buffers.step = step
    prefill(model, buffers, buffers.token.expand(1, 2), None)
    decode_one_token(model, buffers, None)
