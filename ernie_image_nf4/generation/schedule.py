"""Which pictures to draw, in which batches and groups: file names, shares of processes, sizes that fit the memory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from diffusers import ErnieImagePipeline

from ..memory.apply import memory_mode, precision_of
from ..memory.placement import GIB, WORKING_BYTES, free_memory
from ..memory.precision import BFLOAT16, Precision
from ..repository.metadata import file_record
from ..upstream.pipelines import execution_device
from .image_file import FORMATS, check_side
from .loras import LoraFiles
from .manifest import Record
from .prompt_file import Row
from .settings import LoraUse, Settings, check_settings

MAX_BATCH = 8
# Activations of the transformer for one picture with guidance, in bfloat16. benchmarks/batch_h100_resident.json has
# 1.6 GiB a megapixel beside the weights' 7.7 GiB, for batches of 8 at 512x512. A batch that turns out too large is
# halved.
DENOISE_BYTES_PER_PIXEL = 2 * GIB / 1024**2


@dataclass(frozen=True)
class Picture:
    """What is to be drawn.

    Attributes:
        file: Name of its file.
        settings: What to draw, and how.
    """

    file: str
    settings: Settings


def plan_pictures(
    rows: Sequence[Row],
    defaults: Settings,
    count: int = 1,
    image_format: str = "png",
    loras: LoraFiles | None = None,
) -> list[Picture]:
    """The pictures of all rows, numbered in order: ``0001-an-orange-cat.png``.

    Args:
        rows: What to draw.
        defaults: For what a row leaves open, everything but the prompt.
        count: Pictures of each row, with seeds counting up.
        image_format: Of the files, one of `FORMATS`.
        loras: Finds the LoRAs that rows name.

    Raises:
        InvalidSettings: Seeds count up beyond the largest one, or the format has no room for a size.
    """
    pictures: list[Picture] = []
    suffix = FORMATS[image_format].suffixes[0]
    digits = max(4, len(str(len(rows) * count)))
    loras = loras or LoraFiles()
    for row in rows:
        settings = row_settings(row, defaults)
        if row.lora is not None:
            settings = replace(settings, lora=loras.find(row.lora))
        check_settings(settings.prompt, seed=settings.seed, count=count)
        check_side(image_format, settings.width, settings.height)
        for offset in range(count):
            number = f"{len(pictures) + 1:0{digits}}"
            file = "-".join(filter(None, (number, row.name or slug(row.prompt)))) + suffix
            pictures.append(Picture(file, replace(settings, seed=settings.seed + offset)))
    return pictures


def row_settings(row: Row, defaults: Settings) -> Settings:
    """The settings of a row, with the defaults for what it leaves open."""
    return replace(
        defaults,
        prompt=row.prompt,
        negative_prompt=defaults.negative_prompt if row.negative is None else row.negative,
        height=defaults.height if row.height is None else row.height,
        width=defaults.width if row.width is None else row.width,
        num_inference_steps=defaults.num_inference_steps if row.steps is None else row.steps,
        guidance_scale=defaults.guidance_scale if row.guidance is None else float(row.guidance),
        seed=defaults.seed if row.seed is None else row.seed,
        guidance_until=defaults.guidance_until if row.guidance_until is None else float(row.guidance_until),
        cache=defaults.cache if row.cache is None else row.cache,
    )


def slug(prompt: str, length: int = 40) -> str:
    """The words of a prompt as part of a file name, in any script: ``an-orange-cat``, ``一只橙色的小猫``."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    if len(words) <= length:
        return words
    return words[: length + 1].rpartition("-")[0] or words[:length]


def is_finished(wanted: Record, found: Record | None, folder: Path) -> bool:
    """Whether what was found is the record of the wanted picture, and the file is still what was written."""
    return (
        found is not None
        and found.error is None
        and found.key == wanted.key
        and (folder / found.file).is_file()
        and file_record(folder / found.file).sha256 == found.sha256
    )


def share(pictures: Sequence[Picture], process: int, processes: int) -> list[Picture]:
    """The pictures of one process: as many of every shape as the others have, give or take one."""
    return sorted(pictures, key=shape)[process::processes]


def shape(picture: Picture) -> tuple[tuple[LoraUse, ...], int, int, int, float, float, int]:
    """What pictures of a batch have in common: LoRAs, height, width, steps, guidance scale, and what steps leave out.

    LoRAs come first: in this order, each is loaded once.
    """
    settings = picture.settings
    size = settings.height, settings.width, settings.num_inference_steps
    return settings.lora, *size, settings.guidance_scale, settings.guidance_until, settings.cache


def groups(
    pictures: Iterable[Picture], batch_size: Callable[[Picture], int], least: int
) -> Iterator[list[list[Picture]]]:
    """Batches of one shape each, in groups of at least `least` pictures. The last group may be smaller."""
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


def choose_pixels_at_once(free_bytes: int | None, precision: Precision = BFLOAT16) -> int | None:
    """Pixels of all pictures together that are denoised at once.

    Args:
        free_bytes: Free memory of the device beside the transformer's weights; None for the machine's own memory. There
            it is one picture, None: a CPU gains less from several (a third of the time at 128x128) than from results
            that are equal to the bit.
        precision: Of the computation.
    """
    if free_bytes is None:
        return None
    bytes_per_pixel = DENOISE_BYTES_PER_PIXEL * precision.work_factor("transformer")
    return max(0, int((free_bytes - WORKING_BYTES) / bytes_per_pixel))


def choose_batch_size(pixels: int, free_bytes: int | None, precision: Precision = BFLOAT16) -> int:
    """Pictures to denoise together, of so many pixels each; the other arguments as for `choose_pixels_at_once`."""
    at_once = choose_pixels_at_once(free_bytes, precision)
    return 1 if at_once is None else min(MAX_BATCH, max(1, at_once // pixels))


def find_batch_size(pipe: ErnieImagePipeline, settings: Settings) -> int:
    """`choose_batch_size` by the device's free memory. Offloaded components must all be on the CPU."""
    return choose_batch_size(settings.height * settings.width, _free_beside_transformer(pipe), precision_of(pipe))


def find_pixels_at_once(pipe: ErnieImagePipeline) -> int | None:
    """`choose_pixels_at_once` by the device's free memory, as for `find_batch_size`."""
    return choose_pixels_at_once(_free_beside_transformer(pipe), precision_of(pipe))


def _free_beside_transformer(pipe: ErnieImagePipeline) -> int | None:
    """Bytes that the device has free once the transformer is there; None for the machine's own memory."""
    free = free_memory(execution_device(pipe))
    if free is not None and memory_mode(pipe) != "resident":
        free -= pipe.transformer.get_memory_footprint()
    return free
