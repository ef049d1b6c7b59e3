"""A folder from a stranger: nothing in it is run, nothing outside of it is read, nothing absurd fills the memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from ernie_image_nf4 import load, verify
from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.repository import chat_template
from ernie_image_nf4.repository.chat_template import MESSAGES, check_chat_template
from ernie_image_nf4.repository.components import COMPONENT, METADATA, MODEL_INDEX
from ernie_image_nf4.repository.describe import describe
from ernie_image_nf4.repository.metadata import read_metadata
from ernie_image_nf4.repository.record import open_repository
from ernie_image_nf4.repository.safetensors_io import MAX_HEADER
from ernie_image_nf4.repository.security import MAX_JSON, MAX_TEMPLATE, MAX_VOCABULARY

TRANSFORMER = COMPONENT["transformer"]


def refuse(folder: Path, message: str, **options: object) -> None:
    with pytest.raises(InvalidRepository, match=message):
        load(folder, device="cpu", **options)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def move_into_shards(folder: Path, name: object) -> Path:
    """Names the transformer's weights `name` in an index of shards; returns the file itself, not renamed."""
    weights = folder / TRANSFORMER.name / TRANSFORMER.weights
    moved = weights.rename(weights.with_name("shard.safetensors"))
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    return moved


# Code and pickles; what no component may have is in test_hostile_components


def test_a_pickle_among_the_shards(copy):
    move_into_shards(copy, "pytorch_model.bin")
    refuse(copy, "names 'pytorch_model.bin', expected a .safetensors file")


def test_settings_that_ask_for_code_further_down(copy):
    edit(
        copy / "text_encoder" / "config.json",
        lambda config: config["text_config"].update(auto_map={"AutoModel": "a.B"}),
    )
    refuse(copy, "asks for code from the repository")


def test_a_kernel_from_the_hub(copy):
    edit(copy / "pe" / "config.json", lambda config: config.update(_attn_implementation="user/kernel"))
    refuse(copy, "asks for code from the Hub")


def test_a_custom_pipeline(copy):
    edit(copy / MODEL_INDEX, lambda index: index.update(_class_name=["pipeline", "ErnieImagePipeline"]))
    refuse(copy, "is of a .*pipeline.*, this package loads ErnieImagePipeline")


def test_a_component_too_many(copy):
    edit(copy / MODEL_INDEX, lambda index: index.update(safety_checker=["os", "system"]))
    refuse(copy, "has a component 'safety_checker', ErnieImagePipeline has none")


# Paths

OUTSIDE = [
    "../shard.safetensors",
    "/shard.safetensors",
    "a/shard.safetensors",
    "..\\shard.safetensors",
    "C:shard.safetensors",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "..", "", "shard.safetensors\0", 5, None])
def test_an_index_of_shards_that_leads_elsewhere(copy, name):
    moved = move_into_shards(copy, name)
    shutil.copy(moved, copy)
    with pytest.raises(InvalidRepository, match=r"expected a .safetensors file beside it"):
        open_repository(copy)
    with pytest.raises(InvalidRepository, match=r"expected a .safetensors file beside it"):
        describe(open_repository(copy, weights=False))


def test_an_index_beside_the_one_file(copy):
    weights = copy / TRANSFORMER.name / TRANSFORMER.weights
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": weights.name}}))
    refuse(copy, "stands beside")


@pytest.mark.parametrize(
    "file",
    [
        MODEL_INDEX,
        METADATA,
        "transformer/config.json",
        "tokenizer/tokenizer.json",
        "vae/diffusion_pytorch_model.safetensors",
        "pe",
    ],
)
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_a_link_out_of_the_repository(copy, tmp_path, file, absolute):
    link, target = copy / file, tmp_path / "elsewhere"
    link.rename(target)
    link.symlink_to(target if absolute else os.path.relpath(target, link.parent))
    if file == METADATA:
        with pytest.raises(InvalidRepository, match="leads out of the repository"):
            read_metadata(copy)
    else:
        refuse(copy, "leads out of the repository")


def test_a_link_to_nothing(copy):
    (copy / "tokenizer" / "chat_template.jinja").unlink()
    (copy / "tokenizer" / "chat_template.jinja").symlink_to("chat_template.jinja")
    refuse(copy, "is a link to nothing")


def test_links_within_the_repository_are_followed(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "tokenizer" / "tokenizer.json").symlink_to("../pe_tokenizer/tokenizer.json")
    open_repository(copy)


