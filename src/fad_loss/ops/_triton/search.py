"""nearest and knn: screen with a matrix product, then be exact.

The screening kernels only decide which points can be among the nearest: a short list, longer than k
by a margin for what the product's rounding exchanges. `rerank_kernel` then recomputes those
distances from the differences of the points as they were given, so the result has the accuracy of
the inputs.

`scan_kernel` (k = 1). Tile: BLOCK_ROWS x BLOCK_COLUMNS. In registers: the tile, and for every
element of it the smallest distance at that place of any tile so far, with the number of that tile.
Nothing is reduced across the tile until the end, when the best of the places become the short list.
A contender is missed only if another one, closer by less than the rounding, falls on the same
place: 1 in BLOCK_COLUMNS of the already rare ties.

`shortlist_kernel` (k > 1). In registers: the tile as 64-bit (distance, index) keys, and the
unsorted short list of every row. As long as some row's best key beats the worst on its list it
takes that place, for all rows at once: a row's list changes about SHORT log(M / SHORT) times in
all, so that most tiles cost one comparison, where sorting every tile would cost more than the
product.

Columns may be shared out among programs: then a row has a list from each, and `rerank_kernel`
chooses from all of them. It computes exact distances and takes the lower index of equal ones, so
the result does not depend on who found what.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fad_loss.ops._triton.configurations import run
from fad_loss.ops._triton.launch import SIZES, launch, on_device
from fad_loss.ops._triton.prepare import Clouds, Points, flat, prepare_pair, schedule, sides
from fad_loss.ops._triton.tiles import hold, load_values, locate, share, squared_distances

# A short list of 128 stays in registers, with the margin that 64 neighbors need under the coarsest
# multiply. More are the tiled backend's. From 65 on, lists take tiles of their own.
LARGEST_SHORT_LIST = 128
LARGEST_K = 64
LONG = 64
MARGIN = 4
# Candidates of a row, and shares of the columns that contribute to them.
MOST_CANDIDATES = 1024
MOST_LISTS = 128
_LAST = tl.constexpr(-(2**63))


@triton.jit
def packed(d, index):
    """(distance, index) as one number that is largest for the nearest, the lower index first."""
    bits = d.to(tl.int32, bitcast=True).to(tl.int64)
    return ~((bits << 32) | index.to(tl.int64))


@triton.jit
def index_of(keys):
    """The index in a key, -1 if it stands for no point."""
    keys = ~keys
    return tl.where((keys >> 32) < 0x7F800000, (keys & 0xFFFFFFFF).to(tl.int32), -1)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    x,
    x_norms,
    y,
    y_norms,
    candidates,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    splits,
    rows_total,
    SHORT: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RAGGED: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """candidates[i, :]: where the smallest distances of row i probably are."""
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
    best = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("inf"), tl.float32)
    where = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    start, end, moved = share(columns, splits, rows_total, BLOCK_COLUMNS)
    for j in range(start, end, BLOCK_COLUMNS):
        at = column_start + j
        y_base = y + at * STRIDE
        b = load_values(y_norms + at, columns - j, BLOCK_COLUMNS, 1, float("inf"))
        tile = hold(y_base, columns - j, CHANNELS, BLOCK_COLUMNS, BLOCK_CHANNELS, KEPT, PRECISION)
        d = squared_distances(
            kept,
            tile,
            x_base,
            y_base,
            a,
            b,
            left,
            columns - j,
            first - j,
            CHANNELS,
            DIRECT,
            EXCLUDE_SELF,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            KEPT,
            PRECISION,
        )
        better = d < best
        best = tl.where(better, d, best)
        where = tl.where(better, j, where)
    index = where + tl.arange(0, BLOCK_COLUMNS)[None, :]
    keys = packed(best, index)
    point = tl.arange(0, BLOCK_ROWS)
    for place in tl.static_range(SHORT):
        top = tl.max(keys, 1)
        keys = tl.where(keys == top[:, None], _LAST, keys)
        target = candidates + (begin + moved) * SHORT + (point * SHORT + place)
        tl.store(target, index_of(top), mask=point < left)


@triton.jit(do_not_specialize=SIZES)
def shortlist_kernel(
    x,
    x_norms,
    y,
    y_norms,
    candidates,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    splits,
    rows_total,
    SHORT: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RAGGED: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """candidates[i, :]: the SHORT nearest by the product's distances, in any order."""
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
    point = tl.arange(0, BLOCK_ROWS)
    place = tl.arange(0, SHORT)
    # Free places are all different, so that one at a time is taken, and worse than any key.
    best = tl.zeros((BLOCK_ROWS, SHORT), tl.int64) + (place.to(tl.int64) + (_LAST + 1))[None, :]
    worst = tl.min(best, 1)
    start, end, moved = share(columns, splits, rows_total, BLOCK_COLUMNS)
    for j in range(start, end, BLOCK_COLUMNS):
        at = column_start + j
        y_base = y + at * STRIDE
        b = load_values(y_norms + at, columns - j, BLOCK_COLUMNS, 1, float("inf"))
        tile = hold(y_base, columns - j, CHANNELS, BLOCK_COLUMNS, BLOCK_CHANNELS, KEPT, PRECISION)
        d = squared_distances(
            kept,
            tile,
            x_base,
            y_base,
            a,
            b,
            left,
            columns - j,
            first - j,
            CHANNELS,
            DIRECT,
            EXCLUDE_SELF,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            KEPT,
            PRECISION,
        )
        column = j + tl.arange(0, BLOCK_COLUMNS)
        # Neither infinity nor NaN is anyone's neighbor.
        keys = tl.where(d < float("inf"), packed(d, column[None, :]), _LAST)
        top = tl.max(keys, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            taken = (best == worst[:, None]) & (top > worst)[:, None]
            best = tl.where(taken, top[:, None], best)
            keys = tl.where(keys == top[:, None], _LAST, keys)
            worst = tl.min(best, 1)
            top = tl.max(keys, 1)
    target = candidates + (begin + moved) * SHORT + (point[:, None] * SHORT + place[None, :])
    tl.store(target, index_of(best), mask=(point < left)[:, None])


@triton.jit(do_not_specialize=SIZES)
def rerank_kernel(
    x,
    y,
    candidates,
    distance,
    index,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    splits,
    rows_total,
    C: tl.constexpr,
    K: tl.constexpr,
    SHORT: tl.constexpr,
    RAGGED: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The K nearest of the candidates, by distances summed from differences in float32.

    A row has as many lists as its columns had shares, at most LISTS.
    """
    _, row_start, rows, first, column_start, _ = locate(
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
    point = tl.arange(0, BLOCK_ROWS)
    inside = first + point < rows
    place = tl.arange(0, LISTS * SHORT)
    from_list = candidates + (place // SHORT).to(tl.int64) * rows_total * SHORT + place % SHORT
    listed = from_list[None, :] + (begin + point)[:, None] * SHORT
    there = inside[:, None] & (place < splits * SHORT)[None, :]
    number = tl.load(listed, mask=there, other=-1)
    found = number >= 0
    other = (column_start + number.to(tl.int64)) * C
    d = tl.zeros((BLOCK_ROWS, LISTS * SHORT), tl.float32)
    for channel in range(0, C, BLOCK_CHANNELS):
        channels = channel + tl.arange(0, BLOCK_CHANNELS)
        present = channels < C
        own = x + begin * C + (point[:, None] * C + channels[None, :])
        a = tl.load(own, mask=inside[:, None] & present[None, :], other=0.0).to(tl.float32)
        theirs = y + (other[:, :, None] + channels[None, None, :])
        b = tl.load(theirs, mask=found[:, :, None] & present[None, None, :], other=0.0)
        difference = a[:, None, :] - b.to(tl.float32)
        # Channels after the last are loaded as 0 on both sides.
        d += tl.sum(difference * difference, 2)
    d = tl.where(found & (d < float("inf")), d, float("inf"))
    keys = packed(d, tl.where(found, number, 0x7FFFFFFF - place[None, :]))
    for rank in range(K):
        top = tl.max(keys, 1)
        keys = tl.where(keys == top[:, None], _LAST, keys)
        value = (~top >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        # A key that was taken already stands for no point.
        value = tl.where(top == _LAST, float("inf"), value)
        target = point * K + rank
        tl.store(distance + begin * K + target, value, mask=inside)
        tl.store(index + begin * K + target, index_of(top).to(tl.int64), mask=inside)


def short_list(k: int, rounding: str) -> int:
    """Candidates for k neighbors; more where the multiply is coarse."""
    if k == 1:
        return 8 if rounding == "bf16" else 4
    margin = max(2 * MARGIN, k // 2) if rounding == "bf16" else MARGIN
    return min(max(8, int(triton.next_power_of_2(k + margin))), LARGEST_SHORT_LIST)


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k nearest points of y for each of x, ascending: distance and index, (..., k)."""
    distance = x.new_empty((*x.shape[:-1], k), dtype=torch.float32)
    index = x.new_empty((*x.shape[:-1], k), dtype=torch.int64)
    with on_device(x):
        rows, columns = prepare_pair(x, y, x_offsets, y_offsets)
        candidates = screen(rows, columns, k, exclude_self)
        rerank(flat(x), flat(y), rows.clouds, columns.clouds, candidates, distance, index)
    return distance, index


def most_lists(short: int) -> int:
    """How many lists of a row are chosen from, at most."""
    return min(MOST_LISTS, MOST_CANDIDATES // short)


def screen(rows: Points, columns: Points, k: int, exclude_self: bool) -> Tensor:
    """The short lists of every row, (lists, T, SHORT)."""
    short = short_list(k, rows.format.rounding)
    kernel, name = (scan_kernel, "scan") if k == 1 else (shortlist_kernel, "shortlist")
    name = "longlist" if short > LONG else name
    arguments = {**sides(rows, columns), "SHORT": short, "EXCLUDE_SELF": exclude_self}

    def results(lists: int) -> dict[str, Tensor]:
        shape = lists, rows.clouds.total, short
        device = rows.values.device
        return {"candidates": torch.empty(shape, dtype=torch.int32, device=device)}

    return run(name, kernel, rows, columns, arguments, results, most=most_lists(short))[
        "candidates"
    ]


def rerank(
    x: Tensor,
    y: Tensor,
    rows: Clouds,
    columns: Clouds,
    candidates: Tensor,
    distance: Tensor,
    index: Tensor,
) -> None:
    """Fill the results from the short lists."""
    lists, _, short = candidates.shape
    # Two compiled kernels, for one list and for several: how many there are is a number.
    most = 1 if lists == 1 else most_lists(short)
    block = max(128 // (most * short), 1)
    tiles, where = schedule(rows, columns, block, lists)
    arguments = {
        "x": x,
        "y": y,
        "candidates": candidates,
        "distance": distance,
        "index": index,
        "C": x.shape[-1],
        "K": distance.shape[-1],
        "SHORT": short,
        "LISTS": most,
        "BLOCK_ROWS": block,
        "BLOCK_CHANNELS": min(
            triton.next_power_of_2(x.shape[-1]), max(4096 // (block * most * short), 1)
        ),
        "num_warps": 4,
    }
    launch(rerank_kernel, (tiles,), {**arguments, **where})
