"""Device and library versions of an evaluation, for the record."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from ..repository.metadata import installed_versions
from .baselines import BASELINES

PACKAGES = ("torchmetrics", "torchvision", "torch-fidelity", *(baseline.package for baseline in BASELINES.values()))


def device_name(device: torch.device) -> str:
    """Name of a GPU; of other devices their type, with processor and threads."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    return f"{device.type}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that draw, that measure, and that make baselines, as installed."""
    versions = installed_versions()
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"python": platform.python_version()}
