"""What stands beside a LoRA's tensors: peft's settings, of which the alphas count, and the base model's name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidLora
from .lora_source import PEFT_CONFIG

BASES = ("modelspec.architecture", "ss_base_model_version", "base_model", "base_model_name_or_path", "ss_sd_model_name")
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # of a safetensors file's metadata, in JSON


def read_settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings: from the metadata, where diffusers keeps them, or from the file beside a peft adapter.

    Raises:
        InvalidLora: They aren't a JSON object, or have other values than peft writes.
    """
    if DIFFUSERS_CONFIG in metadata:
        where = f"{file}: {DIFFUSERS_CONFIG}"
        stored = _json_object(metadata[DIFFUSERS_CONFIG], where)
        found = {
            key.removeprefix("transformer."): value for key, value in stored.items() if key.startswith("transformer.")
        }
    else:
        where = str(file.with_name(PEFT_CONFIG))
        found = _beside(file)
    patterns = found.get("alpha_pattern") or {}
    alphas = [found["lora_alpha"]] if "lora_alpha" in found else []
    if not isinstance(patterns, dict) or not all(map(_is_number, [*alphas, *patterns.values()])):
        raise InvalidLora(f"{where} has a lora_alpha or alpha_pattern that isn't of numbers: save the LoRA again.")
    return found


def base_model(file: Path, metadata: Mapping[str, str]) -> str | None:
    """The base model's name, if it is said."""
    known = {**metadata, **_beside(file)}
    return next((str(known[name]) for name in BASES if known.get(name)), None)


def alpha_scale(layer: str, rank: int, alpha: float | None, settings: Mapping[str, Any]) -> float:
    """What a layer's up matrix is multiplied by.

    Args:
        layer: The layer's name.
        rank: Of its matrices.
        alpha: Its own alpha, which comes before the settings'.
        settings: peft's.
    """
    if alpha is not None:
        return alpha / rank
    if "lora_alpha" not in settings:
        return 1.0
    chosen = _by_pattern(settings.get("alpha_pattern"), layer, settings["lora_alpha"])
    return float(chosen) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """peft's way: the first pattern that is a layer's name or the end of it."""
    for pattern, value in (patterns or {}).items():
        name = pattern.removeprefix("^")
        # As regular expressions, which peft takes them for, those of a stranger could take forever.
        if not re.fullmatch(r"[\w.]+", name):
            raise InvalidLora(
                f"alpha_pattern has {pattern!r}, where names of layers are wanted: save the LoRA without."
            )
        if layer == name or (name == pattern and layer.endswith(f".{name}")):
            return value
    return default


def _beside(file: Path) -> dict[str, Any]:
    beside = file.with_name(PEFT_CONFIG)
    return _json_object(beside.read_bytes(), str(beside)) if beside.is_file() else {}


def _json_object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidLora(f"{where} is not JSON ({error}): download or save the LoRA again.") from error
    if not isinstance(value, dict):
        raise InvalidLora(f"{where} holds no JSON object: download or save the LoRA again.")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e30  # as a float32, with room for a rank
