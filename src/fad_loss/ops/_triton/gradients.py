"""From the reductions' gradients to launches of the kernels in `backward.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fad_loss.ops._triton import small
from fad_loss.ops._triton.backward import backward_kernel
from fad_loss.ops._triton.configurations import added, run
from fad_loss.ops._triton.double_backward import double_backward_kernel
from fad_loss.ops._triton.prepare import (
    Points,
    Rounding,
    flat,
    given,
    prepare,
    prepare_pair,
    sides,
)

Shape = Sequence[int] | None


def room(t: Tensor, gradient: Shape, extra: Shape) -> Callable[[int], dict[str, Tensor | None]]:
    """What makes room for the results of so many shares; None is not wanted."""

    def results(shares: int) -> dict[str, Tensor | None]:
        return {
            name: None if shape is None else t.new_empty((shares, *shape), dtype=torch.float32)
            for name, shape in (("gradient", gradient), ("extra", extra))
        }

    return results


def total_of(found: dict[str, Tensor | None], t: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over the shares; nothing for what was not wanted."""
    gradient, extra = (
        t.new_empty(0, dtype=torch.float32) if part is None else added(part)
        for part in (found["gradient"], found["extra"])
    )
    return gradient, extra


def backward(
    rows: Points,
    columns: Points,
    settings: dict[str, Any],
    gradient: Shape,
    extra: Shape,
    **values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of what the rows have: points, and weights or biases (`extra`), of shapes."""
    if gradient is None and extra is None:
        return total_of({"gradient": None, "extra": None}, rows.norms)
    arguments = {
        **sides(rows, columns, row="row", column="column"),
        **dict.fromkeys(("row_shift", "column_shift", "row_scale", "column_scale")),
        **values,
        **settings,
    }
    results = room(rows.norms, gradient, extra)
    slabs = gradient is not None
    exact = given(rows, columns, row="row", column="column")
    found = run(
        *("backward", backward_kernel, rows, columns, arguments, results),
        slabs=slabs,
        exact=exact,
    )
    return total_of(found, rows.norms)


def gradients_of(
    x: Tensor, y: Tensor, x_offsets: Tensor | None, y_offsets: Tensor | None
) -> tuple[Any, Any, Callable[..., tuple[Tensor, Tensor]]]:
    """Both sides, as what fills their gradients takes them."""
    if small.are_small(x, y, x_offsets):
        return x, y, small.backward
    return *prepare_pair(x, y, x_offsets, y_offsets), backward


class Moves:
    """Directions in which one side's points move, as the kernels want them; None does not move."""

    def __init__(self, points: Points, moves: Tensor | None) -> None:
        self.given = None if moves is None else flat(moves.float())
        self.values: Tensor | None = None
        self.dots: Tensor | None = None
        if self.given is not None:
            rounding = "" if points.direct else _ROUNDING[points.format.precision]
            form = replace(points.format, center=False, rounding=rounding)
            prepared = prepare(self.given, points.clouds, form)
            self.values = prepared.values
            self.dots = (points.whole() * prepared.whole()).sum(-1)


# Directions are rounded to the multiply's format, like points, if they are multiplied.
_ROUNDING: dict[str, Rounding] = {"tf32": "tf32", "tf32x2": "tf32", "bf16x6": ""}


def double_backward(
    rows: Points,
    columns: Points,
    row_moves: Moves,
    column_moves: Moves,
    settings: dict[str, Any],
    gradient: Shape,
    extra: Shape,
    *,
    of_y: bool = False,
    **values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The second-order gradients of the rows' points, and `extra`, of these shapes."""
    names = ("shift", "scale", "less")
    arguments = {
        **sides(rows, columns, row="row", column="column"),
        "row_moves": row_moves.values,
        "row_dots": row_moves.dots,
        "column_moves": column_moves.values,
        "column_dots": column_moves.dots,
        **{f"{side}_{name}": None for side in ("row", "column") for name in names},
        **values,
        "OF_Y": of_y,
        **settings,
    }
    results = room(rows.norms, gradient, extra)
    kernel, slabs = double_backward_kernel, gradient is not None
    exact = {
        **given(rows, columns, row="row", column="column"),
        "row_moves": row_moves.given,
        "column_moves": column_moves.given,
    }
    found = run(
        *("double_backward", kernel, rows, columns, arguments, results), slabs=slabs, exact=exact
    )
    return total_of(found, rows.norms)
