"""A denoising step in other libraries' formats and in ours, at full size in one run: time, memory, seconds to make.

    pip install -e ".[baselines]"
    python -m benchmarks.peers --synthetic FOLDER --output benchmarks/peers_h100.json

The model has random weights, made in FOLDER (41 GB) unless it is there. Each arm is a process of its own with a limit
of its own, and of each only the transformer stays on the GPU: prompts are random embeddings. Its step is timed as in
``ernie-image-nf4 benchmark``: the median between the ends of a picture's steps, with guidance, the second of two
pictures. First plain, then by diffusers' ``compile_repeated_blocks``, compiled anew for each size; without
``fullgraph`` where the library can't be compiled with it. Ours isn't compiled: that would take its kernels away.

SDNQ tunes its kernels for quantized products, which takes minutes, and keeps what it found for its next arm. Arms are
compared with each other, so they all belong to one run: `--resume` goes on with one that was interrupted, on the same
machine with the same versions and settings, and else begins anew. `--preset tiny --device cpu` is for a try.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.children import apart, end_with_parent, write

if TYPE_CHECKING:
    import torch
    from diffusers import ErnieImagePipeline

CHECKOUT = Path(__file__).parents[1]
OURS = {"ours": "auto", "ours-int8": "int8", "ours-fp8": "fp8"}  # Arm -> products
ORIGINAL, NUNCHAKU = "bfloat16", "nunchaku-lite"
TUNING = ("sdnq-int8", "sdnq-uint4-products")
ARMS = (
    *(*OURS, ORIGINAL, "nf4-stock", "torchao-float8", "torchao-int4", "quanto-int4", "gguf-q4_0"),
    *("sdnq-uint4", *TUNING, NUNCHAKU),
)
SIZES = {"full": (512, 1024), "tiny": (32, 64)}
GUIDANCE = 4.0
WARM_UP_STEPS, STEPS = 2, 8  # of the two pictures of a size

Note = Callable[[dict[str, Any]], None]


def main() -> None:
    arguments = parse()
    if arguments.measure:
        measure_arm(arguments.measure, arguments)
    else:
        measure_all(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="peers", description=__doc__.splitlines()[0])
    parser.add_argument("--synthetic", type=Path, required=True, help="folder for the model with random weights")
    parser.add_argument("--output", type=Path, default=Path("peers.json"))
    parser.add_argument("--preset", default="full", choices=SIZES)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--limit", type=float, default=120, help="seconds of an arm")
    parser.add_argument("--tuning-limit", type=float, default=240, help="seconds of an arm that tunes its kernels")
    parser.add_argument("--resume", action="store_true", help="keep the arms that --output has, of an interrupted run")
    parser.add_argument("--no-compile", action="store_true", help="time plain steps only")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace) -> None:
    """Run all arms, and write what there is after each."""
    from ernie_image_nf4.benchmarking.device import describe_machine
    from ernie_image_nf4.benchmarking.predictions import TEXT_LENGTHS
    from ernie_image_nf4.benchmarking.run import make_synthetic
    from ernie_image_nf4.evaluation.environment import library_versions

    apart(functools.partial(make_synthetic, preset=arguments.preset), arguments.synthetic)
    found = apart(describe_machine, arguments.device)
    words = ["FOLDER" if word == str(arguments.synthetic) else word for word in sys.argv[1:] if word != "--resume"]
    result: dict[str, Any] = {
        "machine": found["machine"],
        "versions": library_versions(),
        "command": " ".join(["python -m benchmarks.peers", *words]),
        "settings": {
            "preset": arguments.preset,
            "sizes": SIZES[arguments.preset],
            "guidance": GUIDANCE,
            "text_tokens": TEXT_LENGTHS,
            "steps": STEPS,
        },
        "arms": [],
    }
    if arguments.resume:
        result["arms"] = arms_kept(arguments.output, result)
    done = {row["name"] for row in result["arms"]}
    with tempfile.TemporaryDirectory(prefix="peers-") as caches:
        for name in arguments.arms:
            if name in done:
                continue
            print(f"{name} ...", flush=True)
            limit = arguments.tuning_limit if name in TUNING else arguments.limit
            row = run_arm(name, limit, sys.argv[1:], Path(caches))
            print(f"  {json.dumps(row)}", flush=True)
            result["arms"].append(row)
            write(arguments.output, json.dumps(result, indent=2) + "\n")


def arms_kept(output: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an interrupted run left in a file; none if it was of another machine, other versions or settings."""
    from ernie_image_nf4.benchmarking.interrupted import is_same_run, read_result

    earlier = read_result(output)
    return earlier["arms"] if is_same_run(earlier, result, ("machine", "versions", "settings")) else []


