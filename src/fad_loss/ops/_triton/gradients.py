"""From the reductions' gradients to launches of the kernels in `backward.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fad_loss.ops._triton import small
from fad_loss.ops._triton.backward import backward_kernel
from fad_loss.ops._triton.configurations import run
from fad_loss.ops._triton.double_backward import double_backward_kernel
from fad_loss.ops._triton.prepare import (
    Points,
    Rounding,
    flat,
    prepare,
    prepare_pair,
    sides,
)


def gradient_like(t: Tensor, *, wanted: bool = True) -> Tensor:
    """Room for a gradient of `t`, or nothing if nobody wants it."""
    return t.new_empty(t.shape if wanted else (0,), dtype=torch.float32)


def backward(
    rows: Points,
    columns: Points,
    settings: dict[str, Any],
    gradient: Tensor | None,
    *,
    extra: Tensor | None = None,
    row_shift: Tensor | None = None,
    column_shift: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> None:
    """Fill the gradients of what the rows have: points (T, C), and weights or biases (`extra`)."""
    arguments = {
        **sides(rows, columns, row="row", column="column"),
        "row_shift": row_shift,
        "column_shift": column_shift,
        "row_scale": row_scale,
        "column_scale": column_scale,
        "gradient": gradient,
        "extra": extra,
        "C": rows.channels,
        **settings,
    }
    run("backward", backward_kernel, rows, columns, arguments, slabs=gradient is not None)


def gradients_of(
    x: Tensor, y: Tensor, x_offsets: Tensor | None, y_offsets: Tensor | None
) -> tuple[Any, Any, Callable[..., None]]:
    """Both sides, as what fills their gradients takes them."""
    if small.are_small(x, y, x_offsets):
        return x, y, small.backward
    return *prepare_pair(x, y, x_offsets, y_offsets), backward


class Moves:
    """Directions in which one side's points move, as the kernels want them; None does not move."""

    def __init__(self, points: Points, moves: Tensor | None) -> None:
        self.values: Tensor | None = None
        self.dots: Tensor | None = None
        if moves is not None:
            form = replace(points.format, center=False, rounding=_ROUNDING[points.format.precision])
            self.values = prepare(flat(moves.float()), points.clouds, form).values
            self.dots = (points.values * self.values).sum(-1)


# Directions are rounded to the multiply's format, like points.
_ROUNDING: dict[str, Rounding] = {"tf32": "tf32", "tf32x3": ""}


def double_backward(
    rows: Points,
    columns: Points,
    row_moves: Moves,
    column_moves: Moves,
    settings: dict[str, Any],
    gradient: Tensor | None,
    *,
    of_y: bool = False,
    extra: Tensor | None = None,
    row_shift: Tensor | None = None,
    column_shift: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    row_less: Tensor | None = None,
    column_less: Tensor | None = None,
) -> None:
    """Fill the second-order gradients of the rows' points (T, C), and `extra`."""
    arguments = {
        **sides(rows, columns, row="row", column="column"),
        "row_moves": row_moves.values,
        "row_dots": row_moves.dots,
        "column_moves": column_moves.values,
        "column_dots": column_moves.dots,
        "row_shift": row_shift,
        "column_shift": column_shift,
        "row_scale": row_scale,
        "column_scale": column_scale,
        "row_less": row_less,
        "column_less": column_less,
        "gradient": gradient,
        "extra": extra,
        "C": rows.channels,
        "OF_Y": of_y,
        **settings,
    }
    run(
        "double_backward",
        double_backward_kernel,
        rows,
        columns,
        arguments,
        slabs=gradient is not None,
    )
