"""Fresh processes, one for each measurement, which end with the process that started them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection
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

    It is killed where this one is interrupted, and ends by itself where this one is killed: a measurement that nobody
    waits for any more would disturb the next one on the device.

    Args:
        context: As from `process_context`.
        function: One that can be pickled.
        arguments: Its arguments.

    Returns:
        Its result, or the ``error`` that it or its process ended with: an arm that can't run says why, and the others
            run.
    """
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))  # type: ignore[attr-defined]
    process.start()
    theirs.close()  # so that reading ends when the process does
    try:
        answer = ours.recv()
        process.join()
        return answer
    except EOFError:
        return {"error": "the process was killed, probably for lack of memory"}
    finally:
        process.kill()
        process.join()
        ours.close()


def _answer(connection: Connection, function: Callable[..., dict[str, Any]], arguments: Sequence[object]) -> None:
    """In the fresh process: send what the function gives, or its error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = function(*arguments)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    connection.send(answer)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has only the latter
