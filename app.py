"""What a Hugging Face Space runs: the page, over the model that the variable MODEL names. See docs/page.md."""

from __future__ import annotations

import os
import sys


def command() -> list[str]:
    """``ernie-image-nf4 serve`` at the address that a Space shows to its visitors."""
    model = [os.environ["MODEL"]] if os.environ.get("MODEL") else []
    port = os.environ.get("PORT", "7860")
    return [sys.executable, "-m", "ernie_image_nf4", "serve", *model, "--host", "0.0.0.0", "--port", port]


if __name__ == "__main__":
    os.execv(sys.executable, command())
