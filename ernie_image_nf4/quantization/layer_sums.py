"""The sums over a layer's inputs that rounding needs: two matrices of its width squared, in float32."""

from __future__ import annotations

import torch

CHUNK = 1024  # rows of a sum that are added to at once, so that no third matrix of its size is made
BFLOAT16_CAPABILITY = (8, 0)  # of CUDA GPUs that multiply it


class LayerSums:
    """Sums of y y' and of (x - y) y', each token times its weight.

    x is the layer's input in the original, y the same in the quantized model. The difference is taken before it is
    multiplied: it is small, and so is the error of what is found with it.

    On GPUs that multiply bfloat16, products are of values rounded to it and added in float32. y, which was computed in
    it, has to be rounded for its weight alone, the same on both sides, so that the sum stays positive semi-definite.
    Rounding to 8 bits adds at most 2^-18 of the diagonal, far less than the damping.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.hessian = torch.zeros(width, width, device=device)
        self.difference = torch.zeros(width, width, device=device)
        self.tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the tokens of one sample.

        Args:
            x: (tokens, width).
            y: (tokens, width).
            weight: (tokens,), on any device.
        """
        root = weight.to(y.device).sqrt()[:, None]
        right, left = y.float() * root, (x.float() - y.float()) * root
        if self.tensor_cores:
            right, left = right.bfloat16(), left.bfloat16()
        _add_products(self.hessian, right, right)
        _add_products(self.difference, left, right)

    def taken(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sums, which from then on belong to the caller alone."""
        sums = self.hessian, self.difference
        del self.hessian, self.difference
        return sums


def _add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left' right, (width, width) float32."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
        return
    for start in range(0, len(total), CHUNK):
        part = slice(start, start + CHUNK)
        total[part] += torch.mm(left[:, part].T, right, out_dtype=torch.float32)
