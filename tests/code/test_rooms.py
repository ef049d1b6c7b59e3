"""The rooms: who may import whom, how large files and functions are, where private names of libraries stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import CHECKOUT

from docs import make_rooms

PACKAGE = CHECKOUT / "ernie_image_nf4"
ROOMS = (*make_rooms.ROOMS, "errors")  # from the top down: a module imports from its own room and those below it
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES, MAX_MODULES_BESIDE_ROOMS = 400, 60, 6
LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "huggingface_hub",
    "triton",
)
named = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def room_of(module: str) -> str:
    """``ernie_image_nf4.fast.ops`` -> ``fast``; the package's own modules are rooms by themselves."""
    return module.split(".")[1] if "." in module else ""


def imported(path: Path, source: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it, by their full names."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == PACKAGE.name}


def upward(path: Path, source: str) -> list[str]:
    """Imports of a room above the module's own."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own not in ROOMS:  # __init__ and __main__, through which all rooms are entered
        return []
    rooms = {name: room_of(name) for name in imported(path, source)}
    return sorted(name for name, room in rooms.items() if room in ROOMS and ROOMS.index(room) < ROOMS.index(own))


@named
def test_no_module_imports_from_a_room_above_its_own(path):
    assert upward(path, path.read_text(encoding="utf-8")) == []


def test_an_import_of_a_room_above_is_found():
    path = PACKAGE / "fast" / "ops" / "module.py"
    assert upward(path, "def f():\n    from ...loading.pipeline import load") == [
        "ernie_image_nf4.loading.pipeline.load"
    ]
    assert upward(path, "from ...repository import record\nfrom . import other\nimport ernie_image_nf4.cli.app") == [
        "ernie_image_nf4.cli.app"
    ]


def test_every_folder_is_a_room_that_says_what_it_is_for():
    folders = {path.parent for path in MODULES} - {PACKAGE}
    assert {folder.relative_to(PACKAGE).parts[0] for folder in folders} <= set(ROOMS)
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert text
        assert len(text) > 60, folder


def test_few_modules_stand_beside_the_rooms():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_MODULES_BESIDE_ROOMS


@named
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@named
def test_no_function_is_long(path):
    """Docstrings aside: a public function's says what each argument means."""
    long = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node):
                lines -= first.end_lineno - first.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                long.append((node.name, lines))
    assert long == []


# Private names


def private_names(source: str) -> set[str]:
    """Private attributes and imports in a module that neither it nor the package defines."""
    tree = ast.parse(source)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES and not node.level:
            found |= {alias.name for alias in node.names if is_private(alias.name)}
            found |= {part for part in node.module.split(".") if is_private(part)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                found.add(str(name.value))
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Private names that the package defines: functions, classes, module and instance attributes."""
    names = set()
    for path in MODULES:
        if "upstream" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r"(?:def|class) (_\w+)", text))
        names |= set(re.findall(r"^\s*(?:self\.)?(_\w+)(?:: [^=\n]+)? = ", text, re.MULTILINE))
        names |= set(re.findall(r"^    (_\w+): ", text, re.MULTILINE))
    return names


@named
def test_private_names_of_libraries_stand_in_one_room(path):
    if "upstream" not in path.relative_to(PACKAGE).parts:
        assert private_names(path.read_text(encoding="utf-8")) - own_names() == set()


def test_a_private_name_is_found():
    source = "import torch\nfrom torch import _dynamo\nx._hf_hook\ntorch._C._rocm\ngetattr(x, '_b')\nx.__class__"
    assert private_names(source) == {"_dynamo", "_hf_hook", "_C", "_rocm", "_b"}
