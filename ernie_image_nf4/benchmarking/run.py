"""Speed and memory of ways to run ERNIE-Image on one GPU, each way in a process of its own, all in one run.

The model card's two experiments: one picture, and several in a row after one load. On random weights the prompt enhancer finds no
end, and on others every prompt's is elsewhere: so it is made to write a fixed number of tokens.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceUnavailable, InvalidSettings

if TYPE_CHECKING:
    import torch
    from diffusers import ErnieImagePipeline

# The first of the two prompts of the model card that this project set out from.
PROMPT = (
    "A realistic orange kitten sits on a wooden desk with a white sheet of paper that says Hello ERNIE-Image NF4, "
    "soft natural lighting, centered composition."
)
GIB = 1024**3
TIMESTEPS = tuple(range(1000, 0, -100))
TEXT_LENGTHS = (3, 24)  # tokens of an empty prompt and of one, for predictions
# Of all that is imported, what takes longest. bitsandbytes is not among it: it initializes CUDA, after which no process can be
# forked. So do some packages that transformers imports where they are installed (torchao).
PRELOADED = (
    "torch",
    "transformers.models.mistral3.modeling_mistral3",
    "transformers.models.ministral3.modeling_ministral3",
)
FLOPS_A_PRODUCT = 2  # a multiplication and an addition


@dataclass(frozen=True)
class Arm:
    """A way to run the model.

    Attributes:
        name: In the report.
        way: ``"original"`` (bfloat16 with diffusers' CPU offload), ``"demo"`` (the model card's plain ``from_pretrained`` calls),
            ``"ours"`` (`load`), or ``"peer"``.
        options: Arguments of `load`, or the peer's name as ``peer``.
        pictures: How many to draw in a row; None for the run's number. Fewer do for the slow ones: medians need a few.
        cold: Whether the caches of compiled code and kernels are emptied before, so that the first picture is that of a first start.
    """

    name: str
    way: str
    options: dict[str, Any] = field(default_factory=dict)
    pictures: int | None = None
    cold: bool = False


ARMS = (
    Arm("demo", "demo", pictures=4),
    Arm("resident, first start", "ours", {"memory": "resident"}, pictures=2, cold=True),
    Arm("resident", "ours", {"memory": "resident"}),
    Arm("resident, compiled, first start", "ours", {"memory": "resident", "compile": True}, pictures=2, cold=True),
    Arm("resident, compiled", "ours", {"memory": "resident", "compile": True}),
    Arm("offload", "ours", {"memory": "offload"}, pictures=4),
    Arm("stream", "ours", {"memory": "stream"}, pictures=4),
    Arm("resident, fp8", "ours", {"memory": "resident", "fp8": True}, pictures=4),
    Arm("original, CPU offload", "original", pictures=2),
)
REFERENCE = ARMS[0].name
EXACT = "float32"  # predictions of the demo's weights, computed in it
LOADED_AGAIN = (REFERENCE, "resident")


@dataclass(frozen=True)
class Workload:
    """What every arm does.

    Attributes:
        size: Height and width of the pictures.
        steps: Denoising steps.
        guidance: Guidance scale.
        tokens: New tokens of the prompt enhancer; 0 leaves it out.
        pictures: In a row after one load.
        large: Another size, drawn twice at the end with a fifth of the steps and without the prompt enhancer; None for none.
        loads: How often the arms `LOADED_AGAIN` are loaded, each time in a process of its own.
    """

    size: int = 512
    steps: int = 50
    guidance: float = 4.0
    tokens: int = 256
    pictures: int = 10
    large: int | None = 1024
    loads: int = 5


def choose_arms(names: Sequence[str], *, peers: bool = False) -> list[Arm]:
    """The arms of these names, or all; with the peers, other libraries' quantizations, if asked for or named.

    Raises:
        InvalidSettings: There is no arm of that name.
    """
    from ..evaluation.baselines import PEERS

    known = {arm.name: arm for arm in ARMS}
    others = {name: Arm(name, "peer", {"peer": name}, pictures=4) for name in PEERS if name != "nf4-stock"}
    for name in names:
        if name not in known | others:
            raise InvalidSettings(f"There is no arm {name!r}: choose of {'; '.join(known | others)}.")
    if names:
        return [(known | others)[name] for name in names]
    return [*known.values(), *(others.values() if peers else ())]


def make_synthetic(folder: str | Path) -> tuple[Path, Path]:
    """Full-size repositories with random weights in `folder`, NF4 and original, made unless they are there."""
    from ..quantization.convert import quantize
    from ..quantization.synthetic import synthesize

    original, nf4 = Path(folder) / "ERNIE-Image", Path(folder) / "ERNIE-Image-NF4"
    if not (original / "README.md").exists():  # which is written last
        shutil.rmtree(original, ignore_errors=True)
        synthesize(original)
    if not nf4.exists():  # which it does once it is finished
        quantize(original, nf4)
    return nf4, original


def benchmark(
    model: str | Path,
    original: str | Path | None,
    work: str | Path,
    *,
    arms: Sequence[Arm] = ARMS,
    workload: Workload = Workload(),
    device: str = "cuda",
    growth: bool = True,
    on_progress: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run all arms and collect what they measured.

    Args:
        model: Folder of the NF4 repository.
        original: Folder of the original one; None leaves out the arms that need it.
        work: Folder for the compiler's cache and the predictions that are compared.
        arms: What to run, in this order.
        workload: What each does.
        device: Where.
        growth: Whether to measure how a step's time grows with size and batch.
        on_progress: Called with the result so far after each arm and each later part: a run takes a quarter of an hour.

    Returns:
        Machine, versions, command, workload, a list of ``arms`` with their figures or the error that kept one from running, the seconds
        that the predictions in ``float32`` took or the error that kept them from being made, and the table of ``growth``.

    Raises:
        DeviceUnavailable: There is no such device.
    """
    from ..memory.placement import find_device

    find_device(device)
    work = Path(work)
    work.mkdir(parents=True, exist_ok=True)
    in_a_process = functools.partial(_in_a_process, _process_context(device))
    result: dict[str, Any] = in_a_process(_machine, device)
    if "error" in result:
        raise DeviceUnavailable(f"Processes of their own can't use {device}: {result['error']}")
    result |= {"workload": asdict(workload), "prompt": PROMPT, "arms": []}
    for file in work.glob("*.safetensors"):  # predictions of an earlier run
        file.unlink()
    if workload.loads > 1:
        in_a_process(
            _measure, arms[0], model, original, work, workload, device, 0
        )  # so that no arm is the first of all
    for arm in arms:
        print(f"{arm.name} ...", file=sys.stderr, flush=True)
        figures = in_a_process(_measure, arm, model, original, work, workload, device)
        result["arms"].append({"name": arm.name, "way": arm.way, "options": arm.options} | figures)
        print(f"  {_brief(figures)}", file=sys.stderr, flush=True)
        _compare_predictions(result["arms"], work)
        on_progress(result)
    # Loading depends on what the machine has just done: a median of several.
    for arm, row in zip(arms, result["arms"], strict=True):
        if arm.name in LOADED_AGAIN and "error" not in row:
            again = [
                in_a_process(_measure, arm, model, original, work, workload, device, 0)
                for _ in range(workload.loads - 1)
            ]
            row["all_load_s"] = [row["load_s"], *(figures["load_s"] for figures in again if "load_s" in figures)]
            row["load_s"] = statistics.median(row["all_load_s"])
            on_progress(result)
    result["float32"] = in_a_process(_exact_predictions, model, work, workload.size, device)
    _compare_predictions(result["arms"], work)
    on_progress(result)
    if growth:
        result["growth"] = in_a_process(_growth, model, device)
        on_progress(result)
    return result


