"""`generate_batch`: many prompts become numbered files and a manifest, in one process or several of accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import ErnieImagePipeline
from tqdm import tqdm

from .. import __version__
from ..errors import ErnieImageNF4Error, InvalidSettings, WriteFailed
from ..fast.step_plan import check_skipping
from ..loading.loaded_pipeline import skipping_of
from ..memory.placement import find_device
from ..repository.metadata import file_record
from ..upstream.pipelines import execution_device
from .computation import computation_of
from .image_file import FORMATS, Drawing, check_name, make_output_folder, remove_leftovers, save_picture
from .loras import LoraFiles, active_uses, noting
from .manifest import MANIFEST, LineCount, Record, append, locked, merge_manifests, part_of, read_manifest
from .prompt_file import Row, check_rows
from .schedule import Picture, is_finished, plan_pictures, share
from .settings import (
    Settings,
    check_settings,
    complete_settings,
    described_model,
    hub_revision,
    warn_of_unused_negative,
)
from .stages import draw_in_groups

logger = logging.getLogger(__name__)

# Processes wait for each other before the first picture and after the last one, which can be hours apart.
PATIENCE = timedelta(days=7)


def generate_batch(
    pipe: ErnieImagePipeline,
    rows: Iterable[Row],
    out_dir: str | os.PathLike[str],
    *,
    model: str | None = None,
    negative: str = "",
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    use_pe: bool = True,
    guidance_until: float | None = None,
    cache: int | bool | None = None,
    lora: Sequence[str] = (),
    lora_files: LoraFiles | None = None,
    count: int = 1,
    batch_size: int | None = None,
    format: str = "png",
    progress: bool = False,
) -> Iterator[Record]:
    """Draw the rows that aren't drawn yet. Yields a record of each once its file and line in the manifest are there.

    The pipeline isn't to be used otherwise meanwhile. Called again, it skips what the manifest and the files show as
    finished. A picture that comes to NaN, infinity or one single value counts as failed and is no file. In a script
    started by ``accelerate launch`` each process draws and yields its share; `out_dir` is then a folder that all of
    them see.

    Args:
        pipe: The pipeline, as from `load`.
        rows: What to draw, as from `read_prompts`.
        out_dir: Folder for the pictures and ``manifest.jsonl``, made if need be.
        model: Name to note in the files where the repository gives itself none.
        negative: What not to draw. A row's own settings come first, here and below.
        height: Pixels; None for what the pipeline's repository recommends, as for the next three.
        width: Pixels.
        steps: Denoising steps.
        guidance: Guidance scale.
        seed: Of the initial latents and of the prompt enhancer's sampling.
        use_pe: Whether the prompt enhancer rewrites the prompts.
        guidance_until: Share of the steps with guidance, as for `set_skipping`; None for what is set on the pipeline.
        cache: Every how many steps the transformer is computed, likewise.
        lora: LoRAs, each ``FILE`` or ``FILE:STRENGTH`` with a file, a folder, ``user/name`` or ``user/name/FILE`` of
            the Hub. Pictures without any have those that are on in the pipeline.
        lora_files: Where they have been found already.
        count: Pictures of each row, with seeds counting up from the row's.
        batch_size: Pictures to denoise together at most; None chooses by free memory, and 1 on a CPU.
        format: Of the files: ``"png"``, ``"jpeg"`` or ``"webp"``.
        progress: Whether the main process shows a progress bar over the pictures of all processes.

    Returns:
        Records of this process's share, failed pictures included.

    Raises:
        InvalidSettings: A row or setting that can't work, or an output folder that can't be written to. Once drawing
            begins: another run is in the folder.
        InvalidLora: A LoRA isn't there, or doesn't fit the model.
        DiskFull: While drawing. What is there is kept for the next run.

    Example:
        >>> rows = [Row("a fox in the snow", name="fox"), Row("一只橙色的小猫", seed=7, width=512)]
        >>> for record in generate_batch(load(), rows, "pictures"):
        ...     print(record.file, record.revised_prompt, record.error)
    """
    check_settings("-", height=height, width=width, steps=steps, guidance=guidance, seed=seed, count=count)
    check_skipping(guidance_until, cache)
    if batch_size is not None and batch_size < 1:
        raise InvalidSettings(f"{batch_size} is too few for the batch size: use 1 or more.")
    if format not in FORMATS:
        raise InvalidSettings(f"Format {format!r} is none of {', '.join(FORMATS)}.")
    loras = lora_files or LoraFiles()
    rows = check_rows(((f"Row {number}", vars(row)) for number, row in enumerate(rows, 1)), loras)
    recommended, name = described_model(pipe, model)
    defaults = complete_settings(
        recommended,
        "",
        negative=negative,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        use_pe=use_pe,
        skipping=skipping_of(pipe),
        guidance_until=guidance_until,
        cache=cache,
        lora=loras.find(lora),
    )
    defaults = replace(defaults, guidance_scale=float(defaults.guidance_scale))
    pictures = plan_pictures(rows, defaults, count, format, loras)
    loras.check(pipe)
    folder = Path(out_dir)
    make_output_folder(folder)
    if pictures:
        check_name(folder / max((picture.file for picture in pictures), key=lambda file: len(file.encode())))
    return _generate(pipe, pictures, folder, _about(pipe, name, defaults), batch_size, loras, progress)


def process_device(device: str | None) -> str | None:
    """The device for this process: as asked for, or one of its own where accelerate started several processes.

    Raises:
        DeviceUnavailable: There is no such device.
        InvalidSettings: One numbered device for several processes.
    """
    state = PartialState(cpu=find_device(device).type == "cpu", timeout=PATIENCE)
    if state.num_processes == 1:
        return device
    if device is not None and ":" in device:
        raise InvalidSettings(f"Device {device} for {state.num_processes} processes: leave the number to accelerate.")
    return str(state.device)


def _generate(
    pipe: ErnieImagePipeline,
    pictures: Sequence[Picture],
    folder: Path,
    about: Record,
    batch_size: int | None,
    loras: LoraFiles,
    progress: bool,
) -> Iterator[Record]:
    """`generate_batch`, with all that is the same in its records in `about`."""
    state = PartialState(cpu=execution_device(pipe).type == "cpu", timeout=PATIENCE)
    with ExitStack() as run:
        pending = _find_pending(state, run, pictures, folder, about)
        there = len(pictures) - len(pending)
        if state.is_main_process:
            warn_of_unused_negative([picture.settings for picture in pictures])
            if there:
                logger.info("%d of %d pictures are there already.", there, len(pictures))

        run.callback(loras.unload, pipe)
        shown, done = progress and state.is_main_process, LineCount(folder)
        bar = run.enter_context(tqdm(total=len(pictures), initial=there, unit="picture", disable=not shown))
        for picture, result in draw_in_groups(
            pipe, share(pending, state.process_index, state.num_processes), batch_size, loras
        ):
            record = _save(picture, result, folder, about)
            append(part_of(folder, state.process_index), record)
            if shown:
                bar.update(there + done.update() - bar.n)
            yield record
        state.wait_for_everyone()
        if shown:
            bar.update(there + done.update() - bar.n)
        if state.is_main_process:
            merge_manifests(folder)
        state.wait_for_everyone()  # whoever returns can read the manifest


def _find_pending(
    state: PartialState, run: ExitStack, pictures: Sequence[Picture], folder: Path, about: Record
) -> list[Picture]:
    """The pictures that aren't finished. The main process locks the folder, looks, and tells the others.

    Leftovers of an interrupted run are removed first.

    Args:
        state: Which process this is.
        run: Holds the lock of the main process.
        pictures: All pictures, the same in every process.
        folder: Their folder.
        about: What records have in common.

    Raises:
        InvalidSettings: Another run is in the folder, or there is a manifest of another kind.
        DiskFull: There is no room for a manifest.
    """
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            run.enter_context(locked(folder))
            remove_leftovers(folder)
            merge_manifests(folder, failed=False)  # failed ones are drawn again
            records = {record.file: record for record in read_manifest(folder / MANIFEST)}
            answer = [
                [
                    number
                    for number, picture in enumerate(pictures)
                    if not is_finished(_record(picture, about), records.get(picture.file), folder)
                ]
            ]
        except ErnieImageNF4Error as error:
            answer = [error]  # the others wait for one
    (found,) = broadcast_object_list(answer)
    if isinstance(found, ErnieImageNF4Error):
        raise found
    return [pictures[number] for number in found]


def _about(pipe: ErnieImagePipeline, name: str, defaults: Settings) -> Record:
    """What all records have in common. Its LoRAs are those that pictures note which name none."""
    settings = replace(defaults, lora=active_uses(pipe))
    return Record("", name, settings, **computation_of(pipe), revision=hub_revision(pipe), version=__version__)


def _record(picture: Picture, about: Record) -> Record:
    """The record of a picture that isn't drawn yet."""
    return replace(about, file=picture.file, settings=noting(picture.settings, about.settings.lora))


def _save(picture: Picture, result: Drawing | str, folder: Path, about: Record) -> Record:
    """Write the file of a picture. Returns its record, or the record of why there is none."""
    record = _record(picture, about)
    if isinstance(result, str):
        return replace(record, error=result)
    try:
        save_picture(
            replace(result, settings=record.settings),
            folder / picture.file,
            model=record.model,
            revision=record.revision,
        )
    except WriteFailed as error:  # but of a full disk, which would have no room for the next ones either
        return replace(record, error=str(error))
    return replace(
        record,
        revised_prompt=result.revised_prompt,
        seconds=round(result.seconds, 3),
        batch_size=result.batch_size,
        sha256=file_record(folder / picture.file).sha256,
        products=result.products,
        dtype=result.dtype,
        fast=result.fast,
    )
