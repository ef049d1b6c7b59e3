"""The model card of a quantized repository, made from its metadata, and the origin and licence of the original."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from string import Template

import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HTTPError

from ..repository.components import COMPONENT, PIPELINE_CLASS
from ..repository.metadata import Metadata, Quantization, Source
from .calibration_prompts import BUILT_IN, FILE

CARD = "README.md"
LICENSE = "LICENSE"
TEMPLATE = Path(__file__).with_name("model_card.md")
PACKAGE_LICENSE = Path(__file__).with_name(LICENSE)  # the text of Apache-2.0
BUILT_IN_FILE = FILE.relative_to(Path(__file__).parents[2]).as_posix()  # as it stands in a repository too
TAGS = ["text-to-image", "diffusers", "ernie-image", "nf4", "4-bit", "quantized", "bitsandbytes"]
STOCK_SCALES = "Each block's scale is its largest magnitude, as bitsandbytes itself sets it."
SEARCHED_SCALES = (
    "Each block's scale, of either sign, was searched for the least squared error, in the same format and size."
)
CALIBRATED_CODES = (
    "The transformer's codes were calibrated: rounded for the least error of what its layers give while "
    "{prompts} prompts {source}are drawn. Its weights are farther from the original for that, its predictions nearer."
)
PROMPT = "A realistic orange kitten sits on a wooden desk, soft natural lighting, centered composition."


def model_card(metadata: Metadata) -> str:
    """The text of ``README.md`` for a repository with this metadata."""
    components = metadata.components
    source, recommended = metadata.source, metadata.recommended
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        front_matter=yaml.safe_dump(_front_matter(source), sort_keys=False).strip(),
        name=metadata.name,
        source=_source_text(source),
        size=_size(sum(record.bytes for record in components.values())),
        original_size=_size(sum(record.original_bytes for record in components.values())),
        prompt=PROMPT,
        height=recommended.height,
        width=recommended.width,
        steps=recommended.num_inference_steps,
        guidance=recommended.guidance_scale,
        demo=_demo(metadata),
        size_rows="\n".join(
            f"| `{name}` | `{record.class_name}` | {'NF4' if record.quantized else 'original precision'} "
            f"| {record.original_bytes} | {record.bytes} | {record.bytes / record.original_bytes:.1%} |"
            for name, record in components.items()
            if record.original_bytes
        ),
        block_size=metadata.quantization.block_size,
        scales=_scales(metadata.quantization),
        compute_dtype=metadata.quantization.compute_dtype,
        kept=", ".join(f"`{name}.{module}`" for name in components for module in components[name].kept_modules)
        or "none",
        versions=", ".join(f"{package} {version}" for package, version in metadata.versions.items()),
        error_rows="\n".join(
            f"| `{name}` | {record.relative_weight_error:.4f} |"
            for name, record in components.items()
            if record.relative_weight_error is not None
        ),
    )


def describe_source(folder: Path, token: str | bool | None = None) -> Source:
    """Where a source folder came from, by its path if it is a snapshot in the Hub cache, and its licence, by its card.

    Card and licence of a Hub repository are downloaded into the snapshot if they aren't there.

    Args:
        folder: The original repository.
        token: Hub token, or True for the stored one.
    """
    repository, revision = folder.resolve().name, None
    if folder.parent.name == "snapshots":
        repository = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        revision = folder.name
        with suppress(HTTPError, OSError):  # without network, what the cache has is used
            snapshot_download(
                repository,
                revision=revision,
                token=token,
                cache_dir=folder.parents[2],
                allow_patterns=[CARD, f"{LICENSE}*"],
            )
    license = None
    if (folder / CARD).is_file():
        with suppress(ValueError, yaml.YAMLError):  # without usable front matter the licence is unknown
            license = ModelCard.load(folder / CARD).data.license
    return Source(repository, revision, license)


def license_file(folder: Path, license: str | None) -> Path | None:
    """The licence text for the weights: the source's own file, or that of Apache-2.0 if its card names it."""
    own = sorted(path for path in folder.glob(f"{LICENSE}*") if path.is_file())
    return own[0] if own else PACKAGE_LICENSE if license == "apache-2.0" else None


def _front_matter(source: Source) -> dict[str, object]:
    """YAML keys that the Hub reads. Only a Hub repository can be a base model."""
    base = {"base_model": source.repository, "base_model_relation": "quantized"} if "/" in source.repository else {}
    return {
        "license": source.license or "unknown",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **base,
        "language": ["en", "zh"],
        "tags": TAGS,
    }


def _source_text(source: Source) -> str:
    if "/" not in source.repository:
        return f"the folder `{source.repository}`"
    link = f"[{source.repository}](https://huggingface.co/{source.repository})"
    return f"{link} at revision `{source.revision}`" if source.revision else link


def _scales(quantization: Quantization) -> str:
    """How scales and codes were chosen."""
    scales = SEARCHED_SCALES if quantization.scale_search else STOCK_SCALES
    if not quantization.calibration_prompts:
        return scales
    prompts = CALIBRATED_CODES.format(prompts=quantization.calibration_prompts, source=_prompts(quantization))
    return f"{scales}\n- {prompts}"


def _prompts(quantization: Quantization) -> str:
    """Which prompts those of the calibration are, followed by a space; nothing if nobody knows."""
    if quantization.calibration_source == BUILT_IN:
        return f"(`{BUILT_IN_FILE}`) "
    return f"of `{quantization.calibration_source}` " if quantization.calibration_source else ""


def _demo(metadata: Metadata) -> str:
    """Python that loads the pipeline with plain ``from_pretrained`` calls."""
    quantized = [COMPONENT[name] for name, record in metadata.components.items() if record.quantized]
    imports: dict[str, list[str]] = {"diffusers": [PIPELINE_CLASS]}
    for part in quantized:
        imports.setdefault(part.library, []).append(part.class_name)
    lines = [f"from {library} import {', '.join(sorted(names))}" for library, names in sorted(imports.items())]
    where = "this repository as a folder, or its Hub id with subfolder=... for each component"
    lines.append(f'\nmodel = "{metadata.name}"  # {where}')
    for part in quantized:
        lines.append(
            f"{part.name} = {part.class_name}.from_pretrained(\n"
            f'    f"{{model}}/{part.name}", torch_dtype=torch.bfloat16, device_map={{"": 0}}\n)'
        )
    arguments = ", ".join(f"{part.name}={part.name}" for part in quantized)
    lines.append(f"pipe = {PIPELINE_CLASS}.from_pretrained(model, {arguments}, torch_dtype=torch.bfloat16)")
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
