"""What runs in a worker's process: load the model, then draw batch after batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection

import torch
from diffusers import ErnieImagePipeline

from ..errors import ErnieImageNF4Error
from ..generation.image_file import png_bytes
from ..generation.loras import LoraFiles
from ..generation.schedule import Picture, find_pixels_at_once
from ..generation.settings import LoraUse, Settings, described_model, hub_revision
from ..generation.stages import DrawingStopped, Limits, Watch, draw_group_or_each
from ..loading.pipeline import load
from ..repository.metadata import file_record
from ..upstream.pipelines import execution_device
from .messages import Draw, Drawn, Drop, Failed, Idle, Ready, StepDone, TextRevised, Unable, WorkerOptions

logger = logging.getLogger(__name__)


class ServerStops(DrawingStopped):
    """The server wants the worker to end, or is gone itself."""


def load_and_draw(connection: Connection, options: WorkerOptions) -> None:
    """Load the model, then draw until the server says stop.

    Args:
        connection: The pipe to the server.
        options: What to load.

    Raises:
        OSError: The server is gone; EOFError likewise.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.INFO)
    try:
        if options.device is not None and options.device.startswith("cuda:"):
            torch.cuda.set_device(options.device)  # else a context on the first GPU takes memory from its own worker
        pipe = load(options.folder, device=options.device, **options.loading)
        loras = LoraFiles(options.loras)
        try_loras(pipe, loras)
    except ErnieImageNF4Error as error:
        connection.send(Unable(str(error)))
        return
    connection.send(Ready(*devices_beside(execution_device(pipe))))
    name, limits = described_model(pipe, options.model)[1], Limits()
    while True:
        connection.send(Idle(find_pixels_at_once(pipe), dict(limits)))
        while isinstance(message := connection.recv(), Drop):
            pass  # of pictures that were finished when it was sent
        if message is None:
            return
        try:
            loras.load(pipe, {use for task in message.tasks for use in task.settings.lora})
            draw_batch(pipe, connection, message, limits, name)
        except ServerStops:
            return
        except DrawingStopped as reason:
            logger.debug("A batch was stopped: %s.", reason)
        except ErnieImageNF4Error as error:
            for task in message.tasks:
                connection.send(Failed(task.number, str(error)))


def try_loras(pipe: ErnieImagePipeline, loras: LoraFiles) -> None:
    """Load each once, so that one that doesn't fit shows before the first request.

    One whose file has been replaced since the server started is left out: only requests that ask for it fail.

    Raises:
        ErnieImageNF4Error: One can't be loaded.
    """
    for sha256, path in loras.paths.items():
        if not path.is_file() or file_record(path).sha256 != sha256:
            logger.warning("%s is not the file any more that the server started with: its LoRA is refused.", path)
            continue
        loras.load(pipe, [LoraUse(path.name, 1.0, sha256)])
    loras.unload(pipe)


def devices_beside(device: torch.device) -> tuple[str, tuple[str, ...]]:
    """A device by its number, and all that the machine has of its kind."""
    if device.type != "cuda":
        return str(device), (str(device),)
    own = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{own}", tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


def draw_batch(pipe: ErnieImagePipeline, connection: Connection, batch: Draw, limits: Limits, name: str) -> None:
    """Draw a batch, telling the server of every text, step and picture.

    Args:
        pipe: The pipeline.
        connection: The pipe to the server.
        batch: What to draw.
        limits: Gets the batch sizes that the memory turned out to allow.
        name: The model's, for the files.

    Raises:
        DrawingStopped: Nobody waits for any of it, or the server stops.
    """
    onlooker = Onlooker(connection, batch)
    pictures = [Picture(str(task.number), task.settings) for task in batch.tasks]
    watch = Watch(onlooker.on_texts, onlooker.on_step)
    # In as many threads as `generate` has. On a CPU, batches are of one picture, which then is that of `generate`.
    for picture, result in draw_group_or_each(pipe, [pictures], limits, watch=watch, one_thread=False):
        number = int(picture.file)
        if isinstance(result, str):
            connection.send(Failed(number, result))
        elif number not in onlooker.dropped:
            png = png_bytes(result, model=name, revision=hub_revision(pipe))
            connection.send(Drawn(number, png, result.revised_prompt, result.batch_size))
        onlooker.look()


class Onlooker:
    """Tells the server how a batch goes, and hears from it whether somebody still waits.

    Attributes:
        dropped: Numbers of the tasks that nobody waits for.
    """

    def __init__(self, connection: Connection, batch: Draw) -> None:
        self.dropped: set[int] = set()
        self._connection = connection
        self._numbers: dict[Settings, list[int]] = {}
        for task in batch.tasks:  # two requests may ask for the very same picture
            self._numbers.setdefault(task.settings, []).append(task.number)

    def on_texts(self, settings: Sequence[Settings], texts: Sequence[str | None]) -> None:
        self.look()
        for each, text in zip(settings, texts, strict=True):
            if text is not None:
                for number in self._numbers[each]:
                    self._connection.send(TextRevised(number, text))

    def on_step(self, settings: Iterable[Settings], step: int) -> None:
        self.look()
        numbers = (number for each in dict.fromkeys(settings) for number in self._numbers[each])
        self._connection.send(StepDone(tuple(numbers), step))

    def look(self) -> None:
        """Take what the server has said meanwhile.

        Raises:
            DrawingStopped: Nobody waits for any of the batch.
            ServerStops: The server ends the worker, or is gone.
        """
        try:
            while self._connection.poll():
                message = self._connection.recv()
                if not isinstance(message, Drop):
                    raise ServerStops
                self.dropped |= message.numbers
        except (EOFError, OSError) as error:
            raise ServerStops from error
        if all(number in self.dropped for numbers in self._numbers.values() for number in numbers):
            raise DrawingStopped("nobody waits for it")
