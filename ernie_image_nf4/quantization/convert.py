"""`quantize`: an original-precision ERNIE-Image repository becomes an NF4 repository, streamed one tensor at a time.

Memory holds a few tensors. Killed at any moment it leaves whole components, or nothing, and goes on from there; of a
calibration it leaves each block.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import DeviceUnavailable, DiskFull, InvalidSettings
from ..memory.placement import find_device
from ..repository.components import METADATA, MODEL_INDEX
from ..repository.metadata import ComponentRecord, Metadata, Recommended, Source, installed_versions, to_json
from ..repository.record import Repository, StoredComponent, open_repository
from ..repository.resolve import CONFIG_PATTERNS, find_repository
from ..repository.safetensors_io import StoredTensor, file_bytes
from ..repository.security import WEIGHTS
from ..repository.upload import create_repository, upload
from .calibration import Calibration, calibrate_transformer, plan_calibration
from .calibration_prompts import CalibrationPrompts, find_prompts
from .family import recommended_for
from .layer_selection import DEFAULT_KEEP, QUANTIZATION, WeightPlan, matches, plan_weights, save_configs
from .model_card import CARD, LICENSE, describe_source, license_file, model_card
from .resumable_output import ResumableOutput, folder_records, resumable_output
from .weight_writer import copy_component, write_quantized

PACKAGE = Path(__file__).parents[1]
# The lines that the Hub puts into a new model repository, as far as they concern files that are here.
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.model"))


@dataclass(frozen=True)
class Conversion:
    """What is made of what, decided before a weight is read.

    Attributes:
        source: The original repository.
        plans: Quantized component -> what becomes of its weights.
        keep: Globs of layers that keep their precision, default ones included.
        device: Where to quantize.
        scale_search: Whether to search the scales of least squared error.
        prompts: What to calibrate with, if anything.
        recommended: Call settings to record.
    """

    source: Repository
    plans: dict[str, WeightPlan]
    keep: list[str]
    device: torch.device
    scale_search: bool
    prompts: CalibrationPrompts
    recommended: Recommended


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    device: str | None = None,
    scale_search: bool = True,
    keep: Sequence[str] = (),
    default_keep: bool = True,
    calibrate: bool | str | Path | Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    push_to_hub: str | None = None,
    name: str | None = None,
    recommended: Recommended | None = None,
    progress: bool = True,
) -> Path:
    """Write the NF4 repository of an original-precision one, complete and publishable.

    Called again after it was interrupted, it keeps finished components and goes on.

    Args:
        source: Folder or Hub id of the original ERNIE-Image pipeline. It is only read.
        output: Folder to write: a new or empty one, or one that an interrupted run left.
        device: Where to quantize, e.g. ``"cuda"`` or ``"cpu"``; None takes a GPU if there is one. Peak memory is that
            of a few of the largest tensors.
        scale_search: Whether to search each block's scale of least squared error, which takes two to three times as
            long on a CPU. Without, the weights are byte for byte those that bitsandbytes makes.
        keep: Globs over the full names of linear layers, the component first: ``"transformer.final_linear"``,
            ``"*.self_attention.to_out.0"``. Matching layers, and all below a matching module, keep their precision.
        default_keep: Whether the layers of `layer_selection.DEFAULT_KEEP` keep their precision as well.
        calibrate: Prompt file, as for `read_prompts`, or prompts, or True for 64 that come with the package: the
            original draws them, and the transformer's codes are rounded for what its layers need then (see
            `calibration`). A few dozen prompts, of all kinds that matter, are enough.
        revision: Branch, tag or commit of a Hub source.
        token: Hub token, or True for the stored one.
        push_to_hub: Hub id to upload the result to.
        name: Name of the new repository in its card; None takes the output folder's.
        recommended: Call settings to record; None takes ERNIE-Image's, or ERNIE-Image-Turbo's for a source of that
            kind.
        progress: Whether to show a progress bar over the bytes of the source.

    Returns:
        The output folder.

    Raises:
        RepositoryNotFound: There is no such source, or the Hub can't be reached.
        InvalidRepository: The source is incomplete or damaged, of other classes, quantized already, or has NaN,
            infinite values or a dtype that NF4 isn't made from.
        IncompatibleLibraries: The installed libraries can't build a model that the source describes.
        InvalidSettings: The output can't be written or is in use, a `keep` pattern matches nothing, or there are no
            prompts to calibrate with, or no scale search.
        DiskFull: The output's disk is too small.
        UploadFailed: The Hub doesn't take the result, which is complete.
        DeviceUnavailable: There is no such device, or its memory is too small.
    """
    output = Path(output)
    prompts = find_prompts(calibrate, scale_search)
    target = find_device(device)
    folder = find_repository(source, revision=revision, token=token)
    if output.resolve().is_relative_to(folder.resolve()):
        raise InvalidSettings(f"{output} lies in the source, which is only read: name a folder outside of it.")
    repository = open_repository(folder)
    kept = [*keep, *(DEFAULT_KEEP if default_keep else ())]
    parts = repository.components
    plans = {name: plan_weights(part, kept) for name, part in parts.items() if part.component.quantized}
    _check_patterns(keep, plans)
    recommended = recommended or recommended_for(repository)
    conversion = Conversion(repository, plans, kept, target, scale_search, prompts, recommended)
    described = describe_source(folder, token)
    if push_to_hub:
        create_repository(push_to_hub, token)
    with _clear_errors(target), resumable_output(output, _job(conversion)) as made:
        if made:
            _write_components(made, conversion, progress)
            _write_rest(made, folder, _metadata(made, conversion, name or output.resolve().name, described))
    if push_to_hub:
        upload(output, push_to_hub, token)
    return output


# Before a weight is read


def _check_patterns(keep: Sequence[str], plans: dict[str, WeightPlan]) -> None:
    kept = [f"{component}.{module}" for component, plan in plans.items() for module in plan.kept_modules]
    for pattern in keep:
        if not any(matches(name, pattern) for name in kept):
            raise InvalidSettings(
                f"--keep {pattern} matches no linear layer: their names are like transformer.final_linear."
            )


def _job(conversion: Conversion) -> dict[str, Any]:
    """Everything that shapes the components: an unfinished output is only continued if all of it is the same."""
    source, prompts = conversion.source, conversion.prompts.texts
    folders = [part.folder for part in source.components.values()]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    stats = [(path.relative_to(source.folder).as_posix(), path.stat()) for path in files]
    digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    return {
        "source files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "device": conversion.device.type,
        "scale search": conversion.scale_search,
        "layers to keep": sorted(conversion.keep),
        "calibration": [digest, asdict(conversion.recommended)] if prompts else None,
        "versions": installed_versions(),
    }


@contextmanager
def _clear_errors(device: torch.device) -> Iterator[None]:
    """Say what to do when the device's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceUnavailable(
            f"Device {str(device)!r} has too little free memory: close what else uses it, or repeat with --device cpu "
            "and another output folder."
        ) from error


