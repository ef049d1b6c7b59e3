"""`load`: an ERNIE-Image NF4 repository -> a plain ``diffusers.ErnieImagePipeline``, ready to draw."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Literal

import diffusers
import torch

from ..errors import InvalidSettings
from ..fast.products import AUTO, find_products, set_products
from ..memory.apply import apply_placement
from ..memory.placement import Placement, find_device, find_dtype, find_memory
from ..memory.precision import Precision
from ..memory.requirements import weight_bytes
from ..repository.integrity import check_integrity
from ..repository.record import Repository, open_repository
from ..repository.resolve import find_repository
from .build import build_pipeline
from .garbage_collection import move_to_oldest_generation

logger = logging.getLogger(__name__)

Fast = bool | Literal["exact"]


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    fast: Fast = True,
    products: str = AUTO,
    prompt_enhancer: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    verify: bool = False,
    fp8: bool | None = None,
) -> diffusers.ErnieImagePipeline:
    """Load an ERNIE-Image NF4 repository as a `diffusers.ErnieImagePipeline` that is placed and ready to draw.

    Args:
        model: A folder, a Hub id (``"user/name"``), or None for the repository in which this package stands.
        device: Where to compute, e.g. ``"cuda:1"``. None takes CUDA, XPU, MPS or the CPU, the first that is there.
        dtype: Of activations and unquantized weights. None takes bfloat16; float16 or float32 on a CUDA GPU that only
            emulates it (compute capability below 8.0), float32 on a CPU without bfloat16 instructions. With
            ``fast=True``, on any device, float16 is only in the transformer's products, which are scaled so that they
            can't overflow, and all else is in float32. With the other values of `fast` it is upstream's, and overflows
            with ERNIE-Image.
        memory: ``"resident"`` keeps all components on the device, ``"offload"`` one at a time, ``"stream"`` the
            transformer block by block as well (for 4 GB); ``"auto"`` chooses by the device's free memory and says so at
            INFO level.
        fast: Whether on CUDA upstream's code paths may be replaced by faster ones that differ by rounding: decoding of
            the prompt enhancer, denoising, loading, offloading. ``"exact"`` replaces them by those whose predictions
            are upstream's to the bit, with attention that takes longer. False leaves them untouched.
        products: What the transformer's blocks multiply in: ``"int8"`` (RTX 20 and newer) or ``"fp8"`` (RTX 40, H100
            and newer), faster and less precise, fp8 the less precise of the two; ``"bfloat16"``; ``"auto"`` is `dtype`.
        prompt_enhancer: False leaves the prompt enhancer's files unread; the pipeline then draws prompts as they are.
        revision: Branch, tag or commit of a Hub repository.
        token: Hub token, or True for the stored one.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Take what the Hub cache holds, without any network call.
        verify: Read every file first, and refuse the repository if one isn't as its metadata says or holds impossible
            values. Takes about as long as hashing them.
        fp8: Deprecated: True is ``products="fp8"``.

    Returns:
        The pipeline. Call it as upstream's.

    Raises:
        RepositoryNotFound: No such folder or Hub repository, or it can't be reached.
        InvalidRepository: The repository is incomplete, damaged, of another pipeline, or asks for code to be run.
        DeviceUnavailable: The device isn't there, or has too little free memory.
        InvalidSettings: A device, dtype, memory mode or products that can't work.
        IncompatibleLibraries: A library can't use the files, in which no check finds a fault.
        DiskFull: There is no room for the download.

    Example:
        >>> pipe = load("user/ERNIE-Image-NF4")
        >>> pipe("an orange cat on a wooden desk", height=512, width=512).images[0].save("cat.png")
    """
    check_fast(fast)
    chosen_device = find_device(device)  # before anything is downloaded for a device that isn't there
    chosen_dtype = find_dtype(dtype, chosen_device, scaled=bool(fast) and fast != "exact")
    chosen_products = find_products(_with_alias(products, fp8), chosen_device, chosen_dtype, bool(fast))
    folder = find_repository(
        model,
        prompt_enhancer=prompt_enhancer,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    move_to_oldest_generation()
    repository = open_repository(folder, prompt_enhancer=prompt_enhancer)
    if verify:
        check_integrity(repository)
    placement, reason = decide_placement(repository, chosen_device, chosen_dtype, memory, fast)
    logger.info("Memory mode %s on %s: %s", placement.memory, placement.device, reason)
    warn_of_unquantized(repository, chosen_dtype)
    pipe = build_pipeline(repository, placement)
    apply_placement(pipe, placement)
    if chosen_products is not None:
        set_products(pipe.transformer, chosen_products)
    move_to_oldest_generation()
    return pipe


def _with_alias(products: str, fp8: bool | None) -> str:
    """`products`, or what `load`'s former argument `fp8` stands for."""
    if fp8 is None:
        return products
    warnings.warn("fp8 is deprecated: fp8=True is now products='fp8'.", DeprecationWarning, stacklevel=3)
    if not fp8 or products == "fp8":
        return products
    if products != AUTO:
        raise InvalidSettings(f"fp8=True and products={products!r} contradict each other: leave fp8 out.")
    return "fp8"


def load_opened(
    repository: Repository,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
) -> diffusers.ErnieImagePipeline:
    """`load` with ``fast=False`` of a repository that was opened before, original or quantized, without a log line.

    Raises:
        InvalidRepository: As `load`, and so are the next two.
        DeviceUnavailable: See there.
        InvalidSettings: See there.
    """
    chosen_device = find_device(device)
    placement, _ = decide_placement(
        repository, chosen_device, find_dtype(dtype, chosen_device, scaled=False), memory, fast=False
    )
    pipe = build_pipeline(repository, placement)
    apply_placement(pipe, placement)
    return pipe


def decide_placement(
    repository: Repository, device: torch.device, dtype: torch.dtype, memory: str, fast: Fast
) -> tuple[Placement, str]:
    """Where and how a pipeline of this repository runs, by the device's free memory, and the reason in words."""
    exact = fast == "exact"
    mixed = bool(fast) and not exact and dtype == torch.float16
    fast = bool(fast) and device.type == "cuda"
    precision = Precision(dtype, mixed)
    recommended = repository.recommended
    mode, reason = find_memory(
        memory,
        device,
        weights={
            name: weight_bytes(part, fast=fast, precision=precision)
            for name, part in repository.components.items()
            if part.component.weights
        },
        pixels=recommended.height * recommended.width,
        precision=precision,
        tiled=fast,
    )
    return Placement(device, dtype, mode, fast, exact and fast, mixed), reason


def check_fast(fast: bool | str) -> None:
    """Refuse a word that `load` doesn't know.

    Raises:
        InvalidSettings: It isn't ``"exact"``.
    """
    if isinstance(fast, str) and fast != "exact":
        raise InvalidSettings(f"fast={fast!r} is none of True, 'exact' (--exact) and False.")


def warn_of_unquantized(repository: Repository, dtype: torch.dtype) -> None:
    """Warn of components that take far more memory than expected of an NF4 repository."""
    for part in repository.components.values():
        if part.component.quantized and not part.quantized:
            logger.warning(
                "%s is not quantized: it is loaded in %s and takes about four times the memory of NF4.",
                part.folder,
                dtype,
            )
