"""Examples of README and docs/ run: Python for real, smaller, and commands as far as their arguments are read."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import diffusers_nf4_on_cpus
from doc_pages import CHECKOUT, FENCE, PAGES, blocks, read
from typer.main import get_command

import ernie_image_nf4
from ernie_image_nf4.cli.app import app

COMMANDS = get_command(app).commands
NAMES = ("ERNIE-Image-NF4", "user/ERNIE-Image-NF4", "user/ERNIE-Image-Turbo-NF4")  # stand for the reader's repositories
MINI = (CHECKOUT / "transformer" / "config.json").exists()
# Values with which an example takes a second on a CPU. A size or a number of steps that it doesn't say is added.
SMALL = {"height": 32, "width": 32, "num_inference_steps": 1}
SMALL_OF = {"pipe": SMALL, "turbo": SMALL, "Row": {"height": 32, "width": 32}, "generate_batch": {"steps": 1}}


class Smaller(ast.NodeTransformer):
    """Makes pictures small, and a CPU of the GPU."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        small = SMALL_OF.get(getattr(node.func, "id", ""), {})
        node.keywords = [keyword for keyword in node.keywords if keyword.arg not in small] + [
            ast.keyword(name, ast.Constant(value)) for name, value in small.items()
        ]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("cpu") if node.value == "cuda" else node

    def visit_Dict(self, node: ast.Dict) -> ast.Dict:
        """``device_map={"": 0}``, the first GPU."""
        self.generic_visit(node)
        whole = [isinstance(key, ast.Constant) and key.value == "" for key in node.keys]
        node.values = [
            ast.Constant("cpu") if all_of else value for all_of, value in zip(whole, node.values, strict=True)
        ]
        return node


def examples(page: str, text: str) -> list[ast.Module]:
    """The Python blocks of a page, but for signatures alone, made smaller."""
    trees = [ast.parse(code, page) for kind, code in FENCE.findall(text) if kind == "python"]
    trees = [tree for tree in trees if not all(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)]
    return [ast.fix_missing_locations(Smaller().visit(tree)) for tree in trees]


def run(page: str, text: str) -> dict[str, Any]:
    """Run a page's blocks one after the other. Later ones may use what an earlier one imports."""
    names: dict[str, Any] = {name: getattr(ernie_image_nf4, name) for name in ernie_image_nf4.__all__}
    if page in PAGES and page != "docs/python-api.md":  # which says at its top where its names come from
        names = {}
    with diffusers_nf4_on_cpus():
        for tree in examples(page, text):
            exec(compile(tree, page, "exec"), names)
    return names


