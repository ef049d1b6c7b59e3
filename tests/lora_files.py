"""LoRA files as trainers write them, for the tests: one adapter in every format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from diffusers import ErnieImagePipeline
from safetensors.torch import save_file

ATTENTION = ("self_attention.to_q", "self_attention.to_k", "self_attention.to_v", "self_attention.to_out.0")
LAYERS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2")  # of a block

Factors = tuple[torch.Tensor, torch.Tensor]


def factors(
    pipe: ErnieImagePipeline, rank: int = 4, *, layers: Iterable[str] = LAYERS, seed: int = 0, size: float = 1.0
) -> dict[str, Factors]:
    """Random factors for layers of each block: down, (rank, in), and up, (out, rank), float32."""
    config = pipe.transformer.config
    generator = torch.Generator("cpu").manual_seed(seed)
    found = {}
    for block in range(config.num_layers):
        for layer in layers:
            width = config.ffn_hidden_size if layer == "mlp.linear_fc2" else config.hidden_size
            height = config.ffn_hidden_size if layer in ("mlp.gate_proj", "mlp.up_proj") else config.hidden_size
            down = torch.randn(rank, width, generator=generator) / width**0.5
            found[f"layers.{block}.{layer}"] = down, size * torch.randn(height, rank, generator=generator) / rank**0.5
    return found


def dotted(prefix: str, down: str, up: str) -> Callable[[str], tuple[str, str, str]]:
    return lambda layer: (f"{prefix}{layer}.{down}.weight", f"{prefix}{layer}.{up}.weight", f"{prefix}{layer}.alpha")


def flat(prefix: str) -> Callable[[str], tuple[str, str, str]]:
    return lambda layer: dotted(prefix, "lora_down", "lora_up")(layer.replace(".", "_"))


# Keys of down, up and alpha.
FORMATS = {
    "diffusers": dotted("transformer.", "lora_A", "lora_B"),
    "peft": dotted("base_model.model.", "lora_A", "lora_B"),
    "ai-toolkit": dotted("diffusion_model.", "lora_A", "lora_B"),
    "OneTrainer": dotted("transformer.", "lora_down", "lora_up"),
    "kohya": flat("lora_unet_"),
    "musubi": flat("lora_transformer_"),
}


def keyed(form: str, layers: Mapping[str, Factors], alpha: float | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file in a format."""
    tensors = {}
    for layer, (down, up) in layers.items():
        names = FORMATS[form](layer)
        tensors |= {names[0]: down, names[1]: up}
        if alpha is not None:
            tensors[names[2]] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def write_lora(path: Path, pipe: ErnieImagePipeline, rank: int = 4, **options) -> Path:
    """A LoRA of all layers of all blocks in diffusers' format."""
    return write(path, keyed("diffusers", factors(pipe, rank, **options)))
