"""What every kernel shares: which tile a program computes, and the squared distances on it.

A program owns BLOCK_ROWS points of one cloud (its rows) and walks over the points of the other
cloud (its columns), BLOCK_COLUMNS at a time. Points come prepared (`prepare.py`): row-major,
channels padded with zeros to CHANNELS, so that every row starts on a 64-byte boundary and copies
are asynchronous. Up to KEPT channels the rows stay in registers or shared memory for the whole
walk, in blocks of BLOCK_CHANNELS, and each tile of columns is read once, also where a product with
it follows; wider points are reread block by block, from L2.

Where there are too few tiles of rows for all processors, each is walked over by several programs,
each of which takes a share of the columns (`share`) and writes results of its own, which a second
pass brings together in a fixed order.

Offsets: a scalar int64 moves a base pointer to the first point of a tile, and int32 offsets,
bounded by the size of a tile, address within it. Nothing else is ever added to a pointer.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# Tuples grow in unrolled loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fad_loss.ops._triton.launch import INTERPRETED

# ruff: noqa: RUF005, because kernels cannot unpack tuples

# The interpreter multiplies the bit patterns of bfloat16; its values fit float32 as well.
PART_OF_HALF = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def locate(
    tile,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Where the tile lies: cloud, start of its rows and columns (int64), their counts, first row.

    Ragged clouds need no schedule computed beforehand: cloud b gets the slots from
    ``offsets[b] // BLOCK + b``, which is never fewer than its tiles, so a binary search over the
    offsets finds the cloud; a slot that is left over has no rows.
    """
    if RAGGED:
        low = tile * 0
        high = low + clouds - 1
        for _ in range(search_steps):
            middle = (low + high + 1) // 2
            reached = tl.load(row_offsets + middle) // BLOCK + middle <= tile
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
        cloud = low
        row_start = tl.load(row_offsets + cloud).to(tl.int64)
        rows = (tl.load(row_offsets + cloud + 1) - row_start).to(tl.int32)
        column_start = tl.load(column_offsets + cloud).to(tl.int64)
        columns = (tl.load(column_offsets + cloud + 1) - column_start).to(tl.int32)
        first = (tile - (row_start // BLOCK).to(tl.int32) - cloud) * BLOCK
        columns = tl.where(first < rows, columns, 0)
    else:
        tiles_each = tl.cdiv(rows_each, BLOCK)
        cloud = tile // tiles_each
        row_start = cloud.to(tl.int64) * rows_each
        rows = rows_each
        column_start = cloud.to(tl.int64) * columns_each
        columns = columns_each
        first = (tile - cloud * tiles_each) * BLOCK
    return cloud, row_start, rows, first, column_start, columns


@triton.jit
def share(columns, splits, rows_total, BLOCK: tl.constexpr):
    """The columns of this program, from and to (the end of the last tile), and where results go.

    The last is a number to add to the first row: the results of the shares lie one after another.
    """
    split = tl.program_id(2)
    each = tl.cdiv(tl.cdiv(columns, BLOCK), splits) * BLOCK
    start = split * each
    return start, tl.minimum(start + each, columns), split.to(tl.int64) * rows_total


@triton.jit
def load_points(
    base,
    left,
    channel,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """BLOCK points from `base` on, BLOCK_CHANNELS of their channels; zeros after the last point."""
    point = tl.arange(0, BLOCK)
    channels = channel + tl.arange(0, BLOCK_CHANNELS)
    inside = (point < left)[:, None]
    if CHANNELS % BLOCK_CHANNELS != 0:
        inside = inside & (channels < CHANNELS)[None, :]
    return tl.load(base + (point[:, None] * STRIDE + channels[None, :]), mask=inside, other=0.0)


@triton.jit
def load_parts(
    base,
    left,
    channel,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The parts that the points are stored in (`prepare.py`): three, or the points themselves."""
    PARTS: tl.constexpr = 3 if PRECISION == "bf16x6" else 1
    result = ()
    for part in tl.static_range(PARTS):
        own = base + part * CHANNELS
        points = load_points(own, left, channel, CHANNELS, PARTS * CHANNELS, BLOCK, BLOCK_CHANNELS)
        result = result + (points,)
    return result


@triton.jit
def load_whole(
    base,
    left,
    channel,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum of the parts, in float32."""
    pieces = load_parts(base, left, channel, CHANNELS, BLOCK, BLOCK_CHANNELS, PRECISION)
    total = pieces[0].to(tl.float32)
    for part in tl.static_range(1, len(pieces)):
        total += pieces[part].to(tl.float32)
    return total


@triton.jit
def load_values(base, left, BLOCK: tl.constexpr, STRIDE: tl.constexpr, other):
    """One number for each of BLOCK points from `base` on; `other` after the last point."""
    point = tl.arange(0, BLOCK)
    return tl.load(base + point * STRIDE, mask=point < left, other=other)


@triton.jit
def hold(
    base,
    left,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The blocks of points that stay, each in all its parts, if there is room for all, or none."""
    blocks = ()
    if CHANNELS <= KEPT:
        for i in tl.static_range(CHANNELS // BLOCK_CHANNELS):
            channel = i * BLOCK_CHANNELS
            block = load_parts(base, left, channel, CHANNELS, BLOCK, BLOCK_CHANNELS, PRECISION)
            blocks = blocks + (block,)
    return blocks


@triton.jit
def products(
    rows,
    columns,
    x,
    y,
    rows_left,
    columns_left,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products x_i . y_j of a tile, of blocks that are there (`hold`) or else are read."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    rest = total
    if CHANNELS <= KEPT:
        for i in tl.static_range(CHANNELS // BLOCK_CHANNELS):
            total, rest = add_product(rows[i], columns[i], total, rest, PRECISION)
    else:
        for channel in range(0, CHANNELS, BLOCK_CHANNELS):
            left = load_parts(
                x, rows_left, channel, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS, PRECISION
            )
            right = load_parts(
                y, columns_left, channel, CHANNELS, BLOCK_COLUMNS, BLOCK_CHANNELS, PRECISION
            )
            total, rest = add_product(left, right, total, rest, PRECISION)
    if PRECISION == "bf16x6":
        total += rest
    return total


@triton.jit
def add_product(left, right, total, rest, PRECISION: tl.constexpr):
    """Add left @ right.T of points in their parts; what small parts add goes to `rest`.

    Of nine products of parts those three are left out that are below the last digit of float32.
    Sums of small numbers apart lose none of theirs to the large ones.
    """
    if PRECISION == "bf16x6":
        rest = tl.dot(left[2], tl.trans(right[0]), rest)
        rest = tl.dot(left[0], tl.trans(right[2]), rest)
        rest = tl.dot(left[1], tl.trans(right[1]), rest)
        rest = tl.dot(left[1], tl.trans(right[0]), rest)
        rest = tl.dot(left[0], tl.trans(right[1]), rest)
        total = tl.dot(left[0], tl.trans(right[0]), total)
    else:
        total = tl.dot(left[0], tl.trans(right[0]), total, input_precision="tf32")
    return total, rest


@triton.jit
def with_own(values, apart, own, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """A tile with a number for a point and itself; row 0 is `apart` points after column 0."""
    rows = apart + tl.arange(0, BLOCK_ROWS)
    return tl.where(rows[:, None] == tl.arange(0, BLOCK_COLUMNS)[None, :], own, values)


@triton.jit
def differences(
    x,
    y,
    rows_left,
    columns_left,
    STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """x_i - y_j of a tile in one channel, in float32."""
    a = load_values(x, rows_left, BLOCK_ROWS, STRIDE, 0.0).to(tl.float32)
    b = load_values(y, columns_left, BLOCK_COLUMNS, STRIDE, 0.0).to(tl.float32)
    return a[:, None] - b[None, :]


@triton.jit
def squared_distances(
    kept,
    tile,
    x,
    y,
    x_norms,
    y_norms,
    rows_left,
    columns_left,
    apart,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_ij of a tile; +inf after the last column. `y_norms` is +inf there, and 0 when DIRECT.

    Also, EXCLUDE_SELF, for a point and itself (`with_own`). DIRECT, the number of channels if
    there are few, sums differences: nothing cancels. Otherwise |x|^2 + |y|^2 - 2 xy, clamped at 0
    without hiding NaN.
    """
    if DIRECT > 0:
        d = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32) + y_norms[None, :]
        for channel in tl.static_range(DIRECT):
            difference = differences(
                x + channel,
                y + channel,
                rows_left,
                columns_left,
                CHANNELS,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
            )
            d = tl.fma(difference, difference, d)
    else:
        s = products(
            kept,
            tile,
            x,
            y,
            rows_left,
            columns_left,
            CHANNELS,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            KEPT,
            PRECISION,
        )
        d = (x_norms[:, None] + y_norms[None, :]) - 2.0 * s
        d = tl.maximum(d, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if EXCLUDE_SELF:
        d = with_own(d, apart, float("inf"), BLOCK_ROWS, BLOCK_COLUMNS)
    return d


@triton.jit
def to_tf32(v):
    """The nearest number with 10 bits of mantissa; the matrix units would truncate instead.

    NaN stays as it is: adding to its bits would carry into the sign and make a number of it.
    """
    bits = v.to(tl.int32, bitcast=True)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -8192
    return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)  # noqa: PLR0124 - false for NaN


@triton.jit
def in_parts(values, like, COUNT: tl.constexpr):
    """COUNT numbers of bfloat16, in the dtype of `like`, whose sum is close to the values."""
    result = ()
    left = values
    for _ in tl.static_range(COUNT):
        part = left.to(tl.bfloat16)
        left -= part.to(tl.float32)
        result = result + (part.to(like.dtype),)
    return result


@triton.jit
def parts_of_weights(weights, like, PRECISION: tl.constexpr):
    """A weight tile as the numbers that are multiplied, one after another.

    Beside half precision they are two, whose sum has twice the digits of one: rounded once, they
    would cost as much accuracy again as half precision does.
    """
    if PRECISION == "bf16x6":
        result = in_parts(weights, like, 3)
    elif like.dtype == tl.bfloat16:
        result = in_parts(weights, like, 2)
    elif like.dtype == tl.float16:
        # The range of weights is wider than that of float16.
        result = in_parts(weights, tl.zeros((1,), PART_OF_HALF), 2)
    else:
        high = to_tf32(weights)
        result = (high, to_tf32(weights - high)) if PRECISION == "tf32x2" else (high,)
    return result


@triton.jit
def add_pulled(weights, points, total, PRECISION: tl.constexpr):
    """Add weights @ points, of a tile of weights and points in their parts.

    Matrix units drop the last digits of what they add to a sum. In float32 a tile is summed up for
    itself, so that there are few such steps.
    """
    if PRECISION == "bf16x6":
        own = tl.dot(weights[2], points[0])
        own = tl.dot(weights[0], points[2], own)
        own = tl.dot(weights[1], points[1], own)
        own = tl.dot(weights[1], points[0], own)
        own = tl.dot(weights[0], points[1], own)
        total += tl.dot(weights[0], points[0], own)
    elif points[0].dtype == tl.float16:
        # A number of float16 is one of bfloat16 and another.
        others = in_parts(points[0].to(tl.float32), weights[0], 2)
        for part in tl.static_range(2):
            for other in tl.static_range(2):
                total = tl.dot(weights[part], others[other], total)
    else:
        for part in tl.static_range(len(weights)):
            total = tl.dot(weights[part], points[0], total, input_precision="tf32")
    return total


@triton.jit
def sum_of_parts(weights):
    """The sums of the rows of weights in parts, as they are multiplied."""
    total = tl.sum(weights[0].to(tl.float32), 1)
    for part in tl.static_range(1, len(weights)):
        total += tl.sum(weights[part].to(tl.float32), 1)
    return total
