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
from fad_loss.ops._triton.configurations import added, run
from fad_loss.ops._triton.exact import measured, rows_to_do
from fad_loss.ops._triton.gradients import Moves, double_backward, gradients_of
from fad_loss.ops._triton.launch import SIZES, on_device
from fad_loss.ops._triton.prepare import given, prepare_pair, sides
from fad_loss.ops._triton.tiles import hold, load_values, locate, share
from fad_loss.ops._triton.weights import evaluate, load_each
from fad_loss.ops.kernels import Energy, Gaussian, InverseMultiquadric, Kernel


@triton.jit(do_not_specialize=SIZES)
def kernel_sum_kernel(
    x,
    x_norms,
    y,
    y_norms,
    flags,
    scale,
    weights,
    out,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    splits,
    rows_total,
    rates,
    FAMILY: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RAGGED: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    EXACT: tl.constexpr,
    CLOSE: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
    SHARED: tl.constexpr,
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
    STRIDE: tl.constexpr = CHANNELS * (3 if PRECISION == "bf16x6" else 1)
    x_base = x + begin * STRIDE
    kept = hold(x_base, left, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS, KEPT, PRECISION)
    a = load_values(x_norms + begin, left, BLOCK_ROWS, 1, 0.0)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    start, end, moved = share(columns, splits, rows_total, SHARED)
    flags += begin + moved
    wanted, end = rows_to_do(flags, left, start, end, EXACT, BLOCK_ROWS)
    flagged = tl.zeros((BLOCK_ROWS,), tl.int32)
    for j in range(start, end, BLOCK_COLUMNS):
        at = column_start + j
        y_base = y + at * STRIDE
        b = load_values(y_norms + at, end - j, BLOCK_COLUMNS, 1, float("inf"))
        tile = hold(y_base, end - j, CHANNELS, BLOCK_COLUMNS, BLOCK_CHANNELS, KEPT, PRECISION)
        d, near = measured(
            kept,
            tile,
            x_base,
            y_base,
            a,
            b,
            left,
            end - j,
            first - j,
            scale,
            C,
            CHANNELS,
            DIRECT,
            EXACT,
            CLOSE,
            EXCLUDE_SELF,
            SAME,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            KEPT,
            PRECISION,
        )
        flagged = tl.maximum(flagged, near)
        value, _first, _second = evaluate(d, rates, FAMILY, COUNT, LADDER)
        if weights is not None:
            w = load_each(weights, at, end - j, 1, BLOCK_COLUMNS, 0.0)
            value *= w[0][None, :]
        total += tl.sum(value, 1)
    point = tl.arange(0, BLOCK_ROWS)
    tl.store(out + (begin + moved) + point, total, wanted)
    if DIRECT == 0 and not EXACT:
        tl.store(flags + point, flagged.to(tl.int8), wanted)


def family(kernel: Kernel) -> dict[str, Any]:
    """A kernel as the arguments FAMILY, COUNT, LADDER, rates and scale."""
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
    return {
        "FAMILY": kernel.name,
        "COUNT": len(rates),
        "LADDER": ladder,
        "rates": tuple(rates),
        "scale": kernel.scale,
    }


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
    settings = {**family(kernel), "EXCLUDE_SELF": exclude_self}
    w = None if weights is None else weights.contiguous()

    def results(shares: int) -> dict[str, Tensor]:
        return {"out": x.new_empty((shares, *x.shape[:-1]), dtype=torch.float32)}

    with on_device(x):
        if small.are_small(x, y, x_offsets):
            total = results(1)["out"]
            small.reduce(x, y, w, settings, total)
        else:
            rows, columns = prepare_pair(x, y, x_offsets, y_offsets)
            arguments = {**sides(rows, columns), "weights": w, **settings}
            total = run(
                *("reduce", kernel_sum_kernel, rows, columns, arguments, results),
                exact=given(rows, columns),
            )["out"]
        return added(total)


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
        dx, _ = fill(rows, columns, settings, x.shape, None, row_scale=g, column_scale=w)
        shapes = y.shape if of_y else None, y.shape[:-1] if of_weights else None
        dy, dw = fill(columns, rows, settings, *shapes, row_scale=w, column_scale=g)
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
        dx, dgrad = double_backward(
            *(rows, columns, of_x, of_y, settings, x.shape, grad.shape),
            row_scale=g,
            column_scale=w,
            column_less=t,
        )
        dy, dw = double_backward(
            *(columns, rows, of_y, of_x, settings, y.shape, y.shape[:-1]),
            of_y=True,
            row_scale=w,
            column_scale=g,
            row_less=t,
        )
    return dgrad, dx, dy, dw
