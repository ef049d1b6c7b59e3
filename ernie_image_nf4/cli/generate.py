"""``generate``: draw one prompt, or a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    CacheOption,
    DeviceOption,
    DtypeOption,
    ExactOption,
    FormatOption,
    GuidanceOption,
    GuidanceUntilOption,
    LoraOption,
    MemoryOption,
    ModelOption,
    OfflineOption,
    Products,
    ProductsOption,
    RevisionOption,
    SizeOption,
    StepsOption,
)

if TYPE_CHECKING:
    from ..generation.loras import LoraFiles

CHECKED = ("height", "width", "steps", "guidance", "guidance_until", "cache")  # before anything heavy is imported


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The .png, .jpg or .webp file; several become out-1.png, out-2.png ..."),
    ] = Path("out.png"),
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="Many prompts: .txt (one a line), .jsonl or .csv; - for standard input. With --out-dir."),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option(help="Folder for the pictures of --prompts-file; what it has already is not redrawn.")
    ] = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    height: SizeOption = None,
    width: SizeOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    guidance_until: GuidanceUntilOption = None,
    cache: CacheOption = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes the whole picture repeatable. Default: a random one; 0 with --prompts-file."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    lora: LoraOption = None,
    no_pe: Annotated[
        bool, typer.Option("--no-pe", help="Draw the prompt as it is, without the prompt enhancer.")
    ] = False,
    count: Annotated[int, typer.Option(help="Pictures, with seeds counting up from the first.")] = 1,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    memory: MemoryOption = "auto",
    products: ProductsOption = "auto",
    fp8: Annotated[bool, typer.Option("--fp8", hidden=True)] = False,
    exact: ExactOption = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures of --prompts-file to denoise together. Default: as the memory allows.")
    ] = None,
    format: FormatOption = None,
    contact_sheet: Annotated[
        bool, typer.Option("--contact-sheet", help="With --prompts-file, all pictures in one overview as well.")
    ] = False,
) -> None:
    """Draw a picture from a prompt, or many from a file of prompts."""
    _check_what_goes_together(prompt, prompts_file, out_dir, format)
    loading: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype, "memory": memory}
    loading |= {"products": _with_alias(products, fp8), "local_files_only": offline, "prompt_enhancer": not no_pe}
    loading["fast"] = "exact" if exact else True
    settings: dict[str, Any] = {"model": model, "negative": negative, "use_pe": not no_pe}
    settings |= {"height": height, "width": width, "steps": steps, "guidance": guidance}
    settings |= {"guidance_until": guidance_until, "cache": cache, "lora": lora or []}
    if prompt is not None:
        _draw_prompt(prompt, output, count, loading, seed=seed, **settings)
    elif prompts_file is not None and out_dir is not None:
        settings |= {"seed": seed or 0, "count": count, "batch_size": batch_size, "format": format or "png"}
        _draw_file(prompts_file, out_dir, contact_sheet, loading, **settings)


def _check_what_goes_together(
    prompt: str | None, prompts_file: Path | None, out_dir: Path | None, format: str | None
) -> None:
    if (prompt is None) == (prompts_file is None):
        raise typer.BadParameter("give either a prompt or --prompts-file.", param_hint="PROMPT")
    if (out_dir is None) != (prompts_file is None):
        raise typer.BadParameter("--prompts-file and --out-dir go together.", param_hint="--out-dir")
    if format is not None and prompts_file is None:
        raise typer.BadParameter(f"name the file so instead, e.g. -o out.{format}.", param_hint="--format")


def _with_alias(products: Products, fp8: bool) -> Products:
    """The products asked for, or what the former option ``--fp8`` stands for."""
    if not fp8:
        return products
    if products not in ("auto", "fp8"):
        raise typer.BadParameter(f"contradicts --products {products}.", param_hint="--fp8")
    typer.echo("--fp8 is now --products fp8.", err=True)
    return "fp8"


def _draw_prompt(
    prompt: str, output: Path, count: int, loading: dict[str, Any], *, model: str | None, **settings: Any
) -> None:
    """Draw one prompt `count` times, and say what came of it."""
    from ..generation.image_file import check_output, output_paths
    from ..generation.settings import check_settings
    from ..generation.single import draw_and_save

    check_settings(prompt, count=count, **{name: settings[name] for name in (*CHECKED, "seed")})
    paths = output_paths(output, count)
    for path in paths:
        check_output(path)
    settings["lora_files"] = _find_loras(settings["lora"], loading=loading)
    from ..loading.pipeline import load

    pipe = load(model, **loading)
    for drawing, path in draw_and_save(pipe, paths, prompt, model=model, **settings):
        drawn = drawing.settings
        if drawing.revised_prompt is not None:
            typer.echo(f"Revised prompt: {drawing.revised_prompt}")
        typer.echo(
            f"{path}: {drawn.width}x{drawn.height}, {path.stat().st_size / 1000:.0f} kB, "
            f"{drawing.seconds:.1f} s, seed {drawn.seed}"
        )


def _find_loras(named: Sequence[str], *, loading: dict[str, Any]) -> LoraFiles:
    """The LoRAs of a list, so that a missing one is told of before a model is loaded."""
    from ..generation.loras import LoraFiles

    files = LoraFiles(local_files_only=loading["local_files_only"])
    files.find(named)
    return files


def _draw_file(
    prompts_file: Path,
    out_dir: Path,
    contact_sheet: bool,
    loading: dict[str, Any],
    *,
    model: str | None,
    **settings: Any,
) -> None:
    """Draw a file of prompts on all processes that accelerate started; the main process says what came of it."""
    from ..generation.image_file import make_output_folder
    from ..generation.prompt_file import read_prompts
    from ..generation.settings import check_settings

    check_settings("-", **{name: settings[name] for name in (*CHECKED, "seed", "count")})
    settings["lora_files"] = loras = _find_loras(settings["lora"], loading=loading)
    rows = read_prompts(prompts_file, loras=loras)
    make_output_folder(out_dir)
    from accelerate import PartialState

    from ..generation.batch import generate_batch, process_device
    from ..generation.contact_sheet import save_contact_sheet
    from ..generation.manifest import MANIFEST, locked, read_manifest
    from ..loading.pipeline import load

    device = process_device(loading["device"])
    if PartialState().is_main_process:
        with locked(out_dir):  # for the message: the second of two models may have no room on the device
            pass
    pipe = load(model, **{**loading, "device": device})
    for _ in generate_batch(pipe, rows, out_dir, model=model, progress=True, **settings):
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
