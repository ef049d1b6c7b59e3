"""Metrics of pictures, computed by the usual libraries. A metric that isn't available says why.

Networks come from PyTorch's and the Hub's local caches; they are downloaded only where that is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch

from ..fast.random_state import SeededDraws

BATCH = 8  # Pictures that go through a metric's network at once
SET_PROMPTS = 100  # Distances between sets of fewer pictures mean nothing
KID_SUBSET = 50
CLIP = "openai/clip-vit-base-patch16"
LPIPS_BACKBONE: Final = "alex"

# (reference pictures, candidate's pictures, prompts) -> a value for each prompt, or one for the two sets. Pictures are
# uint8 (prompts, 3, height, width).
Metric = Callable[[torch.Tensor, torch.Tensor, Sequence[str]], list[float]]


@dataclass(frozen=True)
class MetricStatus:
    """Whether a metric of pictures is available, and if not, why.

    Attributes:
        title: Its name, and which direction is better.
        reason: Why it isn't available, None if it is.
    """

    title: str
    reason: str | None = None


class MetricUnavailable(Exception):
    """A metric's library or the weights of its network are missing. The message says what to do."""


def find_metrics(device: torch.device, count: int, download: bool) -> tuple[dict[str, Metric], dict[str, MetricStatus]]:
    """The metrics that are available, and the status of all.

    Args:
        device: To compute on.
        count: Number of pictures.
        download: Whether networks may be downloaded.

    Returns:
        Name -> metric, for those available, and name -> status, for all of `METRICS`.
    """
    metrics: dict[str, Metric] = {}
    statuses: dict[str, MetricStatus] = {}
    for name, (title, find) in METRICS.items():
        try:
            if name in SET_METRICS and count < SET_PROMPTS:
                raise MetricUnavailable(f"compares sets of at least {SET_PROMPTS} pictures, here are {count}")
            metrics[name] = find(device, download)
            statuses[name] = MetricStatus(title)
        except MetricUnavailable as error:
            statuses[name] = MetricStatus(title, str(error))
    return metrics, statuses


