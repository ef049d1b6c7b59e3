"""The settings of a picture, and which values can't work. Nothing heavy is imported, so that checks come first."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidSettings
from ..fast.step_plan import ALL_STEPS, EVERY_STEP, Skipping, cache_interval, check_skipping
from ..repository.components import PIXELS_PER_PATCH
from ..repository.metadata import Recommended, read_metadata_if_ours

if TYPE_CHECKING:
    from diffusers import ErnieImagePipeline

logger = logging.getLogger(__name__)

MAX_SEED = 2**63 - 1
NOTED_LORA = re.compile(
    r"(?P<file>.+?):(?P<strength>[-+.\de]{1,30}) \((?P<tensors>tensors: )?sha256 (?P<sha256>[\da-f]{64})\)(; |$)",
    re.DOTALL | re.ASCII,
)


@dataclass(frozen=True, order=True)
class LoraUse:
    """A LoRA of a picture.

    Attributes:
        file: Name of its file; of its adapter, if it came from none.
        strength: Factor of what it adds.
        sha256: Digest of the file; of its tensors, if it came from none.
        from_file: Whether it came from a file, as it does unless Python code put it into the pipeline.
    """

    file: str
    strength: float
    sha256: str
    from_file: bool = True

    @property
    def adapter(self) -> str:
        """Name of its adapter in a pipeline."""
        return adapter_of(self.sha256)

    def __str__(self) -> str:
        return f"{self.file}:{self.strength:g} ({'' if self.from_file else 'tensors: '}sha256 {self.sha256})"


def read_noted_loras(text: str) -> tuple[LoraUse, ...]:
    """The LoRAs that a picture's file notes: each as `LoraUse` writes itself, with ``"; "`` between them.

    Raises:
        InvalidSettings: It isn't of this form.
    """
    uses: list[LoraUse] = []
    end = 0
    while match := NOTED_LORA.match(text, end):
        try:
            uses.append(LoraUse(match["file"], float(match["strength"]), match["sha256"], match["tensors"] is None))
        except ValueError:
            break
        end = match.end()
    if end < len(text):
        raise InvalidSettings(f"lora is {text[end : end + 40]!r}, which names no LoRA with its strength and SHA-256.")
    return tuple(uses)


def adapter_of(sha256: str) -> str:
    """Name of the adapter of a file with this digest."""
    return f"sha256_{sha256[:16]}"


@dataclass(frozen=True)
class Settings:
    """What makes a picture, apart from the weights.

    Attributes:
        prompt: What to draw.
        negative_prompt: What not to draw.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of the prompt against the negative prompt. Up to 1 there is no guidance, in half the
            time.
        seed: Of the initial latents and of the prompt enhancer's sampling.
        use_pe: Whether the prompt enhancer rewrites the prompt.
        guidance_until: Share of the steps with guidance.
        cache: Every how many steps the transformer is computed.
        lora: LoRAs that are on. Of a picture that isn't drawn yet, none stands for those that are on in the pipeline.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    use_pe: bool = True
    guidance_until: float = ALL_STEPS
    cache: int = EVERY_STEP

    @property
    def skipping(self) -> Skipping:
        """What denoising leaves out."""
        return Skipping(self.guidance_until, self.cache)

    lora: tuple[LoraUse, ...] = ()

    def __post_init__(self) -> None:
        # From a manifest they come as lists and objects of JSON.
        uses = (use if isinstance(use, LoraUse) else LoraUse(**use) for use in self.lora)
        object.__setattr__(self, "lora", tuple(uses))


def check_settings(
    prompt: str,
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    count: int = 1,
    guidance_until: float | None = None,
    cache: int | bool | None = None,
) -> None:
    """Refuse what can't work before anything is loaded; None stands for the recommended value.

    Raises:
        InvalidSettings: Blank prompt, size not a positive multiple of 16, fewer than 1 step or picture, guidance that
            is no finite number, seed out of range, or steps that can't be left out so.
    """
    if not prompt.strip():
        raise InvalidSettings("The prompt is empty: say what to draw.")
    for name, value in (("Height", height), ("Width", width)):
        if value is not None and (value < PIXELS_PER_PATCH or value % PIXELS_PER_PATCH):
            nearest = max(PIXELS_PER_PATCH, round(value / PIXELS_PER_PATCH) * PIXELS_PER_PATCH)
            raise InvalidSettings(f"{name} {value} is not a positive multiple of {PIXELS_PER_PATCH}: try {nearest}.")
    for name, value in (("steps", steps), ("count", count)):
        if value is not None and value < 1:
            raise InvalidSettings(f"{value} is too few for {name}: use 1 or more.")
    if guidance is not None and not math.isfinite(guidance):
        raise InvalidSettings(f"Guidance {guidance} is not a finite number: try 4.0, or 1.0 for none.")
    if seed is not None and not 0 <= seed <= seed + count - 1 <= MAX_SEED:
        raise InvalidSettings(f"Seed {seed} is out of range: use 0 to {MAX_SEED}.")
    check_skipping(guidance_until, cache)


def complete_settings(
    recommended: Recommended,
    prompt: str,
    *,
    negative: str,
    height: int | None,
    width: int | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    use_pe: bool,
    skipping: Skipping,
    guidance_until: float | None,
    cache: int | bool | None,
    lora: tuple[LoraUse, ...] = (),
) -> Settings:
    """Settings with the recommended values for what is None, and with those of `skipping` for what is left out."""
    return Settings(
        prompt=prompt,
        negative_prompt=negative,
        height=recommended.height if height is None else height,
        width=recommended.width if width is None else width,
        num_inference_steps=recommended.num_inference_steps if steps is None else steps,
        guidance_scale=recommended.guidance_scale if guidance is None else guidance,
        seed=seed,
        use_pe=use_pe,
        guidance_until=skipping.guidance_until if guidance_until is None else float(guidance_until),
        cache=skipping.cache if cache is None else cache_interval(cache),
        lora=lora,
    )


def warn_of_unused_negative(settings: Sequence[Settings]) -> None:
    """Log one warning if pictures have a negative prompt, but no guidance, without which it has no effect."""
    unused = [each for each in settings if each.negative_prompt.strip() and each.guidance_scale <= 1]
    if unused:
        which = "" if len(settings) == 1 else f" of {len(unused)} of {len(settings)} pictures"
        logger.warning(
            "The negative prompt%s has no effect at guidance scale %s: use one above 1 (--guidance 4).",
            which,
            unused[0].guidance_scale,
        )


def hub_revision(pipe: ErnieImagePipeline) -> str | None:
    """The commit that a pipeline was loaded from, None for a local folder. The Hub's cache has a folder for each."""
    folder = Path(pipe.name_or_path)
    return folder.name if folder.parent.name == "snapshots" else None


def described_model(pipe: ErnieImagePipeline, model: str | None = None) -> tuple[Recommended, str]:
    """Recommended settings and name of a pipeline, by its repository's metadata.

    Args:
        pipe: The pipeline, as from `load`.
        model: Name where the repository gives itself none; None takes the folder's.
    """
    folder = Path(pipe.name_or_path)
    metadata = read_metadata_if_ours(folder)
    if metadata is None:
        return Recommended(), model or folder.resolve().name
    return metadata.recommended, metadata.name
