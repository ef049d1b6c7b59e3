"""The transformer's forward pass with less work between its products. Modules and weights stay upstream's.

What changes against ``ErnieImageTransformer2DModel.forward``: rows of different lengths are packed without their
padding, the modulation is broadcast instead of copied to every token, cosine and sine of the rotary embedding are
computed once instead of in every layer, element-wise work is fused (``ops/elementwise.py``), and attention, which has
no padding to mask, gets no mask.

Exact runtimes give attention the mask of zeros that upstream's kernels round by. On CUDA all of it then gives
upstream's bits, but where other libraries choose their kernels by the number of tokens.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from diffusers import ErnieImageTransformer2DModel
from diffusers.models.transformers.transformer_ernie_image import (
    ErnieImageSharedAdaLNBlock,
    ErnieImageTransformer2DModelOutput,
)
from torch import nn

from ..errors import InvalidSettings
from ..upstream.models import attention_dispatch, is_compiled, is_hooked, version_of
from ..upstream.offloading import kept_on_device
from .adapters import Adapters
from .block import FastErnieImageBlock, Pending, Rotary, calls_all_modules
from .cuda_graphs import CapturedStep
from .float16 import no_autocast
from .ops import elementwise
from .packing import Packing, pack, packed_rotary, token_positions
from .subclassing import Runtime, become, named_as_upstream
from .turns import Turn
from .unpickled import restore_nf4_weights

logger = logging.getLogger(__name__)

MINIMUM_HEAD_SIZE = 8  # `norm_rotary` sums four neighbours in each half of a head


def make_transformer_fast(
    transformer: ErnieImageTransformer2DModel, *, capture_steps: bool, exact: bool = False, mixed: bool = False
) -> None:
    """Make an upstream transformer a `FastErnieImageTransformer`. One that `is_suitable` isn't for stays as it is.

    Args:
        transformer: The transformer. One that is fast already gets a runtime of this setting.
        capture_steps: Whether the steps of a picture may be captured as a CUDA graph. Whoever moves weights has to call
            ``transformer.runtime.release_graph()`` before.
        exact: Whether results are to be upstream's bits.
        mixed: Whether its blocks are in float16, and all else in float32, as for `float16.block_forward`.
    """
    if not is_suitable(transformer):
        return
    before = runtime_of(transformer)
    if before is not None:
        before.release_graph()
    if type(transformer) is ErnieImageTransformer2DModel:
        become(transformer, FastErnieImageTransformer)
    for block in transformer.layers.children():
        if type(block) is ErnieImageSharedAdaLNBlock:
            become(block, FastErnieImageBlock)
    products = None if before is None else before.products
    transformer.runtime = TransformerRuntime(capture_steps, products, exact=exact, mixed=mixed)


def is_suitable(transformer: ErnieImageTransformer2DModel) -> bool:
    """Whether a transformer can become a fast one: of upstream's very classes, with heads that the kernels fit.

    Heads have to be rotated as a whole and of a size that is a power of two.
    """
    if type(transformer) not in (ErnieImageTransformer2DModel, FastErnieImageTransformer) or any(
        type(block) not in (ErnieImageSharedAdaLNBlock, FastErnieImageBlock) for block in transformer.layers.children()
    ):
        return False
    if attention_dispatch() is None:
        return False
    config = transformer.config
    head_size = config.hidden_size // config.num_attention_heads
    power_of_two = head_size >= MINIMUM_HEAD_SIZE and not head_size & (head_size - 1)
    return power_of_two and sum(config.rope_axes_dim) == head_size


class TransformerRuntime(Runtime):
    """What a fast transformer keeps beside its weights.

    Attributes:
        captured_step: The step of the picture that is being drawn, or None if none may be captured.
        products: ``"int8"`` or ``"fp8"`` if layers multiply in it; a setting, which copies keep.
        exact: Whether attention rounds as upstream's; a setting as well.
        mixed: Whether blocks multiply in float16 and keep what may overflow in float32; a setting as well.
        pictures: Pictures that the rows of this thread's calls belong to (`several_pictures`).
        adapters: What is known of LoRAs.
        positions: Packing and rotary embedding of the picture that is being drawn, with what they were computed from.
        turn: Held during a step. Pipelines may share a transformer.
    """

    def __init__(
        self, capture_steps: bool = False, products: str | None = None, exact: bool = False, mixed: bool = False
    ) -> None:
        self.captured_step = CapturedStep() if capture_steps else None
        # Older versions pickled whether products are in fp8.
        self.products = {True: "fp8", False: None}.get(products, products)  # type: ignore[call-overload]
        self.exact = exact
        self.mixed = mixed
        self._local = threading.local()
        self.adapters = Adapters()
        self.positions: tuple[torch.Tensor, tuple, tuple[Packing, Rotary]] | None = None
        self.turn = Turn()

    def __reduce__(self) -> tuple:
        return type(self), (self.captured_step is not None, self.products, self.exact, self.mixed)

    @property
    def pictures(self) -> int:
        return getattr(self._local, "pictures", 1)

    @pictures.setter
    def pictures(self, count: int) -> None:
        self._local.pictures = count

    def prepare_adapters(self, transformer: nn.Module) -> None:
        """Take note of what was done to the transformer's LoRAs."""
        self.adapters.prepare(transformer, exact=self.exact)

    def release_graph(self) -> None:
        """Drop the CUDA graph of a picture's steps, if there is one, with the memory that it works in."""
        step = self.captured_step
        if step is None:
            return
        with self.turn.take(torch.device("cpu") if step.stream is None else step.stream.device):
            step.release()


