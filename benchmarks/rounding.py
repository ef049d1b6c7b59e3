"""Error of the transformer's predictions by rounding alone, in bfloat16: upstream's forward and the fast one.

    python benchmarks/rounding.py --widths 512 1024 --size 128 --output benchmarks/rounding_cpu.json

Predictions for the fixed latents, embeddings and ten timesteps of `benchmark`, against the same weights in float32: of
the mini, and of random networks with the full-size model's depth and a part of its width. Their sums are shorter, so
their weights are scaled up to match. Each figure is the largest relative error over the timesteps. Runs on a CPU, where
the fast forward differs from upstream's only by its order of operations.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

import torch
from diffusers import ErnieImageTransformer2DModel

from ernie_image_nf4 import load
from ernie_image_nf4.benchmarking.predictions import TIMESTEPS, largest_error, predictions
from ernie_image_nf4.fast.transformer import make_transformer_fast
from ernie_image_nf4.quantization.synthetic import STANDARD_DEVIATION
from ernie_image_nf4.repository.metadata import installed_versions

CHECKOUT = Path(__file__).parents[1]
FULL = CHECKOUT / "ernie_image_nf4" / "quantization" / "configs" / "full" / "transformer" / "config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("rounding_cpu.json"))
    parser.add_argument("--widths", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "versions": installed_versions() | {"python": platform.python_version()},
        "settings": {"size": arguments.size, "timesteps": list(TIMESTEPS)},
    }
    exact, rounded = (
        load(CHECKOUT, device="cpu", dtype=dtype, prompt_enhancer=False).transformer
        for dtype in ("float32", "bfloat16")
    )
    result["mini"] = errors(exact, rounded, arguments.size)
    for width in arguments.widths:
        exact, rounded = random_network(width), random_network(width).to(torch.bfloat16)
        result[f"random, {width} wide"] = errors(exact, rounded, arguments.size)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def random_network(width: int) -> ErnieImageTransformer2DModel:
    """The full-size transformer's depth and shapes at another width: float32, with weights that bfloat16 represents."""
    config = json.loads(FULL.read_text(encoding="utf-8"))
    ratio = config["hidden_size"] / width
    for key in ("hidden_size", "num_attention_heads", "ffn_hidden_size"):
        config[key] = int(config[key] / ratio)
    model = ErnieImageTransformer2DModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.data.fill_(1 if name.endswith("weight") else 0)
        else:
            inner = parameter.shape[-1] in (config["hidden_size"], config["ffn_hidden_size"])
            parameter.data.normal_(std=STANDARD_DEVIATION * (ratio**0.5 if inner else 1), generator=generator)
    return model.to(torch.bfloat16).float()


def errors(exact: torch.nn.Module, rounded: torch.nn.Module, size: int) -> dict[str, float]:
    """Errors of upstream's forward and of the fast one in bfloat16, against float32 and against each other."""
    reference, demo = predict(exact, size), predict(rounded, size)
    make_transformer_fast(rounded, capture_steps=False)
    fast = predict(rounded, size)
    return {
        "demo_to_float32": error(demo, reference),
        "fast_to_float32": error(fast, reference),
        "fast_to_demo": error(fast, demo),
    }


def predict(transformer: torch.nn.Module, size: int) -> torch.Tensor:
    return predictions(SimpleNamespace(transformer=transformer), size, "cpu")["prediction"]


def error(one: torch.Tensor, reference: torch.Tensor) -> float:
    return float(f"{largest_error(one, reference):.4g}")


if __name__ == "__main__":
    main()
