"""Small clouds in one launch: no point is prepared, because one tile holds all columns of a cloud.

A program owns BLOCK_ROWS points of one cloud and sees all points of the other, at most 128, in one
tile. So it knows their mean, and centers, rounds and multiplies the points as they come, block of
channels by block; neither copies of the points nor their norms are written. Its gradient takes a
second pass over the channels, with the tile of weights in registers, whatever their number. In
training every cloud is that small, and what a step costs is the number of its launches.

The numbers are those of `prepare.py`, but for the mean: gradients of y, where y's points are the
rows, are taken relative to the mean of x. Any common shift is exact; it only has to be close.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fad_loss.ops._triton.backward import store_each, store_gradient, store_values
from fad_loss.ops._triton.configurations import smallest_that_holds
from fad_loss.ops._triton.exact import exact_pulls
from fad_loss.ops._triton.launch import SIZES, launch
from fad_loss.ops._triton.prepare import (
    DIRECT_CHANNELS,
    Clouds,
    close,
    flat,
    multiply_format,
    one_set,
    padded,
    schedule,
)
from fad_loss.ops._triton.small_tiles import FEW, centered, distances, stored
from fad_loss.ops._triton.tiles import (
    add_pulled,
    differences,
    locate,
    parts_of_weights,
    sum_of_parts,
    with_own,
)
from fad_loss.ops._triton.weights import (
    LOG2_E,
    evaluate,
    exponential,
    load_each,
    smooth_minimum,
    weigh,
    zeros_each,
)

# ruff: noqa: SIM108, because kernels do not choose in an expression

# The most columns of a tile.
LARGEST = 128
_STORAGE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=SIZES)
def small_reduce_kernel(
    x,
    y,
    column_values,
    out,
    least,
    total,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    rates,
    scale,
    FAMILY: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RAGGED: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    CLOSE: tl.constexpr,
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
    """`softmin_kernel` and `kernel_sum_kernel`; `column_values` are biases, or weights."""
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
    d, _some = distances(
        x + begin * C,
        y + column_start * C,
        left,
        columns,
        first,
        scale,
        C,
        CHANNELS,
        DIRECT,
        CLOSE,
        EXCLUDE_SELF,
        SAME,
        CENTER,
        ROUNDING,
        STORAGE,
        PART,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_CHANNELS,
    )
    point = tl.arange(0, BLOCK_ROWS)
    SOFTMIN: tl.constexpr = FAMILY == "softmin"
    VALUES: tl.constexpr = COUNT if SOFTMIN else 1
    h = load_each(column_values, column_start, columns, VALUES, BLOCK_COLUMNS, 0.0)
    for e in tl.static_range(VALUES):
        if SOFTMIN:
            rate = rates[e] * LOG2_E
            if column_values is not None:
                shifted = d - h[e][None, :]
            else:
                shifted = d
            smallest = tl.min(shifted, 1)
            # Where there is nothing both are inf, and their difference NaN.
            safe = tl.where(smallest == float("inf"), 0.0, smallest)
            sums = tl.sum(exponential(shifted, safe[:, None], rate), 1)
            target = begin * VALUES + (point * VALUES + e)
            tl.store(least + target, smallest, point < left)
            tl.store(total + target, sums, point < left)
            result = smooth_minimum(smallest, sums, rate)
        else:
            value, _first, _second = evaluate(d, rates, FAMILY, COUNT, LADDER)
            if column_values is not None:
                value *= h[0][None, :]
            result = tl.sum(value, 1)
        tl.store(out + begin * VALUES + (point * VALUES + e), result, point < left)


@triton.jit(do_not_specialize=SIZES)
def small_backward_kernel(
    row,
    column,
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
    scale,
    FAMILY: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RAGGED: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    CLOSE: tl.constexpr,
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
    """`backward_kernel`, with all channels in one program."""
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
    x = row + begin * C
    y = column + column_start * C
    d, some = distances(
        x,
        y,
        left,
        columns,
        first,
        scale,
        C,
        CHANNELS,
        DIRECT,
        CLOSE,
        EXCLUDE_SELF,
        SAME,
        CENTER,
        ROUNDING,
        STORAGE,
        PART,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_CHANNELS,
    )
    SOFTMIN: tl.constexpr = FAMILY == "softmin"
    VALUES: tl.constexpr = COUNT if SOFTMIN else 1
    row_scales = load_each(row_scale, begin, left, VALUES, BLOCK_ROWS, 0.0)
    weights, extras = weigh(
        d,
        load_each(row_shift, begin, left, VALUES, BLOCK_ROWS, float("-inf")),
        load_each(column_shift, column_start, columns, VALUES, BLOCK_COLUMNS, 0.0),
        row_scales,
        load_each(column_scale, column_start, columns, VALUES, BLOCK_COLUMNS, 0.0),
        zeros_each(VALUES, BLOCK_ROWS),
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
        store_each(extra, begin, tl.arange(0, BLOCK_ROWS) < left, extras, VALUES, BLOCK_ROWS)
    factor = tl.full((BLOCK_ROWS,), 2.0, tl.float32)
    if not SOFTMIN and row_scale is not None:
        factor *= row_scales[0]
    target = gradient + begin * C if gradient is not None else None
    if gradient is not None and DIRECT > 0:
        for channel in tl.static_range(DIRECT):
            difference = differences(
                x + channel, y + channel, left, columns, C, BLOCK_ROWS, BLOCK_COLUMNS
            )
            pulls = tl.sum(weights * difference, 1)
            store_values(target + channel, left, pulls * factor, BLOCK_ROWS, C)
    elif gradient is not None:
        if SAME:
            weights = with_own(weights, first, 0.0, BLOCK_ROWS, BLOCK_COLUMNS)
        # As many rounds of one loop as the other has none.
        few_end = tl.where(some > 0, C, 0)
        for channel in range(0, few_end, FEW):
            result = exact_pulls(
                weights, x, y, left, columns, channel, C, BLOCK_ROWS, BLOCK_COLUMNS, FEW
            )
            store_gradient(target, left, channel, result * factor[:, None], C, BLOCK_ROWS, FEW)
        end = tl.where(some > 0, 0, CHANNELS)
        for channel in range(0, end, BLOCK_CHANNELS):
            own, points = centered(
                x,
                y,
                left,
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
            others = stored(points, PART, PRECISION)
            pieces = parts_of_weights(weights, others[0], PRECISION)
            zeros = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
            total = add_pulled(pieces, others, zeros, PRECISION)
            result = sum_of_parts(pieces)[:, None] * own.to(tl.float32) - total
            result *= factor[:, None]
            store_gradient(target, left, channel, result, C, BLOCK_ROWS, BLOCK_CHANNELS)


def are_small(x: Tensor, y: Tensor, x_offsets: Tensor | None) -> bool:
    """Whether all clouds are; the sizes of ragged ones are not known without waiting for them."""
    return x_offsets is None and max(x.shape[1], y.shape[1]) <= LARGEST


def _run(name: str, kernel: Any, x: Tensor, y: Tensor, arguments: dict[str, Any]) -> None:
    """Launch a kernel over the tiles of x's points."""
    channels = x.shape[-1]
    form = multiply_format(x.dtype, channels)
    tile = smallest_that_holds(y.shape[1], name, form, channels, x.device)
    tiles, where = schedule(Clouds.of(x, None), Clouds.of(y, None), tile.rows)
    points = {
        "C": channels,
        "CHANNELS": padded(channels),
        "DIRECT": channels if channels <= DIRECT_CHANNELS else 0,
        "CLOSE": close(channels),
        "SAME": one_set(x, y) and not arguments["EXCLUDE_SELF"] and channels > DIRECT_CHANNELS,
        "CENTER": form.center,
        "ROUNDING": form.rounding,
        "STORAGE": tl.float32 if form.parts > 1 else _STORAGE[form.storage],
        "PART": _STORAGE[form.storage],
        "PRECISION": form.precision,
    }
    arguments = {**arguments, **where, **points, **tile.arguments(padded(channels))}
    launch(kernel, (tiles,), arguments)


