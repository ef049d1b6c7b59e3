"""The original transformer, never as a whole on the device: its blocks come from the files one after the other.

A pass over the blocks serves many samples: each block takes all of them before the next one comes. Between blocks their
tokens wait in page-locked host memory.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ErnieImageTransformer2DModel
from torch import nn

from ..memory.pinned_memory import pinned_buffer
from ..repository.meta_model import meta_model
from ..repository.record import StoredComponent
from ..repository.safetensors_io import StoredTensor, read_tensor

READERS = 4
ALIGNMENT = 256


@dataclass
class BlockInput:
    """What goes into every block for one sample beside its tokens, on the device.

    Attributes:
        tokens: Input of the first block, (image and text tokens, 1, hidden_size); empty once they are in host memory.
        rotary: Rotary embedding of the tokens' positions.
        modulation: Shift, scale and gate of attention and of feed-forward, six of (1, 1, hidden_size).
    """

    tokens: torch.Tensor
    rotary: torch.Tensor
    modulation: list[torch.Tensor]

    def through(self, block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """What a block makes of this sample's tokens."""
        return block(tokens, self.rotary, self.modulation, None)


class Seam(nn.Module):
    """Stands in for all blocks: keeps what would go into the first, and gives what came out of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: BlockInput | None = None
        self.output: torch.Tensor | None = None

    def forward(
        self, tokens: torch.Tensor, rotary: torch.Tensor, modulation: Sequence[torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        self.seen = BlockInput(tokens, rotary, [part[:1].clone() for part in modulation])
        return tokens if self.output is None else self.output


class StreamedOriginal:
    """The original transformer with its blocks in the files.

    Attributes:
        model: All but the blocks, on the device. In their place stands a `Seam`.
        blocks: The blocks, without storage.
        device: Where to compute.
        dtype: Of the computation.
    """

    def __init__(
        self, part: StoredComponent, tensors: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        self._tensors = tensors
        self.model: ErnieImageTransformer2DModel = meta_model(part.component, part.settings).requires_grad_(False)
        layers: Any = self.model.layers
        self.blocks: list[nn.Module] = list(layers)
        self.seam = Seam()
        self.model.layers = nn.ModuleList([self.seam])
        with ThreadPoolExecutor(READERS) as readers:
            self._give_weights(self.model, self._start_reading(self.model, "", readers))

    def stream(self, groups: Iterable[Sequence[int]]) -> Iterator[list[nn.Module]]:
        """Blocks with their weights on the device, by numbers, a group at a time. The next group is read meanwhile.

        A group stays on the device for as long as the caller refers to it.
        """
        with ThreadPoolExecutor(READERS) as readers:
            coming: deque[list[tuple[nn.Module, dict[str, Future[torch.Tensor]]]]] = deque()
            for numbers in groups:
                found = [(copy.deepcopy(self.blocks[number]), number) for number in numbers]
                coming.append([(block, self._start_reading(block, f"layers.{n}.", readers)) for block, n in found])
                if len(coming) > 1:
                    yield self._arrived(coming)
            while coming:
                yield self._arrived(coming)

    def _arrived(self, coming: deque[list[tuple[nn.Module, dict[str, Future[torch.Tensor]]]]]) -> list[nn.Module]:
        return [self._give_weights(block, values) for block, values in coming.popleft()]

    def _start_reading(
        self, module: nn.Module, prefix: str, readers: ThreadPoolExecutor
    ) -> dict[str, Future[torch.Tensor]]:
        """Start reading the weights of a module without storage. Their names begin with `prefix`."""
        pinned = self.device.type == "cuda"
        names = [name for name, _ in module.named_parameters()]
        return {name: readers.submit(read_tensor, self._tensors[prefix + name], pinned=pinned) for name in names}

    def _give_weights(self, module: nn.Module, values: dict[str, Future[torch.Tensor]]) -> nn.Module:
        for name in list(values):
            value = values.pop(name).result().to(self.device, self.dtype, non_blocking=True)
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
        return module


def conditions(
    timestep: float, text: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Timestep (1,), text (1, tokens, text_in_dim) and its length (1,), as the transformer takes them."""
    steps = torch.tensor([timestep], device=device, dtype=dtype)
    return steps, text[None].to(device, dtype), torch.tensor([len(text)], device=device)


