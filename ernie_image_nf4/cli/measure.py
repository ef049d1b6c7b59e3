"""Commands that measure: ``evaluate`` for fidelity, ``benchmark`` for speed and memory."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DeviceOption, GuidanceOption, MemoryOption, QuietOption, SizeOption, StepsOption


def evaluate(
    reference: Annotated[str, typer.Argument(help="Folder or Hub id to compare with, usually the original.")],
    candidates: Annotated[
        list[str],
        typer.Argument(
            metavar="CANDIDATE...",
            help="Folders, Hub ids, or quantizations made of the reference: nf4-stock, sdnq-uint4, "
            "sdnq-uint4-products, sdnq-int8, torchao-int4, torchao-float8, quanto-int4, quanto-int8, gguf-q4_0.",
        ),
    ],
    out_dir: Annotated[Path, typer.Option(help="Folder for tables, grid and plots.")] = Path("evaluation"),
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="Prompts as for generate, with seeds if they like. Default: eight built-in ones."),
    ] = None,
    height: SizeOption = None,
    width: SizeOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt's noise; the others count up.")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures to draw together.")] = 1,
    device: DeviceOption = None,
    memory: MemoryOption = "auto",
    download_metrics: Annotated[
        bool, typer.Option("--download-metrics", help="Let LPIPS, CLIP score, FID and KID download their networks.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how far quantized repositories, and other libraries' quantizations, are from an original."""
    from ..generation.prompt_file import read_prompts

    prompts = read_prompts(prompts_file) if prompts_file else None
    from ..evaluation.report import write_report
    from ..evaluation.run import evaluate
    from ..generation.image_file import make_output_folder

    make_output_folder(out_dir)
    for evaluation in evaluate(
        reference,
        candidates,
        prompts=prompts,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch,
        device=device,
        memory=memory,
        download_metrics=download_metrics,
        command=shlex.join(["ernie-image-nf4", *sys.argv[1:]]),
        progress=not quiet,
    ):
        files = write_report(evaluation, out_dir)
    typer.echo(f"Wrote {', '.join(str(file) for file in files)}")
    failed = [result for result in evaluation.results if result.error]
    for result in failed:
        typer.echo(f"  {result.name}: {result.error}", err=True)
    if any(result.kind == "repository" for result in failed):
        raise typer.Exit(1)


def benchmark(
    model: Annotated[
        str | None, typer.Argument(help="Folder of the NF4 repository. Left out with --synthetic.")
    ] = None,
    original: Annotated[Path | None, typer.Option(help="Folder of the original, for the arms that need it.")] = None,
    synthetic: Annotated[
        Path | None,
        typer.Option(help="Folder for both at full size with random weights (41 GB), made there if they aren't yet."),
    ] = None,
    out_dir: Annotated[Path, typer.Option(help="Folder for JSON, table and chart.")] = Path("benchmark"),
    arm: Annotated[
        list[str] | None, typer.Option(help="Arm to run; may be repeated. Default: all but baselines.")
    ] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Run other libraries' quantizations as well.")] = False,
    peers: Annotated[bool, typer.Option("--peers", hidden=True)] = False,
    size: Annotated[int, typer.Option(min=16, help="Height and width of the pictures.")] = 512,
    large: Annotated[int, typer.Option(min=0, help="Another size, for step time and memory; 0 for none.")] = 1024,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 4.0,
    tokens: Annotated[int, typer.Option(min=0, help="New tokens of the prompt enhancer; 0 leaves it out.")] = 256,
    pictures: Annotated[int, typer.Option(min=2, help="Pictures in a row after one load.")] = 10,
    growth: Annotated[bool, typer.Option(help="Measure a step at four sizes and three batches.")] = True,
    device: Annotated[str, typer.Option(help="Device to measure.")] = "cuda",
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interrupted run left in --out-dir, and measure the rest.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Only this package, one row to send us; begins nothing new after 90 s. Takes --size, "
            "--large and --device of the other options.",
        ),
    ] = False,
) -> None:
    """Measure speed and memory of this package, of the model card's demo and of the original, in a process each."""
    from ..benchmarking.arms import Workload, choose_arms
    from ..errors import InvalidSettings
    from ..generation.image_file import make_output_folder

    try:
        arms = choose_arms(arm or (), baselines=baselines or peers)
    except InvalidSettings as error:
        raise typer.BadParameter(str(error), param_hint="--arm") from error
    _check(model, synthetic, device, {"--size": size, "--large": large})
    if not quick:
        make_output_folder(out_dir)
    nf4, original = _repositories(model, original, synthetic)
    if quick:
        _print_row(nf4, [size, large] if large else [size], device)
        return
    workload = Workload(size, steps, guidance, tokens, pictures, large or None)
    options: dict[str, Any] = {"arms": arms, "workload": workload, "device": device, "growth": growth}
    _benchmark_into(out_dir, nf4, original, resume, options)


def _benchmark_into(out_dir: Path, nf4: Path, original: Path | None, resume: bool, options: dict[str, Any]) -> None:
    """Run `benchmark` and write its result, or the rest of one that an interrupted run left."""
    from ..benchmarking.interrupted import read_result
    from ..benchmarking.report import write_benchmark
    from ..benchmarking.run import benchmark

    files: list[Path] = []

    def keep(result: dict[str, Any]) -> None:  # After each part, so that an interrupted run leaves what it had
        files[:] = write_benchmark(result, out_dir)

    earlier = read_result(out_dir / "benchmark.json") if resume else None
    benchmark(nf4, original, out_dir / "work", earlier=earlier, on_progress=keep, **options)
    typer.echo(f"Wrote {', '.join(str(file) for file in files)}")


def _print_row(model: Path, sizes: list[int], device: str) -> None:
    """The row of ``--quick``."""
    from ..benchmarking.quick import benchmark_quick, row

    typer.echo(row(benchmark_quick(model, sizes, device=device)))


def _repositories(model: str | None, original: Path | None, synthetic: Path | None) -> tuple[Path, Path | None]:
    """Folders of the NF4 repository and of the original."""
    from ..benchmarking.run import make_synthetic
    from ..repository.resolve import find_repository

    if synthetic:
        return make_synthetic(synthetic)
    return find_repository(model), original


def _check(model: str | None, synthetic: Path | None, device: str, sides: dict[str, int]) -> None:
    """Refuse none and both of a repository and one to be made, and a device that isn't there, before one is made.

    Also sides of pictures, by their options, that no picture can have.
    """
    from ..memory.placement import find_device

    for option, side in sides.items():
        if side % 16:
            raise typer.BadParameter(f"{side} is no multiple of 16: try {side // 16 * 16 + 16}.", param_hint=option)
    if model is None and synthetic is None:
        raise typer.BadParameter(
            "name an NF4 repository, or a folder for a synthetic one (--synthetic).", param_hint="MODEL"
        )
    if model is not None and synthetic is not None:
        raise typer.BadParameter("it is made instead of MODEL: leave one of them out.", param_hint="--synthetic")
    find_device(device)
