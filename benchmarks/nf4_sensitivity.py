"""Fidelity gained by keeping layers of the mini in bfloat16, per byte that it costs at mini and at full size.

    python benchmarks/nf4_sensitivity.py ORIGINAL --output benchmarks/nf4_sensitivity.json --device cuda --batch 50

ORIGINAL is the folder of the mini in original precision. One group of layers at a time keeps its precision; all others
are NF4, once with bitsandbytes' scales and once with searched ones. Layers of the transformer are measured with the
original's text embeddings. The combinations at the end are candidates for `layer_selection.DEFAULT_KEEP`.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from diffusers import ErnieImagePipeline
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # Import from the checkout, installed or not

from benchmarks.nf4_mini import SETTINGS, held_out
from ernie_image_nf4.evaluation.environment import device_name
from ernie_image_nf4.evaluation.metrics import psnr
from ernie_image_nf4.evaluation.pictures import draw_from_latents, draw_latents
from ernie_image_nf4.evaluation.predictions import Probe, encode, make_probe, predict, prediction_error
from ernie_image_nf4.loading.pipeline import load
from ernie_image_nf4.quantization.layer_selection import DEFAULT_KEEP, matches
from ernie_image_nf4.quantization.scale_search import quantize_nf4
from ernie_image_nf4.repository.components import COMPONENT, Component
from ernie_image_nf4.repository.meta_model import meta_model
from ernie_image_nf4.repository.metadata import Recommended, installed_versions
from ernie_image_nf4.repository.nf4_format import stored_specs
from ernie_image_nf4.upstream.pipelines import execution_device

MAX_PSNR = 100.0  # Of equal pictures
SCALES = {"stock": False, "scale_search": True}
# {last} is the last block, {before} the block before it
TRANSFORMER = {
    "time_embedding": ["transformer.time_embedding"],
    "text_proj": ["transformer.text_proj"],
    "final_linear": ["transformer.final_linear"],
    "final_norm": ["transformer.final_norm"],
    "adaLN_modulation": ["transformer.adaLN_modulation"],
    "first block": ["transformer.layers.0"],
    "last block": ["transformer.layers.{last}"],
    "first block's attention": ["transformer.layers.0.self_attention"],
    "last block's attention": ["transformer.layers.{last}.self_attention"],
    "last block's to_v and to_out": [
        "transformer.layers.{last}.self_attention.to_v",
        "transformer.layers.{last}.self_attention.to_out",
    ],
    **{
        f"every {name}": [f"transformer.layers.*.{name}"]
        for name in (
            *(f"self_attention.{part}" for part in ("to_q", "to_k", "to_v", "to_out")),
            *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "linear_fc2")),
        )
    },
    "all blocks": ["transformer.layers"],
}
TEXT_ENCODER = {
    "text encoder": ["text_encoder"],
    **{
        f"text encoder, every {name}": [f"text_encoder.language_model.layers.*.{name}"]
        for name in ("self_attn", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    },
}
SMALL = ["transformer.final_linear", "transformer.text_proj"]
LAST = TRANSFORMER["last block's to_v and to_out"]
COMBINATIONS = {
    "final_linear, text_proj": SMALL,
    "final_linear, text_proj, time_embedding": [*SMALL, "transformer.time_embedding"],
    "final_linear, text_proj, time_embedding, final_norm": [
        *SMALL,
        "transformer.time_embedding",
        "transformer.final_norm",
    ],
    "final_linear, text_proj, time_embedding, last to_v and to_out": [*SMALL, "transformer.time_embedding", *LAST],
    "final_linear, text_proj, final_norm, last to_v and to_out": [*SMALL, "transformer.final_norm", *LAST],
    "final_linear, text_proj, last two to_v and to_out": [
        *SMALL,
        *LAST,
        *(pattern.replace("{last}", "{before}") for pattern in LAST),
    ],
    "the default": list(DEFAULT_KEEP),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=Path)
    parser.add_argument("--output", type=Path, default=Path("nf4_sensitivity.json"))
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--probes", type=int, default=16, help="captions for the prediction error")
    parser.add_argument("--size", type=int, default=SETTINGS.height)
    parser.add_argument("--steps", type=int, default=SETTINGS.num_inference_steps)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--groups", help="some of them, separated by semicolons")
    parser.add_argument("--scales", nargs="+", default=[*SCALES], choices=SCALES)
    parser.add_argument("--device", help="default: the best there is")
    arguments = parser.parse_args()

    logging.disable(logging.WARNING)
    mini = measured_mini(arguments)
    groups = {"transformer": TRANSFORMER | COMBINATIONS, "text_encoder": TEXT_ENCODER}
    wanted = arguments.groups.split(";") if arguments.groups else None
    results: list[dict[str, Any]] = []
    for scales in arguments.scales:
        quantized = {name: nf4_of(weights, SCALES[scales]) for name, weights in mini.originals.items()}
        for component, patterns in groups.items():
            chosen = {name: found for name, found in patterns.items() if not wanted or name in wanted}
            for found in measure_groups(mini, scales, component, quantized[component], chosen, arguments.original):
                results.append(found)
                write(arguments.output, mini, results)  # Now: the next one may be interrupted


def write(output: Path, mini: Mini, results: list[dict[str, Any]]) -> None:
    device = execution_device(mini.pipe)
    content = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"device": device_name(device), "platform": platform.platform()},
        "versions": installed_versions(),
        "dtype": "float32",
        "captions": len(mini.prompts),
        "settings": asdict(mini.settings),
        "results": results,
    }
    output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class Mini:
    """The mini in float32, and what it draws and predicts in original precision.

    Attributes:
        pipe: The pipeline, whose weights are exchanged.
        prompts: What to draw.
        settings: Size, steps and guidance scale.
        latents: Initial latents, one for each prompt.
        batch: Pictures drawn together.
        probe: Points at which the transformer predicts, for the first prompts.
        pictures: Drawn with the original weights.
        predictions: Made with the original weights.
        originals: Component -> linear layer -> its original weight.
    """

    pipe: ErnieImagePipeline
    prompts: list[str]
    settings: Recommended
    latents: torch.Tensor
    batch: int
    probe: Probe
    pictures: torch.Tensor
    predictions: torch.Tensor
    originals: dict[str, dict[str, torch.Tensor]]

    def draw(self) -> torch.Tensor:
        return draw_from_latents(self.pipe, self.prompts, self.settings, self.latents, batch_size=self.batch)

    def predict(self) -> torch.Tensor:
        """Predictions with the text embeddings of the present weights."""
        texts = encode(self.pipe, self.prompts[: len(self.probe.texts)])
        return predict(self.pipe, replace(self.probe, texts=texts), self.batch)


def measured_mini(arguments: argparse.Namespace) -> Mini:
    pipe = load(
        arguments.original, device=arguments.device, dtype="float32", fast=False, memory="auto", prompt_enhancer=False
    )
    pipe.set_progress_bar_config(disable=True)
    settings = Recommended(arguments.size, arguments.size, arguments.steps, SETTINGS.guidance_scale)
    _, rows = held_out(arguments.captions)
    prompts = [row.prompt for row in rows]
    latents = draw_latents(pipe, [row.seed for row in rows], settings)
    pictures = draw_from_latents(pipe, prompts, settings, latents, batch_size=arguments.batch)
    probed = slice(arguments.probes)
    probe = make_probe(pipe, prompts[probed], settings, latents[probed], arguments.batch)
    predictions = predict(pipe, probe, arguments.batch)
    originals = {name: weights_of(getattr(pipe, name)) for name in ("transformer", "text_encoder")}
    return Mini(pipe, prompts, settings, latents, arguments.batch, probe, pictures, predictions, originals)


def measure_groups(
    mini: Mini,
    scales: str,
    component: str,
    quantized: dict[str, torch.Tensor],
    groups: dict[str, Sequence[str]],
    original: Path,
) -> Iterator[dict[str, Any]]:
    """Quantize one component, first all of it, then keeping one group of layers at a time: a row of results each.

    Args:
        mini: The mini.
        scales: A key of `SCALES`, for the record.
        component: Its name.
        quantized: Linear layer -> its weight, quantized and restored.
        groups: Name -> patterns of the layers to keep.
        original: Folder of the mini in original precision.
    """
    base = measure(mini, component, quantized, [])
    print(scales, component, "nothing kept", base, flush=True)
    yield {"scales": scales, "quantized": component, "kept": "nothing", **base}
    for name, patterns in groups.items():
        found = measure(mini, component, quantized, patterns)
        cost = {size: extra_bytes(patterns, size, original) for size in ("mini", "full")}
        gain = found["psnr_db"] - base["psnr_db"]
        found |= {
            "gain_db": round(gain, 3),
            "prediction_error_ratio": round(found["prediction_error"] / base["prediction_error"], 4),
            "extra_bytes": cost,
            "gain_db_per_full_size_mb": round(gain / (cost["full"] / 1e6), 6) if cost["full"] else None,
            "share_of_full_transformer": round(cost["full"] / full_transformer_bytes(), 5),
        }
        print(scales, name, found, flush=True)
        yield {"scales": scales, "quantized": component, "kept": name, "patterns": patterns, **found}


def measure(mini: Mini, component: str, quantized: dict[str, torch.Tensor], patterns: Sequence[str]) -> dict[str, Any]:
    """Fidelity with one component quantized but for the layers that patterns name, the other one as it was."""
    for name, weights in mini.originals.items():
        keep = set(kept(weights, name, patterns, len(mini.pipe.transformer.layers)))
        set_weights(getattr(mini.pipe, name), weights, quantized if name == component else {}, keep)
    error = prediction_error(mini.predictions, mini.predict(), mini.probe.timesteps)
    mean = statistics.mean(min(value, MAX_PSNR) for value in psnr(mini.pictures, mini.draw()))
    return {"psnr_db": round(mean, 3), "prediction_error": error.overall, "by_timestep": error.relative_errors}


def linear_layers(model: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """The linear layers that become NF4. The text encoder's vision tower is left out: text-to-image doesn't use it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "vision" not in name and "multi_modal" not in name:
            yield name, module


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(model)}


