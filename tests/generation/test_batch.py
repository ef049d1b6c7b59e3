"""Many prompts: pictures that depend on their row alone, runs that go on, and failures that spoil nothing else."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import CHECKOUT
from PIL import Image

import ernie_image_nf4
from ernie_image_nf4 import Row, generate_batch, load
from ernie_image_nf4.errors import DiskFull, InvalidSettings
from ernie_image_nf4.generation.batch import process_device
from ernie_image_nf4.generation.contact_sheet import save_contact_sheet
from ernie_image_nf4.generation.image_file import read_settings, save_picture
from ernie_image_nf4.generation.manifest import (
    MANIFEST,
    Record,
    read_manifest,
)
from ernie_image_nf4.generation.schedule import (
    MAX_BATCH,
    plan_pictures,
)
from ernie_image_nf4.generation.settings import Settings
from ernie_image_nf4.generation.single import draw
from ernie_image_nf4.memory.offload import enable_offload
from ernie_image_nf4.memory.tensor_arena import HostArena

DEFAULTS = Settings("", "", 32, 32, 2, 3.0, seed=0)
ROWS = [
    Row("a cat on a wooden desk"),
    Row("一只橙色的小猫坐在木桌上", seed=7),
    Row("a fox in the snow", width=48, name="fox"),
    Row("two dogs", negative="cats", seed=3),
    Row("一朵红花", guidance=1.0),
    Row("a very long prompt that goes on and on about a lighthouse", steps=1),
]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that has the pipeline already")


def run(pipe, folder: Path, rows=ROWS, **options) -> list[Record]:
    return list(generate_batch(pipe, rows, folder, height=32, width=32, steps=2, guidance=3.0, **options))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@contextmanager
def broken(pipe, break_it):
    """`break_it` sees what goes into the transformer, (batch, channels, height, width), and may raise."""
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, __, options: break_it(options["hidden_states"]), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory) -> Path:
    """All rows, drawn in one go."""
    folder = tmp_path_factory.mktemp("whole")
    run(pipe, folder)
    return folder


# Pictures


def test_each_picture_is_what_single_mode_draws_to_the_byte(pipe, whole, tmp_path):
    for picture in plan_pictures(ROWS, DEFAULTS):
        save_picture(draw(pipe, picture.settings), tmp_path / picture.file, model="ERNIE-Tiny-NF4")
    assert digests(tmp_path) == digests(whole)


def test_names_are_numbered_and_readable(whole):
    assert sorted(digests(whole)) == [
        "0001-a-cat-on-a-wooden-desk.png",
        "0002-一只橙色的小猫坐在木桌上.png",
        "0003-fox.png",
        "0004-two-dogs.png",
        "0005-一朵红花.png",
        "0006-a-very-long-prompt-that-goes-on-and-on.png",
    ]


def test_the_manifest_has_a_record_of_each_picture(whole):
    records = read_manifest(whole / MANIFEST)
    assert {record.file: record.sha256 for record in records} == digests(whole)
    assert [record.settings for record in records] == [picture.settings for picture in plan_pictures(ROWS, DEFAULTS)]
    assert all(record.revised_prompt and record.seconds > 0 and record.error is None for record in records)
    assert sorted(path.name for path in whole.iterdir()) == sorted([*digests(whole), MANIFEST])


def test_a_line_of_the_manifest_is_flat(whole):
    line = json.loads((whole / MANIFEST).read_text(encoding="utf-8").splitlines()[1])
    assert list(line) == [
        "file", "prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "seed",
        "use_pe", "guidance_until", "cache", "lora", "model", "revised_prompt", "seconds", "batch_size", "sha256",
        "products", "dtype", "fast", "revision", "version", "error",
    ]  # fmt: skip
    assert (line["prompt"], line["seed"], line["model"]) == ("一只橙色的小猫坐在木桌上", 7, "ERNIE-Tiny-NF4")


def test_order_and_company_make_no_difference(pipe, whole, tmp_path):
    run(pipe, tmp_path, ROWS[:0:-1])
    assert set(digests(tmp_path).values()) == set(digests(whole).values()) - {
        digests(whole)["0001-a-cat-on-a-wooden-desk.png"]
    }


def test_larger_batches_differ_by_rounding_only(pipe, whole, tmp_path):
    sizes = {record.file[:4]: record.batch_size for record in run(pipe, tmp_path, batch_size=4)}
    assert sizes == {"0001": 3, "0002": 3, "0004": 3, "0003": 1, "0005": 1, "0006": 1}
    prompts = [record.revised_prompt for record in read_manifest(tmp_path / MANIFEST)]
    assert prompts == [record.revised_prompt for record in read_manifest(whole / MANIFEST)]
    for name in digests(whole):
        assert np.abs(pixels(tmp_path / name) - pixels(whole / name)).max() <= 1


def test_several_pictures_a_row_count_their_seeds_up(pipe, tmp_path):
    records = run(pipe, tmp_path, [Row("a cat", seed=5), Row("a dog")], count=2, seed=1, use_pe=False)
    assert [(record.file, record.settings.seed) for record in records] == [
        ("0001-a-cat.png", 5), ("0002-a-cat.png", 6), ("0003-a-dog.png", 1), ("0004-a-dog.png", 2),
    ]  # fmt: skip
    assert {record.revised_prompt for record in records} == {None}


def test_the_pipeline_and_torch_are_left_as_they_were(pipe, tmp_path):
    state, attributes, meanwhile = torch.get_rng_state(), vars(pipe) | {"_guidance_scale": None}, set()
    torch.set_num_threads(2)
    try:
        with broken(pipe, lambda _: meanwhile.add(torch.get_num_threads())):
            run(pipe, tmp_path, ROWS[:1])
        assert (meanwhile, torch.get_num_threads()) == ({1}, 2)  # threads would change how sums are rounded
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(pipe) | {"_guidance_scale": None} == attributes


def test_only_the_calls_of_a_group_have_no_progress_bar(pipe, tmp_path, capfd):
    for _ in generate_batch(pipe, ROWS[:2], tmp_path, height=32, width=32, steps=2, guidance=1.0, use_pe=False):
        assert capfd.readouterr().err == ""
        pipe("a cat", height=32, width=32, num_inference_steps=1, guidance_scale=1.0, use_pe=False)
        assert "1/1" in capfd.readouterr().err


def test_a_contact_sheet_shows_every_picture(whole):
    path = save_contact_sheet(whole)
    try:
        assert pixels(path).shape == (2 * 256, 3 * 256, 3)
        assert len({pixels(path)[y : y + 256, x : x + 256].sum() for y in (0, 256) for x in (0, 256, 512)}) == 6
    finally:
        path.unlink()


# Going on


def test_what_is_finished_is_not_drawn_again(pipe, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*.png")}
    assert run(pipe, whole) == []
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*.png")} == before


def test_broken_missing_and_changed_ones_are(pipe, whole, tmp_path):
    run(pipe, tmp_path, ROWS[:4])
    broken_one, missing, *_ = sorted(tmp_path.glob("*.png"))
    broken_one.write_bytes(broken_one.read_bytes()[:-1])
    missing.unlink()
    changed = [*ROWS[:3], Row("two dogs", negative="cats", seed=4)]
    assert [record.file[:4] for record in run(pipe, tmp_path, changed)] == ["0001", "0002", "0004"]
    assert run(pipe, tmp_path, changed) == []
    assert digests(tmp_path).items() ^ {k: v for k, v in digests(whole).items() if k[:4] < "0005"}.items() == {
        ("0004-two-dogs.png", digests(folder)["0004-two-dogs.png"]) for folder in (tmp_path, whole)
    }


def test_another_version_of_the_package_draws_anew(pipe, tmp_path):
    """It may draw other pictures. The first version didn't note itself."""
    rows = ROWS[:2]
    assert {record.version for record in run(pipe, tmp_path, rows)} == {ernie_image_nf4.__version__}
    manifest = tmp_path / MANIFEST
    first, second = (json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines())
    del first["version"]
    for other in (first, first | {"version": "0.0.1"}):
        manifest.write_text(f"{json.dumps(other)}\n{json.dumps(second)}\n")
        assert [record.file for record in run(pipe, tmp_path, rows)] == [first["file"]]
        assert run(pipe, tmp_path, rows) == []


