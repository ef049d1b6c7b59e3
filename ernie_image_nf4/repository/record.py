"""`open_repository`: a folder, read and checked once, as the record that everything else works from.

Only headers and small JSON files are read, so that every complaint comes before a weight is loaded.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidRepository
from .components import COMPONENT, COMPONENTS, METADATA, MODEL_INDEX, PIPELINE_CLASS, PROMPT_ENHANCER, Component
from .metadata import ComponentRecord, Metadata, Recommended, parse_metadata
from .safetensors_io import StoredTensor, read_header
from .security import (
    DOWNLOAD_AGAIN,
    INDEX,
    WEIGHTS,
    is_plain_name,
    read_component_files,
    read_json,
    refuse_lfs_pointer,
)

# Of files that libraries read by pickle, weights and others (optimizer.pt, training_args.bin). NumPy's may hold some.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz")
WRAPPED = "base_layer"  # PEFT's name of a layer to which it adds a LoRA
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class StoredComponent:
    """A component as it lies in a repository.

    Attributes:
        component: Its row of the table of components.
        folder: Its folder.
        class_name: The class that ``model_index.json`` names for it.
        settings: Content of each JSON file in the folder but vocabularies, by name.
        files: Its weight files, none for a component without weights.
        tensors: The tensors in these files by name, from their headers.
        templates: Text of each chat template in the folder, by name.
        record: What the metadata says of it, if anything.
        problems: Where headers and the index of shards contradict each other, a sentence each.
    """

    component: Component
    folder: Path
    class_name: str
    settings: dict[str, dict[str, Any]]
    files: tuple[Path, ...] = ()
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    record: ComponentRecord | None = None
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def config_file(self) -> Path:
        return self.folder / self.component.config

    @property
    def config(self) -> dict[str, Any]:
        """Content of the configuration. Shared: copy what is to be changed."""
        return self.settings[self.component.config]

    @property
    def quantized(self) -> bool:
        """Whether the configuration says that the weights are stored quantized."""
        return "quantization_config" in self.config

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    def weight_files(self) -> tuple[Path, ...]:
        """The one weight file if it is there, or the shards that the index names. Empty if there are none.

        Raises:
            InvalidRepository: The index of the shards isn't one, names files elsewhere, or stands beside the one file.
        """
        single = self.folder / str(self.component.weights)
        index = single.with_name(f"{single.name}{INDEX}")
        if index.name not in self.settings:
            return (single,) if single.exists() else ()
        if single.exists():  # transformers would read the one, diffusers the other
            raise InvalidRepository(f"{single} stands beside {index.name}: remove the one that isn't meant.")
        weight_map = self.settings[index.name].get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidRepository(f"{index} lists no weight files: {DOWNLOAD_AGAIN}.")
        if strange := [name for name in weight_map.values() if not is_plain_name(name) or not name.endswith(WEIGHTS)]:
            raise InvalidRepository(
                f"{index} names {strange[0]!r}, expected a {WEIGHTS} file beside it: {DOWNLOAD_AGAIN}."
            )
        return tuple(single.with_name(name) for name in sorted(set(weight_map.values())))

    def device_tensors(self, fast: bool) -> dict[str, StoredTensor]:
        """The tensors that come to the device, by name: on the fast code paths all but those of `Component.unused`."""
        unused = set(self.component.unused) if fast else set()
        return {name: stored for name, stored in self.tensors.items() if not unused & set(name.split("."))}


@dataclass(frozen=True)
class Repository:
    """A repository that has been read and checked.

    Attributes:
        folder: Where it is.
        index: Content of ``model_index.json``.
        components: What it holds and was asked for, by name, in the order of the table of components.
        metadata: Content of ``quantization_metadata.json``; None without that file, or if it isn't of this package's
            format.
        metadata_problem: Why there is a file and no metadata.
    """

    folder: Path
    index: dict[str, Any]
    components: dict[str, StoredComponent]
    metadata: Metadata | None = None
    metadata_problem: InvalidRepository | None = None

    def without_prompt_enhancer(self) -> Repository:
        """The same repository, as if it had been opened with ``prompt_enhancer=False``."""
        kept = {name: part for name, part in self.components.items() if not part.component.optional}
        return dataclasses.replace(self, components=kept)

    @property
    def recommended(self) -> Recommended:
        """The call settings that the metadata recommends, ERNIE-Image's without metadata."""
        return self.metadata.recommended if self.metadata else Recommended()

    @property
    def name(self) -> str:
        """The name that the metadata gives the repository, the folder's without metadata."""
        return self.metadata.name if self.metadata else self.folder.resolve().name