def nf4_of(weights: dict[str, torch.Tensor], scale_search: bool) -> dict[str, torch.Tensor]:
    """Linear layer -> its weight, quantized to NF4 and restored."""
    restored = {}
    for name, weight in weights.items():
        packed, state = quantize_nf4(weight.bfloat16(), scale_search=scale_search)
        restored[name] = dequantize_4bit(packed, state).float()
    return restored


def kept(names: Iterable[str], component: str, patterns: Sequence[str], blocks: int) -> list[str]:
    """The layers of a component that patterns name."""
    patterns = [pattern.replace("{last}", str(blocks - 1)).replace("{before}", str(blocks - 2)) for pattern in patterns]
    return [name for name in names if any(matches(f"{component}.{name}", pattern) for pattern in patterns)]


@torch.no_grad()
def set_weights(
    model: nn.Module, originals: dict[str, torch.Tensor], changed: dict[str, torch.Tensor], keep: set[str]
) -> None:
    for name, layer in linear_layers(model):
        layer.weight.copy_(originals[name] if name in keep else changed.get(name, originals[name]))


def extra_bytes(patterns: Sequence[str], size: str, original: Path) -> int:
    """Bytes that keeping layers in bfloat16 costs over NF4."""
    total = 0
    for component in ("transformer", "text_encoder"):
        model = configured(component, size, original)
        blocks = len(model.layers) if component == "transformer" else 0
        layers = dict(linear_layers(model))
        for name in kept(layers, component, patterns, blocks):
            shape = tuple(layers[name].weight.shape)
            nf4_bytes = sum(spec.bytes for spec in stored_specs(shape, torch.bfloat16).values())
            total += 2 * layers[name].weight.numel() - nf4_bytes
    return total


@functools.cache
def configured(component: str, size: str, original: Path | None) -> nn.Module:
    """A component of the mini or of the full size, without storage."""
    if size == "mini":
        return without_storage(COMPONENT[component], original / component)
    with as_file(files("ernie_image_nf4") / "quantization" / "configs" / "full") as configs:
        return without_storage(COMPONENT[component], configs / component)


def without_storage(component: Component, folder: Path) -> nn.Module:
    return meta_model(
        component, {component.config: json.loads((folder / component.config).read_text(encoding="utf-8"))}
    )


@functools.cache
def full_transformer_bytes() -> int:
    """NF4 bytes of the full-size transformer."""
    model = configured("transformer", "full", None)
    layers = {f"{name}.weight": layer for name, layer in linear_layers(model)}
    return sum(
        sum(spec.bytes for spec in stored_specs(tuple(parameter.shape), torch.bfloat16).values())
        if name in layers
        else 2 * parameter.numel()
        for name, parameter in model.named_parameters()
    )


if __name__ == "__main__":
    main()
