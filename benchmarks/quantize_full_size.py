"""Time and memory of `quantize` at full size, beside the conventional way, and whether both give the same weights.

    python benchmarks/quantize_full_size.py --work /tmp/full-size --output benchmarks/quantize_h100.json

One run on one machine, each step in its own process: synthesize the original repository (31.6 GB, which leaves it in
the page cache), quantize it, quantize it the conventional way (``from_pretrained`` with a quantization config, then
``save_pretrained``), compare the two tensor by tensor, and quantize it with scale search. Needs 51 GB of disk.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.children import answer

# OURS is stock NF4, as the conventional way gives it; SEARCHED has scales of least error.
ORIGINAL, OURS, SEARCHED, CONVENTIONAL = "ERNIE-Image", "stock", "ERNIE-Image-NF4", "conventional"
# Byte counts of baidu/ERNIE-Image and of its NF4 release.
PUBLISHED = {
    "original": {"transformer": 16067025160, "text_encoder": 7698241104, "pe": 7663346520},
    "nf4": {"transformer": 4146045428, "text_encoder": 2585177824, "pe": 2367115496},
}
GIB = 1024**3
SAMPLE_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the repositories, deleted at the end")
    parser.add_argument("--output", type=Path, default=Path("quantize_full_size.json"))
    parser.add_argument("--preset", default="full", choices=["full", "tiny"])
    parser.add_argument("--keep-files", action="store_true")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measured(STEPS[arguments.step], arguments.work, arguments.preset)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "preset": arguments.preset}
    for step in STEPS:
        if step == "scale_search":  # First compare what the earlier steps wrote, and free its disk space
            result |= {"bytes": sizes(arguments.work), "same_weights": compare(arguments.work)}
            for name in (OURS, CONVENTIONAL):
                shutil.rmtree(arguments.work / name)
        print(f"{step} ...", flush=True)
        os.sync()  # Write out the previous step's data before this step is timed
        command = [sys.executable, __file__, "--step", step, "--work", arguments.work, "--preset", arguments.preset]
        result[step] = answer(command)
        print(json.dumps(result[step]), flush=True)
    result |= {"machine": machine()}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    if not arguments.keep_files:
        shutil.rmtree(arguments.work)


def synthesize(work: Path, preset: str) -> None:
    from ernie_image_nf4.quantization.synthetic import synthesize

    synthesize(work / ORIGINAL, preset=preset, progress=False)


def quantize(work: Path, preset: str) -> None:
    from ernie_image_nf4.quantization.convert import quantize

    quantize(work / ORIGINAL, work / OURS, scale_search=False, default_keep=False, progress=False)


def scale_search(work: Path, preset: str) -> None:
    from ernie_image_nf4.quantization.convert import quantize

    quantize(work / ORIGINAL, work / SEARCHED, default_keep=False, progress=False)


def conventional(work: Path, preset: str) -> None:
    import torch

    from ernie_image_nf4.repository.components import QUANTIZED

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        allow_nf4_on_cpus()
    for component in QUANTIZED:
        library = importlib.import_module(component.library)
        config = library.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = getattr(library, component.class_name).from_pretrained(
            work / ORIGINAL / component.name,
            quantization_config=config,
            torch_dtype=torch.bfloat16,
            device_map={"": device},
            local_files_only=True,
        )
        model.save_pretrained(work / CONVENTIONAL / component.name)
        del model
        torch.cuda.empty_cache()


def allow_nf4_on_cpus() -> None:
    """Take back diffusers' demand for a GPU, which bitsandbytes no longer has, in this process alone."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    BnB4BitDiffusersQuantizer.validate_environment = lambda *args, **kwargs: None
    BnB4BitDiffusersQuantizer.update_device_map = lambda self, device_map: device_map


STEPS = {"synthesize": synthesize, "quantize": quantize, "conventional": conventional, "scale_search": scale_search}


def measured(step: Callable[[Path, str], None], work: Path, preset: str) -> dict[str, float]:
    """Run a step and measure its seconds, without imports, and its peaks of memory.

    ``host_gib`` is the anonymous and shared memory of the process, without page cache and mapped files, which the
    system can drop. ``host_rss_gib`` includes mapped files, among them the libraries. ``gpu_reserved_gib`` is
    PyTorch's; ``gpu_device_gib`` is the drop in the device's free memory.
    """
    import diffusers
    import torch
    import transformers

    import ernie_image_nf4.quantization.convert  # noqa: F401

    # Imported on first use, which would count as work.
    _ = diffusers.ErnieImageTransformer2DModel, transformers.Mistral3Model, transformers.Ministral3ForCausalLM
    gpu = torch.cuda.is_available()
    if gpu:
        torch.zeros(1, device="cuda")  # Initialize CUDA
    with peaks(gpu) as peak:
        began = time.perf_counter()
        step(work, preset)
        result = {"seconds": round(time.perf_counter() - began, 2)}
    result |= {f"{name}_gib": round(size / GIB, 3) for name, size in peak.items()}
    if gpu:
        result["gpu_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    return result


@contextmanager
def peaks(gpu: bool) -> Iterator[dict[str, int]]:
    """Sample the memory of this process and of the GPU, in bytes, inside the context."""
    import torch

    peak = {"host": 0, "host_rss": 0} | ({"gpu_device": 0} if gpu else {})
    free_before = torch.cuda.mem_get_info()[0] if gpu else 0
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            size = {name: int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "VmRSS")}
            peak["host"] = max(peak["host"], size["RssAnon"] + size["RssShmem"])
            peak["host_rss"] = max(peak["host_rss"], size["VmRSS"])
            if gpu:
                peak["gpu_device"] = max(peak["gpu_device"], free_before - torch.cuda.mem_get_info()[0])

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def machine() -> dict[str, Any]:
    import torch

    from ernie_image_nf4.repository.metadata import installed_versions

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }


def sizes(work: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes of the weight files, and their difference to the published ones."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for kind, folder in (("original", ORIGINAL), ("nf4", OURS)):
        for name, published in PUBLISHED[kind].items():
            size = sum(file.stat().st_size for file in (work / folder / name).glob("*.safetensors"))
            found.setdefault(kind, {})[name] = {"bytes": size, "minus_published": size - published}
    return found


def compare(work: Path) -> dict[str, dict[str, Any]]:
    """Compare all stored tensors of the two ways bit by bit, and the whole files."""
    from safetensors import safe_open

    from ernie_image_nf4.repository.components import QUANTIZED

    result = {}
    for component in QUANTIZED:
        ours, theirs = (work / folder / component.name / component.weights for folder in (OURS, CONVENTIONAL))
        with safe_open(ours, framework="pt") as one, safe_open(theirs, framework="pt") as other:
            shared = {*one.keys()} & {*other.keys()}
            names = {*one.keys(), *other.keys()}
            differing = [
                name for name in names if name not in shared or not same(one.get_tensor(name), other.get_tensor(name))
            ]
        result[component.name] = {
            "tensors": len(names),
            "nf4_layers": sum(name.endswith(".absmax") for name in names),
            "differing_tensors": sorted(differing),
            "files_identical": filecmp.cmp(ours, theirs, shallow=False),
        }
        print(component.name, json.dumps(result[component.name]), flush=True)
    return result


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


if __name__ == "__main__":
    main()
