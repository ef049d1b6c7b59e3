"""bitsandbytes, imported without a download and without PyTorch's compiler.

On CPUs with AVX512-BF16, bitsandbytes 0.50 fetches a compiled kernel from the Hub while it is imported, if the package
`kernels` is installed, and warns if that fails. Nothing here uses that kernel: it is for repacked weights, which `load`
does without.

It also lets PyTorch compile four functions as it decorates them, for devices without kernels of its own. That imports
PyTorch's compiler, which takes seconds on a slow machine. Here they are compiled when they are called.

A finder, because diffusers imports bitsandbytes as well, and whichever import comes first has to be the local one. Gone
(no such download, nothing to compile): the finder hides a package that nobody asks for, and nothing waits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

DOWNLOADS = "kernels"
WARNS = "bitsandbytes.backends.cpu.ops"


class LocalImport(importlib.abc.MetaPathFinder):
    """Finds bitsandbytes where Python would, and hides the package that it would download with while it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "bitsandbytes":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_locally(module: ModuleType) -> None:
                with _hidden(DOWNLOADS), _errors_only(WARNS), _compiled_when_called():
                    execute(module)

            loader.exec_module = execute_locally
        return spec


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let an import of a package raise ImportError."""
    modules: dict[str, Any] = sys.modules
    known = {package: modules[package]} if package in modules else {}
    modules[package] = None
    try:
        yield
    finally:
        del modules[package]
        modules |= known


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Let a logger say errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Let ``torch.compile``, where this thread calls it, wait until the function is called."""
    torch: Any = importlib.import_module("torch")
    compile_now, thread = torch.compile, threading.get_ident()

    def compile_later(function: Any = None, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return compile_now(function, **options)
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


def install() -> None:
    """Import bitsandbytes locally from now on, in this process. One that is imported already stays as it is."""
    if not any(isinstance(finder, LocalImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, LocalImport())
