"""The Hugging Face Space of docs/page.md: its files fit the package, and its program starts the server."""

from __future__ import annotations

import os
import subprocess
import sys

import yaml
from doc_pages import CHECKOUT, blocks, extras, requirements


def test_a_space_needs_what_the_package_needs():
    (listed,) = [text for page, text in blocks("text") if page == "docs/page.md"]
    serve = [each for each in extras()["serve"] if not each.startswith("gradio")]
    assert listed.split("\n") == [*requirements(), *serve, ""]
    (front,) = [text for page, text in blocks("yaml") if page == "docs/page.md"]
    front = yaml.safe_load(front.strip().strip("-"))
    assert f"gradio>={front['sdk_version'].removesuffix('.0')}" in extras()["serve"]
    assert (CHECKOUT / front["app_file"]).is_file()


def test_a_space_serves_the_model_of_its_variable(tmp_path):
    variables = {**os.environ, "MODEL": str(tmp_path / "none"), "PYTHONPATH": str(CHECKOUT)}
    run = subprocess.run([sys.executable, CHECKOUT / "app.py"], env=variables, capture_output=True, text=True)
    assert run.returncode == 1
    assert str(tmp_path / "none") in run.stderr
