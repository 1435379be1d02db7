"""Which backend computes an operation, and why another one cannot."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

# What the kernels use of the compiler (tuples as arguments), and of the hardware.
OLDEST_TRITON: Final = (3, 3)
OLDEST_GPU: Final = (8, 0)

BACKENDS = ("auto", "triton", "tiled", "dense")


def _constant(function: F) -> F:
    """Let `torch.compile` call a function while it traces, and take the result for a constant.

    `torch.compiler.assume_constant_result` does this too, but imports the compiler, which takes
    those who never compile a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def why_not(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """The reason why a backend cannot run on a device (for a dtype), or None if it can."""
    if backend != "triton":
        return None
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA tensors, and these are on {device}"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 at most, and these tensors are float64"
    return _missing(device)


@_constant
def _missing(device: torch.device) -> str | None:
    """What a GPU lacks that the kernels need."""
    return _look_for(device)


@cache
def _look_for(device: torch.device) -> str | None:
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
        return _no_rocm()
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return "the kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def _no_rocm() -> str | None:
    if os.environ.get("FAD_LOSS_ROCM") == "1":
        return None
    return (
        "the Triton kernels are made for NVIDIA GPUs, and this is a ROCm build of PyTorch: they "
        "compile for gfx942, but nobody has measured them there; FAD_LOSS_ROCM=1 lets them run"
    )


@_constant
def _automatic(device: torch.device, dtype: torch.dtype | None) -> str:
    """The backend of `auto`; the first time on a GPU, say which one it is."""
    reason = why_not("triton", device, dtype)
    if device.type == "cuda" and dtype != torch.float64:
        _announce(device, reason)
    return "tiled" if reason else "triton"


@cache
def _announce(device: torch.device, reason: str | None) -> None:
    if reason is None:
        logging.getLogger("fad_loss").info("operations on %s run as Triton kernels", device)
        return
    warnings.warn(
        f"fad_loss: operations on {device} run as tiles of PyTorch's own matrix products, slower "
        f'than the Triton kernels: {reason}. With backend="tiled" nothing is said.',
        stacklevel=2,
    )


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
        return _automatic(device, dtype)
    reason = why_not(backend, device, dtype)
    if reason:
        message = f'backend={backend!r} cannot run: {reason}; use backend="auto"'
        raise RuntimeError(message)
    return backend