def test_another_revision_of_a_hub_repository_draws_anew(repository, pipe, tmp_path):
    commits = ["0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"]
    for number, commit in enumerate(commits, 1):
        snapshot = tmp_path / "models--user--model" / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(repository)
        cached = load(snapshot, device="cpu")
        (record,) = run(cached, tmp_path / "out", ROWS[:1])
        assert record.revision == read_settings(tmp_path / "out" / record.file)["revision"] == commit
        assert run(cached, tmp_path / "out", ROWS[:1]) == [], number
    (record,) = run(pipe, tmp_path / "out", ROWS[:1])
    assert record.revision is None


def test_two_runs_in_one_folder(pipe, tmp_path):
    first = generate_batch(pipe, ROWS[:2], tmp_path, height=32, width=32, steps=1, guidance=1.0, use_pe=False)
    next(first)
    with pytest.raises(InvalidSettings, match="Another run is drawing into"):
        run(pipe, tmp_path, ROWS[:1])
    assert len(list(first)) == 1
    assert len(run(pipe, tmp_path, ROWS[:1])) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".png", ".png"]


def test_a_run_that_is_given_up_leaves_the_folder_to_the_next(pipe, tmp_path):
    given_up = generate_batch(pipe, ROWS[:2], tmp_path, height=32, width=32, steps=1, guidance=1.0, use_pe=False)
    next(given_up)
    given_up.close()
    assert len(run(pipe, tmp_path, ROWS[:2])) == 2


