"""Changelog, issue forms, pre-commit settings and the promises about security: complete, and true of the files here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from doc_pages import CHECKOUT, extras, read, requirements

import ernie_image_nf4

FORMS = sorted((CHECKOUT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def form(name: str) -> dict:
    return yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))


def test_the_changelog_has_this_version_and_what_is_unreleased() -> None:
    text = read("CHANGELOG.md")
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert ernie_image_nf4.__version__ in dict(versions)
    assert all(date for _, date in versions[1:])
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= set(KINDS)


@pytest.mark.parametrize("file", [file for file in FORMS if file.name != "config.yml"], ids=lambda file: file.name)
def test_issue_forms_are_what_github_takes(file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert content["name"]
    assert content["description"]
    assert {part["type"] for part in content["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    fields = [part for part in content["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields)
    assert all(part["attributes"]["label"] for part in fields)


def test_the_form_about_speed_asks_for_what_a_figure_needs() -> None:
    required = {part["id"] for part in form("speed")["body"] if part.get("validations", {}).get("required")}
    assert required == {"card", "driver", "versions", "row"}
    assert f"*{form('speed')['name']}*" in read("README.md")


def test_before_a_commit_ruff_checks_and_formats() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    entries = [hook["entry"].split() for hook in repository["hooks"]]
    assert [entry[:2] for entry in entries] == [["ruff", "check"], ["ruff", "format"]]


def test_the_test_command_checks_and_tests() -> None:
    command = re.search(r"<!-- test-command -->\n```bash\n(.+)\n```\n", read("README.md")).group(1)
    assert [part.split()[0] for part in command.split(" && ")] == ["pip", "ruff", "ruff", "mypy", "pytest"]
    brought = {re.match(r"[\w-]+", requirement).group() for requirement in extras()["test"]}
    assert {"ruff", "mypy", "pytest"} <= brought


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed() -> None:
    allowed = {*requirements(), *extras()["test"]}
    pins = {line for line in read(".ci/lowest.txt").splitlines() if not line.startswith("#")}
    assert {requirement.replace(">=", "==") for requirement in allowed} == pins - {"typer-slim==0.19"}
    assert "typer==0.19" in pins  # the same modules


@pytest.mark.parametrize("page", ["SECURITY.md", "CONTRIBUTING.md", "README.md"])
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(r"`((?:tests|benchmarks|training|docs)/[\w./-]*)`", read(page))
    assert [name for name in named if not (CHECKOUT / name).exists()] == []


def test_extras_that_are_named_exist() -> None:
    pages = [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("training/*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages if page.name != "CHANGELOG.md")
    named = {name for names in re.findall(r"(?:\.|ernie-image-nf4)\[([\w,]+)\]", text) for name in names.split(",")}
    assert {"test", "evaluate", "baselines"} <= named <= set(extras())
