"""bitsandbytes is imported without a download and without PyTorch's compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from conftest import CHECKOUT

from ernie_image_nf4.upstream import local_import

BITSANDBYTES = """
try:
    from kernels import get_kernel
    fetched = get_kernel("some/kernel")
except ImportError:
    fetched = None
"""
IMPORTED = """
import importlib.util, sys
import ernie_image_nf4
assert importlib.util.find_spec("bitsandbytes") is not None  # as libraries look whether it is there
import bitsandbytes
assert bitsandbytes.fetched is None, bitsandbytes.fetched
assert "kernels" not in sys.modules
import kernels
assert kernels.get_kernel("x") == "from the Hub"
"""


def test_importing_bitsandbytes_fetches_no_kernel(tmp_path):
    """It does on CPUs with AVX512-BF16, where `kernels` is installed."""
    (tmp_path / "bitsandbytes.py").write_text(BITSANDBYTES)
    (tmp_path / "kernels.py").write_text("def get_kernel(name):\n    return 'from the Hub'\n")
    run(IMPORTED, tmp_path)


def run(code: str, *paths: Path) -> None:
    """Run code in a process that finds modules in these folders first."""
    path = os.pathsep.join(map(str, [*paths, CHECKOUT]))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


WITHOUT_COMPILER = """
import sys
import ernie_image_nf4
import bitsandbytes
import torch
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert "torch._dynamo" in sys.modules
"""


def test_importing_bitsandbytes_leaves_the_compiler_alone():
    run(WITHOUT_COMPILER)


def test_functions_are_compiled_when_they_are_called(monkeypatch):
    compiled: list[tuple[Any, dict[str, Any]]] = []

    def compile_now(model: Any, **options: Any) -> Any:
        compiled.append((model, options))
        return model

    def double(x: int) -> int:
        return 2 * x

    monkeypatch.setattr(torch, "compile", compile_now)
    with local_import._compiled_when_called(), ThreadPoolExecutor(1) as other_thread:
        bare, with_options = torch.compile(double), torch.compile(dynamic=False)(double)
        assert compiled == []
        assert other_thread.submit(torch.compile, abs).result() is abs
    assert torch.compile is compile_now
    assert compiled == [(abs, {})]
    assert with_options.__name__ == "double"
    assert [with_options(2), with_options(3), bare(4)] == [4, 6, 8]
    assert compiled == [(abs, {}), (double, {"dynamic": False}), (double, {})]
