"""The command line: ``ernie-image-nf4 ...`` and ``python -m ernie_image_nf4 ...``. No logic of its own.

Commands import what they need when they run, so that ``--help`` needs neither torch nor diffusers.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import ErnieImageNF4Error

app = typer.Typer(
    help="ERNIE-Image with NF4 weights: draw, quantize, check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """Run the command line. Errors a user can mend print one line and exit with 1, usage errors exit with 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # it may stand anywhere on the line
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.INFO)
    try:
        app(arguments, prog_name="ernie-image-nf4")
    except ErnieImageNF4Error as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        sys.exit(f"Error: {error}")
    except SystemExit as exit:
        if exit.code == INTERRUPTED:
            print("Interrupted.", file=sys.stderr)
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """ERNIE-Image with NF4 weights: draw, quantize, check."""


SizeOption = Annotated[int | None, typer.Option(help="Pixels. Default: as the model recommends.")]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps. Default: as the model recommends.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale. Default: as the model recommends.")]
MemoryOption = Annotated[str, typer.Option(help="auto, resident, offload or stream.")]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, xpu, mps or cpu. Default: the best there is.")]
ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder or Hub id. Default: the repository this package stands in.")
]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The PNG file; several become out-1.png, out-2.png ...")
    ] = Path("out.png"),
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="Many prompts instead of one: .txt (one a line), .jsonl or .csv. Needs --out-dir."),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option(help="Folder for the pictures of --prompts-file; what it has already is not redrawn.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder or Hub id. Default: the repository this package stands in."),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 16. Default: as the model recommends.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 16. Default: as the model recommends.")
    ] = None,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, 1 for none. Default: as the model recommends.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes the whole picture repeatable. Default: a random one; 0 with --prompts-file."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    no_pe: Annotated[
        bool, typer.Option("--no-pe", help="Draw the prompt as it is, without the prompt enhancer.")
    ] = False,
    count: Annotated[int, typer.Option(help="Pictures, with seeds counting up from the first.")] = 1,
    device: DeviceOption = None,
    memory: MemoryOption = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks; slows the first picture.")
    ] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Multiply in fp8 where the GPU can: faster, a little less precise.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures of --prompts-file to denoise together. Default: as the memory allows.")
    ] = None,
    contact_sheet: Annotated[
        bool, typer.Option("--contact-sheet", help="With --prompts-file, all pictures in one overview as well.")
    ] = False,
) -> None:
    """Draw a picture from a prompt, or many from a file of prompts."""
    if (prompt is None) == (prompts_file is None):
        raise typer.BadParameter("give either a prompt or --prompts-file.", param_hint="PROMPT")
    if (out_dir is None) != (prompts_file is None):
        raise typer.BadParameter("--prompts-file and --out-dir go together.", param_hint="--out-dir")
    if prompts_file is not None:
        _generate_many(
            prompts_file,
            out_dir,
            contact_sheet,
            {"device": device, "memory": memory, "compile": compile, "fp8": fp8, "prompt_enhancer": not no_pe},
            model=model,
            negative=negative,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            seed=seed or 0,
            use_pe=not no_pe,
            count=count,
            batch_size=batch_size,
        )
        return
    from ..generation.image_file import check_output, output_paths
    from ..generation.settings import check_settings

    check_settings(prompt, height=height, width=width, steps=steps, guidance=guidance, seed=seed, count=count)
    paths = output_paths(output, count)
    for path in paths:
        check_output(path)
    from ..generation.single import draw_and_save
    from ..loading.pipeline import load

    pipe = load(model, device=device, memory=memory, compile=compile, fp8=fp8, prompt_enhancer=not no_pe)
    for drawing, path in draw_and_save(
        pipe,
        paths,
        prompt,
        model=model,
        negative=negative,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        use_pe=not no_pe,
    ):
        settings = drawing.settings
        if drawing.revised_prompt is not None:
            typer.echo(f"Revised prompt: {drawing.revised_prompt}")
        typer.echo(
            f"{path}: {settings.width}x{settings.height}, {path.stat().st_size / 1000:.0f} kB, "
            f"{drawing.seconds:.1f} s, seed {settings.seed}"
        )


