"""Random numbers of one thread's call: drawn from the caller's random state, by a generator of the call's own.

torch's global random state is the process's. What one thread seeds, another one draws, and torch 2.11 refuses all draws
from a GPU's global state while any thread captures a graph on that GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .cuda_graphs import CAPTURING

# What transformers samples tokens with, schedulers their noise, and KID its subsets.
RANDOM = {torch.multinomial, torch.rand, torch.randint, torch.randn, torch.randperm}
MAX_SEED = 2**63 - 1

# What stands for the global state in this thread: gives the generator of a device.
_CALLER: ContextVar[Callable[[torch.device], torch.Generator] | None] = ContextVar("caller", default=None)
_LENT: dict[torch.device, threading.Lock] = {}  # held while a call goes on with the global state of a device


class DrawsOf(TorchFunctionMode):
    """While active, in this thread, the functions of `RANDOM` draw from other generators than torch's global ones.

    Args:
        generator: Gives the generator of a device.
    """

    def __init__(self, generator: Callable[[torch.device], torch.Generator]) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM and kwargs.get("generator") is None:
            given = args[0] if args else kwargs.get("input")
            device = given.device if torch.is_tensor(given) else kwargs.get("device") or torch.get_default_device()
            kwargs = {**kwargs, "generator": self._generator(_with_index(torch.device(device)))}
        return func(*args, **kwargs)


class SeededDraws(DrawsOf):
    """While active, in this thread, the functions of `RANDOM` draw from a seed's state instead of torch's global one.

    The draws are those after ``torch.manual_seed(seed)``, on each device, but the global state stays as it is.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(self.generator)
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __enter__(self) -> SeededDraws:
        self._token = _CALLER.set(self.generator)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _CALLER.reset(self._token)

    def generator(self, device: torch.device) -> torch.Generator:
        """The device's generator."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


@contextmanager
def drawing_as_caller(generator: torch.Generator) -> Iterator[Callable[[], None]]:
    """Let a generator draw what the caller's random state would: the global one of its device, or what stands for it.

    Afterwards the caller's state is behind these draws, unless others have drawn from it or seeded it meanwhile. While
    another thread's call goes on with the same global state, the generator is seeded by a draw from it instead: two
    calls must not draw the same numbers. Meanwhile the generator stands for its device's global state in this thread,
    for those who ask here.

    Yields:
        Ends it before the block does: who draws from the caller's state from then on goes on behind these draws.
    """
    outer, device = _CALLER.get(), _with_index(generator.device)
    callers = _global_generator(device) if outer is None else outer(device)
    lock = threading.Lock() if outer else _LENT.setdefault(device, threading.Lock())

    def stand_in(asked: torch.device) -> torch.Generator:
        if _with_index(asked) == device:
            return generator
        return _global_generator(asked) if outer is None else outer(asked)

    def hand_over() -> None:
        if alone:
            with CAPTURING, suppress(RuntimeError):  # a failed capture leaves a generator that tells no state
                if torch.equal(callers.get_state(), before):
                    callers.set_state(generator.get_state())

    alone = lock.acquire(blocking=False)
    with ExitStack() as stack:
        if alone:
            stack.callback(lock.release)
        with CAPTURING:  # not while the global state is another one
            before = callers.get_state()
            if alone:
                generator.set_state(before)
            else:
                generator.manual_seed(int(torch.randint(MAX_SEED, (), device=device, generator=callers)))
        stack.callback(hand_over)
        stack.callback(_CALLER.reset, _CALLER.set(stand_in))
        yield stack.close


def drawing_from_caller() -> AbstractContextManager:
    """Let what draws from torch's global state in this thread draw from what stands for it, if anything does."""
    caller = _CALLER.get()
    return nullcontext() if caller is None else DrawsOf(caller)


def _with_index(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _global_generator(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
