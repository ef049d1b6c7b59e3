"""LoRAs of pictures: how they are named, that each picture has its own, and what its file says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from lora_files import write_lora
from PIL import Image
from test_batch import digests, forked, free_port, needs_fork

from ernie_image_nf4 import Row, generate_batch, load, load_lora
from ernie_image_nf4.errors import InvalidLora, InvalidSettings
from ernie_image_nf4.generation.image_file import read_settings
from ernie_image_nf4.generation.loras import LoraFiles, parse_lora
from ernie_image_nf4.generation.manifest import MANIFEST, read_manifest
from ernie_image_nf4.generation.prompt_file import read_prompts
from ernie_image_nf4.generation.schedule import Picture, groups
from ernie_image_nf4.generation.settings import LoraUse, Settings
from ernie_image_nf4.generation.single import draw_and_save
from ernie_image_nf4.loading.lora import known_adapters, strengths

pytest.importorskip("peft")

SMALL = {"height": 32, "width": 32, "steps": 2}


@pytest.fixture(scope="module")
def adapted(repository: Path):
    return load(repository, device="cpu", dtype="float32", prompt_enhancer=False)


@pytest.fixture
def pipeline(adapted):
    yield adapted
    adapted.unload_lora_weights()


@pytest.fixture(scope="module")
def files(adapted, tmp_path_factory) -> dict[str, Path]:
    """Two LoRAs that show in the pixels."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_lora(folder / f"{name}.safetensors", adapted, seed=seed, size=40.0)
        for seed, name in enumerate(("ink", "oil"), 1)
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(pipe, folder: Path, rows, **options):
    return list(generate_batch(pipe, rows, folder, **SMALL, use_pe=False, **options))


