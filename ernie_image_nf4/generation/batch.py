"""`generate_batch`: many prompts -> numbered PNG files and a manifest, in one process or in all that accelerate started.

Rows are drawn in groups: all their prompts are enhanced, then all encoded, then denoised in batches, then decoded one by one.
So offloading moves each component once a group. Noise and the enhancer's sampling are seeded row by row, and only denoising
works on several rows at once. In batches of one, the default on a CPU, a picture is the same to the bit however the rows are
grouped, ordered and shared out; larger batches change how products are rounded.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import ErnieImagePipeline
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from ..errors import ErnieImageNF4Error, InvalidSettings
from ..fast.decode_request import DecodeRequest
from ..fast.products import is_in_fp8
from ..fast.prompt_enhancer import FastPromptEnhancer
from ..fast.transformer import several_pictures
from ..memory.offload import OffloadHook
from ..memory.placement import GIB, WORKING_BYTES, find_device, free_memory, memory_mode
from ..repository.metadata import file_record
from .prompt_file import Row, check_rows
from .single import (
    Drawing,
    Settings,
    check_settings,
    described_model,
    initial_latents,
    make_output_folder,
    memory_ran_out,
    replacing,
    save_png,
    seeded,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
CONTACT_SHEET = "contact-sheet.png"
SHEET_PIXELS, THUMBNAIL_PIXELS = 8192, 256  # longest side of the sheet, and of a picture in it
MAX_BATCH = 8
GROUP = 16  # pictures for which offloading moves a component once; as many are lost when the process is killed
# Activations of the transformer for one picture with guidance. benchmarks/batch_h100_resident.json has 1.6 GiB a megapixel beside the
# weights' 7.7 GiB, for batches of 8 at 512x512. A batch that turns out too large is halved.
DENOISE_BYTES_PER_PIXEL = 2 * GIB / 1024**2
MAX_WRITERS = 4
# The full-size enhancer's caches of 512, 1,024 and 2,048 tokens are 0.35 GiB by their shapes; the rest is for its graphs.
WRITER_BYTES = GIB // 2
# Processes wait for each other before the first picture and after the last one, which can be hours apart.
PATIENCE = timedelta(days=7)

# By the pixels of a picture, the batch size that an out-of-memory error left.
Limits = dict[int, int]


@dataclass(frozen=True)
class Picture:
    """What is to be drawn.

    Attributes:
        file: Name of the PNG file.
        settings: What to draw, and how.
    """

    file: str
    settings: Settings


@dataclass(frozen=True)
class Record:
    """A line of the manifest: a picture that is there, or one that failed.

    Attributes:
        file: Name of the PNG file in the manifest's folder.
        model: Name of the model.
        settings: What it was drawn with; in JSON its fields stand beside the others.
        revised_prompt: What the prompt enhancer made of the prompt, None without it.
        seconds: Its share of the wall time of its group.
        batch_size: Pictures that were denoised together.
        sha256: Digest of the file.
        fp8: Whether the transformer's blocks multiplied in fp8.
        error: Why there is no picture, None if there is one.
    """

    file: str
    model: str
    settings: Settings
    revised_prompt: str | None = None
    seconds: float | None = None
    batch_size: int | None = None
    sha256: str | None = None
    fp8: bool = False
    error: str | None = None


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
    count: int = 1,
    batch_size: int | None = None,
    progress: bool = False,
) -> Iterator[Record]:
    """Draw the rows that are not drawn yet, and yield a record of each when its file and its line in the manifest are written.

    The pipeline is not to be used otherwise meanwhile. Called again, it skips what the manifest and the files show as finished. In a script started by ``accelerate launch`` each
    process draws and yields its share; `out_dir` is then a folder that all of them see.

    Args:
        pipe: The pipeline, as from `load`.
        rows: What to draw, as from `read_prompts`.
        out_dir: Folder for the pictures and ``manifest.jsonl``, made if need be.
        model: Name to note in the files where the repository gives itself none.
        negative: What not to draw, for rows that don't say; so are the next ones.
        height: Pixels; None for what the pipeline's repository recommends, as for the next three.
        width: Pixels.
        steps: Denoising steps.
        guidance: Guidance scale.
        seed: Of the noise and of the prompt enhancer's sampling.
        use_pe: Whether the prompt enhancer rewrites the prompts.
        count: Pictures of each row, with seeds counting up from the row's.
        batch_size: Pictures to denoise together at most; None chooses by free memory, and 1 on a CPU.
        progress: Whether the main process shows a progress bar over the pictures of all processes.

    Returns:
        Records of this process's share, failed pictures included.

    Raises:
        InvalidSettings: A row or setting that can't work, or an output folder that can't be written to.

    Example:
        >>> rows = [Row("a fox in the snow", name="fox"), Row("一只橙色的小猫", seed=7, width=512)]
        >>> for record in generate_batch(load(), rows, "pictures"):
        ...     print(record.file, record.revised_prompt, record.error)
    """
    check_settings("-", height=height, width=width, steps=steps, guidance=guidance, seed=seed, count=count)
    if batch_size is not None and batch_size < 1:
        raise InvalidSettings(f"{batch_size} is too few for the batch size: use 1 or more.")
    rows = check_rows((f"Row {number}", vars(row)) for number, row in enumerate(rows, 1))
    recommended, name = described_model(pipe, model)
    defaults = Settings(
        prompt="",
        negative_prompt=negative,
        height=recommended.height if height is None else height,
        width=recommended.width if width is None else width,
        num_inference_steps=recommended.num_inference_steps if steps is None else steps,
        guidance_scale=float(recommended.guidance_scale if guidance is None else guidance),
        seed=seed,
        use_pe=use_pe,
    )
    pictures = plan_pictures(rows, defaults, count)
    folder = Path(out_dir)
    make_output_folder(folder)
    return _generate(pipe, pictures, folder, name, batch_size, progress)


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


# What to draw


def plan_pictures(rows: Sequence[Row], defaults: Settings, count: int = 1) -> list[Picture]:
    """The pictures of all rows, numbered in order: ``0001-an-orange-cat.png``.

    Args:
        rows: What to draw.
        defaults: For what a row leaves open, everything but the prompt.
        count: Pictures of each row, with seeds counting up.

    Raises:
        InvalidSettings: Seeds count up beyond the largest one.
    """
    pictures: list[Picture] = []
    digits = max(4, len(str(len(rows) * count)))
    for row in rows:
        given = {
            "prompt": row.prompt,
            "negative_prompt": row.negative,
            "height": row.height,
            "width": row.width,
            "num_inference_steps": row.steps,
            "guidance_scale": None if row.guidance is None else float(row.guidance),
            "seed": row.seed,
        }
        settings = replace(defaults, **{field: value for field, value in given.items() if value is not None})
        check_settings(settings.prompt, seed=settings.seed, count=count)
        for offset in range(count):
            number = f"{len(pictures) + 1:0{digits}}"
            file = "-".join(filter(None, (number, row.name or slug(row.prompt)))) + ".png"
            pictures.append(Picture(file, replace(settings, seed=settings.seed + offset)))
    return pictures


def slug(prompt: str, length: int = 40) -> str:
    """The words of a prompt as part of a file name, in any script: ``an-orange-cat``, ``一只橙色的小猫``."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    if len(words) <= length:
        return words
    return words[: length + 1].rpartition("-")[0] or words[:length]


