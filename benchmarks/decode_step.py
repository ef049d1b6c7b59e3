"""Microseconds of the kernels of a decode step at full size, on random weights, and the fastest sizes of programs.

    python -m benchmarks.decode_step --output decode_step.json
    python -m benchmarks.decode_step --sweep

Each kernel is timed in a CUDA graph of ten layers, more weights than a GPU's cache holds, for one text and for four.
`--sweep` tries columns and warps of the three kinds of products, which are constants of ``ops/triton_nf4_rows.py``, and
prints the best five of each. Compiling takes most of the time: `--processes` do it side by side before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.quantize_full_size import machine
from ernie_image_nf4.fast.ops import triton_decode, triton_nf4_rows

WIDTH, QUERIES, KEYS, INNER, VOCABULARY = 3072, 4096, 1024, 9216, 131072  # of the full-size prompt enhancer
DIM, CAPACITY, POSITION = 128, 512, 300
LAYERS = 10
TEXTS = (1, 4)
COLUMNS, WARPS = (4, 8, 16), (1, 2, 4, 8)
PREFIXES = {"query, key, value": "", "output": "ADDED_", "gate, up": "GATED_", "down": "ADDED_"}  # of the constants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--sweep", action="store_true", help="try sizes of programs")
    parser.add_argument("--processes", type=int, default=8, help="that compile for the sweep")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep(arguments.processes)
        return
    result = {
        "command": " ".join(["python", "-m", "benchmarks.decode_step", *sys.argv[1:]]),
        "microseconds": {f"{texts} texts": {**time_products(texts), **time_others(texts)} for texts in TEXTS},
        "machine": machine(),
    }
    print(json.dumps(result["microseconds"], indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def sweep(processes: int) -> None:
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(compile_with, programs()))
    layers = [make_layer() for _ in range(LAYERS)]
    found: dict[tuple[str, int], list[tuple[float, tuple[int, int]]]] = {}
    for columns, warps in programs():
        use(columns, warps)
        for texts in TEXTS:
            for name, value in time_products(texts, layers).items():
                found.setdefault((name, texts), []).append((value, (columns, warps)))
    for (name, texts), values in found.items():
        best = ", ".join(
            f"{value} ({columns} columns, {warps} warps)" for value, (columns, warps) in sorted(values)[:5]
        )
        print(f"{name}, {texts} texts: {best}")


def programs() -> Iterator[tuple[int, int]]:
    """Columns and warps that leave each thread some words of a weight."""
    words = triton_nf4_rows.WORDS
    return ((c, w) for c, w in itertools.product(COLUMNS, WARPS) if 4 <= c * words / (32 * w) <= 32)


def use(columns: int, warps: int) -> None:
    for prefix in set(PREFIXES.values()):
        setattr(triton_nf4_rows, f"{prefix}COLUMNS", columns)
        setattr(triton_nf4_rows, f"{prefix}WARPS", warps)


def compile_with(program: tuple[int, int]) -> None:
    use(*program)
    layer = make_layer()
    for texts in TEXTS:
        for call in product_calls(layer, texts).values():
            call()


def make_layer() -> dict[str, Any]:
    shapes = {"q": (QUERIES, WIDTH), "k": (KEYS, WIDTH), "v": (KEYS, WIDTH), "o": (WIDTH, QUERIES)}
    shapes |= {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    return {name: random_weight(*shape) for name, shape in shapes.items()}


def random_weight(rows: int, width: int) -> triton_nf4_rows.PackedWeight:
    blocks = rows * width // 64
    return triton_nf4_rows.PackedWeight(
        torch.randint(-(2**31), 2**31 - 1, (blocks * 8,), dtype=torch.int32, device="cuda"),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda"),
        torch.rand(-(-blocks // 256), device="cuda"),
        torch.tensor(0.02, device="cuda"),
        torch.linspace(-1, 1, 256, device="cuda"),
        rows,
    )


def product_calls(layer: dict[str, Any], texts: int) -> dict[str, Callable[[], torch.Tensor]]:
    x, attended, inner = (torch.randn(texts, n, device="cuda").bfloat16() for n in (WIDTH, QUERIES, INNER))
    norm = torch.rand(WIDTH, device="cuda").bfloat16()
    rows = triton_nf4_rows
    return {
        "query, key, value": lambda: rows.products(x, norm, 1e-5, (layer["q"], layer["k"], layer["v"])),
        "output": lambda: rows.added_product(attended, x, layer["o"]),
        "gate, up": lambda: rows.gated_products(x, norm, 1e-5, layer["gate"], layer["up"]),
        "down": lambda: rows.added_product(inner, x, layer["down"]),
    }


def time_products(texts: int, layers: Sequence[dict[str, Any]] | None = None) -> dict[str, float]:
    calls = [product_calls(layer, texts) for layer in layers or [make_layer() for _ in range(LAYERS)]]
    return {name: microseconds([each[name] for each in calls]) for name in PREFIXES}


def time_others(texts: int) -> dict[str, float]:
    bfloat16 = {"device": "cuda", "dtype": torch.bfloat16}
    qkv = torch.randn(texts, QUERIES + 2 * KEYS, **bfloat16)
    cosine, scale = torch.rand(texts, DIM, **bfloat16), torch.ones(texts, **bfloat16)
    caches = [torch.randn(2, texts, KEYS // DIM, CAPACITY, DIM, **bfloat16) for _ in range(LAYERS)]
    position = torch.full((texts,), POSITION, device="cuda")
    x, head = torch.randn(texts, WIDTH, **bfloat16), torch.randn(VOCABULARY, WIDTH, **bfloat16)
    logits, noise = torch.randn(texts, VOCABULARY, **bfloat16), torch.rand(texts, VOCABULARY, device="cuda") + 0.1
    temperature, top_k, top_p = (torch.full((texts, 1), value, device="cuda") for value in (0.6, 50, 0.95))
    ranked = logits.topk(50).values

    def attend(cache: torch.Tensor) -> torch.Tensor:
        return triton_decode.attention(qkv, cosine, cosine, scale, position, *cache, 0.1)

    return {
        "attention": microseconds([lambda cache=cache: attend(cache) for cache in caches]),
        "head": microseconds([lambda: triton_decode.head_product(x, head)]),
        "top-k": microseconds([lambda: logits.topk(50).values]),
        "sampling": microseconds([lambda: triton_decode.sample(logits, noise, ranked, temperature, top_k, top_p)]),
    }


def microseconds(calls: Sequence[Callable[[], torch.Tensor]]) -> float:
    """Of one call, the least of eight graphs of all."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(8):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return round(1000 * min(times) / len(calls), 2)


if __name__ == "__main__":
    main()