def reduce(
    x: Tensor,
    y: Tensor,
    values: Tensor | None,
    settings: dict[str, Any],
    out: Tensor,
    least: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Fill the reduction of every point of x, and its parts, which softmin has."""
    results = {"out": out, "least": least, "total": total}
    arguments = {"x": flat(x), "y": flat(y), "column_values": values, **results, **settings}
    _run("small_reduce", small_reduce_kernel, x, y, arguments)


def backward(
    rows: Tensor,
    columns: Tensor,
    settings: dict[str, Any],
    gradient: Sequence[int] | None,
    extra: Sequence[int] | None,
    **values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of what the rows have: points, and weights or biases (`extra`), of shapes."""
    made = [
        None if shape is None else rows.new_empty(shape, dtype=torch.float32)
        for shape in (gradient, extra)
    ]
    if gradient is not None or extra is not None:
        arguments = {
            "row": flat(rows),
            "column": flat(columns),
            **dict.fromkeys(("row_shift", "column_shift", "row_scale", "column_scale")),
            **values,
            "gradient": made[0],
            "extra": made[1],
            **settings,
        }
        _run("small_backward", small_backward_kernel, rows, columns, arguments)
    # Nothing, twice: results may not be the same tensor.
    found = [rows.new_empty(0, dtype=torch.float32) if part is None else part for part in made]
    return found[0], found[1]
