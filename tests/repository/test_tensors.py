"""safetensors files are read and written a tensor at a time, exactly as the safetensors package does it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ernie_image_nf4.errors import InvalidRepository
from ernie_image_nf4.repository.safetensors_io import (
    DTYPE_NAMES,
    TensorSpec,
    TensorWriter,
    file_bytes,
    read_chunks,
    read_header,
    read_tensor,
)

TENSORS = {
    "b.weight": torch.randn(5, 3).bfloat16(),
    "a.bias": torch.randn(7),
    "a.weight": torch.arange(11, dtype=torch.uint8),
    "c": torch.randn(2, 2, 2).half(),
    "a.count": torch.tensor(4),
    "z": torch.arange(3, dtype=torch.uint8),
}
SPECS = {name: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """`TENSORS` as the safetensors package writes them."""
    file = tmp_path / "reference.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    return file


def test_a_written_file_is_byte_for_byte_that_of_safetensors(tmp_path: Path, reference: Path) -> None:
    file = tmp_path / "file.safetensors"
    with TensorWriter(file, SPECS) as writer:
        for name in writer.names:
            writer.write(name, TENSORS[name].reshape(-1).split(2))
    assert file.read_bytes() == reference.read_bytes()
    assert file_bytes(SPECS) == reference.stat().st_size


def test_bytes_may_turn_out_fewer_than_announced(tmp_path: Path, reference: Path) -> None:
    file = tmp_path / "file.safetensors"
    with TensorWriter(file, SPECS | {"a.weight": TensorSpec("U8", (14,))}) as writer:
        for name in writer.names:
            writer.write(name, [TENSORS[name]])
    assert file.read_bytes() == reference.read_bytes()


def test_an_unfinished_file_is_no_safetensors_file(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    with suppress(KeyboardInterrupt), TensorWriter(file, SPECS) as writer:
        for name in writer.names:
            writer.write(name, [TENSORS[name]])
        raise KeyboardInterrupt
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(InvalidRepository, match="truncated or corrupt"):
        read_header(file)


def test_tensors_read_as_they_were_written(reference: Path) -> None:
    stored = read_header(reference)
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read_tensor(stored[name]), tensor)
        assert torch.equal(torch.cat(list(read_chunks(stored[name], chunk_bytes=8))), tensor.reshape(-1))


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_found_out_by_its_header(reference: Path, size: int) -> None:
    reference.write_bytes(reference.read_bytes()[:size])
    with pytest.raises(InvalidRepository, match="truncated"):
        read_header(reference)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(InvalidRepository, match=r"Git LFS pointer.*git lfs pull"):
        read_header(file)


def test_a_dtype_from_the_future_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InvalidRepository, match="tensor w has dtype F4"):
        read_header(file)