def _in_a_process(context: BaseContext, function, *arguments) -> dict[str, Any]:
    """`function(*arguments)` in a fresh process, or the error that it ended with."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"error": "the process was killed, probably for lack of memory"}
        except Exception as error:  # an arm that can't run says why, and the others go on
            return {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}


def _process_context(device: str) -> BaseContext:
    """How to start fresh processes: forked, where they can use the device then, from one that has made the slow imports."""
    if "forkserver" in get_all_start_methods():
        context = get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        if "error" not in _in_a_process(context, _machine, device):
            return context
    return get_context("spawn")


def _machine(device: str) -> dict[str, Any]:
    import torch

    from ..repository.metadata import installed_versions

    cuda = device.startswith("cuda")
    return {
        "machine": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "versions": installed_versions() | {"python": platform.python_version()},
        "command": " ".join(["python", "-m", "ernie_image_nf4", *sys.argv[1:]]),
    }


# One arm


def _measure(
    arm: Arm,
    model: str | Path,
    original: str | Path | None,
    work: Path,
    workload: Workload,
    device: str,
    pictures: int | None = None,
) -> dict[str, Any]:
    """All figures of one arm, or those of loading alone if there are to be no pictures. Runs in its own process."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": work / "compiled", "TRITON_CACHE_DIR": work / "kernels"}
    for name, cache in caches.items():
        if arm.cold:
            shutil.rmtree(cache, ignore_errors=True)
        os.environ[name] = str(cache)
    import torch

    _import_all()
    folder = (
        Path(original if arm.way in ("original", "peer") else model) if (original or arm.way != "original") else None
    )
    if folder is None:
        raise InvalidSettings("It needs the original repository: name it with --original.")
    _read_all(folder)
    torch.zeros(1, device=device)
    began = time.perf_counter()
    pipe = _load(arm, folder, device)
    _synchronize(device)
    figures: dict[str, Any] = {"load_s": time.perf_counter() - began}
    figures |= {f"loading_{key}": value for key, value in _peaks(device).items()}
    _forget_peaks(device)
    if pictures == 0:
        return figures
    pipe.set_progress_bar_config(disable=True)
    tokens = workload.tokens if pipe.pe is not None else 0
    drawn = []
    for seed in range(min(arm.pictures or workload.pictures, workload.pictures)):
        drawn.append(_picture(pipe, workload.size, workload.steps, workload.guidance, tokens, seed, device))
    figures |= {"pictures": drawn} | _medians(drawn, tokens) | _peaks(device)
    predicted = predictions(pipe, workload.size, device)
    predicted["reordered"] = predictions(pipe, workload.size, device, reordered=True)["prediction"]
    _save(predicted, _prediction_file(work, arm.name))
    if workload.large:
        _forget_peaks(device)
        steps = max(2, workload.steps // 5)
        large = [_picture(pipe, workload.large, steps, workload.guidance, 0, seed, device) for seed in range(2)]
        figures["large"] = {"size": workload.large, "step_ms": large[-1]["step_ms"]} | _peaks(device)
    return figures


def _import_all() -> None:
    """Imports what any arm uses, which is no part of loading. Both libraries import a class when it is first asked for."""
    from ..fast import prompt_enhancer  # noqa: F401
    from ..fast import transformer as denoising  # noqa: F401
    from ..loading import pipeline as loading  # noqa: F401
    from ..repository.components import COMPONENTS, PIPELINE_CLASS

    for library, name in (("diffusers", PIPELINE_CLASS), *((part.library, part.class_name) for part in COMPONENTS)):
        getattr(import_module(library), name)


def _load(arm: Arm, folder: Path, device: str) -> ErnieImagePipeline:
    import torch
    from diffusers import ErnieImagePipeline

    from ..loading.pipeline import DTYPE_ARGUMENT, load
    from ..repository.components import QUANTIZED

    if arm.way == "ours":
        return load(folder, device=device, **arm.options)
    if arm.way == "peer":
        from ..evaluation.baselines import load_peer

        return load_peer(arm.options["peer"], folder, device=device)
    dtypes = {library: {name: torch.bfloat16} for library, name in DTYPE_ARGUMENT.items()}
    parts = {}
    if arm.way == "demo":
        parts = {
            part.name: getattr(import_module(part.library), part.class_name).from_pretrained(
                folder / part.name, device_map={"": device}, local_files_only=True, **dtypes[part.library]
            )
            for part in QUANTIZED
        }
    pipe = ErnieImagePipeline.from_pretrained(folder, **parts, **dtypes["diffusers"], local_files_only=True)
    if arm.way == "demo":
        pipe.vae.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)
    return pipe