@pytest.mark.parametrize(("name", "suffix"), [("jpeg", "jpg"), ("webp", "webp")])
def test_other_formats_hold_the_settings_and_go_on_as_well(pipe, whole, tmp_path, name, suffix):
    rows = ROWS[1:3]
    records = run(pipe, tmp_path, rows, format=name)
    assert [record.file for record in records] == [f"0001-一只橙色的小猫坐在木桌上.{suffix}", f"0002-fox.{suffix}"]
    for record, original in zip(records, ("0002-一只橙色的小猫坐在木桌上.png", "0003-fox.png"), strict=True):
        expected, drawn = pixels(whole / original), pixels(tmp_path / record.file)
        assert drawn.shape == expected.shape
        assert np.abs(drawn - expected).mean() < 8
        settings = read_settings(tmp_path / record.file)
        assert (settings["prompt"], settings["revised_prompt"]) == (record.settings.prompt, record.revised_prompt)
    assert run(pipe, tmp_path, rows, format=name) == []
    (tmp_path / records[0].file).write_bytes(b"")
    (tmp_path / f".{records[1].file}.123.tmp").write_text("half a picture")
    assert [record.file for record in run(pipe, tmp_path, rows, format=name)] == [records[0].file]
    save_contact_sheet(tmp_path)
    assert len(run(pipe, tmp_path, rows)) == 2  # PNG files beside them
    assert len(read_manifest(tmp_path / MANIFEST)) == 4
    assert {path.suffix for path in tmp_path.iterdir()} == {f".{suffix}", ".png", ".jsonl"}