def is_finished(picture: Picture, record: Record | None, folder: Path, model: str, fp8: bool) -> bool:
    """Whether the record is of just this picture, and the file is still what was written."""
    return (
        record is not None
        and record.error is None
        and (record.settings, record.model, record.fp8) == (picture.settings, model, fp8)
        and (folder / picture.file).is_file()
        and file_record(folder / picture.file).sha256 == record.sha256
    )


def dealt(pictures: Sequence[Picture], processes: int) -> list[Picture]:
    """In an order in which equal consecutive parts, one for each process, have the same share of every shape."""
    ordered = sorted(pictures, key=shape)
    return [picture for first in range(processes) for picture in ordered[first::processes]]


def shape(picture: Picture) -> tuple[int, int, int, float]:
    """What pictures of a batch have in common."""
    settings = picture.settings
    return settings.height, settings.width, settings.num_inference_steps, settings.guidance_scale


def choose_batch_size(pixels: int, free_bytes: int | None) -> int:
    """Pictures to denoise together.

    Args:
        pixels: Of one picture.
        free_bytes: Free memory of the device beside the transformer's weights; None in the machine's own memory. There it is one
            picture: a CPU gains less from several (a third of the time at 128x128) than from results that are the same to the bit.
    """
    if free_bytes is None:
        return 1
    return min(MAX_BATCH, max(1, int((free_bytes - WORKING_BYTES) / (DENOISE_BYTES_PER_PIXEL * pixels))))


