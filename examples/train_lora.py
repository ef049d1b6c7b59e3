"""Train a LoRA on a folder of pictures with captions, over NF4 weights, which stay as they are (QLoRA).

    pip install -e . peft
    python examples/train_lora.py PICTURES --model user/ERNIE-Image-NF4 --output my-style

PICTURES holds ``NAME.png`` (or .jpg, .webp) with ``NAME.txt`` beside it, or a ``metadata.jsonl`` with ``file_name`` and
``text`` on each line. An empty caption teaches what is drawn without a prompt. In my-style/, which `load_lora` and
``generate --lora`` take, appear ``my-style.safetensors``, pictures of the prompts given by ``--sample`` every
``--save-every`` steps, and in run/ what a run needs that goes on after an interruption: start it again. On several
GPUs: ``accelerate launch examples/train_lora.py ...``.

Text embeddings and latents are computed once and kept in a file; then the text encoder leaves the GPU. What is left
there is the transformer in NF4, the LoRA in float32 with AdamW's two moments, and the activations of one block at a
time (gradient checkpointing).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ErnieImagePipeline
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ernie_image_nf4 import load
from ernie_image_nf4.errors import ErnieImageNF4Error
from ernie_image_nf4.memory.placement import find_device

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "linear_fc2")
ADAPTER = "default"
RUN = "run"  # folder below the output, of what isn't the LoRA: so the output is taken for it


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pictures", type=Path, help="folder of pictures with captions")
    add("--model", help="folder or Hub id; default: the repository that the package stands in")
    add("--output", "-o", type=Path, required=True, help="folder to write to; its name is the LoRA's")
    add("--steps", type=int, default=1000)
    add("--rank", type=int, default=16)
    add("--learning-rate", type=float, default=1e-4)
    add("--warm-up", type=int, default=20, help="steps in which the learning rate grows to its value")
    add("--batch-size", type=int, default=1, help="pictures of a step, of each process")
    add("--accumulate", type=int, default=1, help="passes whose gradients make a step")
    add("--resolution", type=int, default=512, help="pictures are cut to this square, a multiple of 16")
    add("--no-caption", type=float, default=0.1, help="share of pictures that are learned without their caption")
    add("--sample", action="append", default=[], help="prompt to draw every --save-every steps; may be repeated")
    add("--sample-steps", type=int, default=25)
    add("--save-every", type=int, default=250)
    add("--seed", type=int, default=0)
    add("--device", help="cuda, cuda:1 or cpu; default: the best there is")
    options = parser.parse_args(arguments)
    for name in ("steps", "rank", "batch_size", "accumulate", "resolution", "sample_steps", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more.")
    if options.resolution % 16:
        parser.error(f"--resolution {options.resolution} is no multiple of 16.")
    if not 0 < options.learning_rate < math.inf:
        parser.error("--learning-rate must be above 0.")
    if not 0 <= options.no_caption <= 1:
        parser.error("--no-caption is a share, from 0 to 1.")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"{options.output} is a file: name a folder to write to.")
    return options


def read_pictures(folder: Path) -> list[tuple[Path, str]]:
    """Each picture of a folder with its caption."""
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}: name the one that holds the pictures.")
    listed = folder / "metadata.jsonl"
    if listed.is_file():
        try:
            rows = [json.loads(line) for line in read_text(listed).splitlines() if line.strip()]
        except ValueError as error:
            raise SystemExit(f"{listed} can't be read ({error}): write a JSON object on each line.") from None
        keys = ("file_name", "text")
        right = [isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys) for row in rows]
        if wrong := [number for number, is_right in enumerate(right, 1) if not is_right]:
            raise SystemExit(f"Object {wrong[0]} of {listed} lacks file_name or text: give each picture both.")
        pairs = [(folder / row["file_name"], row["text"]) for row in rows]
        if absent := [path for path, _ in pairs if not path.is_file()]:
            raise SystemExit(f"{listed} names {absent[0]}, which isn't there: correct the name, or remove the line.")
    else:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        missing = [path.name for path in found if not path.with_suffix(".txt").is_file()]
        if missing:
            raise SystemExit(f"{missing[0]} and {len(missing) - 1} more have no caption: write it to a .txt beside it.")
        pairs = [(path, read_text(path.with_suffix(".txt")).strip()) for path in found]
    if not pairs:
        raise SystemExit(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return pairs


def read_text(path: Path) -> str:
    """A file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SystemExit(f"{path} is not in UTF-8: save it so.") from None


def read_picture(path: Path, resolution: int) -> Image.Image:
    """A picture, cut to a square."""
    try:
        with Image.open(path) as image:
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (resolution, resolution))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SystemExit(f"{path} is no picture that can be read ({error}): replace it, or take it out.") from None