def _generate_many(
    prompts_file: Path,
    out_dir: Path,
    contact_sheet: bool,
    placement: dict[str, Any],
    *,
    model: str | None,
    **options: Any,
) -> None:
    """Draw a file of prompts, on all processes that accelerate started; the main one says what came of it."""
    from ..generation.image_file import make_output_folder
    from ..generation.prompt_file import read_prompts
    from ..generation.settings import check_settings

    rows = read_prompts(prompts_file)
    check_settings("-", **{name: options[name] for name in ("height", "width", "steps", "guidance", "seed", "count")})
    make_output_folder(out_dir)
    from accelerate import PartialState

    from ..generation.batch import generate_batch, process_device
    from ..generation.contact_sheet import save_contact_sheet
    from ..generation.manifest import MANIFEST, read_manifest
    from ..loading.pipeline import load

    placement["device"] = process_device(placement["device"])
    for _ in generate_batch(load(model, **placement), rows, out_dir, model=model, progress=True, **options):
        pass
    state = PartialState()
    records = read_manifest(out_dir / MANIFEST)
    failed = [record for record in records if record.error is not None]
    if state.is_main_process:
        if contact_sheet:
            save_contact_sheet(out_dir)
        typer.echo(f"{out_dir}: {len(records) - len(failed)} pictures, {len(failed)} failed, see {MANIFEST}")
        for record in failed:
            typer.echo(f"  {record.file}: {record.error}", err=True)
    state.destroy_process_group()
    if failed:
        raise typer.Exit(1)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of the original, e.g. baidu/ERNIE-Image.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the NF4 repository to.")],
    device: Annotated[str | None, typer.Option(help="Where to quantize. Default: the best there is.")] = None,
    scale_search: Annotated[
        bool, typer.Option(help="Look for the scales of least error, or take those of bitsandbytes.")
    ] = True,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of linear layers to keep unquantized beside the default ones; may be repeated."),
    ] = None,
    default_keep: Annotated[
        bool, typer.Option(help="Keep the few layers unquantized that pictures depend on most.")
    ] = True,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="PROMPTS", help="Prompt file, as for generate: round the transformer for what these prompts need."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO_ID", help="Publish the result there.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make an NF4 repository from an original one."""
    from ..generation.prompt_file import read_prompts

    prompts = [row.prompt for row in read_prompts(calibrate)] if calibrate else None
    from ..quantization.convert import quantize

    folder = quantize(
        source,
        output,
        device=device,
        scale_search=scale_search,
        keep=tuple(keep or ()),
        default_keep=default_keep,
        calibrate=prompts,
        revision=revision,
        push_to_hub=push_to_hub,
        progress=not quiet,
    )
    typer.echo(f"Wrote {folder}")


@app.command()
def verify(model: ModelArgument = None) -> None:
    """Check every file of a repository against its metadata."""
    from ..repository.integrity import verify
    from ..repository.resolve import find_repository

    reports = verify(find_repository(model))
    for report in reports:
        typer.echo(report.summary)
        for problem in report.problems:
            typer.echo(f"  {problem}")
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


@app.command()
def synthesize(
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    preset: Annotated[str, typer.Option(help="full or tiny.")] = "full",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    shards: Annotated[bool, typer.Option("--shards/--no-shards", help="Split large weight files.")] = True,
    duplicate_lm_head: Annotated[
        bool,
        typer.Option(
            "--duplicate-lm-head/--no-duplicate-lm-head",
            help="Store the prompt enhancer's tied head twice, as published.",
        ),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make an original-precision repository of the published architecture with random weights, to measure with."""
    from ..quantization.synthetic import synthesize

    folder = synthesize(
        output, preset=preset, seed=seed, shards=shards, duplicate_lm_head=duplicate_lm_head, progress=not quiet
    )
    typer.echo(f"Wrote {folder}")


@app.command()
def evaluate(
    reference: Annotated[str, typer.Argument(help="Folder or Hub id to compare with, usually the original.")],
    candidates: Annotated[
        list[str],
        typer.Argument(
            metavar="CANDIDATE...",
            help="Folders, Hub ids, or quantizations made of the reference: nf4-stock, sdnq-uint4, torchao-int4, "
            "torchao-float8, quanto-int4, quanto-int8, gguf-q4_0.",
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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure how far quantized repositories, and other libraries' quantizations, are from an original."""
    import shlex

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


@app.command()
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
    arm: Annotated[list[str] | None, typer.Option(help="Arm to run; may be repeated. Default: all but peers.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Run other libraries' quantizations as well.")] = False,
    size: Annotated[int, typer.Option(help="Height and width of the pictures.")] = 512,
    large: Annotated[int, typer.Option(help="Another size, for step time and memory; 0 for none.")] = 1024,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 4.0,
    tokens: Annotated[int, typer.Option(help="New tokens of the prompt enhancer; 0 leaves it out.")] = 256,
    pictures: Annotated[int, typer.Option(help="Pictures in a row after one load.")] = 10,
    growth: Annotated[bool, typer.Option(help="Measure a step at four sizes and three batches.")] = True,
    device: Annotated[str, typer.Option(help="Device to measure.")] = "cuda",
) -> None:
    """Measure speed and memory of this package, of the model card's demo and of the original, each in a process of its own."""
    from ..benchmarking.report import write_benchmark
    from ..benchmarking.run import Workload, benchmark, choose_arms, make_synthetic
    from ..errors import InvalidSettings
    from ..generation.image_file import make_output_folder
    from ..repository.resolve import find_repository

    arms = choose_arms(arm or (), peers=peers)
    make_output_folder(out_dir)
    if synthetic:
        model, original = make_synthetic(synthetic)
    elif model is None:
        raise InvalidSettings(
            "Nothing to measure: name an NF4 repository, or a folder for a synthetic one (--synthetic)."
        )
    else:
        model = find_repository(model)
    workload = Workload(size, steps, guidance, tokens, pictures, large or None)
    files: list[Path] = []

    def keep(result: dict[str, Any]) -> None:  # an interrupted run leaves what it had
        files[:] = write_benchmark(result, out_dir)

    benchmark(
        model, original, out_dir / "work", arms=arms, workload=workload, device=device, growth=growth, on_progress=keep
    )
    typer.echo(f"Wrote {', '.join(str(file) for file in files)}")


@app.command()
def info(model: ModelArgument = None) -> None:
    """Say what a repository holds, without loading it."""
    from ..repository.describe import describe
    from ..repository.resolve import find_repository

    for line in describe(find_repository(model, weights=False)):
        typer.echo(line)
