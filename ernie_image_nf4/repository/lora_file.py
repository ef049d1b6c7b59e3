"""LoRA files as trainers write them, read into one form: a down and an up matrix for each layer, without an alpha.

A LoRA adds ``strength * alpha / rank * (x @ down.T) @ up.T`` to what a layer computes. Trainers differ in the names of
tensors, in how they write the layer's name, and in whether there is an alpha. With DoRA there is a magnitude for each
output as well (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidLora, InvalidRepository
from .lora_settings import alpha_scale, base_model, read_settings
from .safetensors_io import read_header
from .security import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    import torch

# What a tensor's name ends with -> what it is.
PARTS = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "dora_scale": "magnitude",
}
# Names of the kinds of adapter that peft keeps apart from LoRA.
OTHER_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "boft_": "BOFT", "lora_mid": "LoCon with a core"}
WHOLE_WEIGHTS = ("diff", "diff_b")
# What stands before a layer's name, longest first, and before names whose dots became underscores.
PREFIXES = (
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
)
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
TEXT_ENCODERS = re.compile(
    r"(base_model\.model\.)?(lora_te\d*_|te\d*\.|text_encoders?[._]|text_model\.|cond_stage_model\.)"
)
# Who writes such names: (prefix, name of the down matrix).
WRITERS = {
    ("transformer.", "lora_A.weight"): "diffusers",
    ("diffusion_model.", "lora_A.weight"): "ai-toolkit",
    ("base_model.model.", "lora_A.weight"): "peft",
    ("transformer.", "lora_down.weight"): "OneTrainer",
    ("lora_transformer_", "lora_down.weight"): "OneTrainer",
    ("lora_unet_", "lora_down.weight"): "kohya",
    ("diffusion_model.", "lora_down.weight"): "ComfyUI",
}
MANY = 3  # names that an error lists


@dataclass(frozen=True)
class LoraTensor:
    """One tensor of a LoRA.

    Attributes:
        key: Its name in the file.
        layer: Its layer's name, with underscores for dots if `flat`.
        part: ``"down"``, ``"up"``, ``"alpha"`` or ``"magnitude"``.
        flat: Whether dots of the layer's name are underscores.
    """

    key: str
    layer: str
    part: str
    flat: bool


@dataclass(frozen=True)
class LoraDescription:
    """What the names and shapes in a LoRA file say.

    Attributes:
        format: Who writes such files; ``"unknown"`` for names that are no known trainer's, but can be read.
        tensors: What belongs to the transformer.
        unused: Names of tensors for text encoders.
        ranks: Ranks of the layers, in ascending order.
        has_alpha: Whether there is an alpha for some layer.
        is_dora: Whether there are magnitudes.
        base: The model that it was trained on, as the file's metadata has it; None if they don't say.
        settings: peft's settings, if they came along.
    """

    format: str
    tensors: tuple[LoraTensor, ...]
    unused: tuple[str, ...]
    ranks: tuple[int, ...]
    has_alpha: bool
    is_dora: bool
    base: str | None
    settings: dict[str, Any] = field(default_factory=dict)


def describe_lora(file: Path) -> LoraDescription:
    """What is in a LoRA file, by its header. Reads no weights and imports no library.

    Raises:
        InvalidLora: It isn't a whole safetensors file, or no LoRA.
    """
    shapes, metadata = _read_header(file)
    settings, base = read_settings(file, metadata), base_model(file, metadata)
    tensors, unused = find_tensors(shapes, str(file))
    ranks = sorted({shapes[each.key][0] for each in tensors if each.part == "down" and shapes[each.key]})
    return LoraDescription(
        format=_writer(tensors),
        tensors=tuple(tensors),
        unused=tuple(unused),
        ranks=tuple(ranks),
        has_alpha=any(each.part == "alpha" for each in tensors) or "lora_alpha" in settings,
        is_dora=any(each.part == "magnitude" for each in tensors),
        base=base,
        settings=settings,
    )


def read_lora(file: Path, layers: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """A LoRA file in the names that ``load_lora_weights`` of diffusers takes, see `convert_lora`.

    Args:
        file: The file.
        layers: Name of each of the transformer's layers -> its (out, in).

    Raises:
        InvalidLora: It isn't a whole safetensors file, or doesn't fit the layers.
    """
    from safetensors.torch import load_file

    description = describe_lora(file)  # checks that the file is whole
    return convert_lora(load_file(file), layers, description.settings, str(file))


def check_lora(file: Path, layers: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a file that doesn't fit, by its header alone.

    Args:
        file: The file.
        layers: Name of each of the transformer's layers -> its (out, in).

    Raises:
        InvalidLora: It is no LoRA, or doesn't fit the layers.
    """
    import torch

    shapes, _ = _read_header(file)
    for layer, parts in _layers_of(find_tensors(shapes, str(file))[0], layers, str(file)).items():
        found = {part: torch.empty(shapes[key], device="meta") for part, key in parts.items()}
        _check_shapes(layer, found, layers[layer], str(file))