def find_batch_size(pipe: ErnieImagePipeline, settings: Settings) -> int:
    """`choose_batch_size` by the device's free memory, while offloaded components are all on the CPU."""
    free = free_memory(pipe._execution_device)
    if free is not None and memory_mode(pipe) != "resident":
        free -= pipe.transformer.get_memory_footprint()
    return choose_batch_size(settings.height * settings.width, free)


def groups(
    pictures: Iterable[Picture], batch_size: Callable[[Picture], int], least: int
) -> Iterator[list[list[Picture]]]:
    """Batches of one shape each, in groups of at least `least` pictures (the last one apart)."""
    group: list[list[Picture]] = []
    for _, same in groupby(sorted(pictures, key=shape), key=shape):
        left = list(same)
        while left:
            size = batch_size(left[0])
            group.append(left[:size])
            left = left[size:]
            if sum(map(len, group)) >= least:
                yield group
                group = []
    if group:
        yield group


# Drawing


def _generate(
    pipe: ErnieImagePipeline,
    pictures: Sequence[Picture],
    folder: Path,
    model: str,
    batch_size: int | None,
    progress: bool,
) -> Iterator[Record]:
    state = PartialState(cpu=pipe._execution_device.type == "cpu", timeout=PATIENCE)
    if state.is_main_process:
        for leftover in folder.glob(".*.png.*.tmp"):
            leftover.unlink()
        merge_manifests(folder, failed=False)  # they are drawn again
    state.wait_for_everyone()
    records = {record.file: record for record in read_manifest(folder / MANIFEST)}
    fp8 = is_in_fp8(pipe.transformer)
    pending = [each for each in pictures if not is_finished(each, records.get(each.file), folder, model, fp8)]
    state.wait_for_everyone()  # everyone has looked before anyone draws
    there = len(pictures) - len(pending)
    if there and state.is_main_process:
        logger.info("%d of %d pictures are there already.", there, len(pictures))

    manifest = folder / f"manifest.{state.process_index}.jsonl"
    shown = progress and state.is_main_process
    with (
        state.split_between_processes(dealt(pending, state.num_processes)) as share,
        tqdm(total=len(pictures), initial=there, unit="picture", disable=not shown) as bar,
    ):
        for picture, result in draw_pictures(pipe, share, batch_size):
            record = _save(picture, result, folder, model)
            append(manifest, record)
            if shown:
                bar.update(there + _lines(folder) - bar.n)
            yield record
        state.wait_for_everyone()
        if shown:
            bar.update(there + _lines(folder) - bar.n)
    if state.is_main_process:
        merge_manifests(folder)
    state.wait_for_everyone()  # whoever returns can read the manifest


def draw_pictures(
    pipe: ErnieImagePipeline, pictures: Iterable[Picture], batch_size: int | None = None
) -> Iterator[tuple[Picture, Drawing | str]]:
    """Draw in this process; yields each picture with its drawing, or with why there is none.

    Args:
        pipe: The pipeline, as from `load`.
        pictures: What to draw, of any shapes.
        batch_size: Pictures to denoise together at most; None chooses by free memory.
    """
    limits: Limits = {}

    def size(picture: Picture) -> int:
        found = batch_size or find_batch_size(pipe, picture.settings)
        return min(found, limits.get(picture.settings.height * picture.settings.width, found))

    for group in groups(pictures, size, GROUP if memory_mode(pipe) != "resident" else 1):
        yield from _draw_group_or_each(pipe, group, limits)


