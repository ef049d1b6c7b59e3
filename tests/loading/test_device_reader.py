"""Weight files read to a device while models are built: every tensor wanted and no other, nothing taken on trust.

The device may be the CPU: then all but page-locked buffers and streams is tested without a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from conftest import stored, weight_files
from safetensors.torch import load_file, save_file

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.loading import device_reader
from ernie_image_nf4.loading.assembly import TensorSource, assemble
from ernie_image_nf4.loading.build import _to_be_read
from ernie_image_nf4.loading.device_reader import DeviceReader, plan_reads
from ernie_image_nf4.memory.placement import Placement
from ernie_image_nf4.memory.precision import BFLOAT16
from ernie_image_nf4.repository.components import COMPONENT, METADATA, QUANTIZED
from ernie_image_nf4.repository.safetensors_io import StoredTensor, TensorSpec, read_tensor

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture(params=["preadv", "seek"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the system call that Windows lacks."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("range_bytes", "range_tensors"), [(1000, 1000), (1 << 25, 3), (1 << 25, 1000)])
@pytest.mark.parametrize("component", QUANTIZED, ids=lambda component: component.name)
def test_tensors_on_the_device_are_those_of_the_file(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    reading: None,
    device: str,
    range_bytes: int,
    range_tensors: int,
    component,
):
    monkeypatch.setattr(device_reader, "RANGE_BYTES", range_bytes)
    monkeypatch.setattr(device_reader, "RANGE_TENSORS", range_tensors)
    part = stored(repository, component)
    wanted = part.device_tensors(fast=True)
    with DeviceReader(torch.device(device)) as reader:
        reader.start(wanted.values())
        views = {name: reader.view(tensor) for name, tensor in part.tensors.items()}
        reader.wait()
    assert {name for name, view in views.items() if view is not None} == wanted.keys()
    for name, tensor in wanted.items():
        assert views[name].device == torch.device(device)
        assert views[name].data_ptr() % 16 == 0  # which the kernels' wide loads need
        assert torch.equal(views[name].cpu(), read_tensor(tensor))


def test_what_text_to_image_never_uses_is_not_read(repository: Path):
    part = stored(repository, COMPONENT["text_encoder"])
    wanted = part.device_tensors(fast=True).values()
    places, ranges, size = plan_reads(wanted)
    assert sum(count for each in ranges for _, count in each.parts) == sum(tensor.spec.bytes for tensor in wanted)
    assert size < sum(tensor.spec.bytes for tensor in part.tensors.values())
    assert places.keys() == {tensor.offset for tensor in wanted}


def test_a_large_tensor_is_read_in_parts_and_a_gap_ends_a_range(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_reader, "RANGE_BYTES", 100)
    tensors = [
        StoredTensor(Path("f"), offset, TensorSpec("U8", (size,)))
        for offset, size in ((8, 250), (258, 10), (268, 0), (300, 20))
    ]
    places, ranges, size = plan_reads(tensors)
    assert places == {8: 0, 258: 256, 300: 512}
    assert size == 532
    assert [(each.start, each.parts) for each in ranges] == [
        (8, [(0, 100)]),
        (108, [(100, 100)]),
        (208, [(200, 50), (256, 10)]),
        (300, [(512, 20)]),
    ]


def test_a_file_that_became_shorter_or_is_gone_is_refused(copy: Path, reading: None):
    part = stored(copy, COMPONENT["pe"])
    short, gone = copy / "short.safetensors", copy / "gone.safetensors"
    short.write_bytes(part.files[0].read_bytes()[:-1000])

    def read(file: Path) -> None:
        with DeviceReader(CPU) as reader:
            reader.start(StoredTensor(file, each.offset, each.spec) for each in part.tensors.values())
            reader.wait()

    for file, message in ((short, "became shorter"), (gone, "can't be read .No such file")):
        with pytest.raises(InvalidRepository, match=message):
            read(file)


def test_shards_of_equal_layout_are_told_apart(copy: Path):
    """A file for each layer, later layers in earlier files."""
    component = COMPONENT["transformer"]
    folder = copy / component.name
    (whole,) = weight_files(copy, component)
    tensors = load_file(whole)
    layers = sorted({name.split(".")[1] for name in tensors if name.startswith("layers.")}, reverse=True)
    groups = [
        {name: value for name, value in tensors.items() if name.startswith(f"layers.{layer}.")} for layer in layers
    ]
    groups.append({name: value for name, value in tensors.items() if not name.startswith("layers.")})
    stem, index = whole.name.removesuffix(".safetensors"), {}
    for number, group in enumerate(groups, 1):
        file = f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        save_file(group, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(group, file)
    whole.unlink()
    (folder / f"{whole.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (copy / METADATA).unlink()
    part = stored(copy, component)
    with DeviceReader(CPU) as reader:
        reader.start(part.tensors.values())
        reader.wait()
        assert all(torch.equal(reader.view(part.tensors[name]), tensors[name]) for name in tensors)


def test_nothing_is_read_of_what_was_not_asked_for(repository: Path):
    part = stored(repository, COMPONENT["pe"])
    with DeviceReader(CPU) as reader:
        reader.start([])
        assert all(reader.view(tensor) is None for tensor in part.tensors.values())
        reader.wait()


@pytest.mark.parametrize("component", QUANTIZED, ids=lambda component: component.name)
def test_a_model_can_be_built_before_its_weights_have_arrived(repository: Path, component):
    part = stored(repository, component)
    expected = assemble(part, TensorSource(), BFLOAT16).state_dict()
    with torch.inference_mode(), DeviceReader(CPU) as reader:
        reader.start(part.device_tensors(fast=True).values())
        source = TensorSource(reader)
        model = assemble(part, source, BFLOAT16)
        source.wait()
    state = model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_memory_is_given_back_after_an_error(repository: Path):
    part, error = stored(repository, COMPONENT["pe"]), None
    try:
        with DeviceReader(CPU) as reader:
            reader.start(part.tensors.values())
            (tensor, *_) = part.tensors.values()
            memory = weakref.ref(reader.view(tensor).untyped_storage())
            raise InvalidRepository("its structure is wrong")
    except InvalidRepository as raised:
        error = raised
    gc.collect()
    assert error.__traceback__
    assert memory() is None


@pytest.mark.parametrize("kind", ["nf4", "original"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_only_what_stays_as_it_is_stored_is_read_to_the_device(repository: Path, original: Path, kind: str, dtype):
    part = stored(repository if kind == "nf4" else original, COMPONENT["transformer"])
    found = _to_be_read(part, Placement(torch.device("cuda"), dtype, "resident", fast=True))
    plain = [tensor for tensor in found if tensor.spec.dtype == "BF16"]
    assert bool(plain) == (dtype == torch.bfloat16)
    assert bool(found) == (dtype == torch.bfloat16 or kind == "nf4")
    mixed = Placement(torch.device("cuda"), dtype, "resident", fast=True, mixed=True)
    of_blocks = [tensor for tensor in plain if tensor in _to_be_read(part, mixed)]
    assert (0 < len(of_blocks) < len(plain)) == (dtype == torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_load_gives_the_weights_of_upstream_in_every_dtype(repository: Path, dtype: str):
    ours = load(repository, device="cuda", memory="resident", dtype=dtype, fast="exact")
    upstream = load(repository, device="cuda", memory="resident", dtype=dtype, fast=False)
    for name in ("transformer", "text_encoder", "pe"):
        one, other = getattr(ours, name).state_dict(), getattr(upstream, name).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key].cpu(), other[key].cpu()) for key in one)
        assert all(one[key].dtype == other[key].dtype for key in one)
