"""Private parts of diffusers' pipelines."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Device that the pipeline computes on, also while its weights are offloaded.

    Reaches for ``_execution_device`` (diffusers 0.38 to 0.42), which is the only place that knows of offloading hooks. Gone: the
    device of the weights, right without offloading.
    """
    return getattr(pipe, "_execution_device", pipe.device)