@pytest.fixture
def desk(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the repositories that the examples name."""
    (tmp_path / "user").mkdir()
    for name in NAMES:
        (tmp_path / name).symlink_to(repository, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WITH_PYTHON = [page for page in PAGES if examples(page, read(page))]


@pytest.mark.skipif(not MINI, reason="this checkout holds no weights")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_examples_run(page: str, desk: Path) -> None:
    before = set(desk.iterdir())
    names = run(page, read(page))
    assert "pipe" in names or "record" in names
    pictures = {path.name for path in set(desk.iterdir()) - before}
    assert pictures == set(re.findall(r'save\("(.+?)"\)', read(page))) | ({"pictures"} if "record" in names else set())


def test_pages_with_examples_are_found() -> None:
    assert {"README.md", "docs/loading.md", "docs/many-prompts.md", "docs/python-api.md"} <= set(WITH_PYTHON)


def test_the_model_cards_example_without_the_package_runs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (repository / "README.md").read_text(encoding="utf-8")
    plain = [code for kind, code in FENCE.findall(card) if kind == "python" and "ernie_image_nf4" not in code]
    monkeypatch.chdir(repository.parent)
    names = run("card", f"```python\n{plain[0]}```\n")
    assert names["image"].size == (32, 32)
    Path("output.png").unlink()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("from ernie_image_nf4 import lode", ImportError),
        ('load("ERNIE-Image-NF4", fats=True)', TypeError),
        ('load("ERNIE-Image-NF4", "cpu")', TypeError),
        ('pipe = load("ERNIE-Image-NF4")\npipe("a cat", num_steps=3)', TypeError),
        ('pipe = load("ERNIE-Image-NF4")\npipe("a cat").pictures', AttributeError),
        ('Row("a cat", seeds=3)', TypeError),
    ],
)
def test_a_wrong_example_is_found(code: str, error: type[Exception], desk: Path) -> None:
    with pytest.raises(error):
        run("page", f"```python\n{code}\n```\n")


# Commands


def command_lines() -> list[tuple[str, str]]:
    """Page and command line of every command in a block, with the lines that a backslash joins."""
    lines = [
        (page, part.strip())
        for page, text in blocks("bash")
        for line in text.replace("\\\n", " ").splitlines()
        for part in line.split("&&")
    ]
    return [(page, line) for page, line in lines if re.match(r"ernie-image-nf4 |accelerate launch ", line)]


def parse(line: str) -> dict[str, Any]:
    """The arguments of a command of ours as the application reads them; those of accelerate are read by accelerate."""
    first, *words = shlex.split(line, comments=True)
    if first == "accelerate":
        words, module = parse_launch(words[1:])
        assert module == "ernie_image_nf4"
    name, *arguments = words
    return COMMANDS[name].make_context(name, arguments).params


def parse_launch(words: list[str]) -> tuple[list[str], str]:
    """What ``accelerate launch`` hands on, and the module that gets it."""
    parser = launch_command_parser(argparse.ArgumentParser().add_subparsers())
    arguments = parser.parse_args(words)
    assert arguments.module
    return arguments.training_script_args, arguments.training_script


@pytest.fixture
def files(desk: Path) -> None:
    """Files that the commands read."""
    for name in ("prompts.txt", "prompts.jsonl"):
        (desk / name).write_text('{"prompt": "a cat"}\n')
    for name in ("ORIGINAL", "NF4", "SOURCE"):
        (desk / name).mkdir()


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_are_read(page: str, line: str, files: None) -> None:
    assert parse(line)


def test_every_command_has_an_example() -> None:
    lines = [line.split() for _, line in command_lines()]
    assert {words[1] for words in lines if words[0] == "ernie-image-nf4"} == COMMANDS.keys()
    assert any(words[0] == "accelerate" for words in lines)


@pytest.mark.parametrize(
    "line",
    [
        "ernie-image-nf4 generate 'a cat' --sead 7",
        "ernie-image-nf4 generate 'a cat' --seed seven",
        "ernie-image-nf4 generate 'a cat' --memory swap",
        "ernie-image-nf4 quantize SOURCE",
        "ernie-image-nf4 verify ONE TWO",
        "accelerate launch --several_gpus -m ernie_image_nf4 generate --prompts-file prompts.txt --out-dir pictures",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit)) as error:
        parse(line)
    assert 2 in (getattr(error.value, "exit_code", None), getattr(error.value, "code", None))  # usage


def mentioned() -> list[tuple[str, str]]:
    """Page and text of every command in backticks, which may leave arguments out."""
    texts = {page: FENCE.sub("", read(page)) for page in PAGES}
    for form in CHECKOUT.glob(".github/ISSUE_TEMPLATE/*.yml"):
        texts[form.name] = form.read_text(encoding="utf-8")
    return [
        (page, " ".join(code.split()))
        for page, text in texts.items()
        for code in re.findall(r"`(ernie-image-nf4 [^`]+)`", text)
    ]


@pytest.mark.parametrize(("page", "line"), mentioned())
def test_commands_that_are_mentioned_exist_with_their_options(page: str, line: str) -> None:
    _, name, *arguments = shlex.split(line)
    known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {argument for argument in arguments if argument.startswith("-")} <= known