# Components


def _write_components(made: ResumableOutput, conversion: Conversion, progress: bool) -> None:
    """Write all components that aren't finished, after checking that the disk has room for them."""
    parts, plans = conversion.source.components, conversion.plans
    missing = [part for name, part in parts.items() if not made.is_finished(name)]
    needed = sum(_output_bytes(part, plans.get(part.name)) for part in missing)
    calibrated: dict[str, StoredTensor] = {}
    if calibration := _calibration(conversion, missing):
        _check_space(made.output, needed + calibration.disk_bytes - made.checkpoints.bytes)
        calibrated = calibrate_transformer(calibration, made.checkpoints, progress=progress)
    _check_space(made.output, needed)
    sizes = {name: _read_bytes(part, plans.get(name)) for name, part in parts.items()}
    total, left = sum(sizes.values()), sum(sizes[part.name] for part in missing)
    with (
        ThreadPoolExecutor(1) as finisher,
        tqdm(
            total=total, initial=total - left, unit="B", unit_scale=True, desc="quantize", disable=not progress
        ) as bar,
    ):
        finishing = []
        for part in missing:
            bar.set_postfix_str(part.name)
            error = _write_component(made.work / part.name, conversion, part, calibrated, bar)
            # The next component doesn't wait for this one's digests.
            finishing.append(finisher.submit(_finish, made, conversion, part, error))
        for finished in finishing:
            finished.result()


