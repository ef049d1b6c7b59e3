"""The full-size model without its bytes: files whose headers are those of the release, with holes for values."""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path

from conftest import skeleton, stored

from ernie_image_nf4.memory.precision import BFLOAT16, Precision
from ernie_image_nf4.memory.requirements import WeightBytes, weight_bytes
from ernie_image_nf4.quantization.layer_selection import DEFAULT_KEEP, plan_weights
from ernie_image_nf4.quantization.synthetic import tensor_specs
from ernie_image_nf4.repository.components import COMPONENTS
from ernie_image_nf4.repository.record import StoredComponent
from ernie_image_nf4.repository.safetensors_io import TensorSpec


def full_size_components(folder: Path) -> dict[str, StoredComponent]:
    """The components with weights of the repository that `quantize` makes of the release, written to a folder."""
    with as_file(files("ernie_image_nf4") / "quantization" / "configs" / "full") as configs:
        shutil.copytree(configs, folder, dirs_exist_ok=True)
    found = {}
    for component in COMPONENTS:
        if component.weights:
            file = folder / component.name / component.weights
            hollow_file(file, tensor_specs(skeleton(component, folder / component.name), duplicate_lm_head=False))
            if component.quantized:
                hollow_file(file, plan_weights(stored(folder, component), DEFAULT_KEEP).specs())
            found[component.name] = stored(folder, component)
    return found


def full_size_weights(
    components: dict[str, StoredComponent], *, fast: bool = True, precision: Precision = BFLOAT16
) -> dict[str, WeightBytes]:
    return {name: weight_bytes(part, fast=fast, precision=precision) for name, part in components.items()}


def hollow_file(file: Path, specs: dict[str, TensorSpec]) -> None:
    """A safetensors file of these tensors with a hole in place of the values: full size, but no bytes on the disk."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (end, end + spec.bytes)}
        end += spec.bytes
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