def run_arm(name: str, limit_s: float, words: list[str], caches: Path) -> dict[str, Any]:
    """An arm in a process of its own: what it measured, and if it didn't end well, what it was in and why.

    Args:
        name: Of the arm.
        limit_s: Seconds after which it is killed, with all that it has started.
        words: Of this script's command line.
        caches: Folder for compiled kernels. What one library compiled or tuned is there for its next arm.
    """
    file = caches / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.peers", *words, "--measure", name, "--row", str(file)]
    kept = caches / (name if name in OURS else name.partition("-")[0])
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TRITON_CACHE_DIR": str(kept / "triton"),
        "TRITON_CACHE_AUTOTUNING": "1",
    }
    began = time.perf_counter()
    options: dict[str, Any] = {"cwd": CHECKOUT, "env": environment, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent(), **options)
    try:
        code = process.wait(limit_s)
        end = None if code == 0 else f"The process ended with code {code}" + (", killed" if code < 0 else "")
    except subprocess.TimeoutExpired:
        end = f"Not done after {limit_s:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # Inductor's workers too, which may outlive it
        process.wait()
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    row = {"name": name, "limit_s": limit_s, "seconds": round(time.perf_counter() - began, 1)} | figures
    return row if end is None else with_end(row, end)


def with_end(row: dict[str, Any], end: str) -> dict[str, Any]:
    """The row of a process that ended early, with its end where it was: in the compiled steps or before them."""
    doing = row.pop("doing", "ending" if "plain" in row else "starting")
    where = row.get("compiled", row)
    where.setdefault("error", f"{end}: {doing}")
    return row


def measure_arm(name: str, arguments: argparse.Namespace) -> None:
    """All figures of an arm, into its file after each, so that they are there if the process is killed.

    They are ``load_s``, for ours of text encoder and VAE as well; ``make_s``, seconds to quantize the transformer on
    the device; ``bits_per_weight``; ``gib``, what the transformer then holds on a GPU; ``plain`` and ``compiled``:
    size -> ``step_ms``, and on a GPU ``peak_reserved_gib``; when compiled also ``warm_up_s``.
    """
    figures: dict[str, Any] = {}

    def note(found: dict[str, Any]) -> None:
        figures.update(found)
        write(arguments.row, json.dumps(figures))

    try:
        pipe = open_arm(name, arguments, note)
        texts = random_texts(pipe, arguments.device)
        plain: dict[str, Any] = {}
        for size in SIZES[arguments.preset]:
            note({"doing": f"steps of {size}x{size}"})
            draw(pipe, texts, size, WARM_UP_STEPS, arguments.device)
            plain[str(size)] = draw(pipe, texts, size, STEPS, arguments.device)
            note({"plain": plain})
        if name not in OURS and not arguments.no_compile:
            time_compiled(pipe, texts, arguments, note)
    except Exception as error:  # Whatever another library raises where it can't work
        note({"error": first_line(error)})
    figures.pop("doing", None)
    note({})