def _draw_group_or_each(
    pipe: ErnieImagePipeline, group: Sequence[Sequence[Picture]], limits: Limits
) -> Iterator[tuple[Picture, Drawing | str]]:
    """`draw_group`, and if that fails each picture that it didn't reach alone, so that one bad row spoils no other."""
    left = [picture for batch in group for picture in batch]
    try:
        for drawing in draw_group(pipe, [[picture.settings for picture in batch] for batch in group], limits):
            yield left.pop(0), drawing
        return
    except Exception as error:  # whatever it is, the other rows go on
        logger.debug("A group failed.", exc_info=True)
        reason = f"{type(error).__name__}: {error}"
        if should_reduce_batch_size(error):
            reason = memory_ran_out(pipe, left[0].settings)
    clear_device_cache(garbage_collection=True)  # out here, where no traceback holds tensors any more
    if len(left) == 1:
        yield left[0], reason
        return
    for picture in left:
        yield from _draw_group_or_each(pipe, [[picture]], limits)


def draw_group(pipe: ErnieImagePipeline, batches: Sequence[Sequence[Settings]], limits: Limits) -> Iterator[Drawing]:
    """Enhance, encode, denoise and decode pictures, each step for all of them before the next.

    Args:
        pipe: The pipeline, as from `load`.
        batches: What to denoise together; of one size, number of steps and guidance scale each.
        limits: Where to note batch sizes that the memory turned out to allow.
    """
    settings = [each for batch in batches for each in batch]
    with _left_alone(pipe):
        started = time.perf_counter()
        revised = enhance_all(pipe, settings)
        prompts = [each.prompt if text is None else text for each, text in zip(settings, revised, strict=True)]
        embeddings = encode(pipe, [*prompts, *(each.negative_prompt for each in settings if each.guidance_scale > 1)])
        shared = (time.perf_counter() - started) / len(settings)
        denoised: list[Denoised] = []
        for batch in batches:
            texts = [embeddings[prompt] for prompt in prompts[len(denoised) : len(denoised) + len(batch)]]
            negatives = [embeddings.get(each.negative_prompt) for each in batch]
            denoised += denoise(pipe, batch, texts, negatives, limits)
        for each, prompt, text, result in zip(settings, prompts, revised, denoised, strict=True):
            started = time.perf_counter()
            image = decode(pipe, each, embeddings[prompt], result.latents)
            seconds = shared + result.seconds + time.perf_counter() - started
            yield Drawing(image, each, text, seconds, result.batch_size, is_in_fp8(pipe.transformer))


def enhance(pipe: ErnieImagePipeline, settings: Settings) -> str | None:
    """What the prompt enhancer makes of a prompt, as in `draw`, or None without it."""
    if not settings.use_pe or pipe.pe is None or pipe.pe_tokenizer is None:
        return None
    device = pipe._execution_device
    with seeded(settings.seed, device):
        return pipe._enhance_prompt_with_pe(settings.prompt, device, width=settings.width, height=settings.height)


def enhance_all(pipe: ErnieImagePipeline, settings: Sequence[Settings]) -> list[str | None]:
    """`enhance` for each, to the same texts; on CUDA several are written at a time.

    The pipeline's own method is called twice for each prompt: once to learn what it asks of the enhancer, and once to be given the answer.
    """

    def enhanced_by(generate: Callable[..., torch.Tensor]) -> list[str | None]:
        upstream, pipe.pe.generate = pipe.pe.generate, generate
        try:
            return [enhance(pipe, each) for each in settings]
        finally:
            pipe.pe.generate = upstream

    def note(*args, **kwargs) -> torch.Tensor:
        asked.append((pipe.pe.decode_request(**kwargs), torch.initial_seed()))  # which `enhance` has set
        return kwargs["input_ids"]

    asked: list[tuple[DecodeRequest | None, int]] = []
    count = find_writers(pipe) if isinstance(pipe.pe, FastPromptEnhancer) else 1
    if count > 1:
        enhanced_by(note)
    requests = [request for request, _ in asked]
    if len(asked) > 1 and None not in requests:  # else the fast path doesn't know all that is asked for
        try:
            answers = iter(pipe.pe.generate_together(requests, [seed for _, seed in asked], count))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        else:
            return enhanced_by(lambda *args, **kwargs: next(answers))
        clear_device_cache(garbage_collection=True)  # out here, where no traceback holds tensors any more
    return [enhance(pipe, each) for each in settings]


