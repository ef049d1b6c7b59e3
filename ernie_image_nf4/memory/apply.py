"""Carry out a `Placement`: weights go where the memory mode says, and models become the fast subclasses."""

from __future__ import annotations

import logging
from collections.abc import Callable

from diffusers import ErnieImagePipeline

from ..fast.float16 import make_text_model_mixed
from ..fast.prompt_enhancer import make_prompt_enhancer_fast
from ..fast.transformer import computation_dtype, make_transformer_fast, runtime_of
from ..repository.components import COMPONENT
from ..upstream.offloading import hook_of, hooks_are_found
from .decode_check import make_vae_checked
from .host_embeddings import unused_modules
from .offload import OffloadHook, StreamedBlocks, enable_offload
from .placement import Placement
from .precision import Precision
from .vae_tiling import make_vae_tiled

logger = logging.getLogger(__name__)


def apply_placement(pipe: ErnieImagePipeline, placement: Placement) -> None:
    """Put the weights of a pipeline where `placement` says, and make its models fast ones if it says so.

    Args:
        pipe: The pipeline, loaded to `placement.load_device`. If `placement.moves`, its quantized components are on
            the device already.
        placement: The decision.
    """
    if placement.mixed:
        for model in filter(None, (pipe.text_encoder, pipe.pe)):
            make_text_model_mixed(model)
    release_graph = _make_models_fast(pipe, placement)
    decode_budget = _place_weights(pipe, placement)
    hook = hook_of(pipe.transformer)
    if isinstance(hook, OffloadHook):
        hook.on_offload = release_graph  # The captured step reads the weights' addresses.
    if placement.fast:
        make_vae_tiled(pipe.vae, budget=decode_budget, before_decode=release_graph, dtype=placement.dtype)
    else:
        make_vae_checked(pipe.vae, placement.dtype)


def memory_mode(pipe: ErnieImagePipeline) -> str:
    """The memory mode that a pipeline is in: ``"resident"``, ``"offload"`` or ``"stream"``."""
    blocks = pipe.transformer.layers
    if isinstance(blocks, StreamedBlocks) and blocks.runtime.arenas:
        return "stream"
    hooks = [hook_of(part) for part in pipe.components.values()]
    return "offload" if any(getattr(hook, "execution_device", None) is not None for hook in hooks) else "resident"


def precision_of(pipe: ErnieImagePipeline) -> Precision:
    """The dtypes in which a pipeline computes."""
    runtime = runtime_of(pipe.transformer)
    return Precision(computation_dtype(pipe.transformer), runtime is not None and runtime.mixed)


def _make_models_fast(pipe: ErnieImagePipeline, placement: Placement) -> Callable[[], None] | None:
    """Make transformer and prompt enhancer fast ones. In mixed precision the transformer is one on every device.

    Returns:
        Frees the transformer's captured step; None if the transformer isn't a fast one.
    """
    if placement.fast or placement.mixed:
        # Streamed blocks are at other addresses in every step.
        capture_steps = placement.fast and placement.memory != "stream"
        make_transformer_fast(
            pipe.transformer, capture_steps=capture_steps, exact=placement.exact, mixed=placement.mixed
        )
    if placement.fast and pipe.pe is not None:
        make_prompt_enhancer_fast(pipe.pe, exact=placement.exact)
    runtime = runtime_of(pipe.transformer)
    return runtime.release_graph if runtime is not None else None


def _place_weights(pipe: ErnieImagePipeline, placement: Placement) -> int | None:
    """Put the weights where the memory mode says.

    Returns:
        Bytes in which the VAE may decode: with offloading those of the largest component. None for whatever is free.
    """
    device, memory = placement.device, placement.memory
    if memory == "resident":
        pipe.vae.to(device)
        return None
    if memory == "offload" and not placement.fast:
        pipe.enable_model_cpu_offload(device=device)
        return None
    if not hooks_are_found():
        logger.info("accelerate keeps hooks elsewhere than expected: offloading whole components, as diffusers does.")
        pipe.enable_model_cpu_offload(device=device)
        return None
    unused = COMPONENT["text_encoder"].unused if placement.fast else ()
    excluded = unused_modules(pipe.text_encoder, unused)
    turn = getattr(pipe, "turn", None)  # of a `LoadedPipeline`
    return enable_offload(pipe, device, excluded=excluded, stream_blocks=memory == "stream", turn=turn)
