"""What the directions add in which points move, for second derivatives (`double_backward.py`)."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# Tuples grow in unrolled loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fad_loss.ops._triton.tiles import differences, load_values, products

# ruff: noqa: RUF005, because kernels cannot unpack tuples


@triton.jit
def directional(
    kept,
    kept_moves,
    tile,
    tile_moves,
    row,
    row_moves,
    column,
    column_moves,
    row_dots,
    column_dots,
    rows_left,
    columns_left,
    HAS_ROW: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta_ij of a tile; a side without directions does not move."""
    if DIRECT > 0:
        half = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for channel in tl.static_range(DIRECT):
            difference = differences(
                row + channel,
                column + channel,
                rows_left,
                columns_left,
                CHANNELS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
            )
            move = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            if HAS_ROW:
                u = load_values(row_moves + channel, rows_left, BLOCK_ROWS, CHANNELS, 0.0)
                move += u[:, None]
            if HAS_COLUMN:
                v = load_values(column_moves + channel, columns_left, BLOCK_COLUMNS, CHANNELS, 0.0)
                move -= v[None, :]
            half = tl.fma(difference, move, half)
    else:
        half = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        if HAS_ROW:
            half += row_dots[:, None]
            half -= products(
                kept_moves,
                tile,
                row_moves,
                column,
                rows_left,
                columns_left,
                CHANNELS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
                KEPT,
                PRECISION,
            )
        if HAS_COLUMN:
            half += column_dots[None, :]
            half -= products(
                kept,
                tile_moves,
                row,
                column_moves,
                rows_left,
                columns_left,
                CHANNELS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
                KEPT,
                PRECISION,
            )
    return 2.0 * half


@triton.jit
def minus_moves(
    weights,
    moves,
    left,
    totals,
    DIRECT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Subtract sum_j P_ij v_j from each of DIRECT channels."""
    new_totals = ()
    for channel in tl.static_range(DIRECT):
        v = load_values(moves + channel, left, BLOCK, CHANNELS, 0.0)
        new_totals = new_totals + (totals[channel] - tl.sum(weights * v[None, :], 1),)
    return new_totals
