"""Throughput of `quantize` on a CPU, beside bitsandbytes' own `quantize_4bit` on the same weights, in one run.

    python benchmarks/quantize_cpu.py --work /tmp/quantize-cpu --output benchmarks/quantize_cpu.json

The source has the transformer layers of the full size, but few of them, and is in the page cache. `quantize` is timed as a whole:
planning, reading, quantizing, measuring the error, writing and hashing. bitsandbytes gets the weights ready in memory. The two
take turns, so that other load on the machine meets both; medians count.
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
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from diffusers import ErnieImageTransformer2DModel

from ernie_image_nf4.layout import QUANTIZED
from ernie_image_nf4.metadata import installed_versions
from ernie_image_nf4.plan import plan_weights
from ernie_image_nf4.quantize import quantize
from ernie_image_nf4.synthetic import synthesize
from ernie_image_nf4.tensors import read_tensor

FULL_SIZE_WEIGHTS = 14_504_427_520  # values that become NF4 in the three components
LAYER = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 12288, "rope_axes_dim": (32, 48, 48)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the repositories, deleted at the end")
    parser.add_argument("--output", type=Path, default=Path("quantize_cpu.json"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    source = make_source(arguments.work / "source", arguments.layers)
    plans = [plan_weights(source, component) for component in QUANTIZED]
    weights = [read_tensor(plan.tensors[name]) for plan in plans for name in sorted(plan.quantized)]
    values = sum(weight.numel() for weight in weights)
    quantize_4bit(weights[0][:64], quant_type="nf4")  # imports what it needs
    ours, theirs = [], []
    for turn in range(arguments.rounds):
        theirs.append(values / seconds(lambda: quantize_all(weights)))
        output = arguments.work / f"output-{turn}"
        ours.append(values / seconds(lambda output=output: quantize(source, output, device="cpu", progress=False)))
        shutil.rmtree(output)
        print(f"bitsandbytes {theirs[-1] / 1e6:.1f}, ours {ours[-1] / 1e6:.1f} million weights a second", flush=True)
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


def quantize_all(weights: list[torch.Tensor]) -> None:
    for weight in weights:
        quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def seconds(work: object) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
