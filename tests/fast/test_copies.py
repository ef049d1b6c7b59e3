"""Fast models are upstream's to whoever copies, pickles, saves or deletes them."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import test_prompt_enhancer
import test_transformer
import torch
from diffusers import AutoencoderKLFlux2, ErnieImagePipeline, ErnieImageTransformer2DModel
from torch import nn
from transformers import Ministral3ForCausalLM

from ernie_image_nf4 import load
from ernie_image_nf4.fast.prompt_enhancer import make_prompt_enhancer_fast
from ernie_image_nf4.fast.subclassing import Runtime, become, named_as_upstream
from ernie_image_nf4.fast.transformer import TransformerRuntime, make_transformer_fast


def fast_transformer() -> ErnieImageTransformer2DModel:
    transformer = test_transformer.build()
    make_transformer_fast(transformer, capture_steps=True)
    return transformer


def fast_enhancer() -> Ministral3ForCausalLM:
    model = test_prompt_enhancer.build("cpu")
    make_prompt_enhancer_fast(model)
    return model


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    """What a model gives, with all of its runtime in use."""
    if isinstance(model, ErnieImageTransformer2DModel):
        call = test_transformer.inputs("cpu", torch.float32, (2, 5))
        return [model(**call).sample for _ in range(3)][-1]
    call = test_prompt_enhancer.prompt(model, 1, 5) | {"max_new_tokens": 12, "do_sample": False}
    together = model.generate_together([model.decode_request(**call)] * 2, [0, 1], 2)
    return torch.cat([model.generate(**call), *together])


MODELS = pytest.mark.parametrize("build", [fast_transformer, fast_enhancer])


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@MODELS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_computes_with_its_own_weights_and_a_fresh_runtime(
    build: Callable[[], nn.Module], duplicate: Callable[[nn.Module], nn.Module]
):
    model = build()
    expected = run(model)
    twin = duplicate(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert twin.runtime is not model.runtime
    assert type(twin.runtime) is type(model.runtime)
    for weight in model.parameters():
        weight.data.zero_()
    assert torch.equal(run(twin), expected)
    assert not torch.equal(run(model), expected)


def test_a_copy_keeps_the_settings_of_a_runtime_and_none_of_its_state():
    transformer = fast_transformer()
    transformer.runtime.products, transformer.runtime.exact = "int8", True
    run(transformer)
    twin = copy.deepcopy(transformer).runtime
    assert (twin.products, twin.exact, twin.positions, twin.pictures) == ("int8", True, None, 1)
    assert twin.captured_step is not None
    assert twin.captured_step.picture is None
    assert by_pickle(TransformerRuntime(capture_steps=False)).captured_step is None


@pytest.mark.parametrize(("former", "products"), [(True, "fp8"), (False, None), ("int8", "int8"), (None, None)])
def test_a_pickle_of_an_older_version_says_whether_products_are_in_fp8(former, products):
    assert TransformerRuntime(True, former).products == products


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@MODELS
def test_a_model_that_is_deleted_is_freed_without_a_garbage_collection(build, no_collection):
    model = build()
    run(model)
    refs = [weakref.ref(each) for each in (model, next(model.parameters()), model.runtime)]
    del model
    assert [ref() for ref in refs] == [None, None, None]


def test_callbacks_of_a_runtime_do_not_hold_the_model(no_collection):
    transformer = fast_transformer()
    run(transformer)
    ref, callback = weakref.ref(transformer), transformer.runtime.release_graph
    del transformer
    assert ref() is None
    callback()


@pytest.mark.gpu
@MODELS
@torch.no_grad()
def test_a_model_with_captured_steps_is_freed_without_a_garbage_collection(build, no_collection):
    model = build().to("cuda")
    if isinstance(model, ErnieImageTransformer2DModel):
        call = test_transformer.inputs("cuda", torch.float32, (2, 5))
        for _ in range(3):
            model(**call)
        assert model.runtime.captured_step.graph is not None
    else:
        run(model)
        assert model.runtime.slot.buffers
    ref = weakref.ref(model)
    del model
    assert ref() is None


# What is written


def written(pipe: ErnieImagePipeline, folder: Path) -> dict[str, bytes]:
    pipe.save_pretrained(folder)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pipeline_of_fast_parts_writes_upstreams_files(repository, tmp_path):
    plain, fast = (load(repository, device="cpu") for _ in range(2))
    make_transformer_fast(fast.transformer, capture_steps=True)
    make_prompt_enhancer_fast(fast.pe)
    assert type(fast.transformer) is not type(plain.transformer)
    assert type(fast.pe) is not type(plain.pe)
    expected = written(ErnieImagePipeline(**plain.components), tmp_path / "plain")
    assert written(ErnieImagePipeline(**fast.components), tmp_path / "fast") == expected
    assert json.loads(expected["model_index.json"])["transformer"] == ["diffusers", "ErnieImageTransformer2DModel"]
    assert json.loads(expected["model_index.json"])["pe"] == ["transformers", "Ministral3ForCausalLM"]
    assert json.loads(expected["transformer/config.json"])["_class_name"] == "ErnieImageTransformer2DModel"
    assert json.loads(expected["pe/config.json"])["architectures"] == ["Ministral3ForCausalLM"]


def test_registering_fast_parts_notes_upstreams_names(repository):
    pipe = load(repository, device="cpu")
    expected = dict(pipe.config)
    make_transformer_fast(pipe.transformer, capture_steps=False)
    make_prompt_enhancer_fast(pipe.pe)
    pipe.register_modules(transformer=pipe.transformer, pe=pipe.pe)
    assert dict(pipe.config) == expected


def test_a_fast_model_is_upstreams_by_its_classes():
    transformer, model = fast_transformer(), fast_enhancer()
    assert isinstance(transformer, ErnieImageTransformer2DModel)
    assert isinstance(model, Ministral3ForCausalLM)
    for made, upstream in ((transformer, test_transformer.build()), (model, test_prompt_enhancer.build("cpu"))):
        names = [type(module).__name__ for module in upstream.modules()]
        assert [type(module).__name__ for module in made.modules()] == names
        assert made.state_dict().keys() == upstream.state_dict().keys()
        assert str(made) == str(upstream)


# The change of a class


@named_as_upstream
class FastLinear(nn.Linear):
    pass


def test_only_an_object_of_the_very_base_class_becomes_one_of_a_subclass():
    layer = nn.Linear(2, 2)
    become(layer, FastLinear)
    assert type(layer) is FastLinear
    assert (type(layer).__name__, layer.__module__) == ("Linear", nn.Linear.__module__)
    for other in (layer, nn.Bilinear(2, 2, 2), AutoencoderKLFlux2):
        with pytest.raises(TypeError, match=r"FastLinear is for torch\.nn\.modules\.linear\.Linear"):
            become(other, FastLinear)


class Kept(Runtime):
    def __init__(self, setting: int = 0) -> None:
        self.setting, self.state = setting, None

    def __reduce__(self) -> tuple:
        return type(self), (self.setting,)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, by_pickle])
def test_a_runtime_is_copied_with_its_settings_alone(duplicate):
    kept = Kept(3)
    kept.state = "anything"
    twin = duplicate(kept)
    assert (type(twin), twin.setting, twin.state) == (Kept, 3, None)
