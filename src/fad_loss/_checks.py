"""Checks of tensors that every entry point shares, and which values may be looked at.

Shapes, dtypes, devices and Python numbers are always checked. Values *inside* tensors are looked at
on CPU; on a GPU looking would stall the stream, so it happens only with `fad_loss.debug(True)` or
``FAD_LOSS_DEBUG=1``, and never while compiling or tracing.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake

from fad_loss._errors import describe, expected

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_debug = os.environ.get("FAD_LOSS_DEBUG", "0") not in {"", "0"}


def debug(enabled: bool = True) -> None:
    """Look at values inside GPU tensors too.

    Finite features, non-negative weights and consistent ragged offsets are always verified for CPU
    tensors. For tensors on an accelerator the look costs a synchronisation, so it is off unless
    this switch, or the environment variable ``FAD_LOSS_DEBUG=1``, turns it on.

    Args:
        enabled: whether to look.

    Example:
        >>> import fad_loss
        >>> fad_loss.debug(True)
        >>> fad_loss.debug(False)
    """
    global _debug  # noqa: PLW0603
    _debug = enabled


def look(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be looked at: concrete, and on CPU unless debugging."""
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(tensor) or is_fake(tensor):
        return False
    return tensor.device.type != "meta" and (tensor.device.type == "cpu" or _debug)


def check_tensor(name: str, tensor: object) -> None:
    """Raise unless `tensor` is a floating-point tensor of a supported dtype."""
    if not isinstance(tensor, Tensor):
        raise expected(name, "a torch.Tensor", type(tensor).__name__, error=TypeError)
    if tensor.dtype not in FLOATS:
        remedy = f"convert it first, for example with {name}.float()"
        raise expected(
            name, "float32, float64, bfloat16 or float16", tensor, remedy, error=TypeError
        )
    if tensor.is_nested and tensor.layout != torch.jagged:
        remedy = f"make it with fad_loss.ragged(list({name}.unbind()))"
        raise expected(name, "a jagged nested tensor", "one of layout strided", remedy)
    if tensor.layout not in {torch.strided, torch.jagged}:
        kind = str(tensor.layout).removeprefix("torch.")
        remedy = f"convert it with {name}.to_dense()"
        raise expected(name, "a dense tensor", f"one of layout {kind}", remedy, error=TypeError)


def count_non_finite(tensor: Tensor) -> Tensor:
    """How many values are NaN or infinite, as a scalar tensor."""
    values = tensor.detach()
    if look(values):
        # The sum is finite unless something is not (or it overflows): one pass, nothing stored.
        wide = values.dtype in (torch.float32, torch.float64)
        if torch.isfinite(values.sum(dtype=None if wide else torch.float32)):
            return torch.zeros((), dtype=torch.int64, device=values.device)
    return (~torch.isfinite(values)).sum()


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise if `tensor` may be looked at and holds NaN or infinity."""
    bad = int(count_non_finite(tensor)) if look(tensor) else 0
    if bad:
        message = (
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite "
            f"({describe(tensor)}); look at what produced them (overflow in half precision, a "
            f"division by zero, a diverged training run)"
        )
        raise ValueError(message)
