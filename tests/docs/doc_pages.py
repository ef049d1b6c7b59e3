"""The pages that people read: README, docs/, and what stands beside them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(CHECKOUT).as_posix())
    for pattern in ("*.md", "docs/*.md", "training/*.md")
    for path in CHECKOUT.glob(pattern)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    return (CHECKOUT / page).read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of each fenced block in a language."""
    return [(page, text) for page in PAGES for kind, text in FENCE.findall(read(page)) if kind == language]


def prose(page: str) -> str:
    """A page without fenced blocks, comments and what lies in backticks."""
    return re.sub(r"`[^`]*`", "``", re.sub(r"<!--.*?-->", "", FENCE.sub("", read(page)), flags=re.DOTALL))


def extras() -> dict[str, list[str]]:
    """The package's extras with their requirements. Python 3.10 can't read TOML."""
    section = read("pyproject.toml").split("[project.optional-dependencies]\n")[1].split("\n\n")[0]
    return {name: ast.literal_eval(value) for name, value in re.findall(r"^(\w+) = (\[.*?\])$", section, re.M | re.S)}


def requirements() -> list[str]:
    """What the package needs."""
    return ast.literal_eval(re.search(r"^dependencies = (\[.*?^\])", read("pyproject.toml"), re.M | re.S).group(1))
