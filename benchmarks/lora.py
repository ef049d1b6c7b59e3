"""LoRAs at full size with random weights: what they cost a denoising step, and what a step of training takes.

    python -m benchmarks.lora --work /tmp/lora --output benchmarks/lora_h100.json

Each row runs in a process of its own. `step`: a step with guidance at 512x512 without LoRAs, with one and with two of
rank 16 on all layers of the blocks, in each format of products. `train`: examples/train_lora.py at 512x512, rank 16,
one picture a step, on a GPU of which another process holds all but 11 GiB. The NF4 repository is made in `--work`
(41 GB of disk while it is) unless it is there. `--preset tiny --device cpu` is for a try.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.batch_h100 import NF4, build
from benchmarks.children import run
from benchmarks.held_memory import small_card
from benchmarks.quantize_full_size import GIB, machine

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_lora.py"
PRODUCTS = ("auto", "int8", "fp8")
NAMES = ("one", "two")
TEXT_TOKENS = 60
FREE_GIB = 11.0  # of a card of 12 GB
WARM_UP = 3  # steps of training that are not counted


def main() -> None:
    arguments = parse()
    if arguments.row:
        print(json.dumps(train(arguments) if arguments.row == "train" else steps(arguments, arguments.row)))
        return
    build(arguments.work, arguments.preset)
    on_gpu = arguments.device.startswith("cuda")
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.lora", *sys.argv[1:]]),
        "settings": {"preset": arguments.preset, "size": arguments.size, "rank": arguments.rank},
        "step": {},
        "machine": machine(),
    }
    for products in PRODUCTS if on_gpu else PRODUCTS[:1]:
        result["step"][products] = measured(products)
    with small_card(FREE_GIB) if on_gpu else contextlib.nullcontext({}) as card:
        row = measured("train")
    result["train"] = row | card
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the repository and the LoRAs")
    parser.add_argument("--output", type=Path, default=Path("lora.json"))
    parser.add_argument("--preset", default="full", choices=["full", "tiny"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--train-steps", type=int, default=12)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(row: str) -> dict[str, Any]:
    """A row's figures, or how it ended."""
    command = [sys.executable, "-m", "benchmarks.lora", *sys.argv[1:], "--row", row]
    ended = run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines, code = ended.stdout.splitlines(), ended.returncode
    found = json.loads(lines[-1]) if code == 0 else {"error": f"exit status {code}"}
    print(f"{row}: {found}", flush=True)
    return found


def steps(arguments: argparse.Namespace, products: str) -> dict[str, float]:
    """Milliseconds of a step without LoRAs, with one and with two, and MiB that each adds."""
    import torch

    from ernie_image_nf4 import load, load_lora
    from ernie_image_nf4.repository.components import PIXELS_PER_PATCH

    device = arguments.device
    pipe: Any = load(arguments.work / NF4, device=device, memory="resident", prompt_enhancer=False, products=products)
    config, dtype, side = pipe.transformer.config, pipe.transformer.dtype, arguments.size // PIXELS_PER_PATCH
    inputs = {
        "hidden_states": torch.randn(2, config.in_channels, side, side, device=device, dtype=dtype),
        "timestep": torch.full((2,), 500.0, device=device, dtype=dtype),
        "text_bth": torch.randn(2, TEXT_TOKENS, config.text_in_dim, device=device, dtype=dtype),
        "text_lens": torch.full((2,), TEXT_TOKENS, device=device),
    }
    figures = {"none_ms": step_ms(pipe.transformer, inputs, device)}
    for number, name in enumerate(NAMES):
        before = allocated(device)
        file = arguments.work / f"{name}.safetensors"
        write_lora(config, file, arguments.rank, seed=number)
        load_lora(pipe, file, name=name)
        pipe.set_adapters(list(NAMES[: number + 1]))
        figures[f"{name}_mib"] = round((allocated(device) - before) / 2**20, 2)
        figures[f"{name}_ms"] = step_ms(pipe.transformer, inputs, device)
        figures[f"{name}_vs_base"] = round(figures[f"{name}_ms"] / figures["none_ms"], 4)
    figures["file_mib"] = round(file.stat().st_size / 2**20, 2)
    pipe.disable_lora()
    figures["off_ms"] = step_ms(pipe.transformer, inputs, device)
    return figures


def step_ms(transformer: Callable[..., object], inputs: dict[str, Any], device: str) -> float:
    """Milliseconds of one of the later steps of a picture of its own, which are captured with the adapters of now."""
    import torch

    from ernie_image_nf4.benchmarking.device import best_seconds

    # A picture is recognized by its text.
    step = functools.partial(transformer, **inputs | {"text_bth": inputs["text_bth"].clone()})
    with torch.no_grad():
        step()  # the next one is captured
        return round(1000 * best_seconds(step, device, repeats=20), 3)


def allocated(device: str) -> int:
    import torch

    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def write_lora(config: Any, path: Path, rank: int, seed: int) -> None:
    """A LoRA with random factors for all layers of the blocks, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    width, inner = config.hidden_size, config.ffn_hidden_size
    attention = dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), (width, width))
    shapes = {f"self_attention.{name}": shape for name, shape in attention.items()}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.linear_fc2": (width, inner)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for block in range(config.num_layers):
        for name, (rows, columns) in shapes.items():
            key = f"transformer.layers.{block}.{name}"
            for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                tensors[f"{key}.{part}.weight"] = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    save_file(tensors, path)


def train(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of the example, and PyTorch's peak of memory."""
    import torch

    example = load_example()
    began: list[float] = []
    loss_of = example.loss_of

    def timed(*of_step: Any) -> torch.Tensor:
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()
        began.append(time.perf_counter())
        return loss_of(*of_step)

    example.loss_of = timed
    pictures = arguments.work / "pictures"
    write_pictures(pictures, arguments.size)
    trained = arguments.work / "trained"
    shutil.rmtree(trained, ignore_errors=True)  # or it would go on where an earlier run ended
    options = ["--model", str(arguments.work / NF4), "--output", str(trained)]
    options += ["--steps", str(arguments.train_steps), "--rank", str(arguments.rank), "--device", arguments.device]
    with contextlib.redirect_stdout(sys.stderr):
        example.main([str(pictures), *options, "--resolution", str(arguments.size)])
    seconds = [after - before for before, after in zip(began[WARM_UP:], began[WARM_UP + 1 :], strict=False)]
    figures = {"step_s": round(statistics.median(seconds), 4), "steps": len(seconds)}
    if arguments.device.startswith("cuda"):
        figures["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
        figures["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    return figures


def load_example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("train_lora", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    return example


def write_pictures(folder: Path, size: int, count: int = 4) -> None:
    """Pictures of noise with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of noise, number {number}", encoding="utf-8")


if __name__ == "__main__":
    main()