def fingerprint(pairs: Sequence[tuple[Path, str]]) -> str:
    """A hash of pictures and captions."""
    what = [[hashlib.sha256(path.read_bytes()).hexdigest(), caption] for path, caption in pairs]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


# Latents and embeddings


def encoded(
    pipe: ErnieImagePipeline,
    pairs: Sequence[tuple[Path, str]],
    data: str,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Latents, (C, height / 16, width / 16), and embeddings, (tokens, width), by number, from the file if it is there.

    The embeddings of samples follow those of the captions, and that of the empty caption is the last. `data` is the
    `fingerprint` of the pairs.
    """
    texts = [*(caption for _, caption in pairs), *options.sample, ""]
    key = json.dumps([data, texts, options.resolution, pipe.name_or_path])
    metadata = {"key": hashlib.sha256(key.encode()).hexdigest()}
    cache = options.output / RUN / "encoded.safetensors"
    if cache.is_file():
        with suppress(SafetensorError), safe_open(cache, "pt") as stored:  # a damaged one is made anew
            if stored.metadata() == metadata:
                return load_file(cache)
    for path, _ in pairs:
        read_picture(path, options.resolution)  # all of them, before the first is encoded
    values = {}
    for number, (path, _) in enumerate(tqdm(pairs, desc="pictures", unit="picture")):
        values[f"latents.{number}"] = encode_picture(pipe, path, options.resolution).cpu()
    for number, text in enumerate(tqdm(texts, desc="captions", unit="caption")):
        values[f"text.{number}"] = pipe.encode_prompt(text, device)[0].cpu().contiguous()
    save(values, cache, metadata)
    return values


@torch.no_grad()
def encode_picture(pipe: ErnieImagePipeline, path: Path, resolution: int) -> torch.Tensor:
    """Latents of a picture as the transformer has them: patches of 2x2, normalized as the pipeline undoes it."""
    image, vae = read_picture(path, resolution), pipe.vae
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
    latents = F.pixel_unshuffle(vae.encode(pixels).latent_dist.mode().float(), 2)
    mean, variance = (each.view(1, -1, 1, 1).float() for each in (vae.bn.running_mean, vae.bn.running_var))
    return ((latents - mean) / (variance + 1e-5).sqrt())[0]


def texts_of(values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Embeddings of the captions, of the samples, and of the empty caption."""
    return [values[f"text.{number}"] for number in range(sum(key.startswith("text.") for key in values))]


# Steps


def rows_of_step(step: int, count: int, size: int, seed: int) -> list[int]:
    """Numbers of a step's pictures: each once before any comes again, in an order that hangs on the seed alone."""
    rows = []
    for place in range(step * size, (step + 1) * size):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + place // count))
        rows.append(int(order[place % count]))
    return rows


def loss_of(
    model: torch.nn.Module,
    values: dict[str, torch.Tensor],
    rows: Sequence[int],
    options: argparse.Namespace,
    shift: float,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Flow matching: the model predicts noise minus latents, at sigmas of a shifted logit-normal distribution."""
    latents = torch.stack([values[f"latents.{row}"] for row in rows])
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(len(rows), generator=generator))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    without = torch.rand(len(rows), generator=generator) < options.no_caption
    every = texts_of(values)
    texts = [every[-1 if left_out else row] for row, left_out in zip(rows, without.tolist(), strict=True)]
    weight = sigma.view(-1, 1, 1, 1)
    with torch.autocast(device.type, dtype, enabled=device.type == "cuda" and dtype != torch.float32):
        predicted = model(
            hidden_states=(weight * noise + (1 - weight) * latents).to(device, dtype),
            timestep=(sigma * 1000).to(device, dtype),
            text_bth=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device, dtype),
            text_lens=torch.tensor([len(text) for text in texts], device=device),
            return_dict=False,
        )[0]
    return F.mse_loss(predicted.float(), (noise - latents).to(device))


# Files


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file under another name first: it is whole, or isn't there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise SystemExit(f"{path} can't be written ({error}): mend that, and start again to go on.") from None


def save_lora(transformer: torch.nn.Module, path: Path) -> None:
    """The LoRA in diffusers' format, in bfloat16, with peft's settings inside."""
    state = peft.get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    settings = transformer.peft_config[ADAPTER].to_dict()
    settings = {
        f"transformer.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in settings.items()
        if key in ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "lora_bias", "peft_type")
    }
    tensors = {f"transformer.{key}": tensor.to(torch.bfloat16).cpu().contiguous() for key, tensor in state.items()}
    save(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(settings, default=str)})


def save_state(
    weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, path: Path, step: int, about: str
) -> None:
    """All that a run needs to go on: weights and AdamW's moments, in float32. Random numbers hang on the step alone."""
    tensors = {}
    for name, weight in weights.items():
        moments = optimizer.state[weight]
        tensors |= {f"weight.{name}": weight.detach().cpu().clone()}
        tensors |= {f"{key}.{name}": moments[key].cpu().clone() for key in ("exp_avg", "exp_avg_sq")}
    save(tensors, path, {"step": str(step), "about": about})


def restore_state(
    weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, path: Path, about: str
) -> int:
    """The step that a former run came to; 0 without one."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as stored:
            noted = stored.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise SystemExit(f"{path} is damaged ({error}): remove it to begin anew.") from None
    if noted.get("about") != about:
        raise SystemExit(
            f"{path} is of a run with other settings ({noted.get('about')}): name another folder, or remove it."
        )
    step = int(noted["step"])
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(weight.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step


def draw_samples(
    pipe: ErnieImagePipeline, values: dict[str, torch.Tensor], options: argparse.Namespace, step: int
) -> None:
    """One picture of each prompt, from the same noise every time."""
    folder = options.output / "samples"
    folder.mkdir(exist_ok=True)
    texts = texts_of(values)
    size = {"height": options.resolution, "width": options.resolution, "num_inference_steps": options.sample_steps}
    for number, text in enumerate(texts[-1 - len(options.sample) : -1]):
        generator = torch.Generator().manual_seed(options.seed + number)
        embeddings = {"prompt_embeds": [text], "negative_prompt_embeds": [texts[-1]]}
        pipe(**embeddings, generator=generator, **size).images[0].save(folder / f"{step:06d}-{number + 1}.png")


# The whole


def train(options: argparse.Namespace) -> Path:
    """Train, and write the LoRA. Returns its file."""
    accelerator = Accelerator(cpu=options.device == "cpu", gradient_accumulation_steps=options.accumulate)
    device = accelerator.device if options.device in (None, "cpu") else find_device(options.device)
    pairs = read_pictures(options.pictures)
    data = fingerprint(pairs)
    (options.output / RUN).mkdir(parents=True, exist_ok=True)
    pipe = load(options.model, device=device, memory="resident", prompt_enhancer=False)
    pipe.set_progress_bar_config(disable=True)
    with accelerator.main_process_first():
        values = encoded(pipe, pairs, data, options, device)
    pipe.text_encoder = None
    if device.type == "cuda":
        torch.cuda.empty_cache()

    transformer, dtype, shift = pipe.transformer, pipe.transformer.dtype, pipe.scheduler.config.get("shift", 1.0)
    transformer.requires_grad_(False)
    torch.manual_seed(options.seed)
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=list(LAYERS))
    transformer.add_adapter(config, adapter_name=ADAPTER)
    transformer.enable_gradient_checkpointing()
    weights = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    for weight in weights.values():
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights.values(), lr=options.learning_rate, weight_decay=0.0)
    about = (
        f"rank {options.rank}, {options.resolution} pixels, seed {options.seed}, model {pipe.name_or_path}, "
        f"{len(pairs)} pictures and captions {data[:12]}"
    )
    state, result = (
        options.output / RUN / "state.safetensors",
        options.output / f"{options.output.resolve().name}.safetensors",
    )
    first = restore_state(weights, optimizer, state, about)
    model = accelerator.prepare_model(transformer, device_placement=False)

    each = options.batch_size * accelerator.num_processes
    progress = range(first, options.steps)
    bar = tqdm(progress, initial=first, total=options.steps, unit="step", disable=not accelerator.is_main_process)
    for step in bar:
        optimizer.param_groups[0]["lr"] = options.learning_rate * min(1.0, (step + 1) / max(1, options.warm_up))
        losses = []
        for part in range(options.accumulate):
            rows = rows_of_step(step * options.accumulate + part, len(pairs), each, options.seed)
            rows = rows[accelerator.process_index :: accelerator.num_processes]
            seed = hash((options.seed, step, part, accelerator.process_index)) % 2**63
            generator = torch.Generator().manual_seed(seed)
            with accelerator.accumulate(model):
                loss = loss_of(model, values, rows, options, shift, generator, dtype, device)
                accelerator.backward(loss)
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{math.fsum(losses) / len(losses):.4f}")
        if ((step + 1) % options.save_every == 0 or step + 1 == options.steps) and accelerator.is_main_process:
            save_lora(transformer, result)
            save_state(weights, optimizer, state, step + 1, about)
            draw_samples(pipe, values, options, step + 1)
    if accelerator.is_main_process and not result.is_file():  # of a run that had done all steps
        save_lora(transformer, result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        print(train(parse_arguments(arguments)))
    except ErnieImageNF4Error as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
