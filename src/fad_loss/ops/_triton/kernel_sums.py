"""kernel_sum: sums of a kernel of the distances, tile by tile.

Tile: BLOCK_ROWS x BLOCK_COLUMNS. In registers: the tile and one sum for every row. Reread: the
columns (from L2), and the rows where their channels do not fit one block. Bandwidths in a ratio of
2 or of its root, sorted, cost one exponential together and two or one multiplications each.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fad_loss.ops._triton import small
from fad_loss.ops._triton.configurations import run
from fad_loss.ops._triton.gradients import Moves, double_backward, gradient_like, gradients_of
from fad_loss.ops._triton.launch import SIZES, on_device
from fad_loss.ops._triton.prepare import prepare_pair, sides
from fad_loss.ops._triton.tiles import hold, load_values, locate, squared_distances
from fad_loss.ops._triton.weights import evaluate, load_each
from fad_loss.ops.kernels import Energy, Gaussian, InverseMultiquadric, Kernel


@triton.jit(do_not_specialize=SIZES)
def kernel_sum_kernel(
    x,
    x_norms,
    y,
    y_norms,
    weights,
    out,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    rates,
    FAMILY: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RAGGED: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """out[i] = sum_j weights_j k(d_ij)."""
    _, row_start, rows, first, column_start, columns = locate(
        tl.program_id(0),
        row_offsets,
        column_offsets,
        rows_each,
        columns_each,
        clouds,
        search_steps,
        BLOCK_ROWS,
        RAGGED,
    )
    begin = row_start + first
    left = rows - first
    row = first + tl.arange(0, BLOCK_ROWS)
    x_base = x + begin * CHANNELS
    held = hold(x_base, left, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS, DIRECT)
    a = load_values(x_norms + begin, left, BLOCK_ROWS, 1, 0.0)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for j in range(0, columns, BLOCK_COLUMNS):
        at = column_start + j
        b = load_values(y_norms + at, columns - j, BLOCK_COLUMNS, 1, float("inf"))
        d = squared_distances(
            held,
            x_base,
            y + at * CHANNELS,
            a,
            b,
            left,
            columns - j,
            CHANNELS,
            DIRECT,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            PRECISION,
        )
        if EXCLUDE_SELF:
            column = j + tl.arange(0, BLOCK_COLUMNS)
            d = tl.where(row[:, None] == column[None, :], float("inf"), d)
        value, _first, _second = evaluate(d, rates, FAMILY, COUNT, LADDER)
        if weights is not None:
            w = load_each(weights, at, columns - j, 1, BLOCK_COLUMNS, 0.0)
            value *= w[0][None, :]
        total += tl.sum(value, 1)
    tl.store(out + begin + tl.arange(0, BLOCK_ROWS), total, tl.arange(0, BLOCK_ROWS) < left)


def family(kernel: Kernel) -> dict[str, Any]:
    """A kernel as the arguments FAMILY, COUNT, LADDER and rates."""
    rates: Sequence[float] = (0.0,)
    ladder = 0
    if isinstance(kernel, Gaussian):
        rates = sorted(0.5 / (h * h) for h in kernel.parameters)
        steps = {round(math.log2(b / a), 6) for a, b in pairwise(rates)}
        # Squaring doubles the relative error each time: at most 10 times, 1024 units of 6e-8.
        if steps in ({1.0}, {2.0}) and len(rates) * max(steps) <= 10:
            ladder = int(max(steps))
    elif isinstance(kernel, InverseMultiquadric):
        rates = (1.0 / kernel.parameters[0] ** 2,)
    elif not isinstance(kernel, Energy):
        rates = (1.0 / kernel.parameters[0],)
    return {"FAMILY": kernel.name, "COUNT": len(rates), "LADDER": ladder, "rates": tuple(rates)}


def kernel_sum(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    kernel: Kernel,
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> Tensor:
    """Sum over j of w_j k(d_ij)."""
    result = x.new_empty(x.shape[:-1], dtype=torch.float32)
    settings = {**family(kernel), "EXCLUDE_SELF": exclude_self}
    w = None if weights is None else weights.contiguous()
    with on_device(x):
        if small.are_small(x, y, x_offsets):
            small.reduce(x, y, w, settings, result)
            return result
        rows, columns = prepare_pair(x, y, x_offsets, y_offsets)
        arguments = {**sides(rows, columns), "weights": w, "out": result, **settings}
        run("reduce", kernel_sum_kernel, rows, columns, arguments)
    return result


def kernel_sum_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    kernel: Kernel,
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
    of_y: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, y and the weights."""
    with on_device(x):
        rows, columns, fill = gradients_of(x, y, x_offsets, y_offsets)
        settings = {**family(kernel), "EXCLUDE_SELF": exclude_self}
        w = None if weights is None else weights.contiguous()
        g = grad.contiguous()
        dx = gradient_like(x)
        fill(rows, columns, settings, dx, row_scale=g, column_scale=w)
        dy, dw = gradient_like(y, wanted=of_y), y.new_empty(0, dtype=torch.float32)
        if of_weights:
            dw = y.new_empty(y.shape[:-1], dtype=torch.float32)
        if of_y or of_weights:
            fill(
                columns,
                rows,
                settings,
                dy if of_y else None,
                extra=dw if of_weights else None,
                row_scale=w,
                column_scale=g,
            )
    return dx, dy, dw


def kernel_sum_double_backward(
    u: Tensor,
    v: Tensor | None,
    t: Tensor | None,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    kernel: Kernel,
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of S = <u, dx> + <v, dy> + <t, dw> by the incoming gradient, x, y and weights."""
    with on_device(x):
        rows, columns = prepare_pair(x, y, x_offsets, y_offsets, wide=True)
        of_x, of_y = Moves(rows, u), Moves(columns, v)
        settings = {**family(kernel), "EXCLUDE_SELF": exclude_self}
        w = None if weights is None else weights.contiguous()
        g = grad.contiguous()
        t = None if t is None else t.contiguous()
        dgrad, dw = gradient_like(grad), y.new_empty(y.shape[:-1], dtype=torch.float32)
        dx, dy = gradient_like(x), gradient_like(y)
        double_backward(
            rows,
            columns,
            of_x,
            of_y,
            settings,
            dx,
            extra=dgrad,
            row_scale=g,
            column_scale=w,
            column_less=t,
        )
        double_backward(
            columns,
            rows,
            of_y,
            of_x,
            settings,
            dy,
            of_y=True,
            extra=dw,
            row_scale=w,
            column_scale=g,
            row_less=t,
        )
    return dgrad, dx, dy, dw
