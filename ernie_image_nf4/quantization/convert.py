"""An original-precision ERNIE-Image repository -> an NF4 repository, streamed one tensor at a time.

Nothing is held longer than it takes to quantize it, so the work needs the memory of a few tensors. Killed at any moment it
leaves whole components, or nothing, and goes on from there.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import DeviceUnavailable, InvalidRepository, InvalidSettings
from ..generation.prompt_file import read_prompts
from ..memory.placement import find_device
from ..repository import nf4_format as nf4
from ..repository.components import METADATA, MODEL_INDEX, Component
from ..repository.metadata import ComponentRecord, Metadata, Recommended, installed_versions, to_json
from ..repository.resolve import CONFIG_PATTERNS, check_repository, find_repository, weight_files
from ..repository.safetensors_io import StoredTensor, TensorWriter, file_bytes, find_tensors, read_chunks, read_tensor
from ..repository.upload import create_repository, upload
from .calibration import NF4Weight, calibrate_transformer, move_weight
from .layer_selection import DEFAULT_KEEP, QUANTIZATION, WeightPlan, matches, plan_weights, save_configs
from .model_card import CARD, LICENSE, describe_source, license_file, model_card
from .resumable_output import Staging, folder_records, staging

TURBO = Recommended(num_inference_steps=8, guidance_scale=1.0)
TURBO_KEYS = {"use_lora", "lora_rank"}  # of ERNIE-Image-Turbo's transformer config, and of no other
PACKAGE = Path(__file__).parents[1]
AHEAD = 4  # tensors that are read before, and written behind, the one that is worked on
# The lines that the Hub puts into a new model repository, as far as they concern files that are here.
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.model"))


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    device: str | None = None,
    scale_search: bool = True,
    keep: Sequence[str] = (),
    default_keep: bool = True,
    calibrate: str | Path | Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    push_to_hub: str | None = None,
    name: str | None = None,
    recommended: Recommended | None = None,
    progress: bool = True,
) -> Path:
    """Writes the NF4 repository of an original-precision one, complete and publishable.

    Called again after it was interrupted, it keeps what is finished and goes on.

    Args:
        source: Folder or Hub id of the original ERNIE-Image pipeline. It is only read.
        output: Folder to write: a new or empty one, or one that an interrupted run left.
        device: Where to quantize, e.g. ``"cuda"`` or ``"cpu"``; None takes a GPU if there is one. Peak memory is that of a few
            of the largest tensors.
        scale_search: Whether to look for each block's scale of least squared error, which takes two to three times as long on a
            CPU. Without, the weights are byte for byte those that bitsandbytes makes.
        keep: Globs over the full names of linear layers, the component first: ``"transformer.final_linear"``,
            ``"*.self_attention.to_out.0"``. Matching layers, and all below a matching module, keep their precision, and so do
            those of `plan.DEFAULT_KEEP`.
        default_keep: False quantizes the latter, unless `keep` names them.
        calibrate: Prompt file, as `prompt_file.read_prompts` takes it, or prompts: the original draws them, and the transformer's
            codes are rounded for what it needs then (see `calibration`). This takes the memory that drawing with the original
            takes while components are offloaded. A few dozen prompts, of all kinds that matter, are enough.
        revision: Branch, tag or commit of a Hub source.
        token: Hub token, or True for the stored one.
        push_to_hub: Hub id to upload the result to.
        name: Name of the new repository in its card; None takes the output folder's.
        recommended: Call settings to record; None takes ERNIE-Image's, or ERNIE-Image-Turbo's for a source of that kind.
        progress: Whether to show a progress bar over the bytes of the source.

    Returns:
        The output folder.

    Raises:
        RepositoryNotFound: There is no such source, or the Hub can't be reached.
        InvalidRepository: The source is incomplete or damaged, of other classes, quantized already, or has NaN, infinite values
            or a dtype that NF4 isn't made from.
        InvalidSettings: The output can't be written or is in use, its disk is too small, a `keep` pattern matches nothing, or
            there are no prompts to calibrate with, or no scale search.
        DeviceUnavailable: There is no such device.
    """
    output = Path(output)
    prompts = _calibration_prompts(calibrate, scale_search)
    target = find_device(device)
    folder = find_repository(source, revision=revision, token=token)
    if output.resolve().is_relative_to(folder.resolve()):
        raise InvalidSettings(f"{output} lies in the source, which is only read: name a folder outside of it.")
    components = check_repository(folder)
    kept = [*keep, *(DEFAULT_KEEP if default_keep else ())]
    plans = {part.name: plan_weights(folder, part, kept) for part in components if part.quantized}
    _check_patterns(keep, plans)
    recommended = recommended or _recommended(folder, components)
    described = describe_source(folder, token)
    if push_to_hub:
        create_repository(push_to_hub, token)
    try:
        with staging(output, _job(folder, components, target, scale_search, kept, prompts, recommended)) as made:
            if made:
                calibrate = partial(
                    calibrate_transformer,
                    folder,
                    prompts=prompts,
                    settings=recommended,
                    device=target,
                    progress=progress,
                )
                _make_components(
                    made, folder, components, plans, target, scale_search, calibrate if prompts else None, progress
                )
                metadata = Metadata(
                    name=name or output.resolve().name,
                    source=described,
                    quantization=replace(QUANTIZATION, scale_search=scale_search, calibration_prompts=len(prompts)),
                    components={part.name: made.records[part.name] for part in components},
                    recommended=recommended,
                    versions=installed_versions(),
                )
                _make_rest(made, folder, metadata)
    except torch.OutOfMemoryError as error:
        raise DeviceUnavailable(
            f"Device {str(target)!r} has too little free memory: close what else uses it, or repeat with --device cpu "
            "and another output folder."
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"The disk of {output} is full: free some space" if full else f"{error}: mend that"
        raise InvalidSettings(f"{reason} and repeat the command, finished components are kept.") from error
    if push_to_hub:
        upload(output, push_to_hub, token)
    return output


def _calibration_prompts(calibrate: str | Path | Sequence[str] | None, scale_search: bool) -> list[str]:
    """The prompts to calibrate with, none if that isn't asked for."""
    if calibrate is None:
        return []
    if not scale_search:
        raise InvalidSettings("Calibration starts from searched scales: leave the scale search on, or don't calibrate.")
    prompts = [row.prompt for row in read_prompts(calibrate)] if isinstance(calibrate, str | Path) else list(calibrate)
    if not prompts:
        raise InvalidSettings("There are no prompts to calibrate with: name some, of every kind that matters.")
    return prompts


