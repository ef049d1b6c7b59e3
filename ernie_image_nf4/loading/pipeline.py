"""`load`: an ERNIE-Image NF4 repository -> a plain ``diffusers.ErnieImagePipeline``, ready to draw."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import logging
import math
import os
import threading
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import bitsandbytes
import diffusers
import torch
import transformers
from diffusers.quantizers import auto as diffusers_quantizers
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from transformers.core_model_loading import WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

from ..errors import InvalidRepository
from ..fast.products import check_fp8, enable_fp8
from ..memory import placement
from ..memory.host_embeddings import enable_host_embeddings, unused_modules
from ..memory.placement import Placement
from ..repository import nf4_format as nf4
from ..repository.chat_template import check_chat_template
from ..repository.components import COMPONENT, MODEL_INDEX, PROMPT_ENHANCER, Component
from ..repository.integrity import check_integrity
from ..repository.meta_model import upstream_lock
from ..repository.metadata import Recommended, read_metadata_if_ours
from ..repository.resolve import check_repository, find_repository, is_quantized, weight_files
from ..repository.safetensors_io import DTYPES, StoredTensor, find_tensors
from ..repository.security import library_reading, read_json
from ..repository.validation import bounded_loading, check_model, check_structure, checked_loading
from ..upstream.triton_cache import prepare_triton
from .assembly import direct_loading
from .device_reader import DeviceReader

logger = logging.getLogger(__name__)

# diffusers renamed torch_dtype to dtype in 0.40, as transformers had, and warns about the old name since.
DTYPE_ARGUMENT = {
    "transformers": "dtype",
    "diffusers": "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype",
}
ASYNCHRONOUS_OFF = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' environment variable
# Objects at most. Python 3.12 starts with 375; a caller who freezes has thousands, even without any import.
FROZEN_BY_PYTHON = 2000
ABSMAX = ".absmax"  # what every NF4 weight has beside it
# Module of diffusers -> what it needn't warn of: a setting in the published VAE's configuration that its class ignores,
# and (diffusers 0.38) that a Ministral3ForCausalLM is no AutoModelForCausalLM.
SPURIOUS_WARNINGS = {"configuration_utils": "'force_upcast'", "pipelines.pipeline_utils": "Expected types for"}


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    fast: bool = True,
    compile: bool = False,
    fp8: bool = False,
    prompt_enhancer: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    verify: bool = False,
) -> diffusers.ErnieImagePipeline:
    """Load an ERNIE-Image NF4 repository as a `diffusers.ErnieImagePipeline` that is placed and ready to draw.

    Args:
        model: A folder, a Hub id (``"user/name"``), or None for the repository in which this package stands.
        device: Where to compute, e.g. ``"cuda:1"``. None takes CUDA, XPU, MPS or the CPU, the first that is there.
        dtype: Of activations and unquantized weights. None takes bfloat16; float16 or float32 on a CUDA GPU that only
            emulates it (compute capability below 8.0), float32 on a CPU without bfloat16 instructions. Should
            float16 overflow (black pictures), pass ``"float32"``.
        memory: ``"resident"`` keeps all components on the device, ``"offload"`` brings one at a time there, ``"stream"`` the
            transformer block by block as well (for 4 GB), ``"auto"`` chooses by the device's free memory and says so at INFO level.
        fast: Whether on CUDA upstream's code paths may be replaced by faster ones that differ by rounding: decoding of the
            prompt enhancer, denoising, loading, offloading. False leaves them untouched.
        compile: Compile the transformer's blocks as well; the first picture waits for that, without `fast` that of each size.
        fp8: Multiply in fp8 in the transformer's blocks, on GPUs that can (RTX 40, H100 and newer): faster, less precise (README).
        prompt_enhancer: False leaves the prompt enhancer's files unread; the pipeline then draws prompts as they are.
        revision: Branch, tag or commit of a Hub repository.
        token: Hub token, or True for the stored one.
        cache_dir: Hub cache to use instead of the default one.
        local_files_only: Take what the Hub cache holds, without any network call.
        verify: Read every file first, and refuse the repository if one isn't as its metadata says or holds values that can't be.
            Takes about as long as hashing them.

    Returns:
        The pipeline. Call it as upstream's.

    Raises:
        RepositoryNotFound: No such folder or Hub repository, or it can't be reached.
        InvalidRepository: The repository is incomplete, damaged, of another pipeline, or asks for code to be run.
        DeviceUnavailable: The device isn't there, or has too little free memory.
        InvalidSettings: A device, dtype, memory mode or precision that can't work.

    Example:
        >>> pipe = load("user/ERNIE-Image-NF4")
        >>> pipe("an orange cat on a wooden desk", height=512, width=512).images[0].save("cat.png")
    """
    chosen_device = placement.find_device(device)  # before anything is downloaded for a device that isn't there
    chosen_dtype = placement.find_dtype(dtype, chosen_device)
    if fp8:
        check_fp8(chosen_device, chosen_dtype, fast)
    folder = find_repository(
        model,
        prompt_enhancer=prompt_enhancer,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    _count_as_old()
    components = check_repository(folder, prompt_enhancer=prompt_enhancer)
    if verify:
        check_integrity(folder, components)
    metadata = read_metadata_if_ours(folder)
    recommended = metadata.recommended if metadata else Recommended()
    fast = fast and chosen_device.type == "cuda"
    if fast and torch.cuda.memory_allocated(chosen_device):
        gc.collect()  # a pipeline of before may still hold its weights: replaced methods make it refer to itself
    mode = placement.find_memory(
        memory,
        chosen_device,
        weight_bytes={part.name: device_bytes(folder, part, fast) for part in components},
        working_bytes=placement.working_bytes(recommended.height * recommended.width, fast),
    )
    where = Placement(chosen_device, chosen_dtype, mode, fast)
    heavy = [part for part in components if part.quantized]
    with (
        ThreadPoolExecutor(2) as pool,
        _reading(folder, heavy, where) as reader,
        _quiet_loading(),
        _diffusers_nf4_on(where.load_device),
        _cheap_loading(where.load_device),
        _no_collections(),
    ):
        if fast:
            pool.submit(prepare_triton)
        parts, template = dict.fromkeys(PROMPT_ENHANCER), None  # None leaves them unread
        if COMPONENT["pe_tokenizer"] in components:
            parts["pe_tokenizer"] = load_tokenizer(folder, COMPONENT["pe_tokenizer"])
            # Rendered in a process of its own, for which there is no need to wait.
            template = pool.submit(check_chat_template, parts["pe_tokenizer"])
        parts |= {part.name: load_component(folder, part, where, check=not verify) for part in heavy}
        pipe = load_pipeline(folder, components, parts, where, check=not verify)
        _place(pipe, folder, heavy, where, reader)
    _check_agreement(pipe, folder)
    if template:
        template.result()
    placement.apply(pipe, where)
    if fp8:
        enable_fp8(pipe.transformer)
    if compile:  # once for all sizes and lengths of prompts, where rows of different lengths are packed
        pipe.transformer.compile_repeated_blocks(fullgraph=not fast, dynamic=True if fast else None)
    return pipe


@contextmanager
def _reading(folder: Path, components: Sequence[Component], where: Placement) -> Iterator[DeviceReader | None]:
    """Starts reading the weights that we bring to the device ourselves; None if upstream brings them."""
    if not where.moves:
        yield None
        return
    with DeviceReader(where.device) as reader:
        wanted: list[StoredTensor] = []
        for component in components:
            tensors = device_tensors(folder, component, where.fast)
            nf4_names = _nf4_names(tensors)
            wanted += (
                stored
                for name, stored in tensors.items()
                if name in nf4_names or DTYPES[stored.spec.dtype] == where.dtype  # upstream leaves these as they are
            )
        reader.start(wanted)
        yield reader


def _nf4_names(tensors: Container[str]) -> set[str]:
    """Those of a file's tensors that belong to NF4: codes and quantization states."""
    weights = [name.removesuffix(ABSMAX) for name in tensors if name.endswith(ABSMAX)]
    return {name + suffix for name in weights for suffix in nf4.SUFFIXES}


