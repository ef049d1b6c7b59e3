"""Option types that several commands share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

# Spelled out here because the modules that know them import torch, which ``--help`` does without; a test compares them.
Memory = Literal["auto", "resident", "offload", "stream"]
Dtype = Literal["bfloat16", "float16", "float32"]
Format = Literal["png", "jpeg", "webp"]
Products = Literal["auto", "bfloat16", "int8", "fp8"]

SizeOption = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16. Default: as the model recommends.")]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps. Default: as the model recommends.")]
GuidanceOption = Annotated[
    float | None, typer.Option(help="Guidance scale, 1 for none. Default: as the model recommends.")
]
GuidanceUntilOption = Annotated[
    float | None,
    typer.Option(help="Share of the steps with guidance, e.g. 0.5; later ones take half the time. Default: 1, all."),
]
CacheOption = Annotated[
    int | None,
    typer.Option(help="Compute about every n-th step only, e.g. 3, and reuse its prediction between. Default: 1, all."),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(help="LoRA to draw with: FILE, or FILE:STRENGTH, e.g. style.safetensors:0.8. May be repeated."),
]
MemoryOption = Annotated[
    Memory, typer.Option(help="On the device: all weights, one component at a time, or its blocks. auto: what fits.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, xpu, mps or cpu. Default: the best there is.")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Of the computation. Default: what suits the device."),
]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="On CUDA, upstream's predictions to the bit; a step takes longer.")
]
ProductsOption = Annotated[
    Products,
    typer.Option(help="int8 and fp8: faster where the GPU has them, a little less precise (int8) or more so (fp8)."),
]
FormatOption = Annotated[
    Format | None, typer.Option(help="Of the pictures of --prompts-file. Default: png. One picture: see --output.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or Hub id. Default: the repository this package stands in."),
]
ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder or Hub id. Default: the repository this package stands in.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Take what the Hub cache holds, without any network call.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]

CALIBRATE, BUILT_IN = "--calibrate", "built-in"


class CalibratingCommand(TyperCommand):
    """A command whose option ``--calibrate`` may stand without a value, which typer has no way to say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's, after writing out the value of an option ``--calibrate`` that no file follows."""
        written: list[str] = []
        for argument, following in zip(args, [*args[1:], None], strict=True):
            written.append(argument)
            if argument == CALIBRATE and (following is None or (following.startswith("-") and following != "-")):
                written.append(BUILT_IN)
        return super().parse_args(ctx, written)
