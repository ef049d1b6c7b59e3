"""Members of the ERNIE-Image family: what tells them apart, and the call settings that each is made for."""

from __future__ import annotations

from ..repository.metadata import Recommended
from ..repository.record import Repository

TURBO = Recommended(num_inference_steps=8, guidance_scale=1.0)
# In ERNIE-Image-Turbo's transformer config, and in no other. Only that they are there is known, not their values, and
# diffusers uses none.
TURBO_CONFIG = {"use_lora": False, "lora_rank": 64}


def recommended_for(repository: Repository) -> Recommended:
    """Call settings for this member of the family."""
    is_turbo = any(TURBO_CONFIG.keys() <= part.config.keys() for part in repository.components.values())
    return TURBO if is_turbo else Recommended()
