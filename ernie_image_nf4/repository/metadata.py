"""``quantization_metadata.json`` as dataclasses: what was quantized from what, and every file with its size and digest.

Format version 1. A repository without this file loads all the same; with it, ``verify`` can tell whether a byte changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InvalidRepository
from .components import COMPONENT, METADATA, PIXELS_PER_PATCH
from .security import is_plain_name, read_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Of recommended settings: pixels a side, and denoising steps.
MAX_SIZE, MAX_STEPS = 8192, 1000
VERSIONED_PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "accelerate", "safetensors")


@dataclass(frozen=True)
class FileRecord:
    """One file of a component.

    Attributes:
        bytes: Size in bytes.
        sha256: Lower-case hexadecimal SHA-256 digest of the content.
    """

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
    """

    method: str = "bitsandbytes"
    quant_type: str = "nf4"
    block_size: int = 64
    double_quantization: bool = True
    compute_dtype: str = "bfloat16"
    scale_search: bool = False
    calibration_prompts: int = 0


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

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class Metadata:
    """The whole of ``quantization_metadata.json``."""

    name: str
    source: Source
    quantization: Quantization
    components: dict[str, ComponentRecord]
    recommended: Recommended = Recommended()
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that shape the weights, as installed here."""
    return {package: importlib.metadata.version(package) for package in VERSIONED_PACKAGES}


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def to_json(metadata: Metadata) -> str:
    """The text of ``quantization_metadata.json``."""
    return json.dumps(dataclasses.asdict(metadata), indent=2, ensure_ascii=False) + "\n"


def read_metadata(folder: Path) -> Metadata | None:
    """The metadata of a repository folder, or None if it has no ``quantization_metadata.json``.

    Raises:
        InvalidRepository: The file isn't JSON, has another format version, or a field is missing or of a wrong type.
    """
    path = folder / METADATA
    if not path.exists():
        return None
    value = read_json(folder, path)
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise InvalidRepository(
            f"{path} has format version {version!r}, this package reads {FORMAT_VERSION}: "
            "update the package (pip install -U) or make the repository again."
        )
    metadata = _parse(Metadata, value, METADATA)
    _check(metadata)
    return metadata


def read_metadata_if_ours(folder: Path) -> Metadata | None:
    """`read_metadata`, but a file of another form counts as none: that is no reason not to draw from the weights."""
    try:
        return read_metadata(folder)
    except InvalidRepository as error:
        logger.info("No metadata: %s", error)
        return None


def _check(metadata: Metadata) -> None:
    """Refuse what has the right types and makes no sense: a repository's metadata is no more to be trusted than the rest of it."""
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


def _parse(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """`value` (from JSON) as `kind` (a dataclass, dict, list, union or plain type), or InvalidRepository naming the field."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InvalidRepository(f"{where}: expected an object, found {type(value).__name__}.")
        hints = typing.get_type_hints(kind)
        fields = {item.name: item for item in dataclasses.fields(kind)}
        if unknown := sorted(set(value) - set(fields)):
            raise InvalidRepository(f"{where}: unknown field {unknown[0]!r}.")
        for name, item in fields.items():
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and name not in value:
                raise InvalidRepository(f"{where}: field {name!r} is missing.")
        return kind(**{name: _parse(hints[name], inner, f"{where}: {name}") for name, inner in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        if not isinstance(value, dict):
            raise InvalidRepository(f"{where}: expected an object, found {type(value).__name__}.")
        return {name: _parse(arguments[1], inner, f"{where}: {name}") for name, inner in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise InvalidRepository(f"{where}: expected a list, found {type(value).__name__}.")
        return [_parse(arguments[0], inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if type(None) in arguments:
        if value is None:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InvalidRepository(f"{where}: expected {kind.__name__}, found {type(value).__name__}.")
    return value