def _place(
    pipe: diffusers.ErnieImagePipeline,
    folder: Path,
    components: Sequence[Component],
    where: Placement,
    reader: DeviceReader | None,
) -> None:
    """Takes what text-to-image doesn't need out of the components' way, and gives them the weights that `reader` has."""
    for component in components if where.fast else ():
        model, unused = getattr(pipe, component.name), []
        if component.unused:
            enable_host_embeddings(model, component.unused)
            unused = unused_modules(model, component.unused)
        if reader:
            reader.place(model, weight_files(folder, component), unused)


def device_tensors(folder: Path, component: Component, fast: bool) -> dict[str, StoredTensor]:
    """The weights of a component that come to the device, by name."""
    tensors = find_tensors(weight_files(folder, component))
    unused = set(component.unused) if fast else set()
    return {name: stored for name, stored in tensors.items() if not unused & set(name.split("."))}


def device_bytes(folder: Path, component: Component, fast: bool) -> int:
    """Bytes of a component's weights that come to the device."""
    return sum(stored.spec.bytes for stored in device_tensors(folder, component, fast).values())


def load_component(folder: Path, component: Component, where: Placement, *, check: bool = True) -> torch.nn.Module:
    """One of the heavy components through its library's own ``from_pretrained``, on the device it is loaded to.

    Raises:
        InvalidRepository: Its files don't fit its configuration. Without `check`, unless loading is fast, only what upstream notices.
    """
    quantized = is_quantized(folder, component)
    if not quantized:
        logger.warning(
            "%s in %s is not quantized: it is loaded in %s and takes about four times the memory of NF4.",
            component.name,
            folder,
            where.dtype,
        )
        if check:
            check_structure(folder, component)
    with library_reading(folder / component.name), _same_default_dtype(), ExitStack() as contexts:
        if quantized and (check or where.fast):
            weights = contexts.enter_context(checked_loading(folder, component))
            if where.fast:
                contexts.enter_context(direct_loading(component.library, weights))
        model = getattr(importlib.import_module(component.library), component.class_name).from_pretrained(
            folder / component.name,
            device_map={"": where.load_device},
            use_safetensors=True,
            local_files_only=True,
            **_dtype(component.library, where),
        )
    if where.dtype != torch.bfloat16:  # which the files are made for: then upstream's loading is left as it is
        _convert(model, where.dtype)
    if where.device.type == "cpu":
        _keep_as_stored(model)
    # Upstream loads NF4 but can't undo that in save_pretrained (NotImplementedError), though nothing has to be undone.
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [part for part in conversions if not _is_nf4_loading(part)]
    return model