def open_repository(folder: Path, *, prompt_enhancer: bool = True, weights: bool = True) -> Repository:
    """Read and check a repository: index, configurations, headers of weight files against their sizes, metadata.

    Args:
        folder: A folder, as from `resolve.find_repository`.
        prompt_enhancer: Whether the prompt enhancer is wanted. Without it its files are not looked at.
        weights: Whether weight files have to be there. Without, no header is read.

    Returns:
        The record. The prompt enhancer is left out if the repository has none.

    Raises:
        InvalidRepository: A part is missing, truncated, corrupt, a Git LFS pointer, a pickle, of another pipeline, or
            holds what `security` refuses.
    """
    index = read_model_index(folder)
    metadata, problem = _open_metadata(folder)
    records = metadata.components if metadata else {}
    found: dict[str, StoredComponent] = {}
    for component in COMPONENTS:
        if component.optional and not prompt_enhancer:
            continue
        if component_class(index, component) is not None:
            record = records.get(component.name)
            found[component.name] = open_component(folder, index, component, record=record, weights=weights)
        elif not component.optional:
            raise InvalidRepository(f"{folder / MODEL_INDEX} names no {component.name!r}: {DOWNLOAD_AGAIN}.")
    enhancer = [name for name in PROMPT_ENHANCER if name in found]
    if prompt_enhancer and 0 < len(enhancer) < len(PROMPT_ENHANCER):
        raise InvalidRepository(
            f"Of {' and '.join(PROMPT_ENHANCER)}, {folder / MODEL_INDEX} names only {enhancer[0]!r}: "
            f"load without the prompt enhancer (prompt_enhancer=False, --no-pe), or {DOWNLOAD_AGAIN}."
        )
    return Repository(folder, index, found, metadata, problem)


def open_component(
    folder: Path,
    index: dict[str, Any],
    component: Component,
    *,
    record: ComponentRecord | None = None,
    weights: bool = True,
) -> StoredComponent:
    """Read and check one component: its line in ``model_index.json``, its files, and the headers of its weights.

    Args:
        folder: The repository.
        index: Its ``model_index.json``.
        component: One that is not left out.
        record: What the metadata says of it, if anything. Nothing is compared with it here.
        weights: Whether weight files have to be there.

    Raises:
        InvalidRepository: As `open_repository`.
    """
    place, entry = folder / component.name, index.get(component.name)
    is_tokenizer = component.config == TOKENIZER_CONFIG
    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if library != component.library or class_name not in component.class_names:
        raise InvalidRepository(
            f"{folder / MODEL_INDEX}: {component.name} is {entry}, expected "
            f"{[component.library, component.class_name]}: only the classes of ERNIE-Image are loaded, and no code "
            "from a repository."
        )
    if not place.is_dir():
        raise InvalidRepository(f"Folder {place} is missing: {DOWNLOAD_AGAIN}.")
    if not (place / component.config).is_file():
        raise InvalidRepository(f"File {place / component.config} is missing: {DOWNLOAD_AGAIN}.")
    settings, templates = read_component_files(folder, place)
    # diffusers notes the class here; transformers has `architectures` instead.
    if (written := settings[component.config].get("_class_name", component.class_name)) != component.class_name:
        raise InvalidRepository(
            f"{place / component.config} is of a {written}, expected {component.class_name}: {DOWNLOAD_AGAIN}."
        )
    if is_tokenizer:
        _check_tokenizer_files(place)
    stored = StoredComponent(component, place, str(class_name), settings, templates=templates, record=record)
    _refuse_pickles(stored)
    return _with_headers(stored) if component.weights and weights else stored