def psnr(reference: torch.Tensor, pictures: torch.Tensor) -> list[float]:
    """PSNR of each pair of pictures in dB, for values up to 255; infinite for equal pictures.

    Args:
        reference: uint8 (pictures, 3, height, width).
        pictures: Of the same shape.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return [
        peak_signal_noise_ratio(other.double(), one.double(), data_range=255.0).item()
        for one, other in zip(reference, pictures, strict=True)
    ]


def _find_psnr(device: torch.device, download: bool) -> Metric:
    with _needs("torchmetrics"):
        import torchmetrics.functional.image  # noqa: F401
    return lambda reference, pictures, prompts: psnr(reference, pictures)


def _find_ssim(device: torch.device, download: bool) -> Metric:
    with _needs("torchmetrics"):
        from torchmetrics.functional.image import structural_similarity_index_measure

    def ssim(reference: torch.Tensor, pictures: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        values: list[float] = []
        for one, other in _batches(device, reference, pictures):
            found = structural_similarity_index_measure(other, one, data_range=1.0, reduction="none")
            values += cast(torch.Tensor, found).reshape(-1).tolist()  # Only return_full_image gives a tuple
        return values

    return ssim


def _find_lpips(device: torch.device, download: bool) -> Metric:
    with _needs("torchvision"):
        from torchvision.models import AlexNet_Weights
    with _needs("torchmetrics"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    check_cached(AlexNet_Weights.DEFAULT.url, download)
    with _needs("torchmetrics"):
        network = LearnedPerceptualImagePatchSimilarity(LPIPS_BACKBONE, normalize=True).to(device)

    def lpips(reference: torch.Tensor, pictures: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        with torch.no_grad():
            return [
                network(other[None], one[None]).item()
                for some, others in _batches(device, reference, pictures)
                for one, other in zip(some, others, strict=True)
            ]

    return lpips


def _find_st_lpips(device: torch.device, download: bool) -> Metric:
    """Shift-tolerant LPIPS (https://arxiv.org/abs/2207.13686), whose package contains its network."""
    with _needs("torchvision"):
        import torchvision  # noqa: F401
    with _needs("stlpips-pytorch"):
        from stlpips_pytorch.stlpips import LPIPS

        network = LPIPS(net=LPIPS_BACKBONE, variant="shift_tolerant", verbose=False).to(device)

    def st_lpips(reference: torch.Tensor, pictures: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        with torch.no_grad():
            return [
                value
                for one, other in _batches(device, reference, pictures)
                for value in network(2 * other - 1, 2 * one - 1).reshape(-1).tolist()
            ]

    return st_lpips


def _find_clip_score(device: torch.device, download: bool) -> Metric:
    """100 times the cosine of picture and prompt, at least 0 (https://arxiv.org/abs/2104.08718), as in torchmetrics."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    with _needs("transformers"):
        from transformers import CLIPModel, CLIPProcessor
    patterns = ["*.json", "*.txt", "model.safetensors", "pytorch_model.bin"]
    try:
        folder = snapshot_download(CLIP, allow_patterns=patterns, local_files_only=not download)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MetricUnavailable(f"{CLIP} is not in the Hub cache: {_how_to_get(download)}") from error
    with _needs("transformers"):
        model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    def clip_score(reference: torch.Tensor, pictures: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        scores = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            inputs = processor(
                text=list(prompts[part]),
                images=list(pictures[part]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
            )
            with torch.no_grad():
                output = model(**inputs.to(device))
            scores += (100 * (output.image_embeds * output.text_embeds).sum(-1)).clamp(min=0).tolist()
        return scores

    return clip_score


def _find_distance(kind: str, options: dict[str, Any]) -> Callable[[torch.device, bool], Metric]:
    def find(device: torch.device, download: bool) -> Metric:
        with _needs("torch-fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        with _needs("torchmetrics"):
            from torchmetrics import image
        check_cached(URL_INCEPTION_V3, download)
        with _needs("torchmetrics"):
            distance = getattr(image, kind)(**options).to(device)

        def measure(reference: torch.Tensor, pictures: torch.Tensor, prompts: Sequence[str]) -> list[float]:
            distance.reset()
            for real, images in ((True, reference), (False, pictures)):
                for part in images.split(BATCH):
                    distance.update(part.to(device), real=real)
            with SeededDraws(0):  # KID draws random subsets
                value = distance.compute()
            return [(value[0] if isinstance(value, tuple) else value).item()]

        return measure

    return find


METRICS: dict[str, tuple[str, Callable[[torch.device, bool], Metric]]] = {
    "psnr": ("PSNR in dB, higher is closer", _find_psnr),
    "ssim": ("SSIM, 1 is equal", _find_ssim),
    "lpips": (f"LPIPS ({LPIPS_BACKBONE}), 0 is equal", _find_lpips),
    "st_lpips": (f"ST-LPIPS ({LPIPS_BACKBONE}, shift-tolerant), 0 is equal", _find_st_lpips),
    "clip_score": (f"CLIP score ({CLIP}) of picture and prompt, higher fits better", _find_clip_score),
    "fid": ("FID between the two sets, lower is closer", _find_distance("FrechetInceptionDistance", {})),
    "kid": (
        "KID between the two sets, lower is closer",
        _find_distance("KernelInceptionDistance", {"subset_size": KID_SUBSET}),
    ),
}
SET_METRICS = ("fid", "kid")


def _batches(device: torch.device, *pictures: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """`BATCH` pictures of each set at a time, float32 in [0, 1] on the device."""
    for parts in zip(*(each.split(BATCH) for each in pictures), strict=True):
        yield tuple(part.to(device).float() / 255 for part in parts)


@contextmanager
def _needs(package: str) -> Iterator[None]:
    """Turn any error of a missing or broken package into `MetricUnavailable`: torchvision raises a RuntimeError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MetricUnavailable(f"{package} is not installed: `pip install ernie-image-nf4[evaluate]`") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise MetricUnavailable(f"{package} does not work here ({reason})") from error


def check_cached(url: str, download: bool) -> None:
    """Refuse a network that PyTorch would have to download, unless downloads are allowed.

    Raises:
        MetricUnavailable: It isn't in PyTorch's cache.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists() and not download:
        raise MetricUnavailable(f"{file} is not there: {_how_to_get(download)}, or put the file there")


def _how_to_get(download: bool) -> str:
    return "downloading it failed" if download else "allow the download (--download-metrics)"