def _picture(
    pipe: ErnieImagePipeline, size: int, steps: int, guidance: float, tokens: int, seed: int, device: str
) -> dict[str, float]:
    """Draw one picture: its seconds, those of its prompt enhancer, and the median milliseconds of a step."""
    import torch

    moments: list[float] = []

    def on_step_end(pipe, step, timestep, kwargs):
        _synchronize(device)  # upstream waits there as well, for the next timestep
        moments.append(time.perf_counter())
        return kwargs

    torch.manual_seed(seed)  # from which the prompt enhancer samples
    with _counted_tokens(pipe, tokens, device) as enhancing:
        _synchronize(device)
        began = time.perf_counter()
        result = pipe(
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            use_pe=tokens > 0,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=on_step_end,
        )
        _synchronize(device)
    figures = {
        "seconds": time.perf_counter() - began,
        "prompt_enhancer_s": sum(enhancing),
        "text_tokens": len(pipe.tokenizer((result.revised_prompts or [PROMPT])[0])["input_ids"]),
        "step_ms": 1000 * statistics.median(later - earlier for earlier, later in itertools.pairwise(moments)),
    }
    if device.startswith("cuda"):
        figures["reserved_gib"] = torch.cuda.memory_reserved(device) / GIB
    return figures


@contextmanager
def _counted_tokens(pipe: ErnieImagePipeline, tokens: int, device: str) -> Iterator[list[float]]:
    """Let the prompt enhancer write `tokens` tokens; collects the seconds that it takes."""
    seconds: list[float] = []
    if not tokens:
        yield seconds
        return
    generate = pipe.pe.generate

    @functools.wraps(generate)
    def timed(*args, **kwargs):
        _synchronize(device)
        began = time.perf_counter()
        output = generate(*args, **kwargs | {"min_new_tokens": tokens, "max_new_tokens": tokens})
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
        return output

    pipe.pe.generate = timed
    try:
        yield seconds
    finally:
        pipe.pe.generate = generate