def test_a_manifest_cut_short_costs_its_last_line(pipe, whole, tmp_path):
    run(pipe, tmp_path)
    text = (tmp_path / MANIFEST).read_bytes()
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "manifest.3.jsonl").write_bytes(text[:-20])
    (tmp_path / ".0001-a.png.123.tmp").write_text("half a picture")
    assert [record.file[:4] for record in run(pipe, tmp_path)] == ["0006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*digests(whole), MANIFEST])


def test_a_manifest_of_another_kind_is_left_alone(pipe, tmp_path):
    (tmp_path / MANIFEST).write_text('{"name": "somebody else\'s"}\n')
    with pytest.raises(InvalidSettings, match="line 1 is no record of a picture: move the file away"):
        run(pipe, tmp_path)
    assert (tmp_path / MANIFEST).read_text() == '{"name": "somebody else\'s"}\n'


# What fails


def test_a_name_that_the_file_system_refuses_is_refused_before_anything_is_drawn(pipe, tmp_path):
    deep = tmp_path / "a"
    limit = os.pathconf(tmp_path, "PC_PATH_MAX")
    while len(os.fsencode(deep)) < limit - 150:
        deep /= "a" * 100
    deep.mkdir(parents=True)
    with pytest.raises(InvalidSettings, match="use a shorter name"):
        generate_batch(pipe, [Row("a cat", name="字" * 66)], deep)
    assert list(deep.iterdir()) == []


def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(pipe, tmp_path, caplog):
    rows = [Row("a", negative="b", guidance=1.0), Row("a", guidance=1.0), Row("a", negative="b"), Row("a")]
    caplog.set_level(logging.WARNING, logger="ernie_image_nf4")
    options = {"steps": 1, "height": 32, "width": 32, "use_pe": False}
    list(generate_batch(pipe, rows, tmp_path, guidance=3.0, **options))
    (message,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert message == (
        "The negative prompt of 1 of 4 pictures has no effect at guidance scale 1.0: use one above 1 (--guidance 4)."
    )
    caplog.clear()
    list(generate_batch(pipe, rows, tmp_path, guidance=0.0, negative="c", **options))
    assert "of 4 of 4 pictures" in caplog.text
    caplog.clear()
    list(generate_batch(pipe, rows[1:2], tmp_path, guidance=3.0, **options))
    assert "negative" not in caplog.text


def test_a_picture_that_cannot_be_written_is_recorded_and_the_rest_goes_on(pipe, whole, tmp_path):
    (tmp_path / "0002-一只橙色的小猫坐在木桌上.png").mkdir()
    records = {record.file[:4]: record for record in run(pipe, tmp_path)}
    assert "could not be written" in records["0002"].error
    assert records["0002"].sha256 is None
    (tmp_path / "0002-一只橙色的小猫坐在木桌上.png").rmdir()
    assert digests(tmp_path).items() < digests(whole).items()
    assert [record.file[:4] for record in run(pipe, tmp_path)] == ["0002"]
    assert digests(tmp_path) == digests(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize("file", [".0002-two.png.{pid}.tmp", "manifest.0.jsonl"])
def test_a_full_disk_stops_the_run_which_goes_on_later(pipe, tmp_path, file):
    rows = [Row("one"), Row("two"), Row("three")]
    pictures = generate_batch(pipe, rows, tmp_path, height=32, width=32, steps=1, guidance=1.0, use_pe=False)
    first = next(pictures).file
    path = tmp_path / file.format(pid=os.getpid())
    if path.exists():
        path.rename(tmp_path / "manifest.1.jsonl")
    path.symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="the disk is full"):
        next(pictures)
    path.unlink(missing_ok=True)
    options = {"height": 32, "width": 32, "steps": 1, "guidance": 1.0, "use_pe": False}
    assert first == "0001-one.png"
    assert len(list(generate_batch(pipe, rows, tmp_path, **options))) == 2
    assert len(read_manifest(tmp_path / MANIFEST)) == 3


def test_a_picture_that_cannot_be_drawn_spoils_no_other_of_its_batch(pipe, tmp_path):
    noise = torch.randn((pipe.transformer.config.in_channels, 2, 2), generator=torch.Generator().manual_seed(7))

    def fail(latents):
        if any(torch.equal(one, noise.to(one.dtype)) for one in latents):
            raise ValueError("seven is unlucky")

    with broken(pipe, fail):
        records = run(pipe, tmp_path, [Row("a", seed=6), Row("b", seed=7), Row("c", seed=8)], batch_size=3)
    assert [(record.file, record.error) for record in records] == [
        ("0001-a.png", None), ("0002-b.png", "ValueError: seven is unlucky"), ("0003-c.png", None),
    ]  # fmt: skip


def test_out_of_memory_halves_the_batch(pipe, tmp_path):
    tried = []

    def fail(latents):
        tried.append(len(latents))
        if len(latents) > 4:  # with guidance, two pictures
            raise torch.OutOfMemoryError("CUDA out of memory.")

    rows = [Row("a cat", seed=seed) for seed in range(12)]
    with broken(pipe, fail):
        records = run(pipe, tmp_path, rows, batch_size=8, use_pe=False)
    assert {(record.batch_size, record.error) for record in records} == {(2, None)}
    assert tried == [16, 8] + [4] * 2 * 2 + [8] + [4] * 2 * 2 + [4] * 2 * 2


def test_a_picture_too_large_says_what_to_do(pipe, tmp_path):
    def fail(latents):
        if latents.shape[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with broken(pipe, fail):
        small, large = run(pipe, tmp_path, [Row("small"), Row("large", width=48)], batch_size=2)
    assert small.error is None
    assert large.error.startswith("The memory of cpu ran out at 48x32: draw a smaller size")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "0 is too few for the batch size"),
        ({"seed": 2**63 - 1, "count": 2}, "is out of range"),
        ({"rows": [Row("a", seed=2**63 - 1)], "count": 2}, "is out of range"),
        ({"rows": [Row("a"), Row("b", height=100)]}, "Row 2, height: Height 100 is not"),
        ({"rows": [Row("a", name="x"), Row("b", name="X")]}, "Row 2, name: 'X' was used before"),
    ],
)
def test_rows_and_settings_that_cannot_work(pipe, tmp_path, options, message):
    with pytest.raises(InvalidSettings, match=message):
        generate_batch(pipe, options.pop("rows", ROWS), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(pipe, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InvalidSettings, match="can't be made"):
        generate_batch(pipe, ROWS, tmp_path / "out")


# Decisions


def test_one_process_draws_on_the_device_that_was_asked_for():
    assert process_device("cpu") == "cpu"


# The command


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{key: value for key, value in vars(row).items() if value is not None} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


OPTIONS = ("--height", 32, "--width", 32, "--guidance", 3, "--device", "cpu")
LAUNCH = ("-m", "accelerate.commands.launch")


def test_the_command_draws_a_file_of_prompts(command, repository, prompts, whole, tmp_path):
    options = ("--prompts-file", prompts, "--out-dir", tmp_path / "out", "-m", repository, *OPTIONS, "--steps", 2)
    result = command("generate", *options, "--contact-sheet")
    assert (result.code, result.out) == (0, f"{tmp_path / 'out'}: 6 pictures, 0 failed, see manifest.jsonl\n")
    assert digests(tmp_path / "out").items() > digests(whole).items()
    assert (tmp_path / "out" / "contact-sheet.png").exists()
    (tmp_path / "out" / "0003-fox.png").unlink()
    (tmp_path / "out" / "0003-fox.png").mkdir()
    result = command("generate", *options)
    assert (result.code, result.out) == (1, f"{tmp_path / 'out'}: 5 pictures, 1 failed, see manifest.jsonl\n")
    assert "  0003-fox.png: " in result.err


def test_usage_errors_exit_with_two(command, prompts, tmp_path):
    assert command("generate", "a cat", "--prompts-file", prompts, "--out-dir", tmp_path).code == 2
    assert command("generate", "--prompts-file", prompts).code == 2
    assert command("generate", "a cat", "--out-dir", tmp_path).code == 2


# Several processes


def free_port() -> int:
    """For `accelerate launch`, of which older versions take 0 for a port like another and wait forever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def forked(target, *arguments, rank: int | None = None, port: int | None = None) -> multiprocessing.Process:
    """A process that has the pipeline already, and that accelerate takes for one of two if it has a rank."""

    def work():
        if rank is not None:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
            PartialState._reset_state()
        target(*arguments)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@needs_fork
def test_killed_at_any_moment_it_goes_on_and_draws_nothing_twice(pipe, whole, tmp_path):
    for seed in range(4):
        process = forked(run, pipe, tmp_path)
        time.sleep(random.Random(seed).uniform(0, 0.6))
        process.kill()
        process.join()
        lines = [line for part in tmp_path.glob("manifest*.jsonl") for line in read_manifest(part, unfinished=True)]
        finished = {record.file: (tmp_path / record.file).stat().st_ino for record in lines}
        assert {record.file: record.sha256 for record in lines}.items() <= digests(whole).items()
    run(pipe, tmp_path)
    assert {name: (tmp_path / name).stat().st_ino for name in finished} == finished
    assert digests(tmp_path) == digests(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in whole.iterdir())


@needs_fork
def test_a_process_that_dies_does_not_lose_the_pictures_of_the_other(pipe, whole, tmp_path):
    def two() -> list[multiprocessing.Process]:
        port = free_port()
        return [forked(run, pipe, tmp_path, rank=rank, port=port) for rank in range(2)]

    first, second = two()
    while second.is_alive() and not (tmp_path / "manifest.1.jsonl").exists():
        time.sleep(0.01)
    second.kill()
    first.join()
    assert first.exitcode != 0
    assert len(read_manifest(tmp_path / "manifest.0.jsonl")) == 3  # its share, to the end
    finished = {
        record.file: (tmp_path / record.file).stat().st_ino
        for part in tmp_path.glob("manifest.*.jsonl")
        for record in read_manifest(part, unfinished=True)
    }

    for process in two():
        process.join()
        assert process.exitcode == 0
    assert digests(tmp_path) == digests(whole)
    assert {name: (tmp_path / name).stat().st_ino for name in finished} == finished
    assert [record.file for record in read_manifest(tmp_path / MANIFEST)] == sorted(digests(whole))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo")
def test_the_command_under_accelerate_launch_gives_the_same_bytes(repository, prompts, whole, tmp_path):
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", 2, "--main_process_port", free_port()]
    command = [
        "-m",
        "ernie_image_nf4",
        "generate",
        "--prompts-file",
        prompts,
        "--out-dir",
        tmp_path / "out",
        "-m",
        repository,
    ]
    arguments = [sys.executable, *map(str, (*launch, *command, *OPTIONS, "--steps", 2))]
    result = subprocess.run(arguments, cwd=CHECKOUT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 pictures, 0 failed") == 1
    assert digests(tmp_path / "out") == digests(whole)
    assert {record.sha256 for record in read_manifest(tmp_path / "out" / MANIFEST)} == set(digests(whole).values())


@needs_fork
def test_each_file_is_hashed_by_one_process(pipe, whole, tmp_path):
    """Both take its word for what is finished."""
    folder = shutil.copytree(whole, tmp_path / "out")
    (folder / "0003-fox.png").unlink()

    def opened() -> None:
        log = (tmp_path / "opened").open("a")
        read = os.O_RDONLY

        def note(event: str, arguments: tuple) -> None:
            if event == "open" and str(arguments[0]).endswith(".png") and arguments[2] & os.O_ACCMODE == read:
                print(Path(arguments[0]).name, file=log, flush=True)

        sys.addaudithook(note)
        run(pipe, folder)

    port = free_port()
    for process in [forked(opened, rank=rank, port=port) for rank in range(2)]:
        process.join()
        assert process.exitcode == 0
    assert sorted((tmp_path / "opened").read_text().splitlines()) == sorted(digests(whole))


@needs_fork
def test_all_processes_of_a_second_run_stop_and_the_first_goes_on(pipe, tmp_path):
    first = generate_batch(pipe, ROWS[:2], tmp_path, height=32, width=32, steps=1, guidance=1.0, use_pe=False)
    next(first)
    errors = multiprocessing.get_context("fork").SimpleQueue()

    def second() -> None:
        try:
            run(pipe, tmp_path)
        except InvalidSettings as error:
            errors.put(str(error))

    port = free_port()
    for process in [forked(second, rank=rank, port=port) for rank in range(2)]:
        process.join()
        assert process.exitcode == 0
    assert {errors.get() for _ in range(2)} == {
        f"Another run is drawing into {tmp_path}: wait for it, or name another folder."
    }
    assert len(list(first)) == 1


# On a GPU


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_offload_moves_each_component_once_a_group(repository, tmp_path, monkeypatch, device):
    offloaded = load(repository, device=device, memory="auto" if device == "cpu" else "offload")
    if device == "cpu":
        enable_offload(offloaded, torch.device("cpu"))
    arrivals = []
    names = {
        id(getattr(offloaded, name)._hf_hook.weights.arena): name
        for name in ("pe", "text_encoder", "transformer", "vae")
    }
    prefetch = HostArena.prefetch

    def recorded(weights: HostArena, stream: torch.cuda.Stream | None) -> None:
        if not weights.device_blocks:
            arrivals.append(names[id(weights)])
        prefetch(weights, stream)

    monkeypatch.setattr(HostArena, "prefetch", recorded)
    records = run(offloaded, tmp_path, [Row("a cat", seed=seed) for seed in range(6)], batch_size=2)
    assert {record.batch_size for record in records} == {2}
    assert arrivals == ["pe", "text_encoder", "transformer", "vae"]
    assert {parameter.device.type for parameter in offloaded.transformer.parameters()} == {"cpu"}


@pytest.mark.gpu
def test_under_accelerate_launch_each_gpu_draws_its_share(repository, prompts, tmp_path):
    count = torch.cuda.device_count()
    command = ["-m", "ernie_image_nf4", "generate", "--prompts-file", prompts, "-m", repository, "--batch-size", 1]
    launch = [*LAUNCH, "--num_processes", count, "--main_process_port", free_port()]
    launch += ["--multi_gpu"] if count > 1 else []
    options = [option for option in OPTIONS if option not in ("--device", "cpu")]
    output = {}
    for name, starter in (("one", ()), ("each", launch)):
        arguments = [sys.executable, *starter, *command, *options, "--steps", 2, "--out-dir", tmp_path / name]
        result = subprocess.run(list(map(str, arguments)), cwd=CHECKOUT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        output[name] = result.stdout + result.stderr
    assert digests(tmp_path / "each") == digests(tmp_path / "one")
    assert len(read_manifest(tmp_path / "each" / MANIFEST)) == len(ROWS)
    for number in range(count):
        assert f"on cuda:{number}" in output["each"]


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["resident", "offload"])
def test_in_batches_of_one_a_gpu_draws_what_single_mode_draws(repository, tmp_path, memory):
    placed = load(repository, memory=memory)
    run(placed, tmp_path, batch_size=1)
    for picture in plan_pictures(ROWS, DEFAULTS):
        image = np.asarray(draw(placed, picture.settings).image).astype(int)
        assert np.array_equal(pixels(tmp_path / picture.file), image)


@pytest.mark.gpu
def test_on_a_gpu_rows_share_a_batch(repository, tmp_path):
    records = run(load(repository, memory="resident"), tmp_path, [Row("a cat", seed=seed) for seed in range(10)])
    assert [record.batch_size for record in records] == [MAX_BATCH] * MAX_BATCH + [10 - MAX_BATCH] * (10 - MAX_BATCH)
