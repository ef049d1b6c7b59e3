"""What a repository holds, from its small JSON files and file sizes alone."""

from __future__ import annotations

from pathlib import Path

from .components import COMPONENTS, Component
from .lora_file import describe_lora
from .metadata import Quantization, installed_versions
from .record import Repository

MB = 1000**2


def describe(repository: Repository) -> list[str]:
    """Printable lines: name, source, components with class, precision and size, recommended settings, versions.

    Args:
        repository: As from `open_repository` with ``weights=False``; sizes of weight files that aren't there come from
            the metadata.
    """
    metadata, settings = repository.metadata, repository.recommended
    rows = [("name", repository.name), ("folder", str(repository.folder))]
    if metadata:
        source, scheme = metadata.source, metadata.quantization
        origin = (source.repository, source.revision, source.license)
        rows.append(("source", ", ".join(part for part in origin if part)))
        rows.append(("quantized", _scheme_text(scheme)))
    rows += [(component.name, _component_text(repository, component)) for component in COMPONENTS]
    size = f"{settings.width}x{settings.height}"
    rows.append(("recommended", f"{size}, {settings.num_inference_steps} steps, guidance {settings.guidance_scale}"))
    if metadata:
        rows.append(("made with", _versions(metadata.versions)))
    rows.append(("installed", _versions(installed_versions())))
    return [f"{label:<12} {text}" for label, text in rows]


def describe_adapter(file: Path) -> list[str]:
    """Printable lines: what a LoRA file is, its rank, the layers that it changes, and what it was trained on.

    Raises:
        InvalidLora: It isn't a whole safetensors file, or no LoRA.
    """
    found = describe_lora(file)
    layers = len({tensor.layer for tensor in found.tensors})
    ranks = " to ".join(map(str, dict.fromkeys((found.ranks[0], found.ranks[-1])))) if found.ranks else "unknown"
    rows = [
        ("file", f"{file}, {file.stat().st_size / MB:.1f} MB"),
        ("kind", "DoRA" if found.is_dora else "LoRA"),
        ("format", found.format),
        ("rank", f"{ranks}, {'with' if found.has_alpha else 'without'} alpha"),
        ("layers", str(layers)),
        ("base", found.base or "not said"),
    ]
    if found.unused:
        rows.append(("not used", f"{len(found.unused)} tensors for a text encoder"))
    return [f"{label:<12} {text}" for label, text in rows]


def _scheme_text(scheme: Quantization) -> str:
    parts = [f"{scheme.quant_type.upper()} by {scheme.method}", f"blocks of {scheme.block_size}"]
    if scheme.scale_search:
        parts.append("scale search")
    if scheme.calibration_prompts:
        source = f" ({scheme.calibration_source})" if scheme.calibration_source else ""
        parts.append(f"calibrated with {scheme.calibration_prompts} prompts{source}")
    return ", ".join(parts)


def _component_text(repository: Repository, component: Component) -> str:
    part = repository.components.get(component.name)
    if part is None:
        return "left out"
    if component.weights is None:
        return part.class_name
    precision = "quantized" if part.quantized else "unquantized"
    files = [file for file in part.weight_files() if file.exists()]
    record = repository.metadata.components.get(component.name) if repository.metadata else None
    if files:
        size = f"{sum(file.stat().st_size for file in files) / MB:.1f} MB"
    else:
        size = f"{record.bytes / MB:.1f} MB, not here" if record else "weights not here"
    kept = f", kept: {', '.join(record.kept_modules)}" if record and record.kept_modules else ""
    return f"{part.class_name}, {precision}, {size}{kept}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