def _medians(pictures: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """Of the pictures after the first, where there are any; what the first took beyond is its overhead."""
    later = pictures[1:] or pictures
    medians = {
        key: statistics.median(picture[key] for picture in later) for key in ("seconds", "prompt_enhancer_s", "step_ms")
    }
    figures = {
        "first_s": pictures[0]["seconds"],
        "seconds": medians["seconds"],
        "slowest_over_median": max(picture["seconds"] for picture in later) / medians["seconds"],
        "step_ms": medians["step_ms"],
    }
    if tokens:
        figures["prompt_enhancer_ms_per_token"] = 1000 * medians["prompt_enhancer_s"] / tokens
        figures["prompt_enhancer_first_overhead_s"] = pictures[0]["prompt_enhancer_s"] - medians["prompt_enhancer_s"]
    return figures


def _peaks(device: str) -> dict[str, float]:
    import torch

    if not device.startswith("cuda"):
        return {}
    return {
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
    }


def _forget_peaks(device: str) -> None:
    """Give unused memory back and measure peaks anew."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _read_all(folder: Path) -> None:
    """Read all weight files, so that every arm finds them in the page cache."""

    def read(file: Path) -> None:
        block = bytearray(1 << 24)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, folder.rglob("*.safetensors")))


# Predictions


def predictions(
    pipe: ErnieImagePipeline, size: int, device: str, *, reordered: bool = False
) -> dict[str, torch.Tensor]:
    """The transformer's prediction for fixed latents and embeddings of a pair of prompts, (timesteps, 2, C, h, w) float32.

    Reordered: with the two rows of the batch exchanged, and exchanged back in the result.
    """
    import torch

    from ..repository.components import PIXELS_PER_PATCH

    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    generator = torch.Generator("cpu").manual_seed(0)
    side = size // PIXELS_PER_PATCH
    latents = torch.randn(1, config.in_channels, side, side, generator=generator).expand(2, -1, -1, -1)
    text = torch.randn(2, max(TEXT_LENGTHS), config.text_in_dim, generator=generator)
    text[0, TEXT_LENGTHS[0] :] = 0
    lengths = torch.tensor(TEXT_LENGTHS)
    if reordered:
        text, lengths = text.flip(0), lengths.flip(0)
    rows = []
    for timestep in TIMESTEPS:
        with torch.no_grad():
            row = pipe.transformer(
                hidden_states=latents.to(device, dtype),
                timestep=torch.full((2,), timestep, device=device, dtype=dtype),
                text_bth=text.to(device, dtype),
                text_lens=lengths.to(device),
                return_dict=False,
            )[0]
        rows.append((row.flip(0) if reordered else row).float().cpu())
    return {"prediction": torch.stack(rows)}


def _prediction_file(work: Path, arm: str) -> Path:
    return work / f"{arm.replace(', ', '-').replace(' ', '-')}.safetensors"


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def _exact_predictions(model: str | Path, work: Path, size: int, device: str) -> dict[str, float]:
    """Save what the plain pipeline predicts in float32: what rounding to bfloat16 takes from each arm is seen against it."""
    from ..loading.pipeline import load

    pipe = load(model, device=device, dtype="float32", fast=False, prompt_enhancer=False)
    began = time.perf_counter()
    _save(predictions(pipe, size, device), _prediction_file(work, EXACT))
    return {"seconds": time.perf_counter() - began}


def _compare_predictions(arms: list[dict[str, Any]], work: Path) -> None:
    """Add to each arm its `largest_error` against the demo (to the demo that of its own reordered batch), and against float32."""
    from safetensors.torch import load_file

    files = {name: _prediction_file(work, name) for name in (REFERENCE, EXACT)}
    if not files[REFERENCE].exists() or all(arm["name"] != REFERENCE or "error" in arm for arm in arms):
        return
    reference = load_file(files[REFERENCE])
    exact = load_file(files[EXACT])["prediction"] if files[EXACT].exists() else None
    for arm in arms:
        if "error" in arm or arm["way"] not in ("demo", "ours"):  # the others have other weights
            continue
        own = load_file(_prediction_file(work, arm["name"]))
        other = own["reordered" if arm["name"] == REFERENCE else "prediction"]
        arm["prediction_error"] = largest_error(other, reference["prediction"])
        if exact is not None:
            arm["prediction_error_to_float32"] = largest_error(own["prediction"], exact)


def largest_error(one: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest relative error over the timesteps, of `predictions`."""
    difference = (one - reference).flatten(1).norm(dim=1)
    return (difference / reference.flatten(1).norm(dim=1)).max().item()


# How a step grows


def _growth(model: str | Path, device: str) -> dict[str, Any]:
    """Milliseconds of one denoising step with guidance, by size and batch, over the time that its products alone would take."""
    import torch

    from ..loading.pipeline import load
    from ..repository.components import PIXELS_PER_PATCH

    pipe = load(model, device=device, memory="resident", prompt_enhancer=False)
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    rate = _product_rate(device, dtype)
    text_tokens = max(TEXT_LENGTHS)
    rows = []
    for size in (512, 768, 1024, 1536):
        for batch in (1, 2, 4):
            side = size // PIXELS_PER_PATCH
            inputs = {
                "hidden_states": torch.randn(2 * batch, config.in_channels, side, side, device=device, dtype=dtype),
                "timestep": torch.full((2 * batch,), 500.0, device=device, dtype=dtype),
                "text_bth": torch.randn(2 * batch, text_tokens, config.text_in_dim, device=device, dtype=dtype),
                "text_lens": torch.full((2 * batch,), text_tokens, device=device),
            }
            seconds = _best_seconds(functools.partial(_no_grad, pipe.transformer, inputs), device)
            operations = step_operations(config, 2 * batch, side * side + text_tokens)
            rows.append(
                {
                    "size": size,
                    "batch": batch,
                    "step_ms": 1000 * seconds,
                    "tflop": operations / 1e12,
                    "over_floor": seconds * rate / operations,
                }
            )
    return {"tflop_per_s": rate / 1e12, "rows": rows}


def step_operations(config: Any, rows: int, tokens: int) -> float:
    """Floating point operations of the products of one forward pass of the transformer, attention included.

    Args:
        config: Of the transformer.
        rows: Of the batch.
        tokens: Of a row, text included.
    """
    width, inner = config.hidden_size, config.ffn_hidden_size
    block = (
        4 * width * width + 3 * width * inner + 2 * tokens * width
    )  # weights a token meets, and queries with keys, values
    return FLOPS_A_PRODUCT * rows * tokens * block * config.num_layers


def _product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of one large product of matrices."""
    import torch

    side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return FLOPS_A_PRODUCT * side**3 / _best_seconds(lambda: a @ b, device)


def _best_seconds(function, device: str, repeats: int = 5) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        began = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _no_grad(module, inputs: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        module(**inputs)


# Report


def _brief(figures: dict[str, Any]) -> str:
    if "error" in figures:
        return figures["error"]
    return ", ".join(
        f"{key} {figures[key]:.3g}"
        for key in ("load_s", "first_s", "seconds", "prompt_enhancer_ms_per_token", "step_ms", "peak_reserved_gib")
        if key in figures
    )


def summary(result: dict[str, Any]) -> dict[str, float]:
    """The headline figures of a run on an H100, as they stand in ``benchmarks/summary.json``; those of arms that failed are missing."""
    arms = {arm["name"]: arm for arm in result["arms"] if "error" not in arm}
    demo, resident, compiled = (arms.get(name, {}) for name in (REFERENCE, "resident", "resident, compiled"))
    offload, stream, fp8 = (arms.get(name, {}) for name in ("offload", "stream", "resident, fp8"))

    def ratio(one: dict, other: dict, *keys: str) -> float | None:
        for key in keys:
            one, other = one.get(key, {}), other.get(key, {})
        return one / other if one and other else None

    def peak(arm: dict) -> float | None:
        return max((arm[key] for key in ("loading_peak_reserved_gib", "peak_reserved_gib") if key in arm), default=None)

    figures = {
        "time_vs_demo.resident": ratio(resident, demo, "seconds"),
        "time_vs_demo.resident_compiled": ratio(compiled, demo, "seconds"),
        "pe_ms_per_token": resident.get("prompt_enhancer_ms_per_token"),
        "step_ms.eager_512": resident.get("step_ms"),
        "step_ms.compiled_512": compiled.get("step_ms"),
        "step_vs_demo.compiled_1024": ratio(compiled, demo, "large", "step_ms"),
        "peak_gib.resident_512": peak(resident),
        "peak_gib.offload_512": peak(offload),
        "peak_gib.stream_512": peak(stream),
        "peak_gib.offload_1024": offload.get("large", {}).get("peak_reserved_gib"),
        "peak_gib.stream_1024": stream.get("large", {}).get("peak_reserved_gib"),
        "time_vs_resident.offload": ratio(offload, resident, "seconds"),
        "time_vs_resident.stream": ratio(stream, resident, "seconds"),
        "load_time_vs_demo": ratio(resident, demo, "load_s"),
        "prediction_error.resident_compiled": compiled.get("prediction_error"),
        "time_vs_demo.resident_fp8": ratio(fp8, demo, "seconds"),
        "step_ms.fp8_512": fp8.get("step_ms"),
        "step_vs_demo.fp8_1024": ratio(fp8, demo, "large", "step_ms"),
        "prediction_error.resident_fp8": fp8.get("prediction_error"),
    }
    return {f"h100.{key}": float(f"{value:.4g}") for key, value in figures.items() if value is not None}
