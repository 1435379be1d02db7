"""Measure the constants of `ops.cost` on a device: what ``python -m fad_loss --measure`` does."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fad_loss import ops
from fad_loss.ops._cost import Machine

# Long enough for a rate, short enough for a person who waits.
SECONDS = 0.2


def measure(device: torch.device) -> Machine:
    """Time products, exponentials, differences, pairs and a call."""
    size = 4096 if device.type == "cuda" else 512
    rates = {dtype: _products(device, size, dtype) for dtype in _DTYPES}
    tf32 = rates[torch.float32]
    if device.type == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            tf32 = _products(device, size, torch.float32)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    values = torch.rand(size, size, device=device)
    exponentials = values.numel() / _fastest(lambda: torch.exp(values), device)
    tiny = torch.rand(1, 4, 4, device=device)
    call = _fastest(lambda: ops.softmin(tiny, tiny, 1.0), device)
    few = torch.rand(1, 8 * 64, 4, device=device)
    dense = _fastest(lambda: ops.softmin(few, few, 1.0, backend="dense"), device)
    differences = few.shape[1] ** 2 * few.shape[2] / dense
    many = torch.rand(1, 4 * size, 32, device=device)
    pairs = many.shape[1] ** 2
    whole = _fastest(lambda: ops.kernel_mean(many, many, ops.Energy()), device)
    multiplied = 2 * pairs * many.shape[2] / rates[torch.float32]
    # What is left is at least a tenth, where the product hides the rest.
    left = max(whole - call - multiplied, whole / 10)
    return Machine(
        rates[torch.float64],
        rates[torch.float32],
        tf32,
        rates[torch.bfloat16],
        pairs / left,
        differences,
        exponentials,
        call,
        measured=True,
    )


_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def _products(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a = torch.rand(size, size, device=device).to(dtype)
    return 2 * size**3 / _fastest(lambda: a @ a, device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several rounds, after one that warms up."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once()]
    while sum(times) < SECONDS:
        times.append(once())
    return min(times)
