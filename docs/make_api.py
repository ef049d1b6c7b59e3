"""Write python-api.md from the docstrings of what ``ernie_image_nf4`` offers.

    python docs/make_api.py

The source is only parsed, not imported: neither torch nor an installation is needed.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
PACKAGE = FOLDER.parent / "ernie_image_nf4"
PAGE = FOLDER / "python-api.md"
FUNCTIONS = ("load", "load_lora", "set_skipping", "generate_batch", "read_prompts", "quantize", "verify")
RECORDS = ("Row", "Record", "Settings", "ComponentReport", "Recommended")
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")
HEAD = """\
# Python API

<!-- Written by docs/make_api.py from the docstrings: change those, then run it. -->

From `ernie_image_nf4` come {offered}; other names have their module beside them.
The pipeline that `load` returns is diffusers' own, and
[diffusers documents it](https://huggingface.co/docs/diffusers/main/en/api/pipelines/ernie_image).
"""

Definition = ast.FunctionDef | ast.ClassDef


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of python-api.md."""
    offered = exported()
    parts = [HEAD.format(offered=", ".join(f"`{name}`" for name in sorted(offered, key=str.lower)))]
    for title, names in (("Functions", FUNCTIONS), ("Records", RECORDS)):
        parts.append(f"## {title}\n")
        for name in names:
            module, definition = find(name)
            source = "" if name in offered else f"From `{module}`.\n\n"
            parts.append(f"### {name}\n\n{source}{described(definition)}")
    errors = list(definitions(PACKAGE / "errors.py"))
    rows = [f"- `{error.name}`: {' '.join(markdown(ast.get_docstring(error) or '').split())}" for error in errors]
    parts.append("## Errors\n\nAll in `ernie_image_nf4.errors`, each a subclass of the first.\n")
    return "\n".join([*parts, *rows]) + "\n"


def exported() -> set[str]:
    """What can be imported from the package itself: the names that it imports for type checkers."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return names & {name for name in _all(tree) if not name.startswith("_")}


def _all(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def find(name: str) -> tuple[str, Definition]:
    """The one public function or class of this name in the package, with its module.

    Raises:
        ValueError: There is none, or there are several.
    """
    found = [
        (".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts), definition)
        for file in sorted(PACKAGE.rglob("*.py"))
        for definition in definitions(file)
        if definition.name == name
    ]
    # A command of the command line bears the name of the function that it calls.
    found = [(module, definition) for module, definition in found if ".cli." not in module]
    if len(found) != 1:
        raise ValueError(f"{name}: found in {[module for module, _ in found] or 'no module'}, expected one.")
    return found[0]


def definitions(file: Path) -> Iterator[Definition]:
    """Functions and classes of a file, in its order."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


def described(definition: Definition) -> str:
    """Signature and docstring as Markdown."""
    parts = [f"```python\n{signature(definition)}\n```\n"]
    for title, text in sections(ast.get_docstring(definition) or ""):
        if title == "Example":
            code = "\n".join(line[4:] for line in text.splitlines() if line.startswith((">>>", "...")))
            parts.append(f"**Example**\n\n```python\n{code}\n```\n")
        elif title in ("Args", "Attributes", "Raises"):
            rows = "\n".join(f"- `{name}`: {meaning}" for name, meaning in entries(text))
            parts.append(f"**{'Arguments' if title == 'Args' else title}**\n\n{rows}\n")
        elif title:
            parts.append(f"**{title}**: {markdown(text)}\n")
        else:
            parts.append(f"{markdown(text)}\n")
    return "\n".join(parts)


def signature(definition: Definition) -> str:
    """A class with its fields, or a function, with an argument a line if it is long."""
    if isinstance(definition, ast.ClassDef):
        fields = [code(node) for node in definition.body if isinstance(node, ast.AnnAssign)]
        return "\n    ".join([f"class {definition.name}:", *(fields or ["..."])])
    arguments = definition.args
    lines = [_argument(argument) for argument in arguments.args]
    first_default = len(lines) - len(arguments.defaults)
    for index, default in enumerate(arguments.defaults):
        lines[first_default + index] += f" = {code(default)}"
    if arguments.kwonlyargs:
        lines.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        lines.append(_argument(argument) + (f" = {code(default)}" if default else ""))
    returns = f" -> {code(definition.returns)}" if definition.returns else ""
    one_line = f"def {definition.name}({', '.join(lines)}){returns}: ..."
    if len(one_line) <= 88:
        return one_line
    return f"def {definition.name}(\n" + "".join(f"    {line},\n" for line in lines) + f"){returns}: ..."


def _argument(argument: ast.arg) -> str:
    return f"{argument.arg}: {code(argument.annotation)}" if argument.annotation else argument.arg


def code(node: ast.AST) -> str:
    """The source of a node, with the quotes that this project uses."""
    return ast.unparse(node).replace("'", '"')


def sections(docstring: str) -> Iterator[tuple[str, str]]:
    """Title and text of each part of a docstring in Google's style; the title of what comes first is empty."""
    title, lines = "", []
    for line in [*docstring.splitlines(), "End:"]:
        if line.removesuffix(":") in (*SECTIONS, "End") and line.endswith(":"):
            if text := inspect.cleandoc("\n" + "\n".join(lines)):
                yield title, text
            title, lines = line.removesuffix(":"), []
        else:
            lines.append(line)


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Name and meaning of each entry of a section; continuation lines are indented."""
    for entry in re.split(r"\n(?=\S)", text):
        name, _, meaning = entry.partition(":")
        yield name.strip(), " ".join(markdown(meaning).split())


def markdown(text: str) -> str:
    """A docstring's double backticks as Markdown's single ones."""
    return text.replace("``", "`")


if __name__ == "__main__":
    main()
