"""The typer application, with all commands, and its entry point."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import ErnieImageNF4Error
from .build import quantize, synthesize
from .generate import generate
from .inspect import info, verify
from .measure import benchmark, evaluate
from .options import CalibratingCommand
from .serve import serve

COMMANDS = (generate, quantize, verify, synthesize, evaluate, benchmark, info, serve)  # In the order of --help
INTERRUPTED = 130  # Exit status of shells after Ctrl-C, 128 + SIGINT

app = typer.Typer(
    help="ERNIE-Image with NF4 weights: draw, quantize, check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command(cls=CalibratingCommand if command is quantize else None)(command)


def main() -> None:
    """Run the command line. Errors that the user can mend print one line and exit with 1, usage errors exit with 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # Allowed anywhere on the line
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
