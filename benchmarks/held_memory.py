"""A large GPU as a small card: a process of its own holds the rest of the memory.

It imports nothing but PyTorch, as it is started for each picture that is measured.
"""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CHECKOUT = Path(__file__).parents[1]
GIB = 1024**3
POLL_SECONDS = 0.02


@contextmanager
def small_card(free_gib: float | None) -> Iterator[dict[str, float]]:
    """A GPU of which only `free_gib` are free; None leaves it as it is.

    Yields:
        Gets ``free_gib`` when the memory is held, and ``least_free_gib`` at the end: the least that the driver had.
    """
    figures: dict[str, float] = {}
    if free_gib is None:
        yield figures
        return
    command = [sys.executable, "-m", "benchmarks.held_memory", str(free_gib)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        line = holder.stdout.readline()
        if not line:
            raise SystemExit(f"{free_gib} GiB could not be left free.")
        figures["free_gib"] = float(line)
        try:
            yield figures
        finally:
            holder.stdin.close()
            figures["least_free_gib"] = float(holder.stdout.readline() or "nan")


def hold(free_gib: float) -> None:
    """Hold all but so much of the GPU's memory until standard input closes. Prints the GiB free then, and the least."""
    torch.zeros(1, device="cuda")
    excess = torch.cuda.mem_get_info()[0] - int(free_gib * GIB)
    if excess < 0:
        raise SystemExit(f"Only {torch.cuda.mem_get_info()[0] / GIB:.2f} GiB are free.")
    held = torch.empty(excess, dtype=torch.uint8, device="cuda")
    print(torch.cuda.mem_get_info()[0] / GIB, flush=True)
    least = torch.cuda.mem_get_info()[0]
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        least = min(least, torch.cuda.mem_get_info()[0])
    print(least / GIB, flush=True)
    del held


if __name__ == "__main__":
    hold(float(sys.argv[1]))
