"""A tokenizer of files that were read before is the one that upstream's ``from_pretrained`` makes of them."""

from __future__ import annotations

import copy as copies
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from conftest import CHECKOUT, stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.loading.tokenizers import DROPPED, PLAIN, load_tokenizer
from ernie_image_nf4.repository.components import COMPONENT, MODEL_INDEX
from ernie_image_nf4.repository.record import StoredComponent

TEXTS = ["", "a cat", "一只橙色的小猫  坐在\n木桌上", "<s>a</s> <pad><unk> cat<s>", "<new> cat <image>", "\ufffd\x00 é"]
CHAT = [{"role": "user", "content": "a cat"}]
NAMES = ("tokenizer", "pe_tokenizer")
ATTRIBUTES = (
    "all_special_ids", "all_special_tokens", "chat_template", "clean_up_tokenization_spaces", "extra_special_tokens",
    "model_input_names", "model_max_length", "name_or_path", "padding_side", "special_tokens_map",
    "split_special_tokens", "truncation_side", "vocab_size",
    *transformers.PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
)  # fmt: skip


def description(tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> dict[str, object]:
    """All of a tokenizer that is public."""
    found = {name: getattr(tokenizer, name) for name in ATTRIBUTES}
    found |= {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in tokenizer.special_tokens_map}
    found["class"], found["len"], found["vocabulary"] = type(tokenizer), len(tokenizer), tokenizer.get_vocab()
    found["added"] = {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
    found["encoded"] = [dict(tokenizer(text)) for text in TEXTS]
    found["plain"] = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    ids = list(range(0, len(tokenizer), 7))
    found["decoded"] = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
    if tokenizer.pad_token is not None:
        found["batch"] = dict(tokenizer(TEXTS, padding=True, truncation=True, max_length=8))
    if tokenizer.chat_template is not None:
        found["chat"] = tokenizer.apply_chat_template(CHAT, tokenize=False)
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    found["saved"] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return found


@pytest.fixture
def upstream_calls(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that upstream's ``from_pretrained`` is asked for."""
    calls: list[Path] = []
    original = transformers.TokenizersBackend.from_pretrained.__func__

    def from_pretrained(cls: type, folder: Path, **options: object) -> object:
        calls.append(folder)
        return original(cls, folder, **options)

    monkeypatch.setattr(transformers.TokenizersBackend, "from_pretrained", classmethod(from_pretrained))
    return calls


def compare(part: StoredComponent, tmp_path: Path, calls: list[Path]) -> bool:
    """Hold a tokenizer to upstream's; returns whether upstream was asked to make it."""
    calls.clear()
    ours = load_tokenizer(part)
    asked = bool(calls)
    tokenizer_class = getattr(transformers, part.class_name)
    upstreams = description(tokenizer_class.from_pretrained(part.folder, local_files_only=True), tmp_path / "saved")
    assert description(ours, tmp_path / "saved") == upstreams
    assert description(copies.deepcopy(ours), tmp_path / "saved") == upstreams
    return asked


def write_config(folder: Path, **changes: object) -> None:
    path = folder / COMPONENT["tokenizer"].config
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_vocabulary(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    change(vocabulary)
    path.write_text(json.dumps(vocabulary))


@pytest.mark.parametrize("name", NAMES)
def test_the_minis_tokenizers_are_upstreams(name, tmp_path, upstream_calls):
    if not (CHECKOUT / MODEL_INDEX).exists():
        pytest.skip("this checkout holds no weights")
    assert not compare(stored(CHECKOUT, COMPONENT[name]), tmp_path, upstream_calls)


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizers_of_a_quantized_repository_are_upstreams(repository, name, tmp_path, upstream_calls):
    assert not compare(stored(repository, COMPONENT[name]), tmp_path, upstream_calls)


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_special_tokens": ["<new>", "<reserved_3>", "a"]},
        {"padding_side": "left", "truncation_side": "left"},
        {"model_max_length": 10**30},
        {"model_max_length": ...},
        {"add_bos_token": True, "add_eos_token": True},
        {"split_special_tokens": True, "clean_up_tokenization_spaces": True},
        {"cls_token": "<s>", "mask_token": "<new>", "sep_token": None, "unk_token": ...},
        {"pad_token": ..., "bos_token": ..., "eos_token": "a"},
        {"chat_template": "{{ messages[0].content }}", "processor_class": "PixtralProcessor"},
        {"is_local": False, "local_files_only": False, "tokenizer_class": "LlamaTokenizerFast"},
        {"model_input_names": ["input_ids"]},
    ],
    ids=str,
)
def test_settings_of_the_published_form(copy, changes, tmp_path, upstream_calls):
    write_config(copy / "tokenizer", **changes)
    assert not compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


def test_a_chat_template_in_the_settings_alone(copy, tmp_path, upstream_calls):
    template = copy / "tokenizer" / "chat_template.jinja"
    template.unlink()
    write_config(copy / "tokenizer", chat_template="{{ messages[0].content }}")
    assert not compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


def test_a_chat_template_with_line_ends_of_windows(copy, tmp_path, upstream_calls):
    (copy / "tokenizer" / "chat_template.jinja").write_bytes("{{ messages[0].content }}\r\né\r\n".encode())
    assert not compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


@pytest.mark.parametrize("change", ["truncation", "padding", "no post-processor", "no added tokens"])
def test_vocabularies_with_settings_of_their_own(copy, change, tmp_path, upstream_calls):
    def edit(vocabulary: dict) -> None:
        if change == "truncation":
            vocabulary["truncation"] = {
                "direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0
            }  # fmt: skip
        elif change == "padding":
            vocabulary["padding"] = {
                "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 4, "pad_id": 11,
                "pad_type_id": 0, "pad_token": "<pad>",
            }  # fmt: skip
        elif change == "no post-processor":
            vocabulary["post_processor"] = None
        else:
            vocabulary["added_tokens"] = []

    edit_vocabulary(copy / "tokenizer", edit)
    assert not compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


tokens = st.sampled_from(["<s>", "</s>", "<pad>", "<unk>", "<reserved_3>", "a", "cat", "<new>", "é"])
configurations = st.fixed_dictionaries(
    {"backend": st.just("tokenizers"), "tokenizer_class": st.just("TokenizersBackend")},
    optional={
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "mask_token"), tokens | st.none()),
        "extra_special_tokens": st.lists(tokens, max_size=4, unique=True),
        "padding_side": st.sampled_from(["left", "right"]),
        "truncation_side": st.sampled_from(["left", "right"]),
        "model_max_length": st.integers(1, 10**30),
        "add_bos_token": st.booleans(),
        "add_eos_token": st.booleans(),
        "split_special_tokens": st.booleans(),
        "clean_up_tokenization_spaces": st.booleans(),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configurations)
def test_any_settings_of_the_published_form(copy, tmp_path, upstream_calls, config):
    (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    assert not compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


def test_settings_are_sorted_into_those_that_are_given_and_those_that_are_not():
    assert not PLAIN.keys() & DROPPED.keys()


# Other forms


@pytest.mark.parametrize(
    "changes",
    [
        {"image_token": "<image>"},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"additional_special_tokens": ["<new>"]},
        {"bos_token": {"__type": "AddedToken", "content": "<new>", "lstrip": True, "special": True}},
        {"added_tokens_decoder": {"300": {"content": "<new>", "special": True}}},
        {"legacy": False},
    ],
    ids=str,
)
def test_settings_that_upstream_translates(copy, changes, tmp_path, upstream_calls):
    write_config(copy / "tokenizer", **changes)
    assert compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("special_tokens_map.json", {"bos_token": "<new>"}),
        ("added_tokens.json", {"<new>": 300}),
        ("config.json", {"model_type": "mistral"}),
        ("additional_chat_templates/other.jinja", "{{ messages[0].role }}"),
    ],
)
def test_files_that_upstream_looks_for(copy, file, content, tmp_path, upstream_calls):
    path = copy / "tokenizer" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


