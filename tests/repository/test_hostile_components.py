"""Every hostile case in every component: refused by `load`, `info` and `verify`, and no pickle opened."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import stored

from ernie_image_nf4 import load, verify
from ernie_image_nf4.errors import IncompatibleLibraries, InvalidRepository
from ernie_image_nf4.loading.tokenizers import load_tokenizer
from ernie_image_nf4.repository.components import COMPONENT, COMPONENTS, METADATA, MODEL_INDEX, Component
from ernie_image_nf4.repository.record import PICKLES, open_repository
from ernie_image_nf4.repository.security import MAX_JSON, MAX_TEMPLATE, MAX_VOCABULARY

every_component = pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
TOKENIZERS = [component for component in COMPONENTS if component.other_classes]
Change = Callable[[Path, Component], object]

opened: list[str] = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


def write_bomb(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb()))


def refuse(folder: Path, component: Component, message: str) -> None:
    """None of the three takes the folder, with metadata or without, and none opens a pickle."""
    opened.clear()
    with pytest.raises(InvalidRepository, match=message):
        load(folder, device="cpu")
    with pytest.raises(InvalidRepository, match=message):
        open_repository(folder, weights=False)
    assert [report.ok for report in verify(folder, components=[component])] == [False]
    (folder / METADATA).unlink()
    with pytest.raises(InvalidRepository, match=message):
        load(folder, device="cpu")
    assert [report.ok for report in verify(folder, components=[component])] == [False]
    assert any(name.endswith(MODEL_INDEX) for name in opened)
    assert not [name for name in opened if name.startswith(str(folder)) and Path(name).suffix.lower() in PICKLES]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def setting(**changes: object) -> Change:
    return lambda place, component: edit(place / component.config, **changes)


def file(name: str, content: bytes) -> Change:
    return lambda place, component: (place / name).write_bytes(content)


def configuration(content: bytes) -> Change:
    return lambda place, component: (place / component.config).write_bytes(content)


def link(target: str) -> Change:
    def change(place: Path, component: Component) -> None:
        path = place / component.config
        elsewhere = place.parents[1] / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to({"absolute": str(elsewhere), "relative": "../../elsewhere", "nothing": "nowhere"}[target])

    return change


ADAPTER = b'{"base_model_name_or_path": "user/other", "peft_type": "LORA"}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4146045428\n"
CODE = ("auto_map", "custom_pipelines", "custom_pipeline", "custom_code", "custom_generate", "trust_remote_code")
CASES: dict[str, tuple[Change, str]] = {
    **{
        key: (setting(**{key: {"AutoModel": "modeling.Model"}}), rf"asks for code from the repository \({key}\)")
        for key in CODE
    },
    "code in nested settings": (setting(inner={"deep": [{"auto_map": {"AutoModel": "a.B"}}]}), "asks for code from"),
    "a kernel": (setting(_attn_implementation="user/kernel"), "asks for code from the Hub"),
    "a module": (file("modeling.py", b"raise SystemExit('ran')"), "modeling.py would change what is loaded"),
    "a module named as a library": (file("transformers.py", b"raise SystemExit('ran')"), "would change what is loaded"),
    "an adapter": (file("adapter_config.json", ADAPTER), "adapter_config.json would change what is loaded"),
    "another class": (setting(_class_name="Other"), "is of a Other, expected"),
    "a file elsewhere": (setting(vocab_file="../../x.json"), "names files outside of its folder"),
    "weights elsewhere": (setting(transformers_weights="/x.safetensors"), "names files outside of its folder"),
    "an absolute link": (link("absolute"), "leads out of the repository"),
    "a relative link": (link("relative"), "leads out of the repository"),
    "a link to nothing": (link("nothing"), "is missing"),
    "much JSON": (configuration(b"{}" + b" " * MAX_JSON), "bytes, such a file has at most"),
    "deep JSON": (configuration(b'{"a":' * 100_000), "is not JSON"),
    "no JSON": (configuration(b"\xff\xfe{}"), "is not JSON"),
    "no object": (configuration(b"[]"), "holds no JSON object"),
    "no number": (configuration(b'{"a": NaN}'), "is not JSON .*NaN"),
    "a pointer": (configuration(POINTER), "is a Git LFS pointer"),
    "a large template": (file("chat_template.jinja", b"a" * (MAX_TEMPLATE + 1)), "bytes, such a file has at most"),
    "a large vocabulary": (file("merges.txt", b" " * (MAX_VOCABULARY + 1)), "bytes, such a file has at most"),
}


@every_component
@pytest.mark.parametrize("case", CASES)
def test_what_no_component_may_have(copy, component, case):
    change, message = CASES[case]
    change(copy / component.name, component)
    refuse(copy, component, message)


@pytest.mark.parametrize(
    "component", [part for part in COMPONENTS if part not in TOKENIZERS], ids=lambda component: component.name
)
def test_a_number_that_no_model_has(copy, component):
    edit(copy / component.name / component.config, number=10**12)
    refuse(copy, component, "has number: 1000000000000, no model has more")


# Pickles


@every_component
@pytest.mark.parametrize(
    "name",
    [
        *(f"weights{suffix}" for suffix in PICKLES),
        "pytorch_model.bin", "training_args.bin", "optimizer.pt", "sub/inner.bin", "UPPER.BIN",
    ],
)  # fmt: skip
def test_a_stray_pickle_is_named_and_not_opened(copy, component, name):
    path = copy / component.name / name
    write_bomb(path)
    refuse(copy, component, f"{path} may be a pickle, .* remove the file")
    path.unlink()
    open_repository(copy)


@every_component
def test_several_stray_pickles_are_counted(copy, component):
    for name in ("a.bin", "b.pt", "c.pkl"):
        write_bomb(copy / component.name / name)
    refuse(copy, component, rf"a\.bin \(and 2 more in .*{component.name}\) may be a pickle")


@pytest.mark.parametrize(
    "component", [part for part in COMPONENTS if part.weights], ids=lambda component: component.name
)
def test_pickles_in_place_of_the_weights(copy, component):
    for path in (copy / component.name).glob("*.safetensors"):
        path.unlink()
    write_bomb(copy / component.name / "pytorch_model.bin")
    refuse(copy, component, r"has its weights as a pickle only \(pytorch_model\.bin\)")


# Classes


@every_component
@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["modeling", "Model"],
        ["transformers", "pipeline"],
        ["transformers", "BertForTokenClassification"],  # has "Token" in its name
        ["transformers", "AutoTokenizer"],
        ["transformers", "TransfoXLTokenizer"],
        ["diffusers", "DiffusionPipeline"],
        ["diffusers", "TokenizersBackend"],
        ["diffusers"],
        [1, 2],
        [["transformers"], {}],
    ],
    ids=str,
)
def test_other_classes_than_those_of_ernie_image(copy, component, entry):
    edit(copy / MODEL_INDEX, **{component.name: entry})
    refuse(copy, component, f"{component.name} is .*only the classes of ERNIE-Image are loaded")


@pytest.mark.parametrize("component", TOKENIZERS, ids=lambda component: component.name)
def test_a_model_in_place_of_a_tokenizer(copy, component):
    """With its weights as a pickle, for which transformers would look."""
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    config.save_pretrained(copy / component.name)
    model = transformers.BertForTokenClassification(config)
    torch.save(model.state_dict(), copy / component.name / "pytorch_model.bin")
    edit(copy / MODEL_INDEX, **{component.name: ["transformers", type(model).__name__]})
    refuse(
        copy, component, f"{component.name} is .*BertForTokenClassification.*only the classes of ERNIE-Image are loaded"
    )


@pytest.mark.parametrize("component", TOKENIZERS, ids=lambda component: component.name)
def test_the_names_of_tokenizers_in_earlier_releases(copy, component):
    for name in component.class_names:
        edit(copy / MODEL_INDEX, **{component.name: ["transformers", name]})
        tokenizer = load_tokenizer(stored(copy, component))
        assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
        assert type(tokenizer) is getattr(transformers, name)


@pytest.mark.parametrize("replaced", [transformers.BertForTokenClassification, os.system, None], ids=str)
def test_a_known_name_that_is_no_tokenizer_in_the_installed_transformers(copy, monkeypatch, replaced):
    part = stored(copy, COMPONENT["tokenizer"])
    monkeypatch.setattr(transformers, part.class_name, replaced)
    opened.clear()
    with pytest.raises(
        IncompatibleLibraries, match=f"has no tokenizer {part.class_name}, .*pip install -U transformers"
    ):
        load_tokenizer(part)
    assert not [name for name in opened if name.startswith(str(copy))]
