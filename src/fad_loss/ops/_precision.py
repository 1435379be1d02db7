"""How precisely float32 is multiplied, whichever of PyTorch's two settings the user has chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def float32_matmul_precision() -> str:
    """`"highest"`, `"high"` (tf32) or `"medium"` (bfloat16).

    `torch.get_float32_matmul_precision()` raises once a backend was set by the newer
    ``torch.backends.cuda.matmul.fp32_precision`` (torch 2.9); that is asked then.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        chosen = torch.backends.cuda.matmul.fp32_precision
    return {"tf32": "high", "bf16": "medium"}.get(chosen, "highest")


def rounding_unit(t: Tensor) -> float:
    """Half the distance between 1 and the next number that a product of `t` distinguishes.

    On a CPU, `full_precision` is taken for granted.
    """
    if t.dtype == torch.float64:
        return 2.0**-53
    if t.device.type == "cpu":
        return 2.0**-24
    return {"high": 2.0**-11, "medium": 2.0**-8}.get(float32_matmul_precision(), 2.0**-24)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """On a CPU, multiply float32 in float32 whatever the user allows elsewhere.

    A coarser product would leave more to recompute than it saves time. On other devices the tiles
    do not multiply in float32.
    """
    setting = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9
    if device.type != "cpu":
        yield
    elif setting is None:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
    elif (chosen := setting.fp32_precision) in {"ieee", "none"}:
        yield
    else:
        setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            setting.fp32_precision = "none"  # that is: as the setting above it says
            if setting.fp32_precision != chosen:
                setting.fp32_precision = chosen
