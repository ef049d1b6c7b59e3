"""bitsandbytes, imported without a download.

On CPUs with AVX512-BF16, bitsandbytes 0.50 fetches a compiled kernel from the Hub while it is imported, if the package
`kernels` is installed, and warns if that fails. Nothing here uses that kernel: it is for repacked weights, which `load`
does without.

A finder, because diffusers imports bitsandbytes as well, and whichever import comes first has to be the local one. Gone
(no such download): the finder hides a package that nobody asks for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
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
                with _hidden(DOWNLOADS), _errors_only(WARNS):
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


def install() -> None:
    """Import bitsandbytes locally from now on, in this process. One that is imported already stays as it is."""
    if not any(isinstance(finder, LocalImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, LocalImport())