def embed(
    model: ErnieImageTransformer2DModel, latents: torch.Tensor, timestep: float, text: torch.Tensor
) -> BlockInput:
    """The input of the first block, by a model with a `Seam` in place of its blocks."""
    seam = _seam(model)
    seam.output = None
    dtype, device = model.dtype, model.device
    model(latents.to(device, dtype), *conditions(timestep, text, device, dtype), return_dict=False)
    assert seam.seen is not None
    seen, seam.seen = seam.seen, None
    return seen


def enter_blocks(
    model: ErnieImageTransformer2DModel,
    inputs: Sequence[tuple[torch.Tensor, float, torch.Tensor]],
    memory: HostMemory,
) -> tuple[list[BlockInput], TokenPool]:
    """What goes into the blocks for latents, timesteps and texts, and the tokens in host memory.

    The rotary embedding of pictures of one size and texts of one length is the same, and held once.
    """
    pool = TokenPool([tokens_shape(model, latents, text) for latents, _, text in inputs], model.dtype, memory)
    given: list[BlockInput] = []
    rotary: dict[tuple, torch.Tensor] = {}
    for number, (latents, timestep, text) in enumerate(inputs):
        seen = embed(model, latents, timestep, text)
        pool[number] = seen.tokens
        kept = rotary.setdefault((latents.shape, len(text)), seen.rotary)
        given.append(BlockInput(seen.tokens.new_empty(0), kept, seen.modulation))
    return given, pool


def tokens_shape(model: ErnieImageTransformer2DModel, latents: torch.Tensor, text: torch.Tensor) -> torch.Size:
    """Of what goes into a block: (image and text tokens, 1, hidden_size)."""
    config = model.config
    return torch.Size((latents.shape[-2:].numel() // config.patch_size**2 + len(text), 1, config.hidden_size))


def predict(
    model: ErnieImageTransformer2DModel,
    tokens: torch.Tensor,
    latents: torch.Tensor,
    timestep: float,
    text: torch.Tensor,
) -> torch.Tensor:
    """The prediction, given the last block's output, by a model with a `Seam` in place of its blocks."""
    seam = _seam(model)
    seam.output = tokens
    dtype, device = model.dtype, model.device
    prediction = model(latents.to(device, dtype), *conditions(timestep, text, device, dtype), return_dict=False)[0]
    seam.output = seam.seen = None
    return prediction


def _seam(model: ErnieImageTransformer2DModel) -> Seam:
    (seam,) = model.layers
    return seam


class HostMemory:
    """Page-locked host memory for the tokens that wait between blocks, made once and used for one phase after another.

    To lock pages takes a second for a few GiB.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self._block = pinned_buffer(size, device)
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        """The next `size` bytes."""
        start = self._used
        self._used += padded(size)
        if self._used > len(self._block.memory):
            raise MemoryError(f"{self._used} bytes of tokens, of which {len(self._block.memory)} were planned")
        return self._block.memory[start : start + size]

    def clear(self) -> None:
        """Let all of it be taken anew, after the copies that are under way."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._used = 0


def padded(size: int) -> int:
    """Bytes that tokens take up in `HostMemory`: the next ones are aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class TokenPool:
    """Tokens of several samples in host memory. Copies to and from the device are in the order of its stream."""

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, memory: HostMemory) -> None:
        self.device = memory.device
        sizes = [shape.numel() * dtype.itemsize for shape in shapes]
        self._views = [memory.take(size).view(dtype).view(shape) for size, shape in zip(sizes, shapes, strict=True)]

    def __getitem__(self, number: int) -> torch.Tensor:
        """A sample's tokens on the device."""
        return self._views[number].to(self.device, non_blocking=True)

    def __setitem__(self, number: int, tokens: torch.Tensor) -> None:
        self._views[number].copy_(tokens.detach(), non_blocking=True)
