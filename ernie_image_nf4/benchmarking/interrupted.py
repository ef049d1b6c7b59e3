"""What an interrupted run left, for the run that goes on with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_result(file: Path) -> dict[str, Any]:
    """The result in a JSON file; empty if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def is_same_run(earlier: Mapping[str, Any], asked: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Whether a result that was read has, under these keys, what a run that begins has: its machine, for example."""
    written = json.loads(json.dumps({key: asked[key] for key in keys}))  # tuples become lists
    return all(earlier.get(key) == value for key, value in written.items())