def _job(
    folder: Path,
    components: Sequence[Component],
    device: torch.device,
    scale_search: bool,
    keep: Sequence[str],
    prompts: Sequence[str],
    recommended: Recommended,
) -> dict[str, Any]:
    """All that shapes the components: an unfinished output is only continued if none of it has changed."""
    files = [path for part in components for path in sorted((folder / part.name).iterdir()) if path.is_file()]
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return {
        "source files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "device": device.type,
        "scale search": scale_search,
        "layers to keep": sorted(keep),
        "calibration": [hashlib.sha256("\0".join(prompts).encode()).hexdigest(), asdict(recommended)]
        if prompts
        else None,
        "library versions": installed_versions(),
    }


def _make_components(
    made: Staging,
    folder: Path,
    components: Sequence[Component],
    plans: dict[str, WeightPlan],
    device: torch.device,
    scale_search: bool,
    calibrate: Callable[..., dict[str, NF4Weight]] | None,
    progress: bool,
) -> None:
    """Makes all components that aren't finished, after checking that the disk has room for them."""
    missing = [part for part in components if not made.is_finished(part.name)]
    _check_space(made.output, sum(_output_bytes(folder, part, plans.get(part.name)) for part in missing))
    sizes = {part.name: _read_bytes(folder, part, plans.get(part.name)) for part in components}
    total = sum(sizes.values())
    with (
        ThreadPoolExecutor(1) as finisher,
        tqdm(
            total=total,
            initial=total - sum(sizes[part.name] for part in missing),
            unit="B",
            unit_scale=True,
            desc="quantize",
            disable=not progress,
        ) as bar,
    ):
        finishing = []
        for component in missing:
            bar.set_postfix_str(component.name)
            work, plan, error = made.work / component.name, plans.get(component.name), None
            work.mkdir()
            if plan:
                save_configs(plan.model, work)
                calibrated = calibrate(component=component, plan=plan) if calibrate and component.streamed else {}
                error = _quantize_weights(plan, work / component.weights, device, scale_search, calibrated, bar)
            else:
                _copy_component(folder, component, work, bar)
            # The next component doesn't wait for this one's digests.
            finishing.append(finisher.submit(_finish, made, folder, component, plan, error))
        for finished in finishing:
            finished.result()


def _finish(made: Staging, folder: Path, component: Component, plan: WeightPlan | None, error: float | None) -> None:
    """Notes what was written of a component and moves it to its name."""
    record = ComponentRecord(
        class_name=component.class_name,
        quantized=component.quantized,
        files=folder_records(made.work / component.name),
        bytes=_weight_bytes(made.work, component),
        original_bytes=_weight_bytes(folder, component),
        kept_modules=plan.kept_modules if plan else [],
        relative_weight_error=error,
    )
    made.finish(component.name, record)