def pixels_of(folder: Path) -> dict[str, np.ndarray]:
    """The pictures of a folder by their names, in order."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image)
    return found


# How they are named


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        ("style.safetensors:-1", ("style.safetensors", -1.0)),
        ("style.safetensors:.5", ("style.safetensors", 0.5)),
        ("style:1e-1", ("style", 0.1)),
        ("C:\\loras\\style.safetensors", ("C:\\loras\\style.safetensors", 1.0)),
        ("C:\\loras\\style.safetensors:+2.", ("C:\\loras\\style.safetensors", 2.0)),
        ("user/name", ("user/name", 1.0)),
        ("user/name/a/b.safetensors:0.25", ("user/name/a/b.safetensors", 0.25)),
        ("style.safetensors:nan", ("style.safetensors:nan", 1.0)),
    ],
)
def test_a_number_behind_the_last_colon_is_the_strength(text, expected):
    assert parse_lora(text) == expected


def test_a_file_of_that_very_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("style:2").touch()
    assert parse_lora("style:2") == ("style:2", 1.0)


@pytest.mark.parametrize("text", ["", " ", " :0.5"])
def test_a_lora_without_a_file(text):
    with pytest.raises(InvalidSettings, match="names no file"):
        parse_lora(text)


@pytest.mark.parametrize("text", ["ink.safetensors:1e999", "ink.safetensors:-1e400"])
def test_a_strength_beyond_all_numbers(text):
    with pytest.raises(InvalidSettings, match="no finite number"):
        parse_lora(text)


def test_a_lora_of_a_row_that_is_not_there_is_told_of_with_its_place(files, tmp_path):
    rows = [{"prompt": "a", "lora": [str(files["ink"])]}, {"prompt": "b", "lora": ["nowhere.safetensors:0.5"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(InvalidLora, match=r"rows\.jsonl, line 3, lora: There is no file or folder 'nowhere"):
        read_prompts(path, loras=LoraFiles())
    path.write_text(json.dumps({"prompt": "a", "lora": [str(files["ink"])] * 2}))
    with pytest.raises(InvalidSettings, match=r"rows\.jsonl, line 1, lora: LoRA ink\.safetensors is named twice"):
        read_prompts(path, loras=LoraFiles())


@pytest.mark.parametrize("text", ["~nobody-is-called-so/ink.safetensors", "x" * 5000, "x" * 5000 + ".safetensors:0.5"])
def test_a_path_that_no_system_takes_is_not_there(text):
    with pytest.raises(InvalidLora, match="There is no file or folder"):
        LoraFiles().find([text])


def test_a_strength_that_overflows_is_what_the_error_names(pipeline, files, tmp_path):
    rows = [Row("a cat", lora=(f"{files['ink']}:1e300",)), Row("a cat")]
    strong, without = sorted(draw(pipeline, tmp_path, rows), key=lambda record: record.file)
    assert "use a LoRA strength nearer to 1 than 1e+300" in strong.error
    assert without.error is None


def test_files_are_known_by_their_digest(files):
    uses = LoraFiles().find([f"{files['ink']}:0.5", str(files["oil"])])
    assert uses == (
        LoraUse("ink.safetensors", 0.5, sha256(files["ink"])),
        LoraUse("oil.safetensors", 1.0, sha256(files["oil"])),
    )
    with pytest.raises(InvalidSettings, match=r"LoRA ink\.safetensors is named twice"):
        LoraFiles().find([f"{files['ink']}:0.5", f"{files['ink']}:0.25"])
    with pytest.raises(InvalidLora, match="There is no file"):
        LoraFiles().find(["nowhere.safetensors:0.5"])


def test_lists_in_prompt_files(tmp_path):
    jsonl, csv = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    rows = [{"prompt": "a", "lora": ["x.safetensors:0.5", "C:\\y.safetensors"]}, {"prompt": "b", "lora": []}]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    csv.write_text("prompt,lora\na,x.safetensors:0.5; C:\\y.safetensors\nb,\n")
    both = ("x.safetensors:0.5", "C:\\y.safetensors")
    assert [row.lora for row in read_prompts(jsonl)] == [both, ()]
    assert [row.lora for row in read_prompts(csv)] == [both, None]
    jsonl.write_text('{"prompt": "a", "lora": "x.safetensors"}\n{"prompt": "b", "lora": [1]}\n')
    with pytest.raises(InvalidSettings) as problems:
        read_prompts(jsonl)
    assert str(problems.value).splitlines() == [
        f"{jsonl}, line 1, lora: expected a list, found 'x.safetensors'.",
        f"{jsonl}, line 2, lora: expected text, found 1.",
    ]


# Each picture has its own


def test_each_row_is_drawn_as_it_is_alone(pipeline, files, tmp_path):
    ink, oil = map(str, files.values())
    wanted = [(), (ink,), (f"{oil}:0.5",), (ink, f"{oil}:-0.5"), ()]
    rows = [Row("a cat", lora=lora) for lora in wanted]
    records = draw(pipeline, tmp_path / "all", rows, batch_size=4)
    assert known_adapters(pipeline) == []
    together = pixels_of(tmp_path / "all")
    for number, lora in enumerate(wanted):
        for source in lora:
            name, _, strength = source.partition(".safetensors")
            load_lora(pipeline, name + ".safetensors", strength=float(strength.removeprefix(":") or 1))
        draw(pipeline, tmp_path / str(number), [Row("a cat")])
        (alone,) = pixels_of(tmp_path / str(number)).values()
        pipeline.unload_lora_weights()
        assert np.abs(alone.astype(int) - list(together.values())[number].astype(int)).max() <= 1
    different = list(together.values())
    assert all(not np.array_equal(one, other) for n, one in enumerate(different[:4]) for other in different[:n])
    assert np.array_equal(different[0], different[4])
    assert {record.error for record in records} == {None}


def test_rows_of_one_lora_share_a_batch(files):
    find = LoraFiles().find
    defaults = Settings("a cat", "", 32, 32, 2, 1.0, 0)
    named = [find([str(path)]) for path in files.values()]
    pictures = [
        Picture(str(number), Settings(**{**vars(defaults), "lora": named[number % 2], "seed": number}))
        for number in range(6)
    ]
    (group,) = groups(pictures, lambda picture: 8, 16)
    assert sorted([picture.file for picture in batch] for batch in group) == [["0", "2", "4"], ["1", "3", "5"]]


def test_loras_of_the_pipeline_stay_as_they_are(pipeline, files, tmp_path):
    load_lora(pipeline, files["oil"], name="mine", strength=0.25)
    draw(pipeline, tmp_path / "before", [Row("a cat")])
    (before,) = pixels_of(tmp_path / "before").values()
    draw(pipeline, tmp_path / "all", [Row("a cat", lora=[str(files["ink"])]), Row("a cat")])
    ink, mine = pixels_of(tmp_path / "all").values()
    assert np.array_equal(mine, before)
    assert not np.array_equal(ink, before)
    assert strengths(pipeline) == {"mine": 0.25}
    assert known_adapters(pipeline) == ["mine"]
    pipeline.disable_lora()
    draw(pipeline, tmp_path / "off", [Row("a cat", lora=[str(files["ink"])])])
    assert np.array_equal(next(iter(pixels_of(tmp_path / "off").values())), ink)
    assert strengths(pipeline) == {}


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_drawn(pipeline, files, tmp_path, repository):
    from safetensors.torch import load_file, save_file

    wrong = {key: tensor[:, :-1].clone() for key, tensor in load_file(files["ink"]).items()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(InvalidLora, match="doesn't fit layers"):
        generate_batch(pipeline, [Row("a cat", lora=[str(tmp_path / "wrong.safetensors")])], tmp_path / "out")
    assert known_adapters(pipeline) == []


@needs_fork
def test_two_processes_draw_24_rows_with_three_loras_as_one_does(pipeline, files, tmp_path):
    third = write_lora(tmp_path / "chalk.safetensors", pipeline, rank=2, seed=3, size=40.0)
    loras = [(), *((str(path),) for path in files.values()), (f"{third}:-0.5",), (str(third), f"{files['ink']}:0.25")]
    rows = [Row(f"picture {number}", seed=number, lora=loras[number % len(loras)]) for number in range(24)]
    draw(pipeline, tmp_path / "one", rows)
    port = free_port()
    both = [forked(draw, pipeline, tmp_path / "two", rows, rank=rank, port=port) for rank in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(digests(tmp_path / "one")) == 24
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    one, two = (read_manifest(tmp_path / name / MANIFEST) for name in ("one", "two"))
    assert [record.settings for record in two] == [record.settings for record in one]
    assert {use.file for record in two for use in record.settings.lora} == {
        "ink.safetensors",
        "oil.safetensors",
        "chalk.safetensors",
    }


# What files say


def test_a_run_goes_on_by_the_files_of_its_loras(pipeline, files, tmp_path):
    moved = tmp_path / "ink.safetensors"
    moved.write_bytes(files["ink"].read_bytes())
    rows = [Row("a cat", name="cat")]
    assert len(draw(pipeline, tmp_path / "out", rows, lora=[str(files["ink"])])) == 1
    (record,) = read_manifest(tmp_path / "out" / MANIFEST)
    assert record.settings.lora == (LoraUse("ink.safetensors", 1.0, sha256(files["ink"])),)
    assert draw(pipeline, tmp_path / "out", rows, lora=[str(moved)]) == []
    assert len(draw(pipeline, tmp_path / "out", rows, lora=[f"{moved}:0.5"])) == 1
    moved.write_bytes(files["oil"].read_bytes())
    assert len(draw(pipeline, tmp_path / "out", rows, lora=[f"{moved}:0.5"])) == 1


def test_loras_that_the_pipeline_has_already_are_noted(pipeline, files, tmp_path):
    load_lora(pipeline, files["oil"], name="mine", strength=0.25)
    noted = LoraUse("oil.safetensors", 0.25, sha256(files["oil"]))
    rows = [Row("a cat"), Row("a cat", lora=[str(files["ink"])])]
    plain, own = draw(pipeline, tmp_path, rows)
    assert plain.settings.lora == (noted,)
    assert own.settings.lora == (LoraUse("ink.safetensors", 1.0, sha256(files["ink"])),)
    (file, _) = sorted(tmp_path.glob("*.png"))
    assert read_settings(file)["lora"] == f"oil.safetensors:0.25 (sha256 {noted.sha256})"
    assert draw(pipeline, tmp_path, rows) == []
    ((drawing, path),) = draw_and_save(pipeline, [tmp_path / "one.png"], "a cat", **SMALL, seed=0, use_pe=False)
    assert drawing.settings.lora == (noted,)
    assert read_settings(path)["lora"] == read_settings(file)["lora"]


def switch_off(pipe) -> None:
    pipe.disable_lora()


def change_strength(pipe) -> None:
    pipe.set_adapters(["mine"], [0.5])


def change_one_layer(pipe) -> None:
    pipe.set_adapters(["mine"], [{"layers.0": 0.25, "layers.1": 0.5}])


def leave_out(pipe) -> None:
    pipe.unload_lora_weights()


@pytest.mark.parametrize("change", [switch_off, change_strength, change_one_layer, leave_out])
def test_other_loras_in_the_pipeline_are_other_pictures(pipeline, files, tmp_path, change):
    load_lora(pipeline, files["oil"], name="mine", strength=0.25)
    rows = [Row("a cat"), Row("a dog", lora=[str(files["ink"])])]
    draw(pipeline, tmp_path, rows)
    change(pipeline)
    before = pixels_of(tmp_path)
    (again,) = draw(pipeline, tmp_path, rows)  # that with a LoRA of its own stays
    assert again.settings.prompt == "a cat"
    assert not np.array_equal(pixels_of(tmp_path)[again.file], before[again.file])
    assert draw(pipeline, tmp_path, rows) == []


def test_a_lora_of_the_same_name_from_another_file_is_another(pipeline, files, tmp_path):
    for loading in (load_lora, type(pipeline).load_lora_weights):
        for name in ("ink", "oil"):
            pipeline.unload_lora_weights()
            if loading is load_lora:
                load_lora(pipeline, files[name], name="mine")
            else:
                pipeline.load_lora_weights(files[name], adapter_name="mine")
            (record,) = draw(pipeline, tmp_path, [Row("a cat")]) or read_manifest(tmp_path / MANIFEST)
            assert record.settings.lora == (LoraUse(f"{name}.safetensors", 1.0, sha256(files[name])),)
    pipeline.load_lora_weights(files["ink"], adapter_name="mine", hotswap=True)
    (record,) = draw(pipeline, tmp_path, [Row("a cat")])
    assert record.settings.lora == (LoraUse("ink.safetensors", 1.0, sha256(files["ink"])),)


def test_a_lora_from_no_file_is_known_by_its_tensors(pipeline, files, tmp_path):
    from safetensors.torch import load_file

    digests = set()
    for name in ("ink", "oil", "ink"):
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(load_file(files[name]), adapter_name="mine")
        (record,) = draw(pipeline, tmp_path, [Row("a cat")])
        (use,) = record.settings.lora
        assert (use.file, use.strength, use.from_file) == ("mine", 1.0, False)
        digests.add(use.sha256)
        assert draw(pipeline, tmp_path, [Row("a cat")]) == []
        assert read_settings(tmp_path / record.file)["lora"] == f"mine:1 (tensors: sha256 {use.sha256})"
    assert len(digests) == 2


def test_saving_leaves_what_is_known_of_a_lora(pipeline, files, tmp_path):
    load_lora(pipeline, files["oil"], strength=0.25)
    pipeline.save_pretrained(tmp_path / "saved")
    (record,) = draw(pipeline, tmp_path / "out", [Row("a cat")])
    assert record.settings.lora == (LoraUse("oil.safetensors", 0.25, sha256(files["oil"])),)


def test_a_manifest_that_noted_no_loras_of_the_pipeline_holds_for_none(pipeline, files, tmp_path):
    draw(pipeline, tmp_path, [Row("a cat")])
    manifest = tmp_path / MANIFEST
    values = json.loads(manifest.read_text())
    assert values.pop("lora") == []
    manifest.write_text(json.dumps(values) + "\n")
    assert draw(pipeline, tmp_path, [Row("a cat")]) == []
    load_lora(pipeline, files["oil"])
    assert len(draw(pipeline, tmp_path, [Row("a cat")])) == 1


def test_the_command(command, repository, files, tmp_path):
    size = ("--model", repository, "--height", 32, "--width", 32, "--steps", 2, "--device", "cpu", "--no-pe")
    for name, options in (("plain", ()), ("ink", ("--lora", f"{files['ink']}:0.5", "--lora", files["oil"]))):
        path = tmp_path / f"{name}.png"
        assert command("generate", "a cat", "--seed", 1, "-o", path, *size, *options).code == 0
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "ink.png") as ink:
        assert not np.array_equal(np.asarray(plain), np.asarray(ink))
    assert "lora" not in read_settings(tmp_path / "plain.png")
    assert read_settings(tmp_path / "ink.png")["lora"] == (
        f"ink.safetensors:0.5 (sha256 {sha256(files['ink'])}); oil.safetensors:1 (sha256 {sha256(files['oil'])})"
    )


def test_the_command_with_a_file_of_prompts(command, repository, files, tmp_path):
    size = ("--model", repository, "--height", 32, "--width", 32, "--steps", 1, "--device", "cpu", "--no-pe")
    rows = [{"prompt": "a cat", "lora": [str(files["ink"])]}, {"prompt": "a cat"}, {"prompt": "a cat", "lora": []}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--prompts-file", tmp_path / "rows.jsonl", "--out-dir", tmp_path / "out", "--lora", files["oil"])
    assert command("generate", *options, *size).code == 0
    paths = sorted((tmp_path / "out").glob("*.png"))
    assert [read_settings(path).get("lora", "").partition(":")[0] for path in paths] == [
        "ink.safetensors",
        "oil.safetensors",
        "",
    ]


def test_a_missing_lora_is_told_of_before_the_model_is_loaded(command, tmp_path):
    size = ("--model", tmp_path / "nowhere", "-o", tmp_path / "out.png")
    refused = command("generate", "a cat", "--lora", "nowhere.safetensors:0.5", *size)
    assert refused.code == 1
    assert "There is no file or folder 'nowhere.safetensors'" in refused.err
