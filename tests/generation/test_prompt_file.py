"""Prompt files: what each format holds, and that every wrong row is named before anything is drawn."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

from ernie_image_nf4.errors import InvalidSettings
from ernie_image_nf4.generation.prompt_file import FIELDS, Row, read_prompts


@pytest.fixture
def write(tmp_path):
    """Writes a prompt file and returns its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def problems(path: Path) -> list[str]:
    with pytest.raises(InvalidSettings) as error:
        read_prompts(path)
    return str(error.value).removeprefix(f"{path}, ").split(f"\n{path}, ")


def test_text_has_a_prompt_a_line(write):
    path = write("prompts.txt", "\ufeff# animals\na cat\n\n  一只橙色的小猫  \r\n#dog\n")
    assert read_prompts(path) == [Row("a cat"), Row("一只橙色的小猫")]


def test_a_file_without_suffix_is_text(write):
    assert read_prompts(write("prompts", "a cat")) == [Row("a cat")]


def test_json_lines_override_what_holds_for_all(write):
    lines = [
        '{"prompt": "a cat", "negative": "dogs", "seed": 7, "height": 32, "width": 64, "steps": 3, "guidance": 2, '
        '"name": "cat"}',
        "",
        '{"prompt": "# 猫", "seed": null}',
    ]
    rows = read_prompts(write("prompts.jsonl", "\n".join(lines)))
    assert rows == [Row("a cat", "dogs", 7, 32, 64, 3, 2.0, "cat"), Row("# 猫")]


def test_csv_has_the_fields_in_its_header(write):
    text = '\ufeffprompt,seed,guidance\r\n"a cat, orange",7,1.5\r\n\r\n"two\nlines",,\r\n一只猫,8\r\n'
    rows = read_prompts(write("prompts.csv", text))
    assert rows == [Row("a cat, orange", seed=7, guidance=1.5), Row("two\nlines"), Row("一只猫", seed=8)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": ""}', "prompt: The prompt is empty: say what to draw."),
        ('{"prompt": "  "}', "prompt: The prompt is empty: say what to draw."),
        ('{"seed": 1}', "prompt: is missing."),
        ('{"prompt": 5}', "prompt: expected text, found 5."),
        ('{"prompt": "a", "height": "512"}', "height: expected a whole number, found '512'."),
        ('{"prompt": "a", "height": 512.0}', "height: expected a whole number, found 512.0."),
        ('{"prompt": "a", "steps": true}', "steps: expected a whole number, found True."),
        ('{"prompt": "a", "guidance": "4"}', "guidance: expected a number, found '4'."),
        ('{"prompt": "a", "guidance": true}', "guidance: expected a number, found True."),
        ('{"prompt": "a", "guidance": 1' + "0" * 400 + "}", "guidance: expected a number, found 1"),
        ('{"prompt": "a", "guidance": NaN}', "guidance: Guidance nan is not a finite number"),
        ('{"prompt": "a", "height": 100}', "height: Height 100 is not a positive multiple of 16: try 96."),
        ('{"prompt": "a", "width": -16}', "width: Width -16 is not a positive multiple of 16: try 16."),
        ('{"prompt": "a", "steps": 0}', "steps: 0 is too few for steps: use 1 or more."),
        ('{"prompt": "a", "seed": -1}', "seed: Seed -1 is out of range"),
        ('{"prompt": "a", "colour": "red"}', "colour: is no known field, use prompt, negative, seed, "),
        ('{"prompt": "a", "negative": ["b"]}', "negative: expected text, found ['b']."),
        ('{"prompt": "a", "": 1}', ": is no known field, use prompt, negative, seed, "),
        ('{"prompt": "a", "\\ud800": 1}', "\ud800: is no known field, use prompt, negative, seed, "),
        ('{"prompt": "a", "negative": "\\ud800"}', "negative: has half a surrogate pair, which is no character."),
        ('{"prompt": "\\ud800"}', "prompt: has half a surrogate pair, which is no character."),
        ('{"prompt": "a", "name": ""}', "name: '' can't be part of a file name"),
        ('{"prompt": "a", "name": "../a"}', "name: '../a' can't be part of a file name"),
        ('{"prompt": "a", "name": "a/b"}', "name: 'a/b' can't be part of a file name"),
        ('{"prompt": "a", "name": "a\\\\b"}', "name: 'a\\\\b' can't be part of a file name"),
        ('{"prompt": "a", "name": ".a"}', "name: '.a' can't be part of a file name"),
        ('{"prompt": "a", "name": "C:a"}', "name: 'C:a' can't be part of a file name"),
        ('{"prompt": "a", "name": "a\\u0000"}', "name: 'a\\x00' can't be part of a file name"),
        ('{"prompt": "a", "name": "' + "a" * 101 + '"}', "name: 'aaa"),
        ('{"prompt": "a", "name": "' + "字" * 67 + '"}', "name: '字字字"),
        ('{"prompt": "a", "name": "' + "🐱" * 51 + '"}', "name: '🐱🐱🐱"),
        ('{"prompt": "a"', "is not JSON ("),
        ("[" * 100000, "is not JSON ("),
        ('"a cat"', 'expected an object, found "a cat".'),
    ],
)
def test_a_wrong_row_is_named_by_line_and_field(write, row, problem):
    path = write("prompts.jsonl", f'{{"prompt": "a cat"}}\n\n{row}\n')
    (found,) = problems(path)
    separator = ": " if problem.startswith(("is not", "expected an object")) else ", "
    assert found.startswith(f"line 3{separator}{problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt,size\na cat,5", "line 1: column 'size' is no known field"),
        ("prompt;seed\na cat;5", "line 1: column 'prompt;seed' is no known field"),
        ("prompt,prompt\na cat,b", "line 1: a column occurs twice."),
        ("name,seed\na,5", "line 2, prompt: is missing."),
        ('prompt,seed\n"two\nlines",1\na cat,many', "line 4, seed: expected a whole number, found 'many'."),
        ("prompt,height\na cat,100", "line 2, height: Height 100 is not a positive multiple of 16"),
        ("prompt,seed\na cat, orange,5", "line 2: has 3 cells, the header 2: quote a cell that has a comma in it."),
        ('prompt,seed\n"a cat,5', "line 2: is not CSV ("),
    ],
)
def test_a_wrong_csv_row_is_named_by_line_and_field(write, text, problem):
    (found,) = problems(write("prompts.csv", text))
    assert found.startswith(problem)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_what_is_not_utf_8_is_named_by_line(write, suffix):
    path = write(f"prompts.{suffix}", "prompt\n一只猫\n".encode() + b"caf\xe9\n")
    assert problems(path) == ["line 3: byte 0xe9 is not UTF-8, save the file as UTF-8."]


