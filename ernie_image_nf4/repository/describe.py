"""What a repository holds, from its small JSON files and file sizes alone."""

from __future__ import annotations

from pathlib import Path

from .components import COMPONENTS, Component
from .metadata import Metadata, Recommended, installed_versions, read_metadata_if_ours
from .resolve import component_class, is_quantized, read_model_index, total_bytes, weight_files

MB = 1000**2


def describe(folder: Path) -> list[str]:
    """Printable lines: name, source, components with class, precision and size, recommended settings, versions.

    Args:
        folder: A repository folder; its weight files may be missing, their sizes then come from the metadata.

    Raises:
        InvalidRepository: ``model_index.json`` or a configuration is missing or not what it should be.
    """
    index = read_model_index(folder)
    metadata = read_metadata_if_ours(folder)
    rows = [("name", metadata.name if metadata else folder.resolve().name), ("folder", str(folder))]
    if metadata:
        source, scheme = metadata.source, metadata.quantization
        rows.append(
            ("source", ", ".join(part for part in (source.repository, source.revision, source.license) if part))
        )
        rows.append(("quantized", f"{scheme.quant_type.upper()} by {scheme.method}, blocks of {scheme.block_size}"))
    rows += [(component.name, _component(folder, component, index, metadata)) for component in COMPONENTS]
    settings = metadata.recommended if metadata else Recommended()
    rows.append(
        (
            "recommended",
            f"{settings.width}x{settings.height}, {settings.num_inference_steps} steps, "
            f"guidance {settings.guidance_scale}",
        )
    )
    if metadata:
        rows.append(("made with", _versions(metadata.versions)))
    rows.append(("installed", _versions(installed_versions())))
    return [f"{label:<12} {text}" for label, text in rows]


def _component(folder: Path, component: Component, index: dict, metadata: Metadata | None) -> str:
    class_name = component_class(index, component)
    if class_name is None:
        return "left out"
    if component.weights is None:
        return class_name
    precision = "quantized" if is_quantized(folder, component) else "unquantized"
    files = [file for file in weight_files(folder, component) if file.exists()]
    record = metadata.components.get(component.name) if metadata else None
    if files:
        size = f"{total_bytes(files) / MB:.1f} MB"
    else:
        size = f"{record.bytes / MB:.1f} MB, not here" if record else "weights not here"
    return f"{class_name}, {precision}, {size}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
