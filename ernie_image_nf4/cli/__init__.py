"""The command line: ``ernie-image-nf4 COMMAND`` and ``python -m ernie_image_nf4 COMMAND``. Options and messages, no
logic.

A command is a function with typer's annotations, in the module of its subject: `generate` draws, `build` makes
repositories, `measure` evaluates and benchmarks, `inspect` says what a repository holds, `serve` answers requests.
`options` has the option types that commands share. To add a command, write its function and add it to ``COMMANDS`` in
`app`. It imports what it needs when it runs, so that ``--help`` imports neither torch nor diffusers.

Imports from all other rooms; none imports from here.
"""

from .app import app, main

__all__ = ["app", "main"]
