"""Whether the prompt enhancer's chat template, a program from the repository, comes to an end.

transformers renders it in a sandbox of Jinja, which keeps it from files and from Python, but not from looping for ever
or from filling the memory. Neither can be seen from the text, nor interrupted from a thread. So `load` has it rendered
once in a process of its own, where time and memory are bounded.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidRepository
from .security import MAX_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCRIPT = Path(__file__).with_name("render_template.py")
SECONDS = 5
MEMORY = 1 << 30  # bytes
MAX_RENDERED = 1 << 16  # characters, of a prompt of a few words
# What the pipeline sends: one message, a JSON text.
MESSAGES = [{"role": "user", "content": json.dumps({"prompt": "a cat", "width": 1024, "height": 1024})}]


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose chat template can't be rendered within bounds.

    What the template does with a prompt of the pipeline's form is tried, not what it might do with another one.

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
    job = {
        "template": template,
        "special_tokens": json.loads(special_tokens),
        "messages": MESSAGES,
        "memory": MEMORY,
    }
    try:
        result = subprocess.run(
            [sys.executable, SCRIPT],
            input=json.dumps(job),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
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
