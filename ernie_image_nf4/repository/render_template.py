"""A script of its own: renders a chat template within bounds of memory, and prints the length of the result.

`chat_template` runs it in another process, with a job on standard input: ``{"template", "special_tokens", "messages",
"memory"}``. It needs Jinja alone, and renders as transformers does.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """``{% generation %}`` of transformers, which marks a part for training and renders as if it weren't there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(value: object, **options: object) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # type: ignore[arg-type]


def limit_memory(size: int) -> None:
    """Let allocations beyond so many bytes fail. Windows and macOS have no such limit: there, time alone is bounded."""
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    job = json.load(sys.stdin)
    limit_memory(job["memory"])
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    unused = {"tools": None, "documents": None, "add_generation_prompt": False}
    template = environment.from_string(job["template"])
    print(len(template.render(messages=job["messages"], **unused, **job["special_tokens"])))


if __name__ == "__main__":
    main()