def test_the_links_of_the_hub_cache_are_followed(copy, tmp_path):
    storage = tmp_path / "models--user--model"
    snapshot = storage / "snapshots" / "0123"
    (storage / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(copy)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = path.rename(storage / "blobs" / str(number))
        link.symlink_to(os.path.relpath(blob, link.parent))
    load(snapshot, device="cpu", verify=True)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "fast_tokenizer_files", "transformers_weights"])
@pytest.mark.parametrize("name", ["/etc/passwd", "../../x.safetensors"])
def test_settings_that_name_files_elsewhere(copy, key, name):
    value = [name] if key.endswith("s") and "file" in key else name
    edit(copy / "pe_tokenizer" / "tokenizer_config.json", lambda config: config.update({key: value}))
    refuse(copy, "names files outside of its folder")


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/passwd", "a//b"])
def test_metadata_that_names_files_elsewhere(copy, name):
    edit(
        copy / METADATA,
        lambda metadata: metadata["components"]["vae"]["files"].update({name: {"bytes": 1, "sha256": ""}}),
    )
    with pytest.raises(InvalidRepository, match="is no file in its folder"):
        verify(copy)


@pytest.mark.parametrize("name", ["..", "/etc", "elsewhere"])
def test_metadata_that_names_components_elsewhere(copy, name):
    edit(copy / METADATA, lambda metadata: metadata["components"].update({name: metadata["components"]["vae"]}))
    with pytest.raises(InvalidRepository, match="there is no component"):
        verify(copy)


# Absurd sizes


@pytest.mark.parametrize("file", [MODEL_INDEX, METADATA, "transformer/config.json", "pe/generation_config.json"])
def test_a_json_file_of_absurd_size(copy, file):
    with (copy / file).open("a") as stream:  # whitespace behind the value: fine but for its length
        stream.write(" " * MAX_JSON)
    with pytest.raises(InvalidRepository, match=r"has [\d,]+ bytes, such a file has at most"):
        verify(copy) if file == METADATA else load(copy, device="cpu")


def test_a_tokenizer_of_absurd_size(copy):
    with (copy / "tokenizer" / "tokenizer.json").open("a") as stream:
        stream.write(" " * MAX_VOCABULARY)
    refuse(copy, r"tokenizer.json has [\d,]+ bytes, such a file has at most")


def test_other_vocabularies_of_absurd_size(copy):
    (copy / "tokenizer" / "merges.txt").write_text(" " * (MAX_VOCABULARY + 1))
    refuse(copy, r"merges.txt has [\d,]+ bytes, such a file has at most")


def test_a_tokenizer_may_be_larger_than_other_json(copy):
    with (copy / "tokenizer" / "tokenizer.json").open("a") as stream:
        stream.write(" " * MAX_JSON)  # 17 MB in the published ones
    load(copy, device="cpu")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_nested_without_end(copy, opening):
    (copy / "vae" / "config.json").write_text(opening * 1_000_000)
    refuse(copy, "is not JSON")


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_numbers_that_json_does_not_have(copy, number):
    edit(copy / "transformer" / "config.json", lambda config: config.update(eps=float(number)))
    refuse(copy, f"is not JSON .*{number}")


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12])
def test_a_safetensors_header_that_claims_absurd_size(copy, length):
    (copy / TRANSFORMER.name / TRANSFORMER.weights).write_bytes(header(b"{}", length))
    refuse(copy, "truncated or corrupt")


def test_a_safetensors_header_of_absurd_size(copy):
    weights = copy / TRANSFORMER.name / TRANSFORMER.weights
    content = weights.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    # whitespace behind the value: fine but for its length
    weights.write_bytes(header(content[8 : 8 + length] + b" " * MAX_HEADER) + content[8 + length :])
    tracemalloc.start()
    refuse(copy, "truncated or corrupt")
    assert tracemalloc.get_traced_memory()[1] < MAX_HEADER
    tracemalloc.stop()


def test_a_safetensors_header_nested_without_end(copy):
    (copy / TRANSFORMER.name / TRANSFORMER.weights).write_bytes(header(b'{"a":' + b"[" * 1_000_000))
    refuse(copy, "truncated or corrupt")


