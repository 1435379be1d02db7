"""Pairwise reductions as Triton kernels for CUDA: one pass over the tiles, O(N + M) memory.

Two cases go to the tiled backend, which computes the same with PyTorch's own matrix products:
float64, which is for checking and which matrix units below data-center GPUs lack, and knn with k >
64, whose lists do not fit into registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fad_loss.ops import _tiled
from fad_loss.ops._triton import kernel_sums, search, smooth_minimum

__all__ = [
    "kernel_sum",
    "kernel_sum_backward",
    "kernel_sum_double_backward",
    "knn",
    "softmin",
    "softmin_backward",
    "softmin_double_backward",
]


def _single(function: Callable[..., Any]) -> Callable[..., Any]:
    """Send float64 (the first tensor decides) to the tiled function of the same name."""
    tiled = getattr(_tiled, function.__name__)

    @wraps(function)
    def run(first: Tensor, *arguments: Any) -> Any:
        chosen = tiled if first.dtype == torch.float64 else function
        return chosen(first, *arguments)

    return run


def _knn(
    x: Tensor,
    y: Tensor,
    k: int,
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    chosen = _tiled.knn if k > search.LARGEST_K else search.knn
    return chosen(x, y, k, exclude_self, x_offsets, y_offsets)


_knn.__name__ = "knn"

knn = _single(_knn)
kernel_sum = _single(kernel_sums.kernel_sum)
kernel_sum_backward = _single(kernel_sums.kernel_sum_backward)
kernel_sum_double_backward = _single(kernel_sums.kernel_sum_double_backward)
softmin = _single(smooth_minimum.softmin)
softmin_backward = _single(smooth_minimum.softmin_backward)
softmin_double_backward = _single(smooth_minimum.softmin_double_backward)
