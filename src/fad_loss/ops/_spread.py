"""What neighbors pull, added up at the points that are neighbors: for the gradient of a search."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fad_loss::add_at", mutates_args=())
def _add_at(values: Tensor, where: Tensor, rows: int) -> Tensor:
    result: Tensor = import_module("fad_loss.ops._triton.spread").add_at(values, where, rows)
    return result


@_add_at.register_fake
def _(values: Tensor, where: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    return values.new_empty(rows, values.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (where,) = ctx.saved_tensors
    return grad.index_select(0, where), None, None


_add_at.register_autograd(_backward, setup_context=_setup)


def spread(total: Tensor, where: Tensor, values: Tensor, *, fused: bool) -> Tensor:
    """Add the values (E, C) to the rows of the total, (rows, C), in a fixed order.

    `fused` by a Triton kernel; else by what PyTorch has, which on a GPU takes ten times as long.
    """
    if fused:
        added: Tensor = _add_at(values, where, total.shape[0])
        return total + added
    # Both add in a fixed order, index_add on a CPU alone, and faster there.
    if total.device.type == "cpu":
        return total.index_add(0, where, values)
    return total.index_put((where,), values, accumulate=True)
