"""Fresh processes, one for each measurement."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Any

from .device import describe_machine

# The slowest imports, made once by the server that processes are forked from. Not bitsandbytes, which initializes CUDA:
# a process forked after that can't use the GPU. Some packages that transformers imports where they are installed
# (torchao) do so too.
PRELOADED = (
    "torch",
    "transformers.models.mistral3.modeling_mistral3",
    "transformers.models.ministral3.modeling_ministral3",
)


def process_context(device: str) -> BaseContext:
    """How to start fresh processes: forked after the slow imports, unless they can't use the device then."""
    if "forkserver" in get_all_start_methods():
        context = get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        if "error" not in in_own_process(context, describe_machine, device):
            return context
    return get_context("spawn")


def in_own_process(context: BaseContext, function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Call a function in a fresh process.

    Args:
        context: As from `process_context`.
        function: One that can be pickled.
        arguments: Its arguments.

    Returns:
        Its result, or the ``error`` that it or its process ended with: an arm that can't run says why, and the others
            run.
    """
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"error": "the process was killed, probably for lack of memory"}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
