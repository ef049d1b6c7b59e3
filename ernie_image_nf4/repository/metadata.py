"""``quantization_metadata.json`` as dataclasses: what was quantized from what, and every file with its size and digest.

Format version 1. A repository without this file loads all the same; with it, ``verify`` can tell whether a byte
changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InvalidRepository
from .components import COMPONENT, METADATA, PIXELS_PER_PATCH
from .security import DOWNLOAD_AGAIN, WEIGHTS, is_plain_name, read_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Of recommended settings: pixels a side, and denoising steps.
MAX_SIZE, MAX_STEPS = 8192, 1000
# For pydantic: no unknown fields, no conversion of types.
STRICT = {"extra": "forbid", "strict": True}
PACKAGE = "ernie-image-nf4"
VERSIONED_PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "accelerate", "safetensors")


@dataclass(frozen=True)
class FileRecord:
    """One file of a component.

    Attributes:
        bytes: Size in bytes.
        sha256: Lower-case hexadecimal SHA-256 digest of the content.
    """

    __pydantic_config__ = STRICT

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where the original weights came from.

    Attributes:
        repository: Hub id or folder name of the original.
        revision: Commit of the Hub repository, None for a folder.
        license: SPDX-like identifier as on the Hub, None if unknown.
    """

    __pydantic_config__ = STRICT

    repository: str
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Quantization:
    """How the quantized components were made.

    Attributes:
        method: Always ``"bitsandbytes"``.
        quant_type: Always ``"nf4"``.
        block_size: Values that share one scale (absmax).
        double_quantization: Whether the scales are quantized themselves (8 bits, blocks of 256).
        compute_dtype: dtype of the products, as in the components' configs.
        scale_search: Whether each block's scale was searched for the least squared error.
        calibration_prompts: How many prompts the transformer's codes were calibrated with, 0 if they weren't.
        calibration_source: Which prompts: ``"built in"`` for this package's, the name of a file, None for others.
    """

    __pydantic_config__ = STRICT

    method: str = "bitsandbytes"
    quant_type: str = "nf4"
    block_size: int = 64
    double_quantization: bool = True
    compute_dtype: str = "bfloat16"
    scale_search: bool = False
    calibration_prompts: int = 0
    calibration_source: str | None = None


@dataclass(frozen=True)
class ComponentRecord:
    """One component as it lies in the repository.

    Attributes:
        class_name: The class that loads it.
        quantized: Whether its linear layers are stored as NF4.
        files: Path inside the component's folder (POSIX) -> size and digest.
        bytes: Size of its weight files, 0 for a component without weights.
        original_bytes: Size of the source's weight files.
        kept_modules: Patterns of linear layers kept in original precision.
        relative_weight_error: Norm of the quantized weights' error over the norm of those weights, None if unquantized.
    """

    __pydantic_config__ = STRICT

    class_name: str
    quantized: bool
    files: dict[str, FileRecord]
    bytes: int = 0
    original_bytes: int = 0
    kept_modules: list[str] = field(default_factory=list)
    relative_weight_error: float | None = None


