"""Buffers that a step changes, as losses use them in compiled graphs."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("fad_loss::snapshot", mutates_args=())
def _snapshot(values: Tensor) -> Tensor:
    return values.clone()


@_snapshot.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def snapshot(values: Tensor) -> Tensor:
    """What buffers hold, or what is made of them, before the step changes them.

    What is cheap, a compiled backward pass computes again: from what the buffers hold by then.
    What an operator like this one has returned it keeps.
    """
    if torch.compiler.is_compiling():
        values = _snapshot(values)
    return values
