r"""What a product does not resolve is computed once more, from differences.

|x|^2 + |y|^2 - 2 xy errs by some roundings of the norms, however small the distance is, and so does
2 (sum_j W_ij) x_i - 2 sum_j W_ij y_j. What is promised is that of `_tiled/distances.py`: a distance
is off by at most t = 2^-14 of itself, or of the scale that the function of it resolves; a gradient
by t of the pulls that it adds up. A pair for which the product may not keep that is *near*.

Every kernel flags the rows that have a near pair, which costs a comparison for each pair, and the
same kernel follows with EXACT, by which it sums differences of the points as they were given: it
computes the flagged rows anew, and ends at once where there are none. So the loops over products
have their registers for themselves, and nobody waits to learn whether there is something to do.
Rows are flagged for each share of the columns, whose results are apart. Where x and y are one set a
point is not near itself: that distance is 0, and it pulls nothing.

A tile of rows that is computed anew takes some ten times as long.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from fad_loss.ops._triton.tiles import load_values, squared_distances, with_own


@triton.jit
def rows_to_do(flags, left, start, end, EXACT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Which rows are this program's to compute, and the end of its columns."""
    wanted = tl.arange(0, BLOCK_ROWS) < left
    if EXACT:
        wanted = wanted & (load_values(flags, left, BLOCK_ROWS, 1, 0) > 0)
        end = tl.where(tl.max(wanted.to(tl.int32), 0) > 0, end, start)
    return wanted, end