def open_arm(name: str, arguments: argparse.Namespace, note: Note) -> ErnieImagePipeline:
    """The pipeline of an arm, of which only the transformer is there."""
    import torch

    from ernie_image_nf4.benchmarking.device import GIB, reset_peak_memory, synchronize

    note({"doing": "loading"})
    if name == NUNCHAKU:
        refuse_nunchaku_lite()
    torch.zeros(1, device=arguments.device)  # Initialize CUDA, which is no part of loading
    pipe, seconds = load_ours(name, arguments) if name in OURS else load_original(arguments)
    note({"load_s": round(seconds, 2), "doing": "making"})
    model = pipe.transformer
    shapes, weights = layout(arguments)
    if name not in (*OURS, ORIGINAL):
        from ernie_image_nf4.evaluation.baselines import BASELINES, baseline_version

        baseline_version(name)
        importlib.import_module(BASELINES[name].package.replace("-", "."))  # No part of making
        synchronize(arguments.device)
        began = time.perf_counter()
        with torch.no_grad():
            BASELINES[name].quantize(model)
        synchronize(arguments.device)
        note({"make_s": round(time.perf_counter() - began, 2)})
    from ernie_image_nf4.evaluation.weights import bits_per_weight, stored_bytes

    note({"bits_per_weight": round(bits_per_weight(stored_bytes(model, shapes), weights), 3)})
    gc.collect()
    reset_peak_memory(arguments.device)
    if arguments.device.startswith("cuda"):
        note({"gib": round(torch.cuda.memory_allocated(arguments.device) / GIB, 3)})
    return pipe