@pytest.mark.parametrize(
    "item",
    [
        {"shape": [4], "data_offsets": [4, 8]},
        {"shape": [4], "data_offsets": [-4, 0]},
        {"shape": [-4], "data_offsets": [0, 4]},
        {"shape": [2**40, 2**40], "data_offsets": [0, 2**80]},
        {"shape": [4.0], "data_offsets": [0, 4]},
        {"shape": [3], "data_offsets": [0, 3]},
        {"shape": [5], "data_offsets": [0, 4]},  # fills the file, but reading it would go on behind its end
    ],
    ids=str,
)
def test_tensors_that_do_not_fill_their_file(copy, item):
    text = json.dumps({"a": {"dtype": "U8", **item}}).encode()
    (copy / TRANSFORMER.name / TRANSFORMER.weights).write_bytes(header(text) + b"1234")
    refuse(copy, "truncated or corrupt")


@pytest.mark.parametrize(
    ("file", "key"),
    [("scheduler/scheduler_config.json", "num_train_timesteps"), ("transformer/config.json", "num_layers")],
)
def test_numbers_no_model_has(copy, file, key):
    edit(copy / file, lambda config: config.update({key: 10**12}))
    refuse(copy, f"has {key}: 1000000000000, no model has more")


@pytest.mark.parametrize(
    "changes",
    [{"height": 2**30}, {"width": -16}, {"width": 24}, {"num_inference_steps": 10**9}, {"guidance_scale": 1e999}],
    ids=str,
)
def test_recommended_settings_that_make_no_sense_are_not_followed(copy, changes):
    edit(copy / METADATA, lambda metadata: metadata["recommended"].update(changes))
    with pytest.raises(InvalidRepository, match=r"recommended|not JSON"):
        verify(copy)


# Chat templates


def tokenizer_with(folder: Path, template: str) -> transformers.PreTrainedTokenizerBase:
    (folder / "pe_tokenizer" / "chat_template.jinja").write_text(template)
    return transformers.AutoTokenizer.from_pretrained(folder / "pe_tokenizer")


LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "ijk") + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "isn't done after"),
        ("{{ 'a' * 2 * 10 ** 9 }}", r"can't be rendered \(MemoryError"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(31) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "can't be rendered",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"can't be rendered \(RecursionError"),
        ("{{ 'a' * 100000 }}", "makes 100,000 characters of a short prompt"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r"can't be rendered \(jinja2.exceptions.SecurityError"),
        ("{{ messages.append(1) }}", r"can't be rendered \(jinja2.exceptions.SecurityError"),
        ("{% include '/etc/passwd' %}", "can't be rendered"),
        ("{{ raise_exception('no') }}", "can't be rendered"),
        ("{% for %}", r"can't be rendered \(jinja2.exceptions.TemplateSyntaxError"),
        ("{% if 1 %}" * 6000, "can't be rendered"),
        ("a" * (MAX_TEMPLATE + 1), "is no text of at most"),
    ],
    ids=lambda text: text[:40],
)
def test_a_template_that_takes_for_ever_swells_or_fails(copy, template, message, monkeypatch):
    if template != LOOP:  # a busy machine needs its time to let one swell
        monkeypatch.setattr(chat_template, "SECONDS", 15)
    started = time.monotonic()
    with pytest.raises(InvalidRepository, match=f"The chat template of .*{message}"):
        check_chat_template(tokenizer_with(copy, template))
    assert time.monotonic() - started < 20


def test_load_looks_at_the_template_that_it_will_use(copy):
    (copy / "pe_tokenizer" / "chat_template.jinja").write_text("{{ 'a' * 2 * 10 ** 9 }}")
    refuse(copy, "load without the prompt enhancer")
    load(copy, device="cpu", prompt_enhancer=False)


def test_a_huge_template_file_is_not_even_read(copy):
    (copy / "tokenizer" / "chat_template.jinja").write_text("a" * (MAX_TEMPLATE + 1))
    refuse(copy, "such a file has at most")


def test_no_template(copy):
    (copy / "pe_tokenizer" / "chat_template.jinja").unlink()
    refuse(copy, "The chat template of .* is missing")


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message['role'] }}: {{ message.content }}\n{% endfor %}Output:",
        "{{ bos_token }}{% generation %}{{ messages[0]['content'] | tojson }}{% endgeneration %}{{ eos_token }}",
        "{% set ns = namespace(i=0) %}"
        "{% for m in messages %}{% if ns.i %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ dict(a=1) | tojson(indent=2) }}{{ messages | map(attribute='role') | list }}",
    ],
)
def test_templates_in_use_pass_and_transformers_renders_them(copy, template):
    tokenizer = tokenizer_with(copy, template)
    check_chat_template(tokenizer)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False)
