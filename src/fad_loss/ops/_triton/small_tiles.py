"""The tile of small clouds (`small.py`): points as they come, and all distances of a few rows."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from fad_loss.ops._triton.exact import exact_distances, near_rows
from fad_loss.ops._triton.launch import INTERPRETED
from fad_loss.ops._triton.tiles import (
    add_product,
    in_parts,
    squared_distances,
    to_tf32,
    with_own,
)

# Channels of all pairs of a tile that are in registers together.
FEW = tl.constexpr(64 if INTERPRETED else 2)


@triton.jit
def centered(
    x,
    y,
    rows,
    columns,
    channel,
    C: tl.constexpr,
    CENTER: tl.constexpr,
    ROUNDING: tl.constexpr,
    STORAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """BLOCK_CHANNELS channels of the rows and of all columns, as `prepare_kernel` leaves them."""
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    channels = channel + tl.arange(0, BLOCK_CHANNELS)
    present = (channels < C)[None, :]
    inside = (column < columns)[:, None] & present
    own = x + (row[:, None] * C + channels[None, :])
    left = tl.load(own, (row < rows)[:, None] & present, 0.0).to(tl.float32)
    right = tl.load(y + (column[:, None] * C + channels[None, :]), inside, 0.0).to(tl.float32)
    if CENTER:
        mean = tl.sum(right, 0) / tl.maximum(columns, 1).to(tl.float32)
        left -= mean[None, :]
        right = tl.where(inside, right - mean[None, :], 0.0)
    if ROUNDING == "tf32":
        left = to_tf32(left)
        right = to_tf32(right)
    if ROUNDING == "bf16":
        left = left.to(tl.bfloat16).to(tl.float32)
        right = right.to(tl.bfloat16).to(tl.float32)
    return left.to(STORAGE), right.to(STORAGE)


@triton.jit
def stored(points, PART: tl.constexpr, PRECISION: tl.constexpr):
    """Points in their parts (`tiles.load_parts`), which are of the dtype PART."""
    result = (points,)
    if PRECISION == "bf16x6":
        result = in_parts(points, tl.zeros((1,), PART), 3)
    return result


@triton.jit
def distances(
    x,
    y,
    rows,
    columns,
    first,
    scale,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    CLOSE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    SAME: tl.constexpr,
    CENTER: tl.constexpr,
    ROUNDING: tl.constexpr,
    STORAGE: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """d_ij of a tile, and whether a pair is near (0 or 1): then all are from differences.

    +inf after the last column, and, EXCLUDE_SELF, for a point and itself.
    """
    a = tl.zeros((BLOCK_ROWS,), tl.float32)
    b = tl.where(tl.arange(0, BLOCK_COLUMNS) < columns, 0.0, float("inf"))
    if DIRECT > 0:
        d = squared_distances(
            (),
            (),
            x,
            y,
            a,
            b,
            rows,
            columns,
            first,
            C,
            DIRECT,
            EXCLUDE_SELF,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            0,
            PRECISION,
        )
        some = 0
    else:
        s = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        rest = s
        for channel in range(0, CHANNELS, BLOCK_CHANNELS):
            left, right = centered(
                x,
                y,
                rows,
                columns,
                channel,
                C,
                CENTER,
                ROUNDING,
                STORAGE,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
            )
            lefts = stored(left, PART, PRECISION)
            rights = stored(right, PART, PRECISION)
            s, rest = add_product(lefts, rights, s, rest, PRECISION)
            left = left.to(tl.float32)
            right = right.to(tl.float32)
            a += tl.sum(left * left, 1)
            b += tl.sum(right * right, 1)
        if PRECISION == "bf16x6":
            s += rest
        d = (a[:, None] + b[None, :]) - 2.0 * s
        d = tl.maximum(d, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if EXCLUDE_SELF or SAME:
            d = with_own(d, first, float("inf"), BLOCK_ROWS, BLOCK_COLUMNS)
        some = tl.max(near_rows(d, a, b, scale, CLOSE), 0)
        if some > 0:
            d = exact_distances(x, y, rows, columns, C, BLOCK_ROWS, BLOCK_COLUMNS, FEW)
            if EXCLUDE_SELF:
                d = with_own(d, first, float("inf"), BLOCK_ROWS, BLOCK_COLUMNS)
        elif SAME:
            d = with_own(d, first, 0.0, BLOCK_ROWS, BLOCK_COLUMNS)
    return d, some
