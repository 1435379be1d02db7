"""Which backend computes an operation, and why another one cannot."""

from __future__ import annotations

from importlib.util import find_spec

import torch

BACKENDS = ("auto", "triton", "tiled", "dense")


def why_not(backend: str, device: torch.device) -> str | None:
    """The reason why a backend cannot run on a device, or None if it can."""
    if backend != "triton":
        return None
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA tensors, and these are on {device}"
    if find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch for Linux with CUDA)"
    if find_spec("fad_loss.ops._triton") is None:
        return "this version of fad_loss has no Triton kernels"
    return None


def select(backend: str, device: torch.device) -> str:
    """The backend that will run: `auto` chooses, an explicit one runs or raises.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend was asked for by name and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        message = f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        raise ValueError(message)
    if backend == "auto":
        return "tiled" if why_not("triton", device) else "triton"
    reason = why_not(backend, device)
    if reason:
        message = f'backend={backend!r} cannot run: {reason}; use backend="auto"'
        raise RuntimeError(message)
    return backend