def load_ours(name: str, arguments: argparse.Namespace) -> tuple[ErnieImagePipeline, float]:
    """The NF4 repository as users load it, and the seconds that it took. Then all but the transformer is given up."""
    from ernie_image_nf4 import load
    from ernie_image_nf4.benchmarking.device import synchronize
    from ernie_image_nf4.benchmarking.run import NF4
    from ernie_image_nf4.benchmarking.worker import fill_page_cache

    folder = arguments.synthetic / NF4
    fill_page_cache(folder)
    began = time.perf_counter()
    pipe = load(folder, device=arguments.device, memory="resident", products=OURS[name], prompt_enhancer=False)
    synchronize(arguments.device)
    seconds = time.perf_counter() - began
    pipe.register_modules(text_encoder=None, tokenizer=None, vae=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe, seconds


def load_original(arguments: argparse.Namespace) -> tuple[ErnieImagePipeline, float]:
    """The original transformer in bfloat16 by diffusers, and the seconds that it took."""
    import torch
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from ernie_image_nf4.benchmarking.device import synchronize
    from ernie_image_nf4.benchmarking.run import ORIGINAL as FOLDER
    from ernie_image_nf4.benchmarking.worker import fill_page_cache
    from ernie_image_nf4.loading.from_pretrained import DTYPE_ARGUMENT

    folder = arguments.synthetic / FOLDER
    fill_page_cache(folder / "transformer")
    began = time.perf_counter()
    transformer = ErnieImageTransformer2DModel.from_pretrained(
        folder / "transformer",
        device_map={"": arguments.device},
        local_files_only=True,
        **{DTYPE_ARGUMENT["diffusers"]: torch.bfloat16},
    )
    synchronize(arguments.device)
    seconds = time.perf_counter() - began
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    pipe = ErnieImagePipeline(transformer, vae=None, text_encoder=None, tokenizer=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe, seconds


def layout(arguments: argparse.Namespace) -> tuple[dict[str, torch.Size], dict[str, torch.Tensor]]:
    """Shapes of the original's state dict, and the weights of its linear layers, without storage."""
    import torch
    from diffusers import ErnieImageTransformer2DModel

    from ernie_image_nf4.benchmarking.run import ORIGINAL as FOLDER
    from ernie_image_nf4.evaluation.weights import linear_layers

    config = ErnieImageTransformer2DModel.load_config(arguments.synthetic / FOLDER / "transformer")
    with torch.device("meta"):
        original = ErnieImageTransformer2DModel.from_config(config)
    shapes = {name: tensor.shape for name, tensor in original.state_dict().items()}
    return shapes, {name: layer.weight for name, layer in linear_layers(original).items()}


def refuse_nunchaku_lite() -> None:
    """Let diffusers say why it doesn't load Nunchaku's checkpoints on this GPU.

    Raises:
        Exception: Always: where diffusers would load them, there is none of these weights.
    """
    from diffusers import NunchakuLiteQuantizationConfig
    from diffusers.quantizers.nunchaku import nunchaku_quantizer

    layers = {"precision": "int4", "group_size": 64, "rank": 32, "targets": ["layers.0.self_attention.to_q"]}
    quantizer = nunchaku_quantizer.NunchakuLiteQuantizer(NunchakuLiteQuantizationConfig(svdq_w4a4=layers))
    # What it says first, that the package `kernels` is missing, is no reason that an installation couldn't end.
    with patch.object(nunchaku_quantizer, "is_kernels_available", return_value=True):
        quantizer.validate_environment()
    raise NotImplementedError("Nunchaku-Lite loads weights that were quantized elsewhere, and makes none.")


def random_texts(pipe: ErnieImagePipeline, device: str) -> list[torch.Tensor]:
    """Embeddings of an empty prompt and of a prompt, as `benchmark` takes them for predictions."""
    import torch

    from ernie_image_nf4.benchmarking.predictions import TEXT_LENGTHS

    generator = torch.Generator().manual_seed(0)
    width, dtype = pipe.transformer.config.text_in_dim, pipe.transformer.dtype
    return [torch.randn(length, width, generator=generator).to(device, dtype) for length in TEXT_LENGTHS]


def draw(pipe: ErnieImagePipeline, texts: list[torch.Tensor], size: int, steps: int, device: str) -> dict[str, float]:
    """Denoise one picture: the median of its steps, and on a GPU the memory reserved at the peak."""
    import torch

    from ernie_image_nf4.benchmarking.device import peak_memory, reset_peak_memory
    from ernie_image_nf4.benchmarking.worker import median_step_ms, step_clock

    negative, prompt = texts
    on_step_end, moments = step_clock(device)
    reset_peak_memory(device)
    pipe(
        prompt_embeds=[prompt],
        negative_prompt_embeds=[negative],
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
        callback_on_step_end=on_step_end,
    )
    found = {"step_ms": round(median_step_ms(moments), 3)}
    memory = peak_memory(device)
    return found | ({"peak_reserved_gib": round(memory["peak_reserved_gib"], 3)} if memory else {})


def time_compiled(
    pipe: ErnieImagePipeline, texts: list[torch.Tensor], arguments: argparse.Namespace, note: Note
) -> None:
    """Steps of compiled blocks, into ``compiled``, with the error if they can't be compiled either way."""
    import torch

    compiled: dict[str, Any] = {}
    for fullgraph in (True, False):
        failed = {"fullgraph_error": compiled["error"]} if compiled else {}
        compiled = {"fullgraph": fullgraph} | failed
        note({"compiled": compiled})
        try:
            pipe.transformer.compile_repeated_blocks(fullgraph=fullgraph)
            for size in SIZES[arguments.preset]:
                note({"doing": f"compiled steps of {size}x{size}"})
                torch.compiler.reset()  # Else the second size would be compiled for sizes of all kinds, which is slower
                began = time.perf_counter()
                draw(pipe, texts, size, WARM_UP_STEPS, arguments.device)
                seconds = round(time.perf_counter() - began, 2)
                compiled[str(size)] = draw(pipe, texts, size, STEPS, arguments.device) | {"warm_up_s": seconds}
                note({})
            return
        except Exception as error:  # Of whatever kind: dynamo's, inductor's, the library's
            compiled["error"] = first_line(error)
            note({})


def first_line(error: Exception) -> str:
    """An error in one line, as in the rows of `benchmark`."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


if __name__ == "__main__":
    main()
