"""Weight files read to a device beside upstream's loading: every tensor there, none read that isn't wanted, nothing taken on trust.

The device may be the CPU: then all but page-locked buffers and streams is tested without a GPU.
"""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_image_nf4 import load
from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.fast.module_tensors import tensors_of
from ernie_image_nf4.loading import device_reader as device_files
from ernie_image_nf4.loading.device_reader import DeviceReader, FileOnDevice, plan_reads
from ernie_image_nf4.loading.pipeline import _reading, device_tensors
from ernie_image_nf4.memory.host_embeddings import unused_modules
from ernie_image_nf4.memory.placement import Placement
from ernie_image_nf4.repository.components import COMPONENT, METADATA, QUANTIZED
from ernie_image_nf4.repository.resolve import weight_files
from ernie_image_nf4.repository.safetensors_io import StoredTensor, TensorSpec, find_tensors

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
        reader.start(device_tensors(repository, component, fast=True).values())
        memory = reader.files[files[0]].memory
        reader.place(module, files, unused)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, snapshot(module), strict=True))
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
    stored = device_tensors(repository, component, fast=True).values()
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


def test_a_file_that_became_shorter_or_is_gone_is_refused(copy: Path):
    component = COMPONENT["pe"]
    module = mapped(copy, component.name)
    wanted = device_tensors(copy, component, fast=True).values()
    short, gone = copy / "short.safetensors", copy / "gone.safetensors"
    short.write_bytes(weight_files(copy, component)[0].read_bytes()[:-1000])

    def read(file: Path) -> None:
        with DeviceReader(CPU) as reader:
            reader.start(StoredTensor(file, stored.offset, stored.spec) for stored in wanted)
            reader.place(module, [file])

    for file, message in ((short, "became shorter"), (gone, "can't be read .No such file")):
        with pytest.raises(InvalidRepository, match=message):
            read(file)


def place(repository: Path, module: torch.nn.Module, name: str) -> list[weakref.ref]:
    """Lets a component have the tensors that a reader has read; returns the memory of each file."""
    component = COMPONENT[name]
    with DeviceReader(CPU) as reader:
        reader.start(device_tensors(repository, component, fast=True).values())
        memory = [weakref.ref(read.memory.untyped_storage()) for read in reader.files.values()]
        reader.place(module, weight_files(repository, component))
    return memory


def test_tensors_that_are_not_mapped_are_copied(repository: Path):
    module = mapped(repository, "transformer")
    norm = module.layers[0].adaLN_sa_ln.weight
    norm.data = (norm.data * 2).clone()  # as upstream would convert a weight
    before = snapshot(module)
    (memory,) = place(repository, module, "transformer")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))
    assert norm.untyped_storage().data_ptr() != memory().data_ptr()
    assert module.layers[1].adaLN_sa_ln.weight.untyped_storage().data_ptr() == memory().data_ptr()


def test_a_transposed_view_of_a_mapping_is_not_taken_for_the_tensor(tmp_path: Path):
    memory = torch.arange(256, dtype=torch.uint8)
    read = FileOnDevice({0: (64, 0)}, memory)
    tensor = torch.zeros(64, dtype=torch.uint8)
    mappings = [(range(tensor.data_ptr(), tensor.data_ptr() + 64), 0)]
    assert torch.equal(read.view(tensor.view(8, 8), mappings), memory[:64].view(8, 8))
    assert read.view(tensor.view(8, 8).T, mappings) is None
    assert read.view(tensor[:32], mappings) is None
    assert read.view(tensor, [(range(10), 0)]) is None


@pytest.mark.parametrize("maps", ["missing", "without the file"])
def test_where_upstream_maps_nothing_all_is_copied_and_nothing_kept(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maps: str
):
    listing = tmp_path / "maps"
    if maps != "missing":
        listing.write_text(
            "7f0000000000-7f0000001000 r--p 00000000 fe:00 1 /usr/lib/libc.so.6\n7f0000001000-7f0000002000 r--p 0 0:0 0\n"
        )
    monkeypatch.setattr(device_files, "MAPS", listing)
    module = mapped(repository, "pe")
    before = snapshot(module)
    memory = place(repository, module, "pe")
    assert len(memory) == (maps != "missing")
    gc.collect()
    assert not any(reference() for reference in memory)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))


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
    module = mapped(copy, component.name)
    before = snapshot(module)
    assert len(place(copy, module, component.name)) == len(groups)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))


def test_a_file_of_which_nothing_is_wanted_is_passed_over(repository: Path):
    module = mapped(repository, "pe")
    before = snapshot(module)
    with DeviceReader(CPU) as reader:
        reader.start([])
        reader.place(module, weight_files(repository, COMPONENT["pe"]))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))


def test_it_works_in_inference_mode(repository: Path):
    module = mapped(repository, "pe")
    before = snapshot(module)
    with torch.inference_mode():
        place(repository, module, "pe")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(module), strict=True))


def test_memory_is_given_back_after_an_error(repository: Path):
    component, error = COMPONENT["pe"], None
    try:
        with DeviceReader(CPU) as reader:
            reader.start(device_tensors(repository, component, fast=True).values())
            (read,) = reader.files.values()
            memory = weakref.ref(read.memory.untyped_storage())
            raise InvalidRepository("its structure is wrong")
    except InvalidRepository as raised:
        error = raised
    gc.collect()
    assert error.__traceback__
    assert memory() is None


@pytest.mark.parametrize("kind", ["nf4", "original"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_only_what_upstream_leaves_as_it_is_gets_read(request, repository: Path, original: Path, kind: str, dtype):
    folder = repository if kind == "nf4" else original
    where = Placement(CPU, dtype, "resident", fast=True)
    with _reading(folder, [COMPONENT["transformer"]], where) as reader:
        offsets = {offset for read in reader.files.values() for offset in read.places}
    plain = {
        name
        for name, stored in device_tensors(folder, COMPONENT["transformer"], fast=True).items()
        if stored.offset in offsets and stored.spec.dtype == "BF16"
    }
    assert bool(plain) == (dtype == torch.bfloat16)
    assert bool(offsets) == (dtype == torch.bfloat16 or kind == "nf4")


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
