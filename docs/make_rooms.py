"""Draw the package's rooms and who imports whom as rooms.svg, from the imports themselves.

    python docs/make_rooms.py

The source is only parsed. An arrow that follows from others is left out: where ``cli`` imports ``generation`` and
``generation`` imports ``memory``, none is drawn from ``cli`` to ``memory``. ``errors``, which every room may import, is
not drawn. An arrow that leads upwards, which the order forbids, is red.
"""

from __future__ import annotations

import ast
import html
import textwrap
from pathlib import Path

FOLDER = Path(__file__).parent
PACKAGE = FOLDER.parent / "ernie_image_nf4"
DRAWING = FOLDER / "rooms.svg"
# From top to bottom: a room imports from those below it only.
ROOMS = (
    "cli",
    "serving",
    "benchmarking",
    "evaluation",
    "quantization",
    "generation",
    "loading",
    "memory",
    "fast",
    "repository",
    "upstream",
)
BOX, LEFT, TOP, GAP, LINE = 600, 12, 12, 22, 17  # pixels
BEND = 26  # by which an arrow past other rooms is farther out than the one before
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<title>The rooms of ernie_image_nf4, and which imports from which</title>
<defs>
<marker id="down" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#3b76af"/></marker>
<marker id="up" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#cf222e"/></marker>
<style>
text {{ font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }}
.name {{ font-size: 15px; font-weight: 600 }}
.text {{ font-size: 13px }}
.files {{ font-size: 11.5px; fill: #59636e }}
.room {{ fill: #f3f6fa; stroke: #b6c2cf }}
.arrow {{ fill: none; stroke-width: 1.6 }}
.down {{ stroke: #3b76af }}
.up {{ stroke: #cf222e }}
</style>
</defs>
<rect width="{width}" height="{height}" fill="#ffffff"/>
{shapes}
</svg>
"""

Arrows = set[tuple[str, str]]


def main() -> None:
    DRAWING.write_text(drawing(), encoding="utf-8")


def rooms() -> list[str]:
    """The rooms there are, from top to bottom.

    Raises:
        ValueError: A folder of the package has no place among `ROOMS`.
    """
    there = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    if strangers := there - set(ROOMS):
        raise ValueError(f"{', '.join(sorted(strangers))}: say in ROOMS where in the order this stands.")
    return [room for room in ROOMS if room in there]


def arrows() -> Arrows:
    """Pairs of rooms of which the first imports from the second."""
    known = rooms()
    found = set()
    for room in known:
        for file in (PACKAGE / room).rglob("*.py"):
            for target in imported(file):
                if target in known and target != room:
                    found.add((room, target))
    return found


def imported(file: Path) -> set[str]:
    """First part below the package of everything that a file imports from the package."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = [*parts[: -node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1}
    return found


def direct(pairs: Arrows) -> Arrows:
    """Those arrows that don't follow from two others; all that lead upwards."""
    upwards = {(start, end) for start, end in pairs if ROOMS.index(end) < ROOMS.index(start)}
    downwards = pairs - upwards

    def reachable(start: str) -> set[str]:
        below = {end for begin, end in downwards if begin == start}
        return below.union(*map(reachable, below))

    return upwards | {
        (start, end)
        for start, end in downwards
        if not any(end in reachable(middle) for begin, middle in downwards if begin == start and middle != end)
    }


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".").replace("`", "")


def modules(room: str) -> str:
    """The names of a room's modules, and of its folders that hold modules."""
    folder = PACKAGE / room
    names = {file.stem for file in folder.glob("*.py")} | {f"{file.parent.name}/" for file in folder.glob("*/*.py")}
    return " · ".join(sorted(name for name in names if not name.startswith("_")))


def drawing() -> str:
    """The SVG."""
    edges: dict[str, tuple[int, int]] = {}  # top and bottom of each box
    shapes, y = [], TOP
    for room in rooms():
        text = textwrap.wrap(purpose(room), 84)
        files = [line.strip(" ·") for line in textwrap.wrap(modules(room), 92)]
        height = 34 + LINE * (len(text) + len(files))
        shapes.append(f'<rect x="{LEFT}" y="{y}" width="{BOX}" height="{height}" rx="6" class="room"/>')
        shapes.append(f'<text x="{LEFT + 14}" y="{y + 22}" class="name">{room}</text>')
        for number, line in enumerate(text + files, 1):
            kind = "text" if number <= len(text) else "files"
            place = f'x="{LEFT + 14}" y="{y + 24 + LINE * number}"'
            shapes.append(f'<text {place} class="{kind}">{html.escape(line)}</text>')
        edges[room] = (y, y + height)
        y += height + GAP
    paths, width = lines(edges)
    return SVG.format(width=width, height=y - GAP + TOP, shapes="\n".join(shapes + paths))


def lines(edges: dict[str, tuple[int, int]]) -> tuple[list[str], int]:
    """The arrows, straight between neighbours and around the right side past other rooms; and the drawing's width."""
    order = list(edges)
    pairs = sorted(direct(arrows()), key=lambda pair: (abs(span(order, pair)), order.index(pair[0])))
    past = [pair for pair in pairs if span(order, pair) != 1]
    drawn = []
    for start, end in pairs:
        if (start, end) in past:
            right, out = LEFT + BOX, LEFT + BOX + BEND * (past.index((start, end)) + 1)
            here, there = port(start, (start, end), past, edges), port(end, (start, end), past, edges)
            path = f"M{right},{here} H{out} V{there} H{right + 1}"
        else:
            path = f"M{LEFT + BOX // 2},{edges[start][1]} V{edges[end][0] - 1}"
        kind = "up" if span(order, (start, end)) < 0 else "down"
        drawn.append(f'<path d="{path}" class="arrow {kind}" marker-end="url(#{kind})"/>')
    return drawn, LEFT + BOX + BEND * len(past) + LEFT


def port(room: str, pair: tuple[str, str], past: list[tuple[str, str]], edges: dict[str, tuple[int, int]]) -> int:
    """Height at which an arrow meets a room's right side, chosen so that arrows cross each other little."""
    arriving = [other for other in past if other[1] == room]
    leaving = [other for other in reversed(past) if other[0] == room]
    places = arriving + leaving
    top, bottom = edges[room]
    return top + (bottom - top) * (places.index(pair) + 1) // (len(places) + 1)


def span(order: list[str], pair: tuple[str, str]) -> int:
    """How many rooms down an arrow leads."""
    return order.index(pair[1]) - order.index(pair[0])


if __name__ == "__main__":
    main()
