"""What keeping layers of the mini in bfloat16 buys: picture fidelity and prediction error, per byte at mini and at full size.

    python benchmarks/nf4_sensitivity.py ORIGINAL --output benchmarks/nf4_sensitivity.json --device cuda --batch 50

ORIGINAL is the folder of the mini in original precision. One group of layers at a time keeps its precision; all others are NF4,
once with bitsandbytes' scales and once with searched ones. Everything is drawn with the original's text embeddings but where
layers of the text encoder are in question. Combinations at the end are candidates for `plan.DEFAULT_KEEP`.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from diffusers import ErnieImagePipeline
from nf4_mini import SETTINGS, held_out
from torch import nn

from ernie_image_nf4.evaluation.metrics import psnr
from ernie_image_nf4.evaluation.run import (
    Probe,
    draw_latents,
    draw_pictures,
    make_probe,
    predict,
    prediction_error,
)
from ernie_image_nf4.loading.pipeline import load
from ernie_image_nf4.quantization.layer_selection import DEFAULT_KEEP, matches
from ernie_image_nf4.quantization.scale_search import quantize_nf4
from ernie_image_nf4.repository.components import COMPONENT
from ernie_image_nf4.repository.meta_model import skeleton
from ernie_image_nf4.repository.metadata import Recommended, installed_versions
from ernie_image_nf4.repository.nf4_format import stored_specs

MAX_PSNR = 100.0  # for equal pictures
SCALES = {"stock": False, "scale_search": True}
# {last} is the last block, {before} the one before it.
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
    pipe = load(
        arguments.original, device=arguments.device, dtype="float32", fast=False, memory="auto", prompt_enhancer=False
    )
    settings = Recommended(arguments.size, arguments.size, arguments.steps, SETTINGS.guidance_scale)
    _, rows = held_out(arguments.captions)
    prompts = [row.prompt for row in rows]
    latents = draw_latents(pipe, [row.seed for row in rows], settings)

    def draw() -> torch.Tensor:
        return draw_pictures(pipe, prompts, settings, latents, batch_size=arguments.batch)

    reference = draw()
    probed = slice(arguments.probes)
    probe = make_probe(pipe, prompts[probed], settings, latents[probed], arguments.batch)
    predictions = predict(pipe, probe, arguments.batch)
    originals = {name: weights_of(getattr(pipe, name)) for name in ("transformer", "text_encoder")}
    quantized = {
        scales: {component: nf4_of(weights, SCALES[scales]) for component, weights in originals.items()}
        for scales in arguments.scales
    }

    def measure(scales: str, components: Sequence[str], patterns: Sequence[str]) -> dict[str, float]:
        for component in originals:
            keep = set(kept(originals[component], component, patterns, len(pipe.transformer.layers)))
            change = quantized[scales][component] if component in components else {}
            set_weights(getattr(pipe, component), originals[component], change, keep)
        error = prediction_error(predictions, predict(pipe, of(probe, pipe, prompts), arguments.batch), probe.timesteps)
        mean = statistics.mean(min(value, MAX_PSNR) for value in psnr(reference, draw()))
        return {"psnr_db": round(mean, 3), "prediction_error": error.overall, "by_timestep": error.relative_errors}

    def of(probe: Probe, pipe: ErnieImagePipeline, prompts: Sequence[str]) -> Probe:
        texts = [text.cpu() for text in pipe.encode_prompt(list(prompts[probed]), pipe._execution_device)]
        return Probe(probe.latents, probe.timesteps, texts)

    results = []
    wanted = arguments.groups.split(";") if arguments.groups else None
    for scales in quantized:
        for component, groups in (("transformer", TRANSFORMER | COMBINATIONS), ("text_encoder", TEXT_ENCODER)):
            base = measure(scales, [component], [])
            print(scales, component, "nothing kept", base, flush=True)
            results.append({"scales": scales, "quantized": component, "kept": "nothing", **base})
            for name, patterns in groups.items():
                if wanted and name not in wanted:
                    continue
                found = measure(scales, [component], patterns)
                cost = {size: extra_bytes(patterns, size, arguments.original) for size in ("mini", "full")}
                gain = found["psnr_db"] - base["psnr_db"]
                found |= {
                    "gain_db": round(gain, 3),
                    "prediction_error_ratio": round(found["prediction_error"] / base["prediction_error"], 4),
                    "extra_bytes": cost,
                    "gain_db_per_full_size_mb": round(gain / (cost["full"] / 1e6), 6) if cost["full"] else None,
                    "share_of_full_transformer": round(cost["full"] / full_transformer_bytes(), 5),
                }
                print(scales, name, found, flush=True)
                results.append({"scales": scales, "quantized": component, "kept": name, "patterns": patterns, **found})
    content = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"device": str(pipe._execution_device), "platform": platform.platform()},
        "versions": installed_versions(),
        "dtype": "float32",
        "captions": len(prompts),
        "settings": asdict(settings),
        "results": results,
    }
    if torch.cuda.is_available():
        content["machine"]["device"] = torch.cuda.get_device_name()
    arguments.output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def linear_layers(model: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """Those that become NF4; of the text encoder not the vision tower, which no prompt comes to."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "vision" not in name and "multi_modal" not in name:
            yield name, module


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(model)}


def nf4_of(weights: dict[str, torch.Tensor], scale_search: bool) -> dict[str, torch.Tensor]:
    """Each weight, quantized and restored."""
    restored = {}
    for name, weight in weights.items():
        packed, state = quantize_nf4(weight.bfloat16(), scale_search=scale_search)
        restored[name] = dequantize_4bit(packed, state).float()
    return restored


def kept(names: Iterable[str], component: str, patterns: Sequence[str], blocks: int) -> list[str]:
    """The layers that patterns name."""
    patterns = [pattern.replace("{last}", str(blocks - 1)).replace("{before}", str(blocks - 2)) for pattern in patterns]
    return [name for name in names if any(matches(f"{component}.{name}", pattern) for pattern in patterns)]


@torch.no_grad()
def set_weights(
    model: nn.Module, originals: dict[str, torch.Tensor], changed: dict[str, torch.Tensor], keep: set[str]
) -> None:
    for name, layer in linear_layers(model):
        layer.weight.copy_(originals[name] if name in keep else changed.get(name, originals[name]))


def extra_bytes(patterns: Sequence[str], size: str, original: Path) -> int:
    """What keeping layers in bfloat16 takes more than NF4."""
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


def configured(component: str, size: str, original: Path | None) -> nn.Module:
    """A component without storage."""
    if size == "mini":
        return skeleton(COMPONENT[component], original / component)
    with as_file(files("ernie_image_nf4") / "quantization" / "configs" / "full") as configs:
        return skeleton(COMPONENT[component], configs / component)


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
