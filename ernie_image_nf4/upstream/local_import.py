"""bitsandbytes, imported without a download.

On CPUs with AVX512-BF16 it fetches a compiled kernel from the Hub while it is imported, if the package `kernels` is installed, and warns
if that fails. Nothing here uses that kernel: it is for repacked weights, which `loading` does without.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

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
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: _execute_locally(execute, module)
        return spec


def _execute_locally(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    logger = logging.getLogger(WARNS)
    level, was_there = logger.level, DOWNLOADS in sys.modules
    package = sys.modules.get(DOWNLOADS)
    sys.modules[DOWNLOADS] = None  # importing it raises ImportError
    logger.setLevel(logging.ERROR)
    try:
        execute(module)
    finally:
        logger.setLevel(level)
        del sys.modules[DOWNLOADS]
        if was_there:
            sys.modules[DOWNLOADS] = package


def install() -> None:
    """Import bitsandbytes locally from now on, in this process; one that is imported already stays as it is."""
    if not any(isinstance(finder, LocalImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, LocalImport())
