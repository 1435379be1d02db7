r"""The gradients of the smooth reductions: a recomputed tile of weights times the other points.

With W_ij = dL/d(d_ij), dx_i = 2 (sum_j W_ij) x_i - 2 sum_j W_ij y_j; where there are few
channels, or rows are computed anew (`exact.py`), what each pair pulls is added up. Gradients of y
come from the same kernel with the roles of x and y exchanged: a program always owns rows and
nobody else writes them, so there are no atomics and the result is repeatable. The second
derivatives need two weights, with delta_ij = 2 (x_i - y_j) . (u_i - v_j) for directions u and v:
A_ij for the points, and P_ij for the directions (`double_backward.py`).

Tile: BLOCK_ROWS x BLOCK_COLUMNS. In registers: the tile, and the rows' gradient. Up to KEPT
channels one program has all of them, and reads the columns once, for the distances and the product.
Of wider points it has SLAB channels; the others are other programs', which recompute the tile, and
columns are read twice (from L2).
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# Tuples grow in unrolled loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fad_loss.ops._triton.exact import add_pulls, measured, rows_to_do, scale_pulls
from fad_loss.ops._triton.launch import SIZES
from fad_loss.ops._triton.tiles import (
    add_pulled,
    differences,
    hold,
    load_parts,
    load_values,
    load_whole,
    locate,
    parts_of_weights,
    share,
    sum_of_parts,
    with_own,
)
from fad_loss.ops._triton.weights import load_each, weigh, zeros_each

# ruff: noqa: C901, PLR0912, PLR0915, RUF005, because a kernel is one function that cannot unpack


@triton.jit
def multiply(
    weights,
    tile,
    base,
    left,
    channel,
    totals,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add weights @ columns to each block of channels; also the weights' sum, as multiplied.

    The columns are those of the tile, or else SLAB channels from `channel` on, which are read.
    """
    if CHANNELS <= KEPT:
        blocks = tile
    else:
        blocks = (load_parts(base, left, channel, CHANNELS, BLOCK, SLAB, PRECISION),)
    pieces = parts_of_weights(weights, blocks[0][0], PRECISION)
    new_totals = ()
    for i in tl.static_range(CHANNELS // SLAB if CHANNELS <= KEPT else 1):
        new_totals = new_totals + (add_pulled(pieces, blocks[i], totals[i], PRECISION),)
    return new_totals, sum_of_parts(pieces)


@triton.jit
def pull_apart(
    weights,
    x,
    y,
    rows_left,
    columns_left,
    totals,
    DIRECT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Add sum_j W_ij (x_i - y_j) to each of DIRECT channels."""
    new_totals = ()
    for channel in tl.static_range(DIRECT):
        difference = differences(
            x + channel, y + channel, rows_left, columns_left, CHANNELS, BLOCK_ROWS, BLOCK_COLUMNS
        )
        new_totals = new_totals + (totals[channel] + tl.sum(weights * difference, 1),)
    return new_totals


@triton.jit
def zeros_of_channels(
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Zeros for each block of channels that a program has, or, DIRECT, for each channel."""
    totals = ()
    if DIRECT > 0:
        totals = zeros_each(DIRECT, BLOCK)
    else:
        for _ in tl.static_range(CHANNELS // SLAB if CHANNELS <= KEPT else 1):
            totals = totals + (tl.zeros((BLOCK, SLAB), tl.float32),)
    return totals


@triton.jit
def store_values(base, left, values, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """Store one number for each of BLOCK points."""
    point = tl.arange(0, BLOCK)
    tl.store(base + point * STRIDE, values, point < left)


@triton.jit
def store_each(base, first, wanted, values, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Store COUNT numbers of each of BLOCK points that is wanted."""
    point = tl.arange(0, BLOCK)
    for e in tl.static_range(COUNT):
        tl.store(base + first * COUNT + (point * COUNT + e), values[e], wanted)


@triton.jit
def store_gradient(
    base, left, channel, values, C: tl.constexpr, BLOCK: tl.constexpr, SLAB: tl.constexpr
):
    """Store SLAB channels of the gradient of BLOCK points, (T, C)."""
    point = tl.arange(0, BLOCK)
    channels = channel + tl.arange(0, SLAB)
    inside = (point < left)[:, None] & (channels < C)[None, :]
    tl.store(base + (point[:, None] * C + channels[None, :]), values, inside)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    row,
    row_norms,
    column,
    column_norms,
    flags,
    scale,
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
    SLAB: tl.constexpr,
    KEPT: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Gradient of the rows' points and, if `extra` is there, of the rows' weights or biases.

    softmin: W = sum_e exp((row_shift + column_shift - d) rate) scale, where the scale is the
    incoming gradient, divided by the total, on whichever side is x. Kernels:
    W = k'(d) row_scale column_scale.
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
    STRIDE: tl.constexpr = CHANNELS * (3 if PRECISION == "bf16x6" else 1)
    base = row + begin * STRIDE
    slab = tl.program_id(1) * SLAB
    kept = hold(base, left, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS, KEPT, PRECISION)
    a = load_values(row_norms + begin, left, BLOCK_ROWS, 1, 0.0)
    SOFTMIN: tl.constexpr = FAMILY == "softmin"
    VALUES: tl.constexpr = COUNT if SOFTMIN else 1
    row_shifts = load_each(row_shift, begin, left, VALUES, BLOCK_ROWS, float("-inf"))
    row_scales = load_each(row_scale, begin, left, VALUES, BLOCK_ROWS, 0.0)
    extras = zeros_each(VALUES, BLOCK_ROWS)
    sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    totals = zeros_of_channels(CHANNELS, DIRECT, BLOCK_ROWS, SLAB, KEPT)
    seen = tl.zeros((), tl.int32)
    start, end, moved = share(columns, splits, rows_total, SHARED)
    flags += begin + moved
    wanted, end = rows_to_do(flags, left, start, end, EXACT, BLOCK_ROWS)
    flagged = tl.zeros((BLOCK_ROWS,), tl.int32)
    for j in range(start, end, BLOCK_COLUMNS):
        at = column_start + j
        remaining = end - j
        column_base = column + at * STRIDE
        tile = hold(
            column_base, remaining, CHANNELS, BLOCK_COLUMNS, BLOCK_CHANNELS, KEPT, PRECISION
        )
        b = load_values(column_norms + at, remaining, BLOCK_COLUMNS, 1, float("inf"))
        d, near = measured(
            kept,
            tile,
            base,
            column_base,
            a,
            b,
            left,
            remaining,
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
            if EXACT:
                add_pulls(
                    weights,
                    weights,
                    gradient + (begin + moved) * C,
                    wanted,
                    seen,
                    base,
                    column_base,
                    None,
                    None,
                    left,
                    remaining,
                    C,
                    BLOCK_ROWS,
                    BLOCK_COLUMNS,
                    BLOCK_CHANNELS,
                )
                seen += 1
            elif DIRECT > 0:
                totals = pull_apart(
                    weights,
                    base,
                    column_base,
                    left,
                    remaining,
                    totals,
                    DIRECT,
                    CHANNELS,
                    BLOCK_ROWS,
                    BLOCK_COLUMNS,
                )
            else:
                if SAME:
                    weights = with_own(weights, first - j, 0.0, BLOCK_ROWS, BLOCK_COLUMNS)
                totals, part = multiply(
                    weights,
                    tile,
                    column_base,
                    remaining,
                    slab,
                    totals,
                    CHANNELS,
                    BLOCK_COLUMNS,
                    SLAB,
                    KEPT,
                    PRECISION,
                )
                sums += part
    if gradient is not None:
        target = gradient + (begin + moved) * C
        factor = tl.full((BLOCK_ROWS,), 2.0, tl.float32)
        if not SOFTMIN and row_scale is not None:
            factor *= row_scales[0]
        if EXACT:
            scale_pulls(target, wanted, seen, factor, C, BLOCK_ROWS, BLOCK_CHANNELS)
        elif DIRECT > 0:
            for channel in tl.static_range(DIRECT):
                store_values(target + channel, left, totals[channel] * factor, BLOCK_ROWS, C)
        else:
            for i in tl.static_range(CHANNELS // SLAB if CHANNELS <= KEPT else 1):
                channel = slab + i * SLAB
                own = load_whole(base, left, channel, CHANNELS, BLOCK_ROWS, SLAB, PRECISION)
                result = (sums[:, None] * own - totals[i]) * factor[:, None]
                store_gradient(target, left, channel, result, C, BLOCK_ROWS, SLAB)
    if slab == 0:
        if extra is not None:
            store_each(extra, begin + moved, wanted, extras, VALUES, BLOCK_ROWS)
        if DIRECT == 0 and not EXACT:
            tl.store(flags + tl.arange(0, BLOCK_ROWS), flagged.to(tl.int8), wanted)