def choose_writers(free_bytes: int | None) -> int:
    """Texts to write at a time, by free memory beside the enhancer's weights; one in the machine's own, where no step leaves cores idle."""
    if free_bytes is None:
        return 1
    return min(MAX_WRITERS, max(1, int((free_bytes - WORKING_BYTES) / WRITER_BYTES)))


def find_writers(pipe: ErnieImagePipeline) -> int:
    """`choose_writers` by the device's free memory, while offloaded components are all on the CPU."""
    free = free_memory(pipe._execution_device) if pipe._execution_device.type == "cuda" else None
    hook = getattr(pipe.pe, "_hf_hook", None)
    if free is not None and hook is not None:
        ours = isinstance(hook, OffloadHook)  # the next component may come meanwhile
        free -= hook.turns.limit if ours else pipe.pe.get_memory_footprint()
    return choose_writers(free)


def encode(pipe: ErnieImagePipeline, texts: Iterable[str]) -> dict[str, torch.Tensor]:
    """Embeddings of each different text, (tokens, text_in_dim). They wait on the CPU: a few MB each, for up to a group."""
    return {text: pipe.encode_prompt(text, pipe._execution_device)[0].cpu() for text in dict.fromkeys(texts)}


@dataclass(frozen=True)
class Denoised:
    """One picture's latents, (1, channels, height / 16, width / 16) on the CPU, and the cost of getting there."""

    latents: torch.Tensor
    batch_size: int
    seconds: float


def denoise(
    pipe: ErnieImagePipeline,
    batch: Sequence[Settings],
    texts: Sequence[torch.Tensor],
    negatives: Sequence[torch.Tensor | None],
    limits: Limits,
) -> list[Denoised]:
    """Latents of a batch. Where the memory runs out, of its halves, which is noted in `limits`."""
    first = batch[0]
    started = time.perf_counter()
    try:
        with several_pictures(pipe.transformer, len(batch)):
            result = pipe(
                prompt_embeds=list(texts),
                negative_prompt_embeds=list(negatives) if first.guidance_scale > 1 else None,
                height=first.height,
                width=first.width,
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                latents=torch.cat([initial_latents(pipe, settings) for settings in batch]),
                output_type="latent",
            )
        latents = getattr(result, "images", result).cpu()  # diffusers 0.38 returns the latents themselves
        seconds = (time.perf_counter() - started) / len(batch)
        return [Denoised(one, len(batch), seconds) for one in latents.split(1)]
    except RuntimeError as error:
        if len(batch) == 1 or not should_reduce_batch_size(error):
            raise
    clear_device_cache(garbage_collection=True)  # out here, where no traceback holds tensors any more
    half = len(batch) // 2
    limits[first.height * first.width] = half
    logger.info(
        "The memory ran out with %d pictures of %dx%d at once: %d.", len(batch), first.width, first.height, half
    )
    return [
        result
        for start in range(0, len(batch), half)
        for result in denoise(
            pipe, batch[start : start + half], texts[start : start + half], negatives[start : start + half], limits
        )
    ]


def decode(pipe: ErnieImagePipeline, settings: Settings, text: torch.Tensor, latents: torch.Tensor) -> Image.Image:
    """The picture of finished latents. One at a time, as that needs more memory a picture than denoising.

    Upstream has no function for what comes after denoising; its pipeline does it when there are no steps left.
    """
    return pipe(
        prompt_embeds=[text],
        height=settings.height,
        width=settings.width,
        num_inference_steps=0,
        guidance_scale=1.0,
        latents=latents.to(pipe._execution_device),
    ).images[0]


@contextmanager
def _left_alone(pipe: ErnieImagePipeline) -> Iterator[None]:
    """Without the pipeline's own progress bar; offloaded components stay on the device until the next one comes.

    After each call the pipeline sends the transformer away and sets up offloading anew, which here is due at the end only. On a
    CPU one thread: sums over several threads are rounded differently for each number of threads, which accelerate chooses by
    the number of processes.
    """
    bar, threads = getattr(pipe, "_progress_bar_config", {}), torch.get_num_threads()
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    pipe.maybe_free_model_hooks = lambda: None
    if pipe._execution_device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del pipe.maybe_free_model_hooks
        pipe.maybe_free_model_hooks()
        pipe.set_progress_bar_config(**bar)