def test_a_class_with_a_constructor_of_its_own(copy, tmp_path, upstream_calls):
    index = json.loads((copy / MODEL_INDEX).read_text())
    index["tokenizer"] = ["transformers", "LlamaTokenizerFast"]
    (copy / MODEL_INDEX).write_text(json.dumps(index))
    assert compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


def test_a_named_token_that_the_vocabulary_has_as_an_ordinary_one(copy, tmp_path, upstream_calls):
    edit_vocabulary(copy / "tokenizer", lambda vocabulary: vocabulary["added_tokens"][1].update(special=False))
    assert compare(stored(copy, COMPONENT["tokenizer"]), tmp_path, upstream_calls)


# Files that are none


@pytest.mark.parametrize("content", [b"{", b"", b"{}", b'{"version": "1.0", "model": {"type": "BPE"}}', b"\xff"])
def test_a_vocabulary_that_is_none_is_named(copy, content):
    (copy / "tokenizer" / "tokenizer.json").write_bytes(content)
    with pytest.raises(InvalidRepository, match=r"tokenizer/tokenizer\.json can't be loaded .*download"):
        load(copy, device="cpu")


def test_a_chat_template_that_is_no_text_is_named(copy):
    (copy / "tokenizer" / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRepository, match=r"chat_template\.jinja is no text in UTF-8"):
        load(copy, device="cpu")


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja"])
def test_a_git_lfs_pointer_instead_of_a_file(copy, file):
    (copy / "tokenizer" / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4146\n")
    with pytest.raises(InvalidRepository, match=rf"tokenizer/{file} is a Git LFS pointer"):
        load(copy, device="cpu")
