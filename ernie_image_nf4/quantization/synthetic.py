"""A complete original-precision repository of the ERNIE-Image architecture, with random weights instead of a download.

At full size it has the published configs and byte counts: everybody can repeat the figures on speed and memory with it.
Turbo is the same size, and is known by its config. At tiny size it serves the tests. It draws noise.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from importlib.resources import as_file, files
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm

from ..errors import InvalidSettings
from ..repository.components import COMPONENT, COMPONENTS, MODEL_INDEX
from ..repository.meta_model import meta_model, saved_names, tied_weights
from ..repository.safetensors_io import DTYPE_NAMES, DTYPES, TensorSpec, TensorWriter
from .family import TURBO_CONFIG
from .resumable_output import resumable_output

SIZES = {"full": "full", "turbo": "full", "tiny": "tiny"}  # preset -> folder of its configs
PRESETS = tuple(SIZES)
TURBO = "turbo"
DTYPE = torch.bfloat16
STANDARD_DEVIATION = 0.02
CHUNK = 1 << 25  # values drawn at a time: 128 MiB in float32
SHARD_BYTES = 10_000_000_000  # diffusers' default limit, which splits the full transformer in two as the release does
SHARDED = "transformer"

# Special tokens fill the first twelve places, so that the padding token has its place in the published prompt enhancer
# config.
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", *(f"<reserved_{place}>" for place in range(3, 11)), "<pad>"]
# The limit of pe_tokenizer is also the number of new tokens that the pipeline lets the prompt enhancer generate.
MODEL_MAX_LENGTH = {"full": {"tokenizer": 1024, "pe_tokenizer": 256}, "tiny": {"tokenizer": 64, "pe_tokenizer": 16}}
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- message["role"] + ": " + message["content"] + "\\n" }}
{%- endfor %}
{{- "Output:" }}"""
CARD_FILE = "README.md"
CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