@dataclass(frozen=True)
class Recommended:
    """Call settings that suit the model: sizes in pixels, guidance scale without unit."""

    __pydantic_config__ = STRICT

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class Metadata:
    """The whole of ``quantization_metadata.json``.

    Attributes:
        name: Of the repository.
        source: Where the original weights came from.
        quantization: How they were quantized.
        components: What lies in each component's folder.
        recommended: Call settings that suit the model.
        versions: Package -> version that made the weights: this package's, ``"ernie-image-nf4"``, which files of 0.1.0
            may lack, and those of the libraries.
        format_version: Of this file.
    """

    __pydantic_config__ = STRICT

    name: str
    source: Source
    quantization: Quantization
    components: dict[str, ComponentRecord]
    recommended: Recommended = Recommended()
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def installed_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that shape the weights, as they are here."""
    libraries = {package: importlib.metadata.version(package) for package in VERSIONED_PACKAGES}
    return {PACKAGE: __version__, **libraries}  # the package need not be installed: a clone or a repository has it too


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def changed_files(folder: Path, record: ComponentRecord, *, weights: bool = True) -> list[str]:
    """Where the files in a component's folder aren't as they were recorded, a sentence each.

    Args:
        folder: The component's.
        record: What they should be.
        weights: Whether to read weight files too. Without, their sizes alone are compared.
    """
    problems = []
    for name, expected in record.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing.")
        elif (size := path.stat().st_size) != expected.bytes:
            problems.append(f"{path} has {size} bytes, expected {expected.bytes}.")
        elif (weights or not name.endswith(WEIGHTS)) and file_record(path) != expected:
            problems.append(f"{path} was changed: its SHA-256 isn't the recorded one.")
    found = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    problems += [
        f"{path} isn't in {METADATA}." for path in found if path.relative_to(folder).as_posix() not in record.files
    ]
    return problems


def to_json(metadata: Metadata) -> str:
    """The text of ``quantization_metadata.json``."""
    return json.dumps(dataclasses.asdict(metadata), indent=2, ensure_ascii=False) + "\n"


def read_metadata(folder: Path) -> Metadata | None:
    """The metadata of a repository folder, or None if it has no ``quantization_metadata.json``.

    Raises:
        InvalidRepository: As `parse_metadata`, or the file isn't JSON.
    """
    path = folder / METADATA
    return parse_metadata(read_json(folder, path), path) if path.exists() else None


def read_metadata_if_ours(folder: Path) -> Metadata | None:
    """`read_metadata`, but a file of another format counts as none: that is no reason not to draw from the weights."""
    try:
        return read_metadata(folder)
    except InvalidRepository as error:
        logger.info("No metadata: %s", error)
        return None


def parse_metadata(value: dict[str, Any], path: Path) -> Metadata:
    """The content of ``quantization_metadata.json`` as a record.

    Args:
        value: The JSON object.
        path: Where it stands, for messages.

    Raises:
        InvalidRepository: It has another format version, a field is missing, unknown or of a wrong type, or what it
            says makes no sense.
    """
    from pydantic import TypeAdapter, ValidationError  # 60 ms, which `--help` does without

    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise InvalidRepository(
            f"{path} has format version {version!r}, this package reads {FORMAT_VERSION}: "
            "update the package (pip install -U) or make the repository again."
        )
    try:
        metadata = TypeAdapter(Metadata).validate_json(json.dumps(value))  # strict mode takes objects from JSON only
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ": ".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f" (found {str(first['input'])[:60]!r})"
        raise InvalidRepository(f"{METADATA}: {field}: {first['msg']}{found}: {DOWNLOAD_AGAIN}.") from error
    _check(metadata)
    return metadata


def _check(metadata: Metadata) -> None:
    """Refuse what has the right types and makes no sense: metadata may come from a stranger as well."""
    if unknown := sorted(metadata.components.keys() - COMPONENT.keys()):
        raise InvalidRepository(f"{METADATA}: components: there is no component {unknown[0]!r}.")
    for component, record in metadata.components.items():
        for name in record.files:
            if not all(is_plain_name(part) for part in name.split("/")):
                raise InvalidRepository(f"{METADATA}: components: {component}: {name!r} is no file in its folder.")
    settings = metadata.recommended
    sizes = (settings.height, settings.width)
    if any(not 0 < size <= MAX_SIZE or size % PIXELS_PER_PATCH for size in sizes):
        raise InvalidRepository(f"{METADATA}: recommended: {settings.width}x{settings.height} is no size of a picture.")
    if not 0 < settings.num_inference_steps <= MAX_STEPS or not math.isfinite(settings.guidance_scale):
        raise InvalidRepository(f"{METADATA}: recommended: no picture is drawn with {settings}.")