def read_model_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a repository, known to be of an ``ErnieImagePipeline``.

    Raises:
        InvalidRepository: It is missing, not JSON, or of another pipeline class.
    """
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise InvalidRepository(f"{folder} has no {MODEL_INDEX}: name a folder or Hub id of an {PIPELINE_CLASS}.")
    index = read_json(folder, path)
    if (found := index.get("_class_name")) != PIPELINE_CLASS:
        raise InvalidRepository(
            f"{path} is of a {found}, this package loads {PIPELINE_CLASS}: "
            "name an ERNIE-Image repository, or load this one with diffusers.DiffusionPipeline."
        )
    unknown = [name for name, entry in index.items() if isinstance(entry, list) and name not in COMPONENT]
    if unknown:  # the libraries would import what it names
        raise InvalidRepository(f"{path} has a component {unknown[0]!r}, {PIPELINE_CLASS} has none: remove that line.")
    return index


def component_class(index: dict[str, Any], component: Component) -> str | None:
    """The class that ``model_index.json`` names for a component, None if left out (``[null, null]``, or no line)."""
    entry = index.get(component.name)
    if entry in (None, [None, None]):
        return None
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else str(entry)


def _check_tokenizer_files(place: Path) -> None:
    files = [place / name for name in TOKENIZER_FILES if (place / name).is_file()]
    if not files:
        raise InvalidRepository(f"File {place / TOKENIZER_FILES[0]} is missing: {DOWNLOAD_AGAIN}.")
    for path in files:
        refuse_lfs_pointer(path)


def _refuse_pickles(stored: StoredComponent) -> None:
    """Nothing here reads one, but other programs that are given the folder might."""
    pickles = sorted(path for path in stored.folder.rglob("*") if path.suffix.lower() in PICKLES)
    if not pickles:
        return
    weights = stored.component.weights
    if weights and not stored.weight_files():
        raise InvalidRepository(
            f"{stored.folder} has its weights as a pickle only ({pickles[0].name}), which can run code when loaded: "
            f"expected {weights}; use a safetensors release, or convert it with save_pretrained."
        )
    more = f" (and {len(pickles) - 1} more in {stored.folder})" if len(pickles) > 1 else ""
    raise InvalidRepository(
        f"{pickles[0]}{more} may be a pickle, which can run code when loaded, and isn't needed: remove the file."
    )


def _with_headers(stored: StoredComponent) -> StoredComponent:
    """The component with its weight files and their headers."""
    files = stored.weight_files()
    if not files:
        _refuse_variant(stored)
        raise InvalidRepository(
            f"Weight file {stored.folder / str(stored.component.weights)} is missing: {DOWNLOAD_AGAIN}."
        )
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for file in files:
        found = read_header(file)
        problems += [f"{file}: tensor {name} is in another file as well." for name in sorted(tensors.keys() & found)]
        tensors |= found
    if wrapped := next((name for name in tensors if WRAPPED in name.split(".")), None):
        raise InvalidRepository(
            f"{tensors[wrapped].file} was saved with a LoRA loaded (its layers are wrapped: {wrapped}): save it again "
            "after pipe.unload_lora_weights(), before which pipe.fuse_lora() makes the LoRA part of an original's "
            "weights; a LoRA by itself goes to load_lora after load."
        )
    index = stored.settings.get(f"{stored.component.weights}{INDEX}")
    if index is not None and index["weight_map"] != {name: each.file.name for name, each in tensors.items()}:
        problems.append(
            f"{stored.folder / str(stored.component.weights)}{INDEX} doesn't list the tensors of its files."
        )
    return dataclasses.replace(stored, files=files, tensors=tensors, problems=tuple(problems))


def _refuse_variant(stored: StoredComponent) -> None:
    """Say what to do with weights that ``save_pretrained(variant="fp16")`` wrote, the only ones in their folder."""
    weights = str(stored.component.weights)
    stem, index = re.escape(weights.removesuffix(WEIGHTS)), re.escape(weights + INDEX.removesuffix(".json"))
    names = sorted(path.name for path in stored.folder.iterdir())
    for pattern, meant in (
        (rf"{index}\.(\w+)\.json", weights + INDEX),
        (rf"{stem}\.(\w+){re.escape(WEIGHTS)}", weights),
    ):
        for found in filter(None, (re.fullmatch(pattern, name) for name in names)):
            raise InvalidRepository(
                f"{stored.folder / found[0]} was saved with variant={found[1]!r}, which isn't looked for, and "
                f"{weights} isn't there: rename the file to {meant}, in a folder of your own, or save again without it."
            )


def _open_metadata(folder: Path) -> tuple[Metadata | None, InvalidRepository | None]:
    """The metadata, or why there is a file and no metadata: that is no reason not to draw from the weights."""
    path = folder / METADATA
    try:
        return (parse_metadata(read_json(folder, path), path) if path.exists() else None), None
    except InvalidRepository as error:
        return None, error
