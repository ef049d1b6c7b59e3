"""The transformer's predictions at fixed points, and their error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ErnieImagePipeline

from ..repository.metadata import Recommended
from ..upstream.pipelines import execution_device
from .pictures import run_pipeline
from .records import PredictionError, relative_error

PROBE_TIMESTEPS = 10


@dataclass(frozen=True)
class Probe:
    """Inputs at which predictions are compared: latents between noise and the reference's own results.

    Attributes:
        latents: (prompts, timesteps, channels, height / 16, width / 16), float32 on the CPU.
        timesteps: (timesteps,).
        texts: The reference's embedding of each prompt, (tokens, text_in_dim).
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    texts: list[torch.Tensor]


def make_probe(
    pipe: ErnieImagePipeline, prompts: Sequence[str], settings: Recommended, latents: torch.Tensor, batch_size: int = 1
) -> Probe:
    """Points on the straight lines from noise to what the reference makes of it, at `PROBE_TIMESTEPS` sigmas.

    Flow matching trains the transformer on such lines, so these are inputs that it knows. They don't depend on the
    candidate.

    Args:
        pipe: The reference.
        prompts: A few prompts.
        settings: As for drawing.
        latents: Initial latents of each prompt, as from `draw_latents`.
        batch_size: Pictures to draw together.
    """
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    drawn = [run_pipeline(pipe, prompts[part], settings, latents[part], "latent").float().cpu() for part in batches]
    results = torch.cat(drawn)
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, PROBE_TIMESTEPS + 1)[:-1].tolist())
    sigmas = pipe.scheduler.sigmas[:PROBE_TIMESTEPS].cpu().view(1, -1, 1, 1, 1)
    points = sigmas * latents[:, None] + (1 - sigmas) * results[:, None]
    return Probe(points, pipe.scheduler.timesteps.cpu().float(), encode(pipe, prompts))


@torch.no_grad()
def predict(pipe: ErnieImagePipeline, probe: Probe, batch_size: int = 1) -> torch.Tensor:
    """The transformer's prediction at each point of a probe, of the shape of its latents, float32 on the CPU."""
    device, dtype = execution_device(pipe), pipe.transformer.dtype
    predictions = []
    for points, text in zip(probe.latents, probe.texts, strict=True):
        for start in range(0, len(points), batch_size):
            part = points[start : start + batch_size].to(device, dtype)
            # All rows have the same text, so there is nothing to pad.
            prediction = pipe.transformer(
                hidden_states=part,
                timestep=probe.timesteps[start : start + len(part)].to(device, dtype),
                text_bth=text.to(device, dtype).repeat(len(part), 1, 1),
                text_lens=torch.full((len(part),), len(text), device=device),
                return_dict=False,
            )[0]
            predictions.append(prediction.float().cpu())
    return torch.cat(predictions).reshape(probe.latents.shape)


def prediction_error(reference: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> PredictionError:
    """Relative error of predictions of shape (prompts, timesteps, ...)."""
    squares = [(tensor.double() ** 2).flatten(2).sum((0, 2)) for tensor in (prediction - reference, reference)]
    by_timestep = zip(*(part.tolist() for part in squares), strict=True)
    return PredictionError(
        overall=relative_error(squares[0].sum().item(), squares[1].sum().item()),
        timesteps=[round(value, 3) for value in timesteps.tolist()],
        relative_errors=[relative_error(error, norm) for error, norm in by_timestep],
    )


def encode(pipe: ErnieImagePipeline, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Text embeddings (tokens, text_in_dim) on the CPU."""
    return [text.cpu() for text in pipe.encode_prompt(list(prompts), execution_device(pipe))]