The architecture of `{source}` ({size} size) with random weights, seed {seed}: for tests and measurements. \
It draws noise.
"""


def synthesize(
    output: str | Path,
    *,
    preset: str = "full",
    seed: int = 0,
    shards: bool = True,
    duplicate_lm_head: bool = True,
    progress: bool = True,
) -> Path:
    """Write an original-precision repository with random bfloat16 weights.

    Weights of linear layers, convolutions and embeddings are normal with standard deviation 0.02, drawn on the GPU if
    there is one. The same seed gives the same weights on the same kind of device.

    Args:
        output: Folder to write, new or empty, or one that a run left that was killed: that starts over. It is a
            repository only when all is written.
        preset: ``"full"``, the published configs (31.6 GB), ``"turbo"``, those of ERNIE-Image-Turbo, for which
            `quantize` recommends 8 steps without guidance, or ``"tiny"`` (3 MB).
        seed: Non-negative seed of the weights.
        shards: Whether to write the transformer in two shards with an index, as the release does.
        duplicate_lm_head: Whether to store the tied ``lm_head`` of the prompt enhancer a second time, as the release
            does.
        progress: Whether to show a progress bar.

    Returns:
        The output folder.

    Raises:
        InvalidSettings: There is no such preset, or the folder isn't empty, in use, or can't be written.
        DiskFull: Its disk is full.
    """
    output = Path(output)
    if preset not in PRESETS:
        raise InvalidSettings(f"There is no preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    with resumable_output(output, {"random weights": [preset, seed, shards, duplicate_lm_head]}) as made:
        if made:
            _write(made.work, preset, seed, shards, duplicate_lm_head, progress)
            source = "baidu/ERNIE-Image-Turbo" if preset == TURBO else "baidu/ERNIE-Image"
            card = CARD.format(name=output.resolve().name, source=source, size=SIZES[preset], seed=seed)
            (made.work / CARD_FILE).write_text(card, encoding="utf-8")
            for name in (*(component.name for component in COMPONENTS), CARD_FILE, MODEL_INDEX):  # the index last
                made.place(name)
    return output


def _write(folder: Path, preset: str, seed: int, shards: bool, duplicate_lm_head: bool, progress: bool) -> None:
    """Write all components and the index to a folder, arguments as for `synthesize`."""
    size = SIZES[preset]
    with as_file(files(__package__) / "configs" / size) as configs:
        shutil.copytree(configs, folder, dirs_exist_ok=True)
    if preset == TURBO:
        transformer = COMPONENT["transformer"]
        config = folder / transformer.name / transformer.config
        config.write_text(json.dumps(_read(config) | TURBO_CONFIG, indent=2) + "\n", encoding="utf-8")
    for component in COMPONENTS:
        place = folder / component.name
        if component.weights:
            model = meta_model(component, {component.config: _read(place / component.config)})
            parts = _parts(tensor_specs(model, duplicate_lm_head), component.name == SHARDED and shards)
            _write_weights(place, component.weights, parts, tied_weights(model), seed, progress)
        elif component.name in MODEL_MAX_LENGTH[size]:
            _tokenizer(MODEL_MAX_LENGTH[size][component.name]).save_pretrained(place)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def tensor_specs(model: torch.nn.Module, duplicate_lm_head: bool) -> dict[str, TensorSpec]:
    """Every tensor of a model, by the name under which ``save_pretrained`` would write it.

    Args:
        model: The model, without storage.
        duplicate_lm_head: Whether a tied weight is stored a second time.
    """
    state, names = model.state_dict(), saved_names(model)
    if duplicate_lm_head:
        names |= {alias: alias for alias in tied_weights(model)}
    dtypes = {key: DTYPE if tensor.is_floating_point() else tensor.dtype for key, tensor in state.items()}
    return {name: TensorSpec(DTYPE_NAMES[dtypes[key]], tuple(state[key].shape)) for key, name in names.items()}


def _parts(specs: dict[str, TensorSpec], shards: bool) -> list[dict[str, TensorSpec]]:
    """The tensors of each file: one file, or two shards, the first filled up to the limit."""
    if not shards:
        return [specs]
    limit = min(SHARD_BYTES, sum(spec.bytes for spec in specs.values()) * 5 // 8)
    first, size = {}, 0
    for name, spec in specs.items():
        size += spec.bytes
        if size > limit:
            break
        first[name] = spec
    return [first, {name: spec for name, spec in specs.items() if name not in first}]


def _write_weights(
    folder: Path,
    weights: str,
    parts: list[dict[str, TensorSpec]],
    aliases: dict[str, str],
    seed: int,
    progress: bool,
) -> None:
    """Write the files of one component, with an index if there are several. `aliases` get other tensors' values."""
    stem = weights.removesuffix(".safetensors")
    shard_names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    names = shard_names if len(parts) > 1 else [weights]
    total = sum(spec.bytes for part in parts for spec in part.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, disable=not progress) as bar:
        for file, part in zip(names, parts, strict=True):
            with TensorWriter(folder / file, part) as writer:
                for name in writer.names:
                    writer.write(name, _random(f"{seed}/{folder.name}/{aliases.get(name, name)}", part[name]))
                    bar.update(part[name].bytes)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, part in zip(names, parts, strict=True) for name in part},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{weights}.index.json").write_text(text, encoding="utf-8")


def _random(name: str, spec: TensorSpec) -> Iterator[torch.Tensor]:
    """Random values for one tensor, in pieces, seeded by its name. Scales and variances are one, other vectors zero."""
    dtype, count = DTYPES[spec.dtype], prod(spec.shape)
    if len(spec.shape) < 2:
        one = name.endswith(("weight", "running_var"))
        yield torch.full((count,), 1 if one else 0, dtype=dtype)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True))
    for start in range(0, count, CHUNK):
        piece = torch.empty(min(CHUNK, count - start), dtype=dtype, device=device)
        yield piece.normal_(std=STANDARD_DEVIATION, generator=generator)


def _tokenizer(model_max_length: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer: any text, one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS.index("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=model_max_length,
        chat_template=CHAT_TEMPLATE,
    )