def test_a_name_may_occur_once_even_where_case_does_not_count(write):
    lines = ['{"prompt": "a", "name": "Caf\\u00e9"}', '{"prompt": "b"}', '{"prompt": "c", "name": "cafe\\u0301"}']
    path = write("prompts.jsonl", "\n".join(lines))
    assert problems(path) == [f"line 3, name: 'cafe\u0301' was used before ({path}, line 1), choose another."]


def test_all_wrong_rows_are_named_at_once(write):
    path = write("prompts.jsonl", '{"prompt": ""}\n{"prompt": "a"}\nnothing\n{"prompt": "b", "seed": -1, "steps": 0}\n')
    assert [line.partition(":")[0] for line in problems(path)] == [
        "line 1, prompt", "line 3", "line 4, seed", "line 4, steps",
    ]  # fmt: skip


def test_names_are_limited_by_what_they_take_as_a_files_name(write):
    longest = ["a" * 100, "字" * 66, "🐱" * 50, "é" * 100]
    path = write("prompts.jsonl", "\n".join(json.dumps({"prompt": "a", "name": name}) for name in longest))
    assert [row.name for row in read_prompts(path)] == longest
    path = write("prompts.jsonl", json.dumps({"prompt": "a", "name": "字" * 100}))
    assert problems(path)[0].endswith("is too long for a file name: 300 bytes in UTF-8, use up to 200.")


# Standard input


@pytest.fixture
def piped(monkeypatch):
    """Makes bytes the standard input."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("path", ["-", Path("-")])
def test_standard_input_has_a_prompt_a_line_or_json_lines(piped, path):
    piped("\ufeff# animals\na cat\n\n一只橙色的小猫\n".encode())
    assert read_prompts(path) == [Row("a cat"), Row("一只橙色的小猫")]
    piped('\ufeff\n {"prompt": "a cat", "seed": 7}\n{"prompt": "猫"}\n'.encode())
    assert read_prompts(path) == [Row("a cat", seed=7), Row("猫")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Standard input has no prompts."),
        (b"a cat\ncaf\xe9\n", "standard input, line 2: byte 0xe9 is not UTF-8"),
        (b'{"prompt": "a cat"}\n{"prompt": ""}\n', "standard input, line 2, prompt: The prompt is empty"),
    ],
)
def test_standard_input_is_checked_as_a_file(piped, content, message):
    piped(content)
    with pytest.raises(InvalidSettings) as error:
        read_prompts("-")
    assert str(error.value).startswith(message)


def test_several_processes_cannot_share_standard_input(piped, monkeypatch):
    piped(b"a cat")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidSettings, match="2 processes can't all read the prompts from standard input: use a file"):
        read_prompts("-")


def test_no_standard_input_at_all(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InvalidSettings, match="no standard input"):
        read_prompts("-")


@pytest.mark.parametrize("content", ["", "# nothing\n\n"])
def test_a_file_without_prompts(write, content):
    with pytest.raises(InvalidSettings, match="has no prompts"):
        read_prompts(write("prompts.txt", content))


@pytest.mark.parametrize(("name", "message"), [("prompts.json", "is none of text"), ("prompts.txt", "can't be read")])
def test_a_file_that_cannot_be_read(tmp_path, name, message):
    with pytest.raises(InvalidSettings, match=message):
        read_prompts(tmp_path / name)


def test_the_command_checks_the_whole_file_before_it_imports_anything_heavy(write):
    path = write("prompts.jsonl", '{"prompt": "a cat"}\n{"prompt": "a dog", "height": 100}\n')
    arguments = [
        "generate",
        "--prompts-file",
        str(path),
        "--out-dir",
        str(path.parent / "out"),
        "-m",
        "user/never-asked",
    ]
    code = f"""
import sys
sys.argv[1:] = {arguments!r}
from ernie_image_nf4.cli.app import main
try:
    main()
except SystemExit as exit:
    print(exit.code)
print({{"torch", "diffusers", "transformers", "accelerate"}} & set(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert out == f"Error: {path}, line 2, height: Height 100 is not a positive multiple of 16: try 96.\nset()\n"
    assert not (path.parent / "out").exists()


def test_a_row_is_public_a_plain_dataclass_and_needs_no_torch():
    code = """
import sys
from ernie_image_nf4 import Row
print(Row("a cat", seed=7, guidance="not checked until it is drawn"))
print({"torch", "diffusers", "transformers", "accelerate"} & set(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [
        "Row(prompt='a cat', negative=None, seed=7, height=None, width=None, steps=None, "
        "guidance='not checked until it is drawn', name=None, guidance_until=None, cache=None, lora=None)",
        "set()",
    ]
    assert vars(Row("a", "b", 1)) == dict.fromkeys(FIELDS) | {"prompt": "a", "negative": "b", "seed": 1}
