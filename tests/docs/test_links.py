"""Every link of README, docs/ and their neighbours leads somewhere. The network is not asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import CHECKOUT, FENCE, PAGES, prose, read

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and the Hub give a page's headings: ``## What `fast` does`` has ``what-fast-does``."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", text), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (numbered := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(numbered)
    return found


def problem(page: str, link: str) -> str | None:
    """What is wrong with a link of a page, or None."""
    if link.startswith(("https://", "mailto:")):
        return None
    target, _, anchor = link.partition("#")
    path = ((CHECKOUT / page).parent / target).resolve() if target else CHECKOUT / page
    if not path.exists():
        return f"{link}: there is no {target}"
    if not path.is_relative_to(CHECKOUT):
        return f"{link}: leads out of the repository"
    if anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
        return f"{link}: {path.name} has no heading for #{anchor}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = LINK.findall(prose(page))
    assert [found for link in links if (found := problem(page, link))] == []


@pytest.mark.parametrize("page", sorted((CHECKOUT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_readme_leads_to_every_page(page: Path) -> None:
    assert f"](docs/{page.name})" in read("README.md")


def test_a_wrong_link_is_found() -> None:
    assert problem("README.md", "docs/missing.md") == "docs/missing.md: there is no docs/missing.md"
    assert problem("docs/speed.md", "#no-such-heading").endswith("speed.md has no heading for #no-such-heading")
    assert problem("docs/speed.md", "../../elsewhere").startswith("../../elsewhere: ")
    assert problem("docs/speed.md", "memory-modes.md#decoding-in-tiles") is None


def test_anchors_are_those_of_github() -> None:
    text = "# What `fast` does\n\n## fp8\n\n```bash\n# no heading\n```\n\n## fp8\n\n## How fast, how much memory\n"
    assert anchors(text) == {"what-fast-does", "fp8", "fp8-1", "how-fast-how-much-memory"}