def runtime_of(transformer: nn.Module) -> TransformerRuntime | None:
    """The runtime of a fast transformer, also of a compiled one; None for upstream's."""
    runtime = getattr(transformer, "runtime", None)
    return runtime if isinstance(runtime, TransformerRuntime) else None


def computation_dtype(transformer: nn.Module) -> torch.dtype:
    """The dtype that a pipeline was loaded for; of a mixed transformer float16, though it takes and gives float32."""
    runtime = runtime_of(transformer)
    return torch.float16 if runtime is not None and runtime.mixed else cast(torch.dtype, transformer.dtype)


def is_exact(transformer: nn.Module) -> bool:
    """Whether a fast transformer gives upstream's bits. Upstream's own, as on a CPU, counts as none."""
    runtime = runtime_of(transformer)
    return runtime is not None and runtime.exact


@contextmanager
def several_pictures(transformer: nn.Module, count: int) -> Iterator[None]:
    """Tell a fast transformer that its rows are of `count` pictures at the same timestep.

    First comes one row of each picture, then the next row of each, and so on. What rounds by the number of rows is then
    computed picture by picture, so that each picture is what it is alone. Upstream's transformer isn't told.
    """
    runtime = runtime_of(transformer)
    if runtime is None:
        yield
        return
    before, runtime.pictures = runtime.pictures, count
    try:
        yield
    finally:
        runtime.pictures = before


