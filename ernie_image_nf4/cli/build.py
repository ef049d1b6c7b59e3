"""Commands that make repositories: ``quantize`` and ``synthesize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import BUILT_IN, QuietOption

# The presets of `quantization.synthetic`, which imports torch; a test compares them.
Preset = Literal["full", "turbo", "tiny"]


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
        str | None,
        typer.Option(
            metavar="[PROMPTS]",
            help="Round the transformer for what pictures need: of a file of prompts, as for generate, or of 64 that "
            "are built in.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO_ID", help="Publish the result there.")] = None,
    quiet: QuietOption = False,
) -> None:
    """Make an NF4 repository from an original one."""
    from ..generation.prompt_file import STANDARD_INPUT, read_prompts

    if calibrate not in (None, BUILT_IN, STANDARD_INPUT):
        read_prompts(calibrate)  # its mistakes are told before torch is imported
    from ..quantization.convert import quantize

    folder = quantize(
        source,
        output,
        device=device,
        scale_search=scale_search,
        keep=tuple(keep or ()),
        default_keep=default_keep,
        calibrate=True if calibrate == BUILT_IN else calibrate,
        revision=revision,
        push_to_hub=push_to_hub,
        progress=not quiet,
    )
    typer.echo(f"Wrote {folder}")


def synthesize(
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    preset: Annotated[
        Preset, typer.Option(help="ERNIE-Image or ERNIE-Image-Turbo (31.6 GB), or a tiny one (3 MB).")
    ] = "full",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    shards: Annotated[bool, typer.Option("--shards/--no-shards", help="Split large weight files.")] = True,
    duplicate_lm_head: Annotated[
        bool,
        typer.Option(
            "--duplicate-lm-head/--no-duplicate-lm-head",
            help="Store the prompt enhancer's tied head twice, as published.",
        ),
    ] = True,
    quiet: QuietOption = False,
) -> None:
    """Make an original-precision repository of the published architecture with random weights, to measure with."""
    from ..quantization.synthetic import synthesize

    folder = synthesize(
        output, preset=preset, seed=seed, shards=shards, duplicate_lm_head=duplicate_lm_head, progress=not quiet
    )
    typer.echo(f"Wrote {folder}")