@triton.jit
def measured(
    kept,
    tile,
    x,
    y,
    a,
    b,
    rows_left,
    columns_left,
    apart,
    scale,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    EXACT: tl.constexpr,
    CLOSE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_ij of a tile, and which of its rows have a near pair (0 or 1)."""
    flags = tl.zeros((BLOCK_ROWS,), tl.int32)
    if EXACT:
        d = exact_distances(
            x, y, rows_left, columns_left, C, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_CHANNELS
        )
        if EXCLUDE_SELF:
            d = with_own(d, apart, float("inf"), BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        d = squared_distances(
            kept,
            tile,
            x,
            y,
            a,
            b,
            rows_left,
            columns_left,
            apart,
            CHANNELS,
            DIRECT,
            EXCLUDE_SELF or SAME,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            KEPT,
            PRECISION,
        )
        if DIRECT == 0:
            flags = near_rows(d, a, b, scale, CLOSE)
        if SAME:
            d = with_own(d, apart, 0.0, BLOCK_ROWS, BLOCK_COLUMNS)
    return d, flags


@triton.jit
def near_rows(d, a, b, scale, CLOSE: tl.constexpr):
    """Which rows have a near pair (0 or 1), for points of squared norms a and b.

    A pair is near if d_ij < CLOSE (a_i + b_j), and the right side is larger than the scale; by the
    largest b_j, so that a pair costs a subtraction and a minimum.
    """
    share = CLOSE * tl.where(b < float("inf"), b, 0.0)
    own = CLOSE * a
    near = tl.min(d - share[None, :], 1) < own
    return (near & (own + tl.max(share, 0) > scale)).to(tl.int32)


@triton.jit
def load_channels(
    base, left, channel, C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """BLOCK points, BLOCK_CHANNELS of their C channels, in float32; zeros for what is not there."""
    point = tl.arange(0, BLOCK)
    channels = channel + tl.arange(0, BLOCK_CHANNELS)
    inside = (point < left)[:, None] & (channels < C)[None, :]
    return tl.load(base + (point[:, None] * C + channels[None, :]), inside, 0.0).to(tl.float32)


@triton.jit
def load_differences(
    x,
    y,
    rows_left,
    columns_left,
    channel,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """x_i - y_j of a tile in BLOCK_CHANNELS channels."""
    left = load_channels(x, rows_left, channel, C, BLOCK_ROWS, BLOCK_CHANNELS)
    right = load_channels(y, columns_left, channel, C, BLOCK_COLUMNS, BLOCK_CHANNELS)
    return left[:, None, :] - right[None, :, :]


@triton.jit
def exact_distances(
    x,
    y,
    rows_left,
    columns_left,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """d_ij of a tile; +inf after the last column."""
    last = tl.where(tl.arange(0, BLOCK_COLUMNS) < columns_left, 0.0, float("inf"))
    d = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32) + last[None, :]
    for channel in range(0, C, BLOCK_CHANNELS):
        difference = load_differences(
            x,
            y,
            rows_left,
            columns_left,
            channel,
            C,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
        )
        d += tl.sum(difference * difference, 2)
    return d


@triton.jit
def exact_directional(
    x,
    y,
    x_moves,
    y_moves,
    rows_left,
    columns_left,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """delta_ij = 2 (x_i - y_j) . (u_i - v_j) of a tile; a side without moves does not move."""
    half = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for channel in range(0, C, BLOCK_CHANNELS):
        difference = load_differences(
            x,
            y,
            rows_left,
            columns_left,
            channel,
            C,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
        )
        move = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_CHANNELS), tl.float32)
        if x_moves is not None:
            u = load_channels(x_moves, rows_left, channel, C, BLOCK_ROWS, BLOCK_CHANNELS)
            move += u[:, None, :]
        if y_moves is not None:
            v = load_channels(y_moves, columns_left, channel, C, BLOCK_COLUMNS, BLOCK_CHANNELS)
            move -= v[None, :, :]
        half += tl.sum(difference * move, 2)
    return 2.0 * half


@triton.jit
def exact_pulls(
    weights,
    x,
    y,
    rows_left,
    columns_left,
    channel,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """sum_j W_ij (x_i - y_j) over a tile in BLOCK_CHANNELS channels."""
    difference = load_differences(
        x,
        y,
        rows_left,
        columns_left,
        channel,
        C,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_CHANNELS,
    )
    return tl.sum(weights[:, :, None] * difference, 1)


@triton.jit
def add_pulls(
    weights,
    move_weights,
    target,
    wanted,
    before,
    x,
    y,
    x_moves,
    y_moves,
    rows_left,
    columns_left,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Add what a tile pulls to the wanted rows of the target, where there may be numbers `before`.

    sum_j W_ij (x_i - y_j), and for moves sum_j P_ij (u_i - v_j). All channels of a row are more
    than registers hold.
    """
    point = tl.arange(0, BLOCK_ROWS)
    for channel in range(0, C, BLOCK_CHANNELS):
        total = exact_pulls(
            weights,
            x,
            y,
            rows_left,
            columns_left,
            channel,
            C,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
        )
        if x_moves is not None:
            u = load_channels(x_moves, rows_left, channel, C, BLOCK_ROWS, BLOCK_CHANNELS)
            total += tl.sum(move_weights, 1)[:, None] * u
        if y_moves is not None:
            v = load_channels(y_moves, columns_left, channel, C, BLOCK_COLUMNS, BLOCK_CHANNELS)
            total -= tl.sum(move_weights[:, :, None] * v[None, :, :], 1)
        channels = channel + tl.arange(0, BLOCK_CHANNELS)
        inside = wanted[:, None] & (channels < C)[None, :]
        place = target + (point[:, None] * C + channels[None, :])
        total += tl.load(place, tl.where(inside, before, 0) > 0, 0.0)
        tl.store(place, total, inside)
    # What comes next to these sums may be other threads'.
    tl.debug_barrier()


@triton.jit
def scale_pulls(
    target,
    wanted,
    before,
    factor,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Multiply wanted rows of the target by a factor each; 0 without numbers `before`."""
    point = tl.arange(0, BLOCK_ROWS)
    for channel in range(0, C, BLOCK_CHANNELS):
        channels = channel + tl.arange(0, BLOCK_CHANNELS)
        inside = wanted[:, None] & (channels < C)[None, :]
        place = target + (point[:, None] * C + channels[None, :])
        total = tl.load(place, tl.where(inside, before, 0) > 0, 0.0)
        tl.store(place, total * factor[:, None], inside)