def _quantize_weights(
    plan: WeightPlan,
    file: Path,
    device: torch.device,
    scale_search: bool,
    calibrated: dict[str, NF4Weight],
    bar: tqdm,
) -> float:
    """Writes the weight file of a component and returns the relative weight error of what was quantized.

    Weights that were calibrated are written as they are.
    """
    error = squares = 0.0
    kept, quantized = sorted(plan.tensors.keys() - plan.quantized), sorted(plan.quantized)

    failed = threading.Event()

    def write_kept(writer: TensorWriter) -> None:
        for name in kept:
            writer.write(
                name, itertools.takewhile(lambda _: not failed.is_set(), _checked(name, plan.tensors[name], bar))
            )

    with TensorWriter(file, plan.specs()) as writer, ThreadPoolExecutor(1) as beside, _telling(failed):
        keeping = beside.submit(write_kept, writer)
        weights = _read_ahead([plan.tensors[name] for name in quantized], pinned=device.type == "cuda")
        with _behind() as write:
            for name, weight in zip(quantized, weights, strict=True):
                on_device = weight.to(device, non_blocking=True)
                if name in calibrated:
                    packed, state = move_weight(calibrated.pop(name), device)
                else:
                    packed, state = nf4.quantize_nf4(on_device, scale_search=scale_search)
                stored = {name: packed} | {f"{name}.{key}": tensor for key, tensor in nf4.state_tensors(state).items()}
                stored = {key: tensor.to("cpu", non_blocking=True) for key, tensor in stored.items()}
                tensor_error, tensor_squares = nf4.squared_error(on_device, packed, state)  # waits for the copies too
                if not math.isfinite(tensor_squares):
                    raise _unusable(name, plan.tensors[name])
                if keeping.done():
                    keeping.result()  # an error there ends it here
                error, squares = error + tensor_error, squares + tensor_squares
                write(_write_all, writer, stored)
                bar.update(weight.nbytes)
        keeping.result()
    return math.sqrt(error / squares) if squares else 0.0


@contextmanager
def _telling(failed: threading.Event) -> Iterator[None]:
    """Sets an event if the context ends by an error."""
    try:
        yield
    except BaseException:
        failed.set()
        raise


def _write_all(writer: TensorWriter, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.write(name, [tensor])


def _copy_component(folder: Path, component: Component, work: Path, bar: tqdm) -> None:
    """Copies a component that keeps its precision: configs, tokenizer files and weights, byte for byte."""
    files = weight_files(folder, component)
    for name, stored in find_tensors(files).items():
        for _ in _checked(name, stored, bar):
            pass
    for pattern in CONFIG_PATTERNS:
        files += (folder / component.name).glob(pattern)
    for file in files:
        shutil.copyfile(file, work / file.name)


def _make_rest(made: Staging, folder: Path, metadata: Metadata) -> None:
    """Writes what stands beside the components. The index comes last: without it no folder is a repository."""
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


def _checked(name: str, stored: StoredTensor, bar: tqdm) -> Iterator[torch.Tensor]:
    """The values of a tensor that is copied, in pieces."""
    for piece in read_chunks(stored):
        _check_finite(name, stored, piece)
        yield piece
        bar.update(piece.nbytes)


def _read_ahead(tensors: Sequence[StoredTensor], *, pinned: bool) -> Iterator[torch.Tensor]:
    """The tensors in order, the next ones read while one is worked on."""
    with ThreadPoolExecutor(AHEAD) as readers:
        coming: deque[Future[torch.Tensor]] = deque()
        for stored in tensors:
            coming.append(readers.submit(read_tensor, stored, pinned=pinned))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


@contextmanager
def _behind() -> Iterator[Callable[..., None]]:
    """Calls made in order by a thread of its own, at most `AHEAD` of them outstanding. The first error comes out here."""
    with ThreadPoolExecutor(1) as worker:
        pending: deque[Future[None]] = deque()

        def call(function: Callable[..., None], *arguments: object) -> None:
            pending.append(worker.submit(function, *arguments))
            if len(pending) > AHEAD:
                pending.popleft().result()

        yield call
        for left in pending:
            left.result()


def _check_finite(name: str, stored: StoredTensor, values: torch.Tensor) -> None:
    if values.is_floating_point() and not values.isfinite().all():
        raise _unusable(name, stored)


def _unusable(name: str, stored: StoredTensor) -> InvalidRepository:
    return InvalidRepository(
        f"{stored.file}: tensor {name} has NaN, infinite or absurdly large values: download the source again."
    )


def _check_patterns(keep: Sequence[str], plans: dict[str, WeightPlan]) -> None:
    kept = [f"{component}.{module}" for component, plan in plans.items() for module in plan.kept_modules]
    for pattern in keep:
        if not any(matches(name, pattern) for name in kept):
            raise InvalidSettings(
                f"--keep {pattern} matches no linear layer: their names are like transformer.final_linear."
            )


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if needed > free:
        raise InvalidSettings(
            f"{output} needs {needed / 1e9:.1f} GB more, its disk has {free / 1e9:.1f} GB free: free some, or name another disk."
        )


def _read_bytes(folder: Path, component: Component, plan: WeightPlan | None) -> int:
    """Size of the tensors that are read; a tied weight stored twice is read once."""
    tensors = plan.tensors if plan else find_tensors(weight_files(folder, component))
    return sum(stored.spec.bytes for stored in tensors.values())


def _output_bytes(folder: Path, component: Component, plan: WeightPlan | None) -> int:
    return file_bytes(plan.specs()) if plan else _weight_bytes(folder, component)


def _weight_bytes(folder: Path, component: Component) -> int:
    return sum(file.stat().st_size for file in weight_files(folder, component))


def _recommended(folder: Path, components: Sequence[Component]) -> Recommended:
    configs = [json.loads((folder / part.name / part.config).read_text(encoding="utf-8")) for part in components]
    return TURBO if any(TURBO_KEYS.issubset(config) for config in configs) else Recommended()
