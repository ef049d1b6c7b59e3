"""torch.compile on fast models, as users call it: upstream's forward pass is what is compiled."""

from __future__ import annotations

import logging

import pytest
import test_products
import test_prompt_enhancer
import test_transformer
import torch
from conftest import captured
from diffusers import ErnieImageTransformer2DModel

from ernie_image_nf4.fast import transformer as fast_transformer
from ernie_image_nf4.fast.products import set_products
from ernie_image_nf4.fast.prompt_enhancer import make_prompt_enhancer_fast
from ernie_image_nf4.fast.transformer import make_transformer_fast, several_pictures

LENGTHS = [(9, 9), (1, 9), (3, 12), (4,)]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def calls() -> list[dict[str, torch.Tensor]]:
    """Several lengths of prompts, numbers of rows and sizes of pictures."""
    made = [test_transformer.inputs("cpu", torch.float32, lengths) for lengths in LENGTHS]
    other = torch.randn(2, 8, 12, 10, generator=torch.Generator().manual_seed(3))
    return [*made, made[1] | {"hidden_states": other}]


def compiled_whole(transformer: ErnieImageTransformer2DModel, **options):
    return torch.compile(transformer, **options)


def compiled_by_blocks(transformer: ErnieImageTransformer2DModel, **options):
    transformer.compile_repeated_blocks(**options)
    return transformer


WAYS = pytest.mark.parametrize("way", [compiled_whole, compiled_by_blocks])


@WAYS
@torch.no_grad()
def test_a_compiled_transformer_is_upstreams_for_all_lengths_and_sizes(way):
    """The same results by as many graphs; with `fullgraph`, the limit of recompilations would be an error."""
    results, counts = [], []
    for fast in (False, True):
        torch.compiler.reset()
        transformer, graphs = test_transformer.build(num_layers=1), []
        if fast:
            make_transformer_fast(transformer, capture_steps=True)

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph

        compiled = way(transformer, fullgraph=True, backend=backend)
        results.append([compiled(**call).sample for call in calls()])
        counts.append(len(graphs))
    assert all(map(torch.equal, *results))
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_a_transformer_compiled_in_place_is_upstreams():
    transformer, call = test_transformer.build(num_layers=1), test_transformer.inputs("cpu", torch.float32, (1, 9))
    expected = transformer(**call).sample
    make_transformer_fast(transformer, capture_steps=True)
    transformer.compile(fullgraph=True, backend="eager")
    assert torch.equal(transformer(**call).sample, expected)


@torch.no_grad()
def test_compiled_blocks_free_a_captured_step():
    transformer, call = test_transformer.build(num_layers=1), test_transformer.inputs("cpu", torch.float32, (1, 9))
    make_transformer_fast(transformer, capture_steps=True)
    transformer(**call)
    memory = captured(transformer)
    transformer(**call)
    assert memory() is not None
    transformer.compile_repeated_blocks(backend="eager")
    transformer(**call)
    assert memory() is None


@torch.no_grad()
def test_a_compiled_batch_is_upstreams():
    transformer = test_transformer.build(num_layers=1)
    call = test_transformer.inputs("cpu", torch.float32, (1, 1, 5, 3))
    expected = transformer(**call).sample
    make_transformer_fast(transformer, capture_steps=False)
    compiled = torch.compile(transformer, backend="eager")
    with several_pictures(compiled, 2):
        assert torch.equal(compiled(**call).sample, expected)


@WAYS
@torch.no_grad()
def test_eight_bits_say_once_that_compiled_blocks_do_without_them(way, caplog):
    fast_transformer.log_compiled_products.cache_clear()
    transformer, call = test_products.build(num_layers=1), test_transformer.inputs("cpu", torch.bfloat16, (3, 7))
    expected = transformer(**call).sample
    set_products(transformer, "int8")
    compiled = way(transformer, fullgraph=True, backend="eager")
    with caplog.at_level(logging.WARNING, fast_transformer.__name__):
        found = [compiled(**each).sample for each in (call, call | {"text_lens": torch.tensor([2, 7])}, call)]
    warnings = [record.message for record in caplog.records if record.name == fast_transformer.__name__]
    assert warnings == ["Compiled blocks multiply in the dtype of the weights, not in 8 bits."]
    assert test_products.relative_error(found[0], expected) < 1e-2


@torch.no_grad()
def test_a_compiled_prompt_enhancer_gives_upstreams_result():
    model = test_prompt_enhancer.build("cpu")
    inputs = [test_prompt_enhancer.prompt(model, *shape)["input_ids"] for shape in ((1, 7), (1, 9))]
    expected = [model(ids, use_cache=False).logits for ids in inputs]
    make_prompt_enhancer_fast(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for ids, reference in zip(inputs, expected, strict=True):
        assert torch.equal(compiled(ids, use_cache=False).logits, reference)
    assert not any("roll" in code for code in graphs)  # as the fast attention rotates


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_blocks_give_the_same_on_a_gpu():
    transformer = test_transformer.build().to("cuda", torch.bfloat16)
    made = [test_transformer.inputs("cuda", torch.bfloat16, lengths) for lengths in ((1, 9), (2, 9), (5, 9))]
    expected = [transformer(**call).sample.float() for call in made]
    make_transformer_fast(transformer, capture_steps=True)
    transformer.compile_repeated_blocks(fullgraph=True)
    for call, reference in zip(made, expected, strict=True):
        assert (transformer(**call).sample.float() - reference).norm() / reference.norm() < 1e-2