def _keep_as_stored(model: torch.nn.Module) -> None:
    """Compute with NF4 weights as they lie in the file, on CPUs with AVX512-BF16 too.

    There bitsandbytes would repack them in the first forward pass, with scales rounded to bfloat16, and save other scales than it read.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_pipeline(
    folder: Path, components: Sequence[Component], parts: dict[str, object], where: Placement, *, check: bool = True
) -> diffusers.ErnieImagePipeline:
    """The pipeline around what has been loaded, with the rest of its components, each on the CPU.

    Raises:
        InvalidRepository: Files don't fit their configuration. Without `check` only what upstream notices.
    """
    light = [part for part in components if part.weights and not part.quantized] if check else []
    try:
        with library_reading(folder), _same_default_dtype(), ExitStack() as bounds:
            for part in light:
                bounds.enter_context(bounded_loading(folder, part))
            pipe = diffusers.ErnieImagePipeline.from_pretrained(
                folder, **parts, **_dtype("diffusers", where), local_files_only=True, use_safetensors=True
            )
    except InvalidRepository:
        for part in light:  # which says more about it
            check_structure(folder, part)
        raise
    for part in light:
        check_model(folder, part, getattr(pipe, part.name))
    return pipe


def load_tokenizer(folder: Path, component: Component) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer by the class that ``model_index.json`` names, as diffusers would load it."""
    _, class_name = read_json(folder, folder / MODEL_INDEX)[component.name]
    with library_reading(folder / component.name):
        return getattr(transformers, class_name).from_pretrained(folder / component.name, local_files_only=True)


def _check_agreement(pipe: diffusers.ErnieImagePipeline, folder: Path) -> None:
    """Refuse components that are sound by themselves, but don't fit each other.

    Raises:
        InvalidRepository: A size differs, or a tokenizer has more tokens than its model.
    """
    sizes = {
        "values a token of the text": (
            pipe.text_encoder.config.text_config.hidden_size,
            pipe.transformer.config.text_in_dim,
        ),
        "channels of the latents": (
            pipe.vae.config.latent_channels * math.prod(pipe.vae.config.patch_size),
            pipe.transformer.config.in_channels,
        ),
    }
    for what, (given, taken) in sizes.items():
        if given != taken:
            raise InvalidRepository(
                f"{folder}: of {what}, the transformer takes {taken} and is given {given}: use components of one release."
            )
    for tokenizer, model in ((pipe.tokenizer, pipe.text_encoder), (pipe.pe_tokenizer, pipe.pe)):
        if model is not None and len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
            raise InvalidRepository(
                f"{tokenizer.name_or_path} has {len(tokenizer)} tokens, its model knows {rows}: use components of one release."
            )