def _calibration(conversion: Conversion, missing: Sequence[StoredComponent]) -> Calibration | None:
    """How to calibrate, if that is asked for and not done yet."""
    part = next((part for part in missing if part.component.streamed), None)
    if part is None or not conversion.prompts.texts:
        return None
    plan, texts = conversion.plans[part.name], conversion.prompts.texts
    return plan_calibration(conversion.source, plan, texts, conversion.recommended, conversion.device)


def _write_component(
    work: Path, conversion: Conversion, part: StoredComponent, calibrated: dict[str, StoredTensor], bar: tqdm
) -> float | None:
    """Write one component to its work folder. Returns its relative weight error if it is quantized."""
    plan, component = conversion.plans.get(part.name), part.component
    work.mkdir()
    if plan is None or component.weights is None:
        configs = [file for pattern in CONFIG_PATTERNS for file in part.folder.glob(pattern)]
        copy_component(part, configs, work, bar)
        return None
    save_configs(plan.model, work)
    found = calibrated if component.streamed else {}
    return write_quantized(plan, work / component.weights, conversion.device, conversion.scale_search, found, bar)


def _finish(made: ResumableOutput, conversion: Conversion, part: StoredComponent, error: float | None) -> None:
    """Record what was written of a component and move it to the output."""
    plan, files = conversion.plans.get(part.name), folder_records(made.work / part.name)
    record = ComponentRecord(
        class_name=part.class_name,
        quantized=part.component.quantized,
        files=files,
        bytes=sum(file.bytes for name, file in files.items() if name.endswith(WEIGHTS)),
        original_bytes=part.bytes,
        kept_modules=plan.kept_modules if plan else [],
        relative_weight_error=error,
    )
    made.finish(part.name, record)
    if part.component.streamed:
        made.checkpoints.discard()


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if needed > free:
        raise DiskFull(
            f"{output} needs {needed / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB free: "
            "free some, or name another disk."
        )


def _read_bytes(part: StoredComponent, plan: WeightPlan | None) -> int:
    """Bytes of the tensors that are read; a tied weight that is stored twice is read once."""
    tensors = plan.tensors if plan else part.tensors
    return sum(stored.spec.bytes for stored in tensors.values())


def _output_bytes(part: StoredComponent, plan: WeightPlan | None) -> int:
    return file_bytes(plan.specs()) if plan else part.bytes


# What stands beside the components


def _metadata(made: ResumableOutput, conversion: Conversion, name: str, source: Source) -> Metadata:
    quantization = replace(
        QUANTIZATION,
        scale_search=conversion.scale_search,
        calibration_prompts=len(conversion.prompts.texts),
        calibration_source=conversion.prompts.source,
    )
    return Metadata(
        name=name,
        source=source,
        quantization=quantization,
        components={name: made.records[name] for name in conversion.source.components},
        recommended=conversion.recommended,
        versions=installed_versions(),
    )


def _write_rest(made: ResumableOutput, folder: Path, metadata: Metadata) -> None:
    """Write the other files. The index comes last: without it no folder is a repository."""
    work = made.work
    (work / CARD).write_text(model_card(metadata), encoding="utf-8")
    (work / ".gitattributes").write_text(GITATTRIBUTES, encoding="utf-8")
    shutil.copytree(PACKAGE, work / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (work / METADATA).write_text(to_json(metadata), encoding="utf-8")
    shutil.copyfile(folder / MODEL_INDEX, work / MODEL_INDEX)
    names = [CARD, ".gitattributes", PACKAGE.name, METADATA, MODEL_INDEX]
    if license := license_file(folder, metadata.source.license):
        shutil.copyfile(license, work / LICENSE)
        names.insert(0, LICENSE)
    for name in names:
        made.place(name)
