"""Pairwise reductions in plain PyTorch, tile by tile: any device, O(N + M) memory."""

from fad_loss.ops._tiled.search import knn
from fad_loss.ops._tiled.smooth import (
    kernel_sum,
    kernel_sum_backward,
    kernel_sum_double_backward,
    softmin,
    softmin_backward,
    softmin_double_backward,
)

__all__ = [
    "kernel_sum",
    "kernel_sum_backward",
    "kernel_sum_double_backward",
    "knn",
    "softmin",
    "softmin_backward",
    "softmin_double_backward",
]
