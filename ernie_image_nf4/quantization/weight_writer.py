"""A component's weights, streamed from the original's files to the output tensor by tensor.

Reading ahead, quantizing and writing behind run at once. Memory holds a few of the largest tensors.
"""

from __future__ import annotations

import itertools
import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import InvalidRepository
from ..repository.nf4_format import quant_state_tensors
from ..repository.record import StoredComponent
from ..repository.safetensors_io import StoredTensor, TensorWriter, read_chunks, read_tensor
from .block_rounding import stored_weight
from .layer_selection import WeightPlan
from .scale_search import quantize_nf4, squared_error

AHEAD = 4  # tensors that are read ahead of the one in work, and written behind it


def write_quantized(
    plan: WeightPlan,
    file: Path,
    device: torch.device,
    scale_search: bool,
    calibrated: dict[str, StoredTensor],
    bar: tqdm,
) -> float:
    """Write the weight file of a quantized component.

    Args:
        plan: What becomes of the component.
        file: The file to write.
        device: Where to quantize.
        scale_search: Whether to search the scales of least squared error.
        calibrated: The tensors of weights that are quantized already, by name.
        bar: Progress bar over the bytes that are read.

    Returns:
        Norm of the quantized weights' error over the norm of the weights.

    Raises:
        InvalidRepository: A value is NaN, infinite or absurdly large.
    """
    failed = threading.Event()
    with TensorWriter(file, plan.specs()) as writer, ThreadPoolExecutor(1) as beside, _set_on_error(failed):
        copying = beside.submit(_copy_kept, plan, writer, failed, bar)
        error = squares = 0.0
        names = sorted(plan.quantized)
        weights = _read_ahead([plan.tensors[name] for name in names], pinned=device.type == "cuda")
        with _write_behind(writer) as write:
            for name, weight in zip(names, weights, strict=True):
                on_device = weight.to(device, non_blocking=True)
                if name in calibrated:
                    packed, state = stored_weight(name, calibrated, device)
                else:
                    packed, state = quantize_nf4(on_device, scale_search=scale_search)
                stored = _stored_tensors(name, packed, quant_state_tensors(state))
                # .tolist() in here waits for the copies to the host too.
                tensor_error, tensor_squares = squared_error(on_device, packed, state)
                if not math.isfinite(tensor_squares):
                    raise _unusable(name, plan.tensors[name])
                if copying.done():
                    copying.result()  # an error of the other thread ends it here
                error, squares = error + tensor_error, squares + tensor_squares
                write(stored)
                bar.update(weight.nbytes)
        copying.result()
    return math.sqrt(error / squares) if squares else 0.0


def copy_component(part: StoredComponent, configs: Iterable[Path], folder: Path, bar: tqdm) -> None:
    """Copy a component that keeps its precision byte for byte, after checking its values.

    Args:
        part: The component.
        configs: Its other files.
        folder: Folder to write to.
        bar: Progress bar over the bytes that are read.

    Raises:
        InvalidRepository: A value is NaN or infinite.
    """
    for name, stored in part.tensors.items():
        for _ in _checked_chunks(name, stored, bar):
            pass
    for file in (*part.files, *configs):
        shutil.copyfile(file, folder / file.name)


def _copy_kept(plan: WeightPlan, writer: TensorWriter, failed: threading.Event, bar: tqdm) -> None:
    """Write the tensors that keep their precision; each ends early once the main thread has failed."""
    for name in sorted(plan.tensors.keys() - plan.quantized):
        chunks = _checked_chunks(name, plan.tensors[name], bar)
        writer.write(name, itertools.takewhile(lambda _: not failed.is_set(), chunks))


def _stored_tensors(name: str, packed: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is stored of a weight, by name, on its way to the host."""
    tensors = {name: packed} | {f"{name}.{key}": tensor for key, tensor in state.items()}
    return {key: tensor.to("cpu", non_blocking=True) for key, tensor in tensors.items()}


def _checked_chunks(name: str, stored: StoredTensor, bar: tqdm) -> Iterator[torch.Tensor]:
    """The values of a tensor in pieces, after checking that they are finite."""
    for chunk in read_chunks(stored):
        if chunk.is_floating_point() and not chunk.isfinite().all():
            raise _unusable(name, stored)
        yield chunk
        bar.update(chunk.nbytes)


def _unusable(name: str, stored: StoredTensor) -> InvalidRepository:
    return InvalidRepository(
        f"{stored.file}: tensor {name} has NaN, infinite or absurdly large values: download the source again."
    )


def _read_ahead(tensors: Sequence[StoredTensor], *, pinned: bool) -> Iterator[torch.Tensor]:
    """The tensors in order; the next ones are read while one is worked on."""
    with ThreadPoolExecutor(AHEAD) as readers:
        coming: deque[Future[torch.Tensor]] = deque()
        for stored in tensors:
            coming.append(readers.submit(read_tensor, stored, pinned=pinned))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


@contextmanager
def _write_behind(writer: TensorWriter) -> Iterator[Callable[[dict[str, torch.Tensor]], None]]:
    """A function that has tensors written in order by another thread, at most `AHEAD` calls outstanding.

    The thread's first error is raised by a later call, or at the end.
    """

    def write_all(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            writer.write(name, [tensor])

    with ThreadPoolExecutor(1) as worker:
        pending: deque[Future[None]] = deque()

        def write(tensors: dict[str, torch.Tensor]) -> None:
            pending.append(worker.submit(write_all, tensors))
            if len(pending) > AHEAD:
                pending.popleft().result()

        yield write
        for left in pending:
            left.result()


@contextmanager
def _set_on_error(failed: threading.Event) -> Iterator[None]:
    """Set an event if the context ends by an error."""
    try:
        yield
    except BaseException:
        failed.set()
        raise