def convert_lora(
    state: Mapping[str, torch.Tensor],
    layers: Mapping[str, tuple[int, int]],
    settings: Mapping[str, Any] | None = None,
    source: str = "The LoRA",
) -> dict[str, torch.Tensor]:
    """Tensors of any trainer's names in those that ``load_lora_weights`` of diffusers takes, for the transformer alone.

    The alphas are folded into the up matrices, in float32 where that isn't exact otherwise.

    Args:
        state: The tensors by name.
        layers: Name of each of the transformer's layers -> its (out, in).
        settings: peft's: ``lora_alpha``, ``alpha_pattern`` and ``use_rslora`` count for layers without an alpha of
            their own.
        source: Where it is from, for errors.

    Raises:
        InvalidLora: Another kind of adapter, names that fit no layer, half a pair, a shape that doesn't fit, or values
            that aren't finite.
    """
    tensors, _ = find_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    import torch

    by_layer = {
        layer: {part: _readable(state[key], layer, source) for part, key in parts.items()}
        for layer, parts in _layers_of(tensors, layers, source).items()
    }
    for layer, found in by_layer.items():
        _check_shapes(layer, found, layers[layer], source)
    # diffusers takes the first layer's rank for every layer's alpha, which is right if all are of one rank. Zeros add
    # nothing.
    rank = max(len(found["down"]) for found in by_layer.values())
    converted = {}
    for layer, found in by_layer.items():
        down, up = found["down"], found["up"]
        alpha = float(found["alpha"]) if "alpha" in found else None
        scale = alpha_scale(layer, len(down), alpha, settings or {})
        if not all(bool(each.isfinite().all()) for each in found.values()) or not math.isfinite(scale):
            raise InvalidLora(f"{source} has values that are not finite, at {layer}: its training went wrong.")
        missing = rank - len(down)
        up = up if scale == 1 else up.float() * scale
        converted[f"transformer.{layer}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, missing))
        converted[f"transformer.{layer}.lora_B.weight"] = torch.nn.functional.pad(up, (0, missing))
        if "magnitude" in found:
            converted[f"transformer.{layer}.lora_magnitude_vector.weight"] = found["magnitude"].flatten()
    return converted


def find_tensors(shapes: Mapping[str, tuple[int, ...]], source: str) -> tuple[list[LoraTensor], list[str]]:
    """What the names mean, and those that belong to text encoders.

    Raises:
        InvalidLora: There is no LoRA for a transformer, or a tensor that belongs to none.
    """
    tensors, unused, unknown = [], [], []
    for key in shapes:
        if TEXT_ENCODERS.match(key):
            unused.append(key)
        elif (tensor := _parse(key)) is not None:
            tensors.append(tensor)
        else:
            unknown.append(key)
    for key in unknown:
        for name, kind in OTHER_KINDS.items():
            if f".{name}" in key:
                raise InvalidLora(
                    f"{source} is a {kind} adapter ({key}), not a LoRA: train or convert it as LoRA or DoRA."
                )
        if key.rpartition(".")[2] in WHOLE_WEIGHTS:
            raise InvalidLora(
                f"{source} changes whole weights ({key}), which stay NF4 here: extract a LoRA from it, or quantize the "
                "changed model."
            )
    if unknown and not tensors:
        raise InvalidLora(f"{source} holds no LoRA but {_some(unknown)}: name one for ERNIE-Image's transformer.")
    if unknown:
        raise InvalidLora(f"{source} has tensors that belong to no LoRA: {_some(unknown)}. Take them out of it.")
    if not any(tensor.part in ("down", "up") for tensor in tensors):
        only = " but one for a text encoder, which is not used" if unused else ""
        raise InvalidLora(f"{source} holds no LoRA{only}: name one for ERNIE-Image's transformer.")
    return tensors, unused


def _parse(key: str) -> LoraTensor | None:
    """What a name means; None for one that no trainer gives a LoRA's tensor."""
    flat = next((prefix for prefix in FLAT_PREFIXES if key.startswith(prefix)), None)
    prefix = flat or next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    rest = key.removeprefix(prefix)
    part = next((name for name in PARTS if rest.endswith(f".{name}")), None)
    if part is None:
        return None
    return LoraTensor(key, rest.removesuffix(f".{part}"), PARTS[part], flat is not None)


def _layers_of(
    tensors: list[LoraTensor], layers: Mapping[str, tuple[int, int]], source: str
) -> dict[str, dict[str, str]]:
    """Layer -> part -> name of its tensor."""
    flat_names = {name.replace(".", "_"): name for name in layers}
    found: dict[str, dict[str, str]] = {}
    strangers = []
    for tensor in tensors:
        layer = flat_names.get(tensor.layer) if tensor.flat else tensor.layer
        if layer is None or layer not in layers:
            strangers.append(tensor.key)
        elif tensor.part in found.setdefault(layer, {}):
            raise InvalidLora(
                f"{source} has {layer} twice: {found[layer][tensor.part]} and {tensor.key}. Keep one of them."
            )
        else:
            found[layer][tensor.part] = tensor.key
    if strangers:
        raise InvalidLora(
            f"{source} has {len(strangers)} of {len(tensors)} tensors for layers that this transformer hasn't: "
            f"{_some(strangers)}. It was trained on another model, or on another size of this one."
        )
    for layer, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise InvalidLora(
                f"{source} has only half of {layer}: {', '.join(parts.values())}. Download or save it again."
            )
    return found


def _readable(tensor: torch.Tensor, layer: str, source: str) -> torch.Tensor:
    """A tensor to compute with: of 8 bits, torch can't even tell whether it is finite."""
    if not tensor.is_floating_point() and tensor.numel() != 1:  # an alpha may be a whole number
        raise InvalidLora(
            f"{source} has {str(tensor.dtype).removeprefix('torch.')} at {layer}, which is no LoRA's without scales: "
            "ask for it in bfloat16, float16 or float32."
        )
    return tensor.float() if tensor.itemsize == 1 else tensor


def _check_shapes(layer: str, found: Mapping[str, torch.Tensor], shape: tuple[int, int], source: str) -> None:
    down, up = (tuple(found[part].shape) for part in ("down", "up"))
    wide = shape[1]
    if len(down) != 2 or len(up) != 2 or 0 in (*down, *up) or (up[0], down[1]) != shape or down[0] != up[1]:
        raise InvalidLora(
            f"{source} doesn't fit {layer}, whose weight is {shape[0]}x{wide}: down is {_shape(down)} and up "
            f"{_shape(up)}, where rank x {wide} and {shape[0]} x rank are wanted. It was trained on another model."
        )
    if "alpha" in found and found["alpha"].numel() != 1:
        raise InvalidLora(f"{source} has {found['alpha'].numel()} alphas at {layer}, where one is wanted.")
    if "magnitude" in found and found["magnitude"].numel() != shape[0]:
        count = found["magnitude"].numel()
        raise InvalidLora(
            f"{source} has {count} magnitudes at {layer}, where one for each of {shape[0]} outputs is wanted: train "
            "the DoRA with magnitudes of outputs, as peft does."
        )


def _read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of a file's tensors, and its metadata."""
    if file.suffix != ".safetensors":
        raise InvalidLora(
            f"{file} is no .safetensors file, and other formats can run code when they are opened: ask for the LoRA as "
            "safetensors."
        )
    try:
        shapes = {name: stored.spec.shape for name, stored in read_header(file).items()}
    except InvalidRepository as error:
        raise InvalidLora(str(error).replace(DOWNLOAD_AGAIN, "download it again")) from error
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return shapes, dict(opened.metadata() or {})


def _writer(tensors: list[LoraTensor]) -> str:
    """Who gives tensors such names."""
    down = next((tensor for tensor in tensors if tensor.part == "down"), None)
    if down is None:
        return "unknown"
    for (prefix, name), writer in WRITERS.items():
        if down.key.startswith(prefix) and down.key.endswith(f".{name}"):
            return writer
    return "unknown"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
