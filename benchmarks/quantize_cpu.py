"""Throughput of `quantize` on a CPU beside bitsandbytes' `quantize_4bit`; time and gain of the scale search.

    python benchmarks/quantize_cpu.py --work /tmp/quantize-cpu --output benchmarks/quantize_cpu.json [--weights FOLDER]

The source has a few transformer layers of full size and is in the page cache. `quantize` without scale search is timed
as a whole: planning, reading, quantizing, measuring the error, writing, hashing. `quantize_4bit`, and `quantize_nf4`
with and without scale search, get the weights in memory. All take turns, so that other load on the machine slows all
alike. The result has medians for `quantize`, and the shortest times for the scale search.

The ratio of squared errors with and without scale search is measured on random normal weights and, given an original
repository, on the weights of each of its components that become NF4.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from diffusers import ErnieImageTransformer2DModel

from ernie_image_nf4.quantization.convert import quantize
from ernie_image_nf4.quantization.layer_selection import plan_weights
from ernie_image_nf4.quantization.scale_search import quantize_nf4, squared_error
from ernie_image_nf4.quantization.synthetic import synthesize
from ernie_image_nf4.repository.components import QUANTIZED, Component
from ernie_image_nf4.repository.metadata import installed_versions
from ernie_image_nf4.repository.record import component_class, open_component, read_model_index
from ernie_image_nf4.repository.safetensors_io import read_tensor

FULL_SIZE_WEIGHTS = 14_504_427_520  # Values that become NF4 in the three components
LAYER = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 12288, "rope_axes_dim": (32, 48, 48)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the repositories, deleted at the end")
    parser.add_argument("--output", type=Path, default=Path("quantize_cpu.json"))
    parser.add_argument("--weights", type=Path, help="original repository with trained weights")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    source = make_source(arguments.work / "source", arguments.layers)
    weights = [weight for component in QUANTIZED for weight in nf4_weights(source, component)]
    values = sum(weight.numel() for weight in weights)
    quantize_4bit(weights[0][:64], quant_type="nf4")  # Warm-up: it imports on first use
    ours, theirs, stock, searched = [], [], [], []
    for turn in range(arguments.rounds):
        theirs.append(values / seconds(lambda: quantize_all(weights)))
        output = arguments.work / f"output-{turn}"
        ours.append(values / seconds(lambda output=output: quantize_stock(source, output)))
        shutil.rmtree(output)
        stock.append(seconds(lambda: [quantize_nf4(weight, scale_search=False) for weight in weights]))
        searched.append(seconds(lambda: [quantize_nf4(weight) for weight in weights]))
        rates = {"bitsandbytes": theirs[-1], "ours": ours[-1], "scale search": values / searched[-1]}
        print(", ".join(f"{name} {rate / 1e6:.1f}" for name, rate in rates.items()), "million a second", flush=True)
    speed, reference = statistics.median(ours), statistics.median(theirs)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "cpu_cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": installed_versions(),
        },
        "weights": values,
        "rounds": arguments.rounds,
        "bitsandbytes_million_per_s": [round(rate / 1e6, 1) for rate in theirs],
        "quantize_million_per_s": [round(rate / 1e6, 1) for rate in ours],
        "cpu_vs_bitsandbytes": round(speed / reference, 2),
        "projected_full_size_s": round(FULL_SIZE_WEIGHTS / speed),
        "scale_search_million_per_s": [round(values / time / 1e6, 1) for time in searched],
        "scale_search_vs_stock": {
            "time": round(min(searched) / min(stock), 2),
            "squared_error": error_ratios(arguments.weights),
        },
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    shutil.rmtree(arguments.work)


def make_source(folder: Path, layers: int) -> Path:
    """A tiny repository whose transformer has `layers` layers of the full size."""
    synthesize(folder, preset="tiny", progress=False)
    shutil.rmtree(folder / "transformer")
    model = ErnieImageTransformer2DModel(**LAYER, num_layers=layers, text_in_dim=3072).to(torch.bfloat16)
    model.save_pretrained(folder / "transformer")
    return folder


def nf4_weights(source: Path, component: Component) -> Iterator[torch.Tensor]:
    """The weights of a component that become NF4."""
    plan = plan_weights(open_component(source, read_model_index(source), component))
    for name in sorted(plan.quantized):
        yield read_tensor(plan.tensors[name])


def error_ratios(source: Path | None) -> dict[str, float]:
    """Squared error with scale search over squared error without, by kind of weights."""
    normal = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    ratios = {"normal": error_ratio([normal])}
    if source:
        index = read_model_index(source)
        there = [component for component in QUANTIZED if component_class(index, component)]
        ratios |= {component.name: error_ratio(nf4_weights(source, component)) for component in there}
    return ratios


def error_ratio(weights: Iterable[torch.Tensor]) -> float:
    searched = stock = 0.0
    for weight in weights:
        searched += squared_error(weight, *quantize_nf4(weight))[0]
        stock += squared_error(weight, *quantize_nf4(weight, scale_search=False))[0]
    return round(searched / stock, 4)


def quantize_stock(source: Path, output: Path) -> None:
    quantize(source, output, device="cpu", scale_search=False, default_keep=False, progress=False)


def quantize_all(weights: list[torch.Tensor]) -> None:
    for weight in weights:
        quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