# Files


def _save(picture: Picture, result: Drawing | str, folder: Path, model: str) -> Record:
    """Write the file of a picture; its record, or that of why there is none."""
    failed = Record(picture.file, model, picture.settings)
    if isinstance(result, str):
        return replace(failed, error=result)
    try:
        save_png(result, folder / picture.file, model=model)
    except ErnieImageNF4Error as error:
        return replace(failed, error=str(error))
    return Record(
        file=picture.file,
        model=model,
        settings=picture.settings,
        revised_prompt=result.revised_prompt,
        seconds=round(result.seconds, 3),
        batch_size=result.batch_size,
        sha256=file_record(folder / picture.file).sha256,
        fp8=result.fp8,
    )


def append(manifest: Path, record: Record) -> None:
    """Add a line to a manifest, on the disk before this returns."""
    with manifest.open("a", encoding="utf-8") as file:
        file.write(to_json(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def to_json(record: Record) -> str:
    """A record as one line of JSON, without the newline."""
    values = asdict(record)
    settings = values.pop("settings")
    return json.dumps({"file": record.file, **settings, **values}, ensure_ascii=False)


def read_manifest(path: Path, *, unfinished: bool = False) -> list[Record]:
    """The records of a manifest; none if it isn't there.

    Args:
        path: The file.
        unfinished: Whether its process may have been killed: a line cut short then counts as none.

    Raises:
        InvalidSettings: A line is no record.
    """
    records = []
    names = [field.name for field in fields(Settings)]
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            values = json.loads(line)
            records.append(Record(settings=Settings(**{name: values.pop(name) for name in names}), **values))
        except (ValueError, TypeError, KeyError, AttributeError):
            if not unfinished:
                raise InvalidSettings(
                    f"{path}, line {number} is no record of a picture: move the file away, or name another folder."
                ) from None
    return records


def merge_manifests(folder: Path, *, failed: bool = True) -> None:
    """Bring the manifests of all processes into ``manifest.jsonl``, one record a file, and delete them. Killed, it can be repeated.

    Args:
        folder: Folder with the pictures.
        failed: Whether to keep records of pictures that failed.

    Raises:
        InvalidSettings: There is a ``manifest.jsonl`` of another kind.
    """
    records = {record.file: record for record in read_manifest(folder / MANIFEST)}
    parts = sorted(folder.glob("manifest.*.jsonl"))
    for part in parts:
        records |= {record.file: record for record in read_manifest(part, unfinished=True)}
    with replacing(folder / MANIFEST) as temporary:
        lines = [to_json(records[file]) + "\n" for file in sorted(records) if failed or records[file].error is None]
        temporary.write_text("".join(lines), encoding="utf-8")
    for part in parts:
        part.unlink()


def _lines(folder: Path) -> int:
    """Pictures that all processes have done in this run."""
    return sum(part.read_bytes().count(b"\n") for part in folder.glob("manifest.*.jsonl"))


def save_contact_sheet(folder: Path) -> Path | None:
    """All pictures of a manifest in one overview, each with its number; None if there are none."""
    records = [record for record in read_manifest(folder / MANIFEST) if record.error is None]
    files = [folder / record.file for record in records if (folder / record.file).exists()]
    if not files:
        return None
    columns = math.ceil(math.sqrt(len(files)))
    rows = math.ceil(len(files) / columns)
    side = min(THUMBNAIL_PIXELS, SHEET_PIXELS // columns)
    thumbnails = [Image.new("RGB", (side, side), "white") for _ in range(rows * columns)]
    for thumbnail, file in zip(thumbnails, files, strict=False):
        with Image.open(file) as image:
            thumbnail.paste(ImageOps.pad(image.convert("RGB"), (side, side), color="white"))
        number = file.name.partition("-")[0].removesuffix(".png")
        ImageDraw.Draw(thumbnail).text((4, 2), number, fill="white", stroke_fill="black", stroke_width=1)
    with replacing(folder / CONTACT_SHEET) as temporary:
        make_image_grid(thumbnails, rows, columns).save(temporary, format="PNG")
    return folder / CONTACT_SHEET