def refuse_for_nf4(model: object, name: str) -> None:
    """Refuse one of upstream's ways of offloading single tensors: it leaves the quantization states of NF4 behind.

    Raises:
        InvalidSettings: The model is in NF4.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        raise InvalidSettings(
            f"{name} breaks NF4 weights: load with memory='stream' instead, which keeps two blocks of the transformer "
            "on the GPU at a time."
        )


@named_as_upstream
class FastErnieImageTransformer(ErnieImageTransformer2DModel):
    """A transformer that denoises by packed rows and captured steps. With gradients or compiled, it is upstream's."""

    runtime: TransformerRuntime | None = None  # of a model built by this class itself: its blocks are upstream's

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        text_bth: torch.Tensor,
        text_lens: torch.Tensor,
        return_dict: bool = True,
    ) -> ErnieImageTransformer2DModelOutput | tuple[torch.Tensor]:
        """As upstream's: latents (B, C, height, width), timestep (B,), text (B, T, width) and its lengths (B,).

        A mixed transformer gives float32, whatever it is given.
        """
        runtime = self.runtime
        if runtime is not None and runtime.mixed:
            hidden_states, timestep, text_bth = (part.float() for part in (hidden_states, timestep, text_bth))
        if (
            runtime is None
            or torch.is_grad_enabled()
            or self._is_compiled(runtime)
            or attention_dispatch() is None  # of a pickle that another version of diffusers loads
        ):
            return super().forward(hidden_states, timestep, text_bth, text_lens, return_dict)
        device = hidden_states.device
        precision = no_autocast(device) if runtime.mixed else nullcontext()
        with kept_on_device(self), runtime.turn.take(device), precision:
            runtime.prepare_adapters(self)
            if runtime.adapters.bring_strengths(device):
                runtime.release_graph()
            if runtime.captured_step is None:
                sample = self.predict(hidden_states, timestep, text_bth, text_lens)
            else:
                sample = runtime.captured_step.predict(self, hidden_states, timestep, text_bth, text_lens)
        return ErnieImageTransformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @functools.wraps(ErnieImageTransformer2DModel.to)
    def to(self, *args: Any, **kwargs: Any) -> Any:
        before, moved = self.device, super().to(*args, **kwargs)
        if self.runtime is not None and self.device != before:
            self.runtime.release_graph()
        return moved

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        restore_nf4_weights(self)

    @functools.wraps(ErnieImageTransformer2DModel.enable_group_offload)
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        refuse_for_nf4(self, "enable_group_offload")
        super().enable_group_offload(*args, **kwargs)

    def _is_compiled(self, runtime: TransformerRuntime) -> bool:
        """Whether torch.compile traces the transformer, or its blocks have been compiled."""
        if not torch.compiler.is_compiling():
            if not any(map(is_compiled, self.layers.children())):
                return False
            runtime.release_graph()
        if runtime.products is not None:
            _warn_of_compiled_products()
        return True

    def has_upstream_blocks(self) -> bool:
        """Whether hooks or attention processors within blocks wait for calls, which upstream's blocks make."""
        return any(map(calls_all_modules, self.layers.children()))

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """The prediction (B, C, height, width) by packed rows; arguments as of `forward`."""
        if self.has_upstream_blocks():
            return super().forward(latents, timestep, text, lengths, return_dict=False)[0]
        size, pictures = self.patch_size, cast(TransformerRuntime, self.runtime).pictures
        rows, columns = latents.shape[2] // size, latents.shape[3] // size
        packing, rotary = self._positions(lengths, text.shape[1], rows, columns, latents.dtype)
        conditioning = self.time_embedding(self.time_proj(timestep[::pictures]).to(latents.dtype))
        modulation = self.adaLN_modulation(conditioning).chunk(6, -1)

        embedded = [
            self._embed(latents[n::pictures].contiguous(), text[n::pictures, : packing.texts[n]].contiguous())
            for n in range(pictures)
        ]
        x = torch.cat(
            [embedded[row % pictures][row // pictures, None, :length] for row, length in enumerate(packing.lengths)], 1
        )
        shapes = [whole.shape for whole in embedded]
        del embedded
        x = self._through_blocks(x, rotary, modulation, packing)
        parts = x.split(packing.lengths, 1)
        sample = latents.new_empty(len(latents), self.out_channels, *latents.shape[2:])
        for n, shape in enumerate(shapes):
            sample[n::pictures] = self._unembed(parts[n::pictures], x.new_zeros(shape), conditioning, rows, columns)
        return sample

    def _through_blocks(
        self, x: torch.Tensor, rotary: Rotary, modulation: Sequence[torch.Tensor], packing: Packing
    ) -> torch.Tensor:
        """What the blocks make of packed tokens, (1, N, H)."""
        if packing.mixed or any(map(is_hooked, self.layers.children())):  # hooks expect what upstream's blocks give
            for block in self.layers:
                x = block(x, rotary, modulation, packing)
            return x
        pending = Pending(x, None)
        for block in self.layers:
            pending = block(pending, rotary, modulation, packing)
        tokens, branch = pending
        return tokens if branch is None else elementwise.gated_add(tokens, branch, modulation[-1], packing.rows)

    def _embed(self, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Tokens (B, S, H) of latents (B, C, height, width) and text (B, T, width)."""
        if self.text_proj is not None and text.numel():
            text = self.text_proj(text)
        return torch.cat([self.x_embedder(latents), text], 1)

    def _unembed(
        self, parts: Sequence[torch.Tensor], whole: torch.Tensor, conditioning: torch.Tensor, rows: int, columns: int
    ) -> torch.Tensor:
        """The prediction (B, C, height, width) of rows without padding.

        Args:
            parts: (1, length, H) of each row.
            whole: (B, S, H) zeros, which the rows are written to: computed with the padding, they round as upstream's
                do.
            conditioning: (B, H), of the timestep.
            rows: Patches from top to bottom.
            columns: Patches from left to right.
        """
        for row, part in zip(whole, parts, strict=True):
            row[: part.shape[1]] = part[0]
        x = self.final_norm(whole.transpose(0, 1), conditioning).type_as(whole)
        patches = self.final_linear(x)[: rows * columns].transpose(0, 1)
        size = self.patch_size
        patches = patches.reshape(len(whole), rows, columns, size, size, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(len(whole), self.out_channels, rows * size, columns * size)

    def _positions(
        self, text_lens: torch.Tensor, text: int, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[Packing, Rotary]:
        """How rows are packed, and cosine and sine of the tokens' rotary angles, (1, N, D) each.

        All steps of a picture get them from the same tensor of lengths: they are kept until another one comes.
        """
        runtime = cast(TransformerRuntime, self.runtime)
        # Products in 8 bits round differently from upstream's anyway, whatever attention does.
        masked = runtime.exact and runtime.products is None and not runtime.mixed
        key = (version_of(text_lens), text, rows, columns, dtype, runtime.pictures, masked)
        if runtime.positions is not None and runtime.positions[0] is text_lens and runtime.positions[1] == key:
            return runtime.positions[2]
        packing = pack(text_lens, text, rows * columns, dtype, runtime.pictures, masked, runtime.mixed)
        angles = self.pos_embed(token_positions(rows, columns, text, text_lens)).squeeze(2)
        positions = packing, packed_rotary(angles, packing.lengths, dtype)
        runtime.positions = (text_lens, key, positions)
        return positions


@functools.cache
def log_compiled_products() -> None:
    """Warn once a process."""
    logger.warning("Compiled blocks multiply in the dtype of the weights, not in 8 bits.")


@torch.compiler.assume_constant_result  # called while tracing: a logger in the traced code would break the graph
def _warn_of_compiled_products() -> bool:
    log_compiled_products()
    return True
