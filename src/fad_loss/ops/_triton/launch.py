"""How kernels are started: one place, which tests replace to see what would run."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# As Triton reads it when it decorates a kernel; its own switch has moved between versions.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on"}

# Numbers that change from call to call and must not compile a kernel anew.
SIZES = (
    "rows_each",
    "columns_each",
    "clouds",
    "search_steps",
    "splits",
    "rows_total",
    "scale",
)


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Kernels launch on the current device: make it the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run a kernel over a grid; an empty grid is nothing to do."""
    if all(grid):
        # Said explicitly, because its default changes between Triton versions.
        kernel[grid](**arguments, enable_fp_fusion=True)
