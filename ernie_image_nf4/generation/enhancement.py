"""The prompt enhancer's texts for several pictures, decoded together where the GPU has room for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import ErnieImagePipeline

from ..fast.decode_request import DecodeRequest
from ..fast.prompt_enhancer import FastPromptEnhancer
from ..fast.random_state import SeededDraws
from ..memory.apply import precision_of
from ..memory.offload import OffloadHook
from ..memory.placement import GIB, WORKING_BYTES, free_memory
from ..memory.precision import BFLOAT16, Precision
from ..upstream.offloading import hook_of
from ..upstream.pipelines import enhance_prompt, execution_device
from .settings import Settings

MAX_DECODE_SLOTS = 4
# In bfloat16. The full-size enhancer's caches of 512, 1,024 and 2,048 tokens are 0.35 GiB a text by their shapes. Of a
# cache that several texts share, each has 0.46 GiB in the moment in which it grows from 2,048 tokens to 2,560. The rest
# is for graphs.
DECODE_SLOT_BYTES = GIB // 2


class _UnknownRequest(Exception):
    """A call of ``generate`` that fast decoding doesn't serve."""


def enhance(
    pipe: ErnieImagePipeline, settings: Settings, generate: Callable[..., torch.Tensor] | None = None
) -> str | None:
    """The prompt as the prompt enhancer rewrites it, the same text as in `draw`; None without the enhancer.

    Args:
        pipe: The pipeline, as from `load`.
        settings: Prompt, size and seed.
        generate: Called instead of the enhancer's ``generate``.
    """
    if not settings.use_pe or pipe.pe is None or pipe.pe_tokenizer is None:
        return None
    device, size = execution_device(pipe), {"width": settings.width, "height": settings.height}
    with SeededDraws(settings.seed):
        return enhance_prompt(pipe, settings.prompt, device, **size, generate=generate)


def enhance_all(pipe: ErnieImagePipeline, settings: Sequence[Settings]) -> list[str | None]:
    """`enhance` for each, to the same texts; on CUDA several are decoded at a time."""
    out_of_memory = False
    try:
        texts = _enhance_together(pipe, settings)
        if texts is not None:
            return texts
    except _UnknownRequest:
        pass
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        out_of_memory = True
    if out_of_memory:  # out here, where no traceback holds tensors any more
        clear_device_cache(garbage_collection=True)
    return [enhance(pipe, each) for each in settings]


def _enhance_together(pipe: ErnieImagePipeline, settings: Sequence[Settings]) -> list[str | None] | None:
    """`enhance` for each, all requests decoded together. None where one after the other is as fast.

    The pipeline makes the request from the prompt and the text from the tokens. So it is asked twice for each prompt:
    first to record its request, then to be given the tokens.

    Raises:
        _UnknownRequest: Fast decoding doesn't serve a request.
    """
    decoding = fast_decoding(pipe.pe)
    slots = find_decode_slots(pipe) if decoding is not None else 1
    if decoding is None or slots == 1:
        return None
    decode_request, generate_together = decoding
    requests: list[DecodeRequest] = []

    def record(*args: object, **kwargs: Any) -> torch.Tensor:
        request = None if args else decode_request(**kwargs)
        if request is None:
            raise _UnknownRequest
        requests.append(request)
        return kwargs["input_ids"]

    texts: list[str | None] = []
    seeds: list[int] = []
    for each in settings:
        known = len(requests)
        texts.append(enhance(pipe, each, record))
        seeds += [each.seed] * (len(requests) - known)
    if not requests:  # nothing to enhance, or upstream has done it without asking `record`
        return texts
    if len(requests) == 1:
        return None
    tokens = iter(generate_together(requests, seeds, slots))
    return [enhance(pipe, each, lambda *args, **kwargs: next(tokens)) for each in settings]


def fast_decoding(pe: Any) -> tuple[Callable[..., DecodeRequest | None], Callable[..., list[torch.Tensor]]] | None:
    """What fast decoding offers beside ``generate``, None for an enhancer without it.

    Returns:
        A function from the arguments of ``generate`` to a request, None for what fast decoding doesn't serve; and one
        from requests, their seeds, and the number to decode at a time, to input and new tokens of each, (1, length)
        int64.
    """
    return (pe.decode_request, pe.generate_together) if isinstance(pe, FastPromptEnhancer) else None


def choose_decode_slots(free_bytes: int | None, precision: Precision = BFLOAT16) -> int:
    """Texts to decode at a time.

    Args:
        free_bytes: Free memory of the device beside the enhancer's weights; None for the machine's own memory. There it
            is one text, as a decode step leaves no core idle.
        precision: Of the computation.
    """
    if free_bytes is None:
        return 1
    slot_bytes = DECODE_SLOT_BYTES * precision.work_factor("pe")
    return min(MAX_DECODE_SLOTS, max(1, int((free_bytes - WORKING_BYTES) / slot_bytes)))


def find_decode_slots(pipe: ErnieImagePipeline) -> int:
    """`choose_decode_slots` by the device's free memory. Offloaded components must all be on the CPU."""
    device = execution_device(pipe)
    free = free_memory(device) if device.type == "cuda" else None
    return choose_decode_slots(free if free is None else free - _offloaded_bytes(pipe), precision_of(pipe))


def _offloaded_bytes(pipe: ErnieImagePipeline) -> int:
    """Bytes of weights that come to the device while texts are decoded."""
    hook = hook_of(pipe.pe)
    if hook is None:
        return 0
    if isinstance(hook, OffloadHook):  # the component after the enhancer may be fetched meanwhile
        return hook.scheduler.limit
    return pipe.pe.get_memory_footprint()
