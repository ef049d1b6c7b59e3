"""What PyTorch knows about this machine's hardware."""

from __future__ import annotations

import logging
import platform

import torch

logger = logging.getLogger(__name__)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions, and PyTorch the kernels that use them.

    Without them float32 is many times faster: a decode of the VAE took 0.4 s instead of 93 s. On x86 oneDNN's own
    answer is of no use: it accepts any AVX-512, and emulates.

    Asks the public ``torch.cpu.get_capabilities`` (seen in PyTorch 2.13). Without it, as in 2.11, reaches for
    ``torch.cpu._is_avx512_bf16_supported`` on x86 and ``torch.ops.mkldnn._is_mkldnn_bf16_supported`` elsewhere, which
    read the same bit. Gone: False; float32 is right everywhere.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    try:
        if capabilities := getattr(torch.cpu, "get_capabilities", None):
            return bool(capabilities().get("avx512_bf16" if on_x86 else "bf16", False))
        if on_x86:
            return torch.cpu._is_avx512_bf16_supported()
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError as error:
        logger.info("PyTorch %s can't tell whether the CPU has bfloat16, float32 is used: %s", torch.__version__, error)
        return False
