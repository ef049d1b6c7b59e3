"""Picture files: three formats, each with the settings inside, and names that are refused before anything is drawn."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ernie_image_nf4
from ernie_image_nf4.errors import DiskFull, InvalidSettings, WriteFailed
from ernie_image_nf4.generation.image_file import (
    Drawing,
    check_output,
    check_side,
    read_settings,
    remove_leftovers,
    save_picture,
)
from ernie_image_nf4.generation.settings import Settings

SETTINGS = Settings('一只橙色的小猫 🐱, "quoted"', "Ünschärfe", 48, 64, 2, 3.0, seed=2**63 - 1)
EXPECTED = {
    "prompt": '一只橙色的小猫 🐱, "quoted"',
    "negative_prompt": "Ünschärfe",
    "seed": str(2**63 - 1),
    "steps": "2",
    "guidance_scale": "3.0",
    "width": "64",
    "height": "48",
    "model": "mini",
}


@pytest.fixture
def drawing() -> Drawing:
    pixels = np.random.default_rng(0).integers(90, 120, (48, 64, 3)).astype("uint8")
    return Drawing(Image.fromarray(pixels), SETTINGS, "a cat 🐱", 1.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("A.PNG", "PNG"), ("A.JPG", "JPEG")],
)
def test_every_format_keeps_the_settings(tmp_path, drawing, name, kind):
    save_picture(drawing, tmp_path / name, model="mini")
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size, image.mode) == (kind, (64, 48), "RGB")
        off = np.abs(np.asarray(image).astype(int) - np.asarray(drawing.image)).mean()
    assert off < (0.5 if kind == "PNG" else 8)
    settings = read_settings(tmp_path / name)
    assert settings.pop("versions").startswith(f"ernie-image-nf4 {ernie_image_nf4.__version__}, torch ")
    assert settings == EXPECTED | {"revised_prompt": "a cat 🐱"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_what_holds_for_some_pictures_only_is_there_then(tmp_path, drawing, suffix):
    path = tmp_path / f"a.{suffix}"
    computation = {"products": "int8", "dtype": "bfloat16", "fast": "exact"}
    save_picture(replace(drawing, revised_prompt=None, **computation), path, model="mini", revision="0123abc")
    settings = read_settings(path)
    assert settings.pop("versions")
    assert settings == EXPECTED | computation | {"revision": "0123abc"}


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_the_comment_is_as_the_exif_standard_has_it(tmp_path, drawing, suffix):
    """UNDEFINED (7), and text in UTF-16 in the byte order of the rest, so that other programs can read it."""
    path = tmp_path / f"a.{suffix}"
    save_picture(drawing, path, model="mini")
    data = path.read_bytes()
    header = data.index(b"MM\0*")
    entry = data.index(b"\x92\x86", header)
    assert data[entry + 2 : entry + 4] == b"\0\7"
    length, offset = (int.from_bytes(data[start : start + 4], "big") for start in (entry + 4, entry + 8))
    comment = data[header + offset : header + offset + length]
    assert comment.startswith(b"UNICODE\0")
    assert json.loads(comment[8:].decode("utf-16-be"))["prompt"] == SETTINGS.prompt


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_of_another_program_has_no_settings(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    image = Image.new("RGB", (8, 8))
    image.save(path)
    assert read_settings(path) == {}
    for comment in (b"ASCII\0\0\0hello", b"UNICODE\0not JSON", b"UNICODE\0" + "[1]".encode("utf-16-be")):
        exif = Image.Exif()
        exif[0x8769] = {0x9286: comment}
        image.save(path, exif=exif)
        assert read_settings(path) == {}


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt", ".png"])
def test_other_endings_name_those_that_work(tmp_path, name):
    with pytest.raises(InvalidSettings, match=r"none of PNG \(\.png\), JPEG \(\.jpg, \.jpeg\) and WebP \(\.webp\)"):
        check_output(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_only_the_unfinished_file_is_too_long_for_is_refused_at_once(tmp_path):
    check_output(tmp_path / ("a" * 100 + ".png"))
    with pytest.raises(InvalidSettings, match="use a shorter name"):
        check_output(tmp_path / ("a" * 250 + ".png"))
    with pytest.raises(InvalidSettings, match="use a shorter name"):
        check_output(tmp_path / ("a" * 300 + ".png"))
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_a_format_has_no_room_for(tmp_path):
    for image_format in ("png", "jpeg", "webp"):
        check_side(image_format, 16368, 16)
    check_side("png", 2**20, 16)
    with pytest.raises(InvalidSettings, match="16x16384 is too large for webp, up to 16383 a side: use PNG"):
        check_side("webp", 16, 16384)
    with pytest.raises(InvalidSettings, match="too large for jpeg"):
        check_side("jpeg", 65536, 16)


def test_settings_too_long_for_jpeg_say_so_and_leave_nothing(tmp_path, drawing):
    long = replace(drawing, settings=replace(SETTINGS, prompt="a cat " * 10_000))
    with pytest.raises(WriteFailed, match="use PNG for prompts this long"):
        save_picture(long, tmp_path / "a.jpg", model="mini")
    assert list(tmp_path.iterdir()) == []
    for name in ("a.png", "a.webp"):
        save_picture(long, tmp_path / name, model="mini")
        assert read_settings(tmp_path / name)["prompt"] == "a cat " * 10_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_no_fault_of_the_settings(tmp_path, drawing):
    (tmp_path / f".a.png.{os.getpid()}.tmp").symlink_to("/dev/full")  # what the picture is first written to
    with pytest.raises(DiskFull, match="could not be written: the disk is full"):
        save_picture(drawing, tmp_path / "a.png", model="mini")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    leftovers = [".0001-a.png.123.tmp", ".0001-a.jpg.4.tmp", ".0001.webp.123.tmp", ".manifest.jsonl.99.tmp"]
    others = ["0001-a.png", ".0001-a.png", ".a.txt.1.tmp", "a.png.123.tmp", ".a.png.old.tmp"]
    for name in leftovers + others:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