def _convert(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the products of NF4 layers and the unquantized weights of a model another dtype.

    The configuration says bfloat16 for the products, and transformers leaves the other weights as they are in the file.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _is_nf4_loading(conversion: object) -> bool:
    return any(isinstance(operation, Bnb4bitDeserialize) for operation in getattr(conversion, "operations", ()))


def _dtype(library: str, where: Placement) -> dict[str, torch.dtype]:
    return {DTYPE_ARGUMENT[library]: where.dtype}


class _NF4AnywhereQuantizer(BnB4BitDiffusersQuantizer):
    """diffusers' NF4 loader without its demand for a GPU, which bitsandbytes no longer has.

    On a machine with a GPU it also allows a device map that names the CPU: offloaded components are loaded to there.
    """

    def validate_environment(self, *args, **kwargs) -> None:
        pass

    def update_device_map(self, device_map):
        return device_map


@contextmanager
def _diffusers_nf4_on(device: torch.device) -> Iterator[None]:
    """Let diffusers load NF4 weights onto a CPU while the context lasts; nothing changes for other devices."""
    if device.type != "cpu":
        yield
        return
    mapping = diffusers_quantizers.AUTO_QUANTIZER_MAPPING
    with upstream_lock:
        upstream = mapping["bitsandbytes_4bit"]
        mapping["bitsandbytes_4bit"] = _NF4AnywhereQuantizer
        try:
            yield
        finally:
            mapping["bitsandbytes_4bit"] = upstream


@contextmanager
def _same_default_dtype() -> Iterator[None]:
    """diffusers sets torch's default dtype while it builds a model, and leaves it so if that fails."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _cheap_loading(device: torch.device) -> Iterator[None]:
    """Spare upstream's loading to `device` what takes Python much time and gives nothing here, while the context lasts.

    transformers copies the conversion of each weight with all that hangs on it, where one level does, and lets threads fetch each
    tensor, even where all are mapped on the CPU and there is nothing to wait for. Layers are given storage and initial values, and
    then lose both for what the files have.
    """
    thread = threading.get_ident()
    linear = torch.nn.Linear
    with upstream_lock:
        asynchronous = os.environ.get(ASYNCHRONOUS_OFF)
        init, reset_parameters = linear.__init__, linear.reset_parameters

        @functools.wraps(init)
        def init_elsewhere(self, in_features, out_features, bias=True, device=None, dtype=None):
            if device is None and threading.get_ident() == thread:
                # Without the context that transformers builds in, which asks for this device as well.
                with torch._C.DisableTorchFunction():
                    init(self, in_features, out_features, bias, "meta", dtype)
            else:
                init(self, in_features, out_features, bias, device, dtype)

        def reset_elsewhere(self: torch.nn.Linear) -> None:
            if threading.get_ident() != thread:
                reset_parameters(self)

        linear.__init__, linear.reset_parameters = init_elsewhere, reset_elsewhere
        WeightConverter.__deepcopy__ = _copy_one_level
        if device.type == "cpu":
            os.environ[ASYNCHRONOUS_OFF] = "1"
        try:
            yield
        finally:
            del WeightConverter.__deepcopy__
            linear.__init__, linear.reset_parameters = init, reset_parameters
            if asynchronous is not None:
                os.environ[ASYNCHRONOUS_OFF] = asynchronous
            else:
                os.environ.pop(ASYNCHRONOUS_OFF, None)


def _copy_one_level(converter: WeightConverter, memo: dict) -> WeightConverter:
    """A copy with lists and dictionaries of its own."""
    new = copy.copy(converter)
    slots = [name for kind in type(new).__mro__ for name in getattr(kind, "__slots__", ())]
    for name in (*slots, *getattr(new, "__dict__", ())):
        value = getattr(new, name, None)
        if isinstance(value, list | dict | set):
            object.__setattr__(new, name, copy.copy(value))
    return new


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep Python from looking for garbage among the hundred thousand objects that are all to stay."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        _count_as_old()
        if collecting:
            gc.enable()


def _count_as_old() -> None:
    """Let Python take all objects for old ones, which it looks through for garbage last, and count new ones from here.

    After the imports it else has a look at all that they made, while the first pipeline is loaded or the first picture drawn.
    """
    if gc.get_freeze_count() <= FROZEN_BY_PYTHON:  # more are the caller's
        gc.freeze()
        gc.unfreeze()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars of a second each, and none of diffusers' warnings about what is right, while the context lasts."""
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    loggers = [diffusers.utils.logging.get_logger(f"diffusers.{name}") for name in SPURIOUS_WARNINGS]
    with upstream_lock:
        shown = [part for part in loggings if part.is_progress_bar_enabled()]
        for part in shown:
            part.disable_progress_bar()
        for each in loggers:
            each.addFilter(_is_worth_saying)
        try:
            yield
        finally:
            for each in loggers:
                each.removeFilter(_is_worth_saying)
            for part in shown:
                part.enable_progress_bar()


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in SPURIOUS_WARNINGS.values())
