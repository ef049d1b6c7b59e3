"""Whether the packages are installed that a server needs and the rest of the package doesn't."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import MissingPackage

# By the extra of pyproject.toml that brings them.
EXTRAS = {"serve": ("fastapi", "uvicorn", "prometheus_client", "gradio"), "cluster": ("ray",)}


def check_installed(extra: str = "serve") -> None:
    """Refuse to go on without the packages of an extra.

    Raises:
        MissingPackage: One isn't installed.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingPackage(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f'pip install "ernie-image-nf4[{extra}]", or pip install -e ".[{extra}]" in a clone.'
        )
