"""Which backend computes an operation, and why another one cannot."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Final

import torch

# What the kernels use of the compiler, and of the hardware.
OLDEST_TRITON: Final = (3, 6)
OLDEST_GPU: Final = (8, 0)

BACKENDS = ("auto", "triton", "tiled", "dense")


def why_not(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """The reason why a backend cannot run on a device (for a dtype), or None if it can."""
    if backend != "triton":
        return None
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA tensors, and these are on {device}"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 at most, and these tensors are float64"
    return _no_compiler() or _no_hardware(device)


def _no_compiler() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch for Linux with CUDA)"
    # Imported only here, where there is a GPU to compile for.
    installed = import_module("triton").__version__
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"the kernels need Triton {oldest} or newer, and this is {installed}"
    return None


def _no_hardware(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernels are made for NVIDIA GPUs, and this is a ROCm build of PyTorch"
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return "the kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def select(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend that will run: `auto` chooses, an explicit one runs or raises.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend was asked for by name and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        message = f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        raise ValueError(message)
    if backend == "auto":
        return "tiled" if why_not("triton", device, dtype) else "triton"
    reason = why_not(backend, device, dtype)
    if reason:
        message = f'backend={backend!r} cannot run: {reason}; use backend="auto"'
        raise RuntimeError(message)
    return backend
