r"""The gradients of the smooth reductions: a recomputed tile of weights times the other points.

With W_ij = dL/d(d_ij), dx_i = 2 (sum_j W_ij) x_i - 2 sum_j W_ij y_j. Gradients of y come from the
same kernel with the roles of x and y exchanged: a program always owns rows and nobody else writes
them, so there are no atomics and the result is repeatable. The second derivatives need two weights,
with delta_ij = 2 (x_i - y_j) . (u_i - v_j) for directions u and v:
A_ij for the points, and P_ij for the directions (`double_backward.py`).

Tile: BLOCK_ROWS x BLOCK_COLUMNS. In registers: the tile, and SLAB channels of the rows' gradient;
more channels than SLAB are other programs, which recompute the tile. Reread: the columns (from L2),
once for the distances and once for the product, or once in all where they fit one block.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from fad_loss.ops._triton.launch import SIZES
from fad_loss.ops._triton.tiles import (
    hold,
    load_points,
    load_values,
    locate,
    rounded,
    squared_distances,
)
from fad_loss.ops._triton.weights import load_each, weigh, zeros_each


@triton.jit
def multiply(
    weights,
    base,
    left,
    channel,
    total,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add weights @ (SLAB channels of the columns); also the weights' sums, as multiplied."""
    points = load_points(base, left, channel, CHANNELS, BLOCK, SLAB)
    if points.dtype == tl.float16:
        # The range of weights is wider than that of float16; tf32 holds both.
        points = points.to(tl.float32)
    weights = rounded(weights, points, PRECISION)
    total = tl.dot(weights, points, total, input_precision=PRECISION)
    return total, tl.sum(weights.to(tl.float32), 1)


@triton.jit
def store_each(base, first, left, values, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Store COUNT numbers of each of BLOCK points."""
    point = tl.arange(0, BLOCK)
    for e in tl.static_range(COUNT):
        tl.store(base + first * COUNT + (point * COUNT + e), values[e], point < left)


@triton.jit
def store_gradient(
    base, first, left, channel, values, C: tl.constexpr, BLOCK: tl.constexpr, SLAB: tl.constexpr
):
    """Store SLAB channels of the gradient of BLOCK points, (T, C)."""
    point = tl.arange(0, BLOCK)
    channels = channel + tl.arange(0, SLAB)
    inside = (point < left)[:, None] & (channels < C)[None, :]
    tl.store(base + first * C + (point[:, None] * C + channels[None, :]), values, inside)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    row,
    row_norms,
    column,
    column_norms,
    row_shift,
    column_shift,
    row_scale,
    column_scale,
    gradient,
    extra,
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
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
):
    """Gradient of the rows' points and, if `extra` is there, of the rows' weights or biases.

    softmin: W = sum_e exp((row_shift + column_shift - d) rate) scale, where the scale is the
    incoming gradient, on whichever side is x. Kernels: W = k'(d) row_scale column_scale.
    """
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
    own_number = first + tl.arange(0, BLOCK_ROWS)
    base = row + begin * CHANNELS
    slab = tl.program_id(1) * SLAB
    held = hold(base, left, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS, DIRECT)
    a = load_values(row_norms + begin, left, BLOCK_ROWS, 1, 0.0)
    SOFTMIN: tl.constexpr = FAMILY == "softmin"
    VALUES: tl.constexpr = COUNT if SOFTMIN else 1
    row_shifts = load_each(row_shift, begin, left, VALUES, BLOCK_ROWS, float("-inf"))
    row_scales = load_each(row_scale, begin, left, VALUES, BLOCK_ROWS, 0.0)
    extras = zeros_each(VALUES, BLOCK_ROWS)
    sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, SLAB), tl.float32)
    for j in range(0, columns, BLOCK_COLUMNS):
        at = column_start + j
        remaining = columns - j
        b = load_values(column_norms + at, remaining, BLOCK_COLUMNS, 1, float("inf"))
        d = squared_distances(
            held,
            base,
            column + at * CHANNELS,
            a,
            b,
            left,
            remaining,
            CHANNELS,
            DIRECT,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            PRECISION,
        )
        if EXCLUDE_SELF:
            number = j + tl.arange(0, BLOCK_COLUMNS)
            d = tl.where(own_number[:, None] == number[None, :], float("inf"), d)
        scales = load_each(column_scale, at, remaining, VALUES, BLOCK_COLUMNS, 0.0)
        weights, new_extras = weigh(
            d,
            row_shifts,
            load_each(column_shift, at, remaining, VALUES, BLOCK_COLUMNS, 0.0),
            row_scales,
            scales,
            extras,
            rates,
            FAMILY,
            COUNT,
            LADDER,
            row_shift is not None,
            column_shift is not None,
            row_scale is not None,
            column_scale is not None,
            extra is not None,
        )
        if extra is not None:
            extras = new_extras
        if gradient is not None:
            total, part = multiply(
                weights,
                column + at * CHANNELS,
                remaining,
                slab,
                total,
                CHANNELS,
                BLOCK_COLUMNS,
                SLAB,
                PRECISION,
            )
            sums += part
    if gradient is not None:
        own = load_points(base, left, slab, CHANNELS, BLOCK_ROWS, SLAB).to(tl.float32)
        result = 2.0 * (sums[:, None] * own - total)
        if not SOFTMIN and row_scale is not None:
            result *= row_scales[0][:, None]
        store_gradient(gradient, begin, left, slab, result, C, BLOCK_ROWS, SLAB)
    if extra is not None:  # noqa: SIM102, because only the first condition is known to the compiler
        if slab == 0:
            store_each(extra, begin, left, extras, VALUES, BLOCK_ROWS)
