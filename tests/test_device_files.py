"""Weight files read to a device beside upstream's loading: every tensor there, none read that isn't wanted, nothing taken on trust.

The device may be the CPU: then all but page-locked buffers and streams is tested without a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ernie_image_nf4 import device_files, load
from ernie_image_nf4.device_files import DeviceReader, mapping_start, plan_reads
from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.hub import weight_files
from ernie_image_nf4.layout import COMPONENT, QUANTIZED
from ernie_image_nf4.loading import device_tensors
from ernie_image_nf4.tensors import StoredTensor, TensorSpec, find_tensors
from ernie_image_nf4.text_encoding import unused_modules
from ernie_image_nf4.weight_blocks import tensors_of

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


def mapped(repository: Path, name: str) -> torch.nn.Module:
    """A component as upstream maps it."""
    return getattr(load(repository, device="cpu", dtype="bfloat16"), name)


def snapshot(module: torch.nn.Module) -> list[torch.Tensor]:
    return [getattr(owner, name).clone() for owner, name in tensors_of(module)]


def inside(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    return memory.data_ptr() <= tensor.data_ptr() < memory.data_ptr() + memory.nbytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("piece_bytes", "piece_tensors"), [(1000, 1000), (1 << 25, 3), (1 << 25, 1000)])
@pytest.mark.parametrize("component", QUANTIZED, ids=lambda component: component.name)
def test_read_tensors_are_those_that_upstream_mapped(
    repository: Path, monkeypatch: pytest.MonkeyPatch, device: str, piece_bytes: int, piece_tensors: int, component
):
    monkeypatch.setattr(device_files, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(device_files, "PIECE_TENSORS", piece_tensors)
    module = mapped(repository, component.name)
    before = snapshot(module)
    unused = unused_modules(module, component.unused)
    left = {id(owner) for part in unused for owner, _ in tensors_of(part)}
    files = weight_files(repository, component)
    with DeviceReader(torch.device(device)) as reader:
        reader.start(device_tensors(repository, component, fast=True))
        reader.place(module, files, unused)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, snapshot(module), strict=True))
    memory = reader.files[files[0]].memory
    there = [getattr(owner, name) for owner, name in tensors_of(module) if id(owner) not in left]
    assert {tensor.device for tensor in there} == {torch.device(device)}
    assert sum(tensor.nbytes for tensor in there if not inside(tensor, memory)) < 0.05 * memory.nbytes
    assert all(tensor.data_ptr() % 16 == 0 for tensor in there)  # which the kernels' wide loads need
    for part in unused:
        for owner, name in tensors_of(part):
            assert getattr(owner, name).device == CPU
            assert not inside(getattr(owner, name), memory)


def test_what_text_to_image_never_uses_is_not_read(repository: Path):
    component = COMPONENT["text_encoder"]
    stored = device_tensors(repository, component, fast=True)
    everything = find_tensors(weight_files(repository, component)).values()
    places, pieces, size = plan_reads(stored)
    assert sum(count for piece in pieces for _, count in piece.parts) == sum(part.spec.bytes for part in stored)
    assert size < sum(part.spec.bytes for part in everything)
    assert places.keys() == {part.offset for part in stored}


def test_a_large_tensor_is_read_in_parts_and_a_gap_ends_a_piece(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_files, "PIECE_BYTES", 100)
    tensors = [
        StoredTensor(Path("f"), offset, TensorSpec("U8", (size,)))
        for offset, size in ((8, 250), (258, 10), (268, 0), (300, 20))
    ]
    places, pieces, size = plan_reads(tensors)
    assert places == {8: (250, 0), 258: (10, 256), 300: (20, 512)}
    assert size == 532
    assert [(piece.start, piece.parts) for piece in pieces] == [
        (8, [(0, 100)]),
        (108, [(100, 100)]),
        (208, [(200, 50), (256, 10)]),
        (300, [(512, 20)]),
    ]


def test_a_file_that_became_shorter_is_refused(copy: Path):
    component = COMPONENT["pe"]
    module = mapped(copy, component.name)
    files = weight_files(copy, component)
    wanted = device_tensors(copy, component, fast=True)
    short = copy / "short.safetensors"
    short.write_bytes(files[0].read_bytes()[:-1000])
    with DeviceReader(CPU) as reader:
        reader.start(StoredTensor(short, stored.offset, stored.spec) for stored in wanted)
        with pytest.raises(InvalidRepository, match="became shorter"):
            reader.place(module, [short])


def test_tensors_that_are_not_mapped_are_copied(repository: Path):
    component = COMPONENT["transformer"]
    module = mapped(repository, component.name)
    files = weight_files(repository, component)
    first = module.layers[0].adaLN_sa_ln.weight
    first.data = (first.data * 2).clone()  # as upstream would convert a weight
    doubled = first.data.clone()
    with DeviceReader(CPU) as reader:
        reader.start(device_tensors(repository, component, fast=True))
        reader.place(module, files)
    memory = reader.files[files[0]].memory
    assert torch.equal(first.data, doubled)
    assert not inside(first.data, memory)
    assert inside(module.layers[1].adaLN_sa_ln.weight, memory)


def test_no_mapping_is_found_where_there_is_none():
    assert mapping_start([torch.zeros(8)], {4: (16, 0)}) is None
    assert mapping_start([], {}) is None


def test_without_scattered_reads_each_tensor_is_read_by_itself(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "preadv")
    component = COMPONENT["pe"]
    module = mapped(repository, component.name)
    before = snapshot(module)
    with DeviceReader(CPU) as reader:
        reader.start(device_tensors(repository, component, fast=True))
        reader.place(module, weight_files(repository, component))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_load_gives_the_weights_of_upstream_in_every_dtype(repository: Path, dtype: str):
    ours = load(repository, device="cuda", memory="resident", dtype=dtype)
    upstream = load(repository, device="cuda", memory="resident", dtype=dtype, fast=False)
    for name in ("transformer", "text_encoder", "pe"):
        one, other = getattr(ours, name).state_dict(), getattr(upstream, name).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key].cpu(), other[key].cpu()) for key in one)
        assert all(one[key].dtype == other[key].dtype for key in one)
