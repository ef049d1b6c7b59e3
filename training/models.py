"""The mini's components at their sizes: every class is the one that ERNIE-Image uses."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import torch
from diffusers import AutoencoderKLFlux2, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import Ministral3Config, Ministral3ForCausalLM, Mistral3Config, Mistral3Model

from ernie_image_nf4 import load

from .tokenizer import MAX_LENGTH, VOCABULARY

TEXT_WIDTH = 256
SHIFT = 3.0  # of the sigmas while sampling; ERNIE-Image has 4.0 at 1024x1024


def build_vae() -> AutoencoderKLFlux2:
    """6.1M parameters: 8x8 pixels to 32 channels, as ERNIE-Image's.

    Eight groups, so that no norm has fewer than four channels in a group, as in ERNIE-Image's. With 32 groups those of
    the 32 channels at full size would each be alone: such a norm takes every channel's brightness and contrast away,
    and the decoder then hides them in one huge activation in a corner, which the picture shows as a dot.
    """
    return AutoencoderKLFlux2(
        block_out_channels=(32, 64, 128, 128),
        decoder_block_out_channels=(48, 64, 160, 192),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
    )


def build_transformer() -> ErnieImageTransformer2DModel:
    """30M parameters, 12 layers of width 384."""
    return ErnieImageTransformer2DModel(
        hidden_size=384,
        num_attention_heads=6,
        num_layers=12,
        ffn_hidden_size=1536,
        in_channels=128,
        out_channels=128,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(16, 24, 24),
    )


def build_text_encoder() -> Mistral3Model:
    """4 layers of width 256; the vision tower, never used for text-to-image, is as small as it can be."""
    return Mistral3Model(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 1024,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 64,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": MAX_LENGTH,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "tie_word_embeddings": True,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "head_dim": 64,
                "image_size": 28,
                "patch_size": 14,
            },
            tie_word_embeddings=True,
        )
    )


def build_enhancer() -> Ministral3ForCausalLM:
    """6 layers of width 256, about 6M parameters."""
    return Ministral3ForCausalLM(
        Ministral3Config(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=VOCABULARY,
            max_position_embeddings=2 * MAX_LENGTH,
            # The release's kind of rotary embedding, without its stretching beyond the trained length.
            rope_parameters={
                "rope_type": "yarn",
                "type": "yarn",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.0,
                "original_max_position_embeddings": 2 * MAX_LENGTH,
            },
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def go_on_from(repository: Path | None, **components: torch.nn.Module) -> None:
    """Copy the weights of an NF4 repository's components into new ones by name, dequantized; None copies nothing.

    Raises:
        SystemExit: A component has other layers than the new one.
    """
    if repository is None:
        return
    pipe = load(repository, device="cpu", dtype=torch.float32, memory="resident", fast=False)
    for name, component in components.items():
        state = getattr(pipe, name).state_dict()
        for key, weight in getattr(pipe, name).named_parameters():
            if isinstance(weight, bnb.nn.Params4bit):
                state[key] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        wanted = component.state_dict()
        if any(key not in state or state[key].shape != value.shape for key, value in wanted.items()):
            raise SystemExit(f"The {name} of {repository} has other layers than the one to train: leave --start out.")
        component.load_state_dict({key: state[key] for key in wanted})


class Ema:
    """Exponential moving average of the parameters of some modules, in float32 on their device."""

    def __init__(self, *modules: torch.nn.Module, decay: float) -> None:
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.shadow = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the modules' parameters; call again to undo."""
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)


class Budget:
    """How far a training is: by its steps, or by the clock where seconds are given.

    Attributes:
        steps: Planned steps; without `seconds` the training ends after them.
        seconds: The training's length, all its runs together; None counts steps.
        spent: Seconds of earlier runs.
        started: ``time.time()`` from which this run's seconds count.
    """

    def __init__(self, steps: int, seconds: float | None = None, spent: float = 0.0, started: float | None = None):
        self.steps, self.seconds, self.spent = steps, seconds, spent
        self.started = time.time() if started is None else started

    def elapsed(self) -> float:
        """Seconds of training, earlier runs' included."""
        return self.spent + time.time() - self.started

    def progress(self, step: int) -> float:
        """From 0 to 1, where the training ends."""
        return min(1.0, step / self.steps if self.seconds is None else self.elapsed() / self.seconds)


def stop_condition(at: float) -> Callable[[], bool]:
    """Tells whether a training should stop: at this time (``time.time()``), or by SIGTERM, which ends it no longer."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return lambda: asked.is_set() or time.time() > at


def learning_rate_factor(step: int, progress: float, warmup: int) -> float:
    """Linear warm-up, then constant, then linear to zero over the last third; `progress` is that of `Budget`."""
    return max(0.0, min(1.0, (step + 1) / warmup, 3 * (1 - progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
