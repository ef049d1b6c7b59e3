"""Triton's hash of its own files, by which it finds compiled kernels."""

from __future__ import annotations

import importlib
import logging

logger = logging.getLogger(__name__)


def prepare_triton() -> None:
    """Let Triton hash its files, hundreds of MB, ahead of the first kernel, which waits for it otherwise.

    Reaches for ``triton.runtime.cache.triton_key`` (in the Triton that torch 2.11 brings), which keeps its result. Run
    beside loading it costs nothing, as hashing hardly needs Python's lock. Gone, or no Triton: does nothing, and the
    first kernel hashes.
    """
    try:
        importlib.import_module("triton.runtime.cache").triton_key()
    except Exception as error:  # only a head start, and Triton reads the system in many ways
        logger.info("Triton hashes its files with the first kernel (%s).", error)
