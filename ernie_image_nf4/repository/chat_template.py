"""Whether the prompt enhancer's chat template, a program from the repository, comes to an end.

transformers renders it in a sandbox of Jinja, which keeps it from files and from Python, but not from looping for ever or from
filling the memory. Neither can be read off the text, nor interrupted from a thread. So `load` renders it once in a process of its
own, as transformers would, where time and memory are bounded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from ..errors import InvalidRepository
from .security import MAX_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5
MEMORY = 1 << 30
MAX_RENDERED = 1 << 16  # characters, of a prompt of a few words
# What the pipeline sends: one message, a JSON text.
MESSAGES = [{"role": "user", "content": json.dumps({"prompt": "a cat", "width": 1024, "height": 1024})}]


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose chat template can't be rendered within bounds.

    What it does for a prompt of the pipeline's form is seen, not what it might do for another one.

    Raises:
        InvalidRepository: There is no template, it is too long, fails, or takes too much time or memory.
    """
    where = f"The chat template of {tokenizer.name_or_path}"
    cure = "load without the prompt enhancer (prompt_enhancer=False, --no-pe), or use another release"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise InvalidRepository(f"{where} is missing: {cure}.") from None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise InvalidRepository(f"{where} is no text of at most {MAX_TEMPLATE:,} characters: {cure}.")
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if problem := _problem(template, json.dumps(special_tokens)):
        raise InvalidRepository(f"{where} {problem}: {cure}.")


@functools.lru_cache(maxsize=64)
def _problem(template: str, special_tokens: str) -> str | None:
    """What goes wrong when the template is rendered, None if nothing does."""
    job = {"template": template, "special_tokens": json.loads(special_tokens)}
    try:
        result = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(job),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"isn't done after {SECONDS} s"
    if result.returncode:
        reason = (result.stderr.splitlines() or [f"exit code {result.returncode}"])[-1]
        return f"can't be rendered ({reason})"
    if int(result.stdout) > MAX_RENDERED:
        return f"makes {int(result.stdout):,} characters of a short prompt"
    return None


def _render_job() -> None:
    """Render the template of a job from standard input, and print the length of what came out."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Windows has no such limits, and macOS takes none for memory: there the time alone is bounded.
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    class Generation(Extension):
        """``{% generation %}`` of transformers, which marks a part for training and renders as if it weren't there."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, **options: object) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    job = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    template = environment.from_string(job["template"])
    unused = {"tools": None, "documents": None, "add_generation_prompt": False}
    rendered = template.render(messages=MESSAGES, **unused, **job["special_tokens"])
    print(len(rendered))


if __name__ == "__main__":
    _render_job()
