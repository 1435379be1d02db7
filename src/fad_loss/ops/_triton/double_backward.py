r"""The second derivatives of the smooth reductions: two recomputed tiles of weights.

Let u_i, v_j be the directions in which x and y move, and delta_ij = 2 (x_i - y_j) . (u_i - v_j).
Two weights per pair, A_ij = dS/d(d_ij) and P_ij = dS/d(delta_ij), multiply the points and
the directions: dx_i = 2 (sum_j A_ij x_i - A_ij y_j + P_ij u_i - P_ij v_j). `_tiled/smooth.py`
derives them. As in `backward.py` a program owns rows, and y's gradients come from exchanged roles.

Tile: BLOCK_ROWS x BLOCK_COLUMNS, for d and for delta. In registers: both tiles, and SLAB channels
of the rows' gradient, or all up to KEPT. Columns and their directions are read once, or reread from
L2, as in `backward.py`. Storage is float32: gradients do not fit half precision.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# Tuples grow in unrolled loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fad_loss.ops._triton.backward import (
    multiply,
    pull_apart,
    store_each,
    store_gradient,
    store_values,
    zeros_of_channels,
)
from fad_loss.ops._triton.exact import (
    add_pulls,
    exact_directional,
    measured,
    rows_to_do,
    scale_pulls,
)
from fad_loss.ops._triton.launch import SIZES
from fad_loss.ops._triton.moves import directional, minus_moves
from fad_loss.ops._triton.tiles import (
    hold,
    load_values,
    load_whole,
    locate,
    share,
    with_own,
)
from fad_loss.ops._triton.weights import evaluate, load_each, probability, zeros_each

# ruff: noqa: C901, PLR0912, PLR0915, RUF005, because a kernel is one function that cannot unpack


@triton.jit(do_not_specialize=SIZES)
def double_backward_kernel(
    row,
    row_norms,
    column,
    column_norms,
    flags,
    scale,
    row_moves,
    row_dots,
    column_moves,
    column_dots,
    row_shift,
    column_shift,
    row_scale,
    column_scale,
    row_less,
    column_less,
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
    OF_Y: tl.constexpr,
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
    """Second-order gradients of the rows' points, and of what else the rows have (`extra`).

    softmin, with q = delta - row_less - column_less (the mean on x's side, the move of the bias on
    y's): P = sum_e p scale, A = -sum_e p scale q rate; extra = sum_j p q for x without a scale (the
    mean itself, which is also the gradient of the incoming gradient), sum p scale q rate for y.
    Kernels, with t = column_less or row_less, the moves of y's weights:
    P = k' scales, A = (k'' delta weight + k' t) scale; extra = sum of k' delta weight + k t for x,
    and of k' delta scale for y.
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
    if row_moves is not None:
        moves_base = row_moves + begin * STRIDE
        kept_moves = hold(moves_base, left, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS, KEPT, PRECISION)
        dots = load_values(row_dots + begin, left, BLOCK_ROWS, 1, 0.0)
    else:
        moves_base = base
        kept_moves = kept
        dots = a
    SOFTMIN: tl.constexpr = FAMILY == "softmin"
    VALUES: tl.constexpr = COUNT if SOFTMIN else 1
    row_shifts = load_each(row_shift, begin, left, VALUES, BLOCK_ROWS, float("-inf"))
    row_scales = load_each(row_scale, begin, left, VALUES, BLOCK_ROWS, 0.0)
    row_lesses = load_each(row_less, begin, left, VALUES, BLOCK_ROWS, 0.0)
    extras = zeros_each(VALUES, BLOCK_ROWS)
    sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    delta_sums = tl.zeros((BLOCK_ROWS,), tl.float32)
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
        b = load_values(column_norms + at, remaining, BLOCK_COLUMNS, 1, float("inf"))
        tile = hold(
            column_base, remaining, CHANNELS, BLOCK_COLUMNS, BLOCK_CHANNELS, KEPT, PRECISION
        )
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
        if column_moves is not None:
            column_moves_base = column_moves + at * STRIDE
            tile_moves = hold(
                column_moves_base,
                remaining,
                CHANNELS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
                KEPT,
                PRECISION,
            )
            other_dots = load_values(column_dots + at, remaining, BLOCK_COLUMNS, 1, 0.0)
        else:
            column_moves_base = column_base
            tile_moves = tile
            other_dots = b
        if EXACT:
            delta = exact_directional(
                base,
                column_base,
                moves_base if row_moves is not None else None,
                column_moves_base if column_moves is not None else None,
                left,
                remaining,
                C,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
            )
        else:
            delta = directional(
                kept,
                kept_moves,
                tile,
                tile_moves,
                base,
                moves_base,
                column_base,
                column_moves_base,
                dots,
                other_dots,
                left,
                remaining,
                row_moves is not None,
                column_moves is not None,
                CHANNELS,
                DIRECT,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHANNELS,
                KEPT,
                PRECISION,
            )
        scales = load_each(column_scale, at, remaining, VALUES, BLOCK_COLUMNS, 0.0)
        lesses = load_each(column_less, at, remaining, VALUES, BLOCK_COLUMNS, 0.0)
        if SOFTMIN:
            shifts = load_each(column_shift, at, remaining, VALUES, BLOCK_COLUMNS, 0.0)
            of_distance = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            of_delta = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            new_extras = ()
            for e in tl.static_range(VALUES):
                p = probability(
                    d,
                    row_shifts[e],
                    shifts[e],
                    rates[e],
                    OF_Y,
                    row_shift is not None,
                    column_shift is not None,
                )
                q = delta
                if row_less is not None:
                    q -= row_lesses[e][:, None]
                if column_less is not None:
                    q -= lesses[e][None, :]
                if row_scale is not None:
                    p *= row_scales[e][:, None]
                if column_scale is not None:
                    p *= scales[e][None, :]
                change = p * q
                if gradient is not None:
                    change *= rates[e]
                    of_distance -= change
                    of_delta += p
                new_extras = new_extras + (extras[e] + tl.sum(change, 1),)
            extras = new_extras
        else:
            value, k1, k2 = evaluate(d, rates, FAMILY, COUNT, LADDER)
            change = k1 * delta
            of_distance = k2 * delta
            of_delta = k1
            if OF_Y:
                if row_scale is not None:
                    of_distance *= row_scales[0][:, None]
                    of_delta *= row_scales[0][:, None]
                if row_less is not None:
                    of_distance += k1 * row_lesses[0][:, None]
                of_distance *= scales[0][None, :]
                of_delta *= scales[0][None, :]
                change *= scales[0][None, :]
            else:
                if column_scale is not None:
                    of_distance *= scales[0][None, :]
                    of_delta *= scales[0][None, :]
                    change *= scales[0][None, :]
                if column_less is not None:
                    of_distance += k1 * lesses[0][None, :]
                    change += value * lesses[0][None, :]
            extras = (extras[0] + tl.sum(change, 1),)
        if gradient is not None:
            if EXACT:
                add_pulls(
                    of_distance,
                    of_delta,
                    gradient + (begin + moved) * C,
                    wanted,
                    seen,
                    base,
                    column_base,
                    moves_base if row_moves is not None else None,
                    column_moves_base if column_moves is not None else None,
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
                    of_distance,
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
                    of_distance = with_own(of_distance, first - j, 0.0, BLOCK_ROWS, BLOCK_COLUMNS)
                totals, part = multiply(
                    of_distance,
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
            if column_moves is None or EXACT:
                delta_sums += tl.sum(of_delta, 1)
            elif DIRECT > 0:
                delta_sums += tl.sum(of_delta, 1)
                totals = minus_moves(
                    of_delta,
                    column_moves_base,
                    remaining,
                    totals,
                    DIRECT,
                    CHANNELS,
                    BLOCK_COLUMNS,
                )
            else:
                totals, part = multiply(
                    of_delta,
                    tile_moves,
                    column_moves_base,
                    remaining,
                    slab,
                    totals,
                    CHANNELS,
                    BLOCK_COLUMNS,
                    SLAB,
                    KEPT,
                    PRECISION,
                )
                delta_sums += part
    if gradient is not None:
        target = gradient + (begin + moved) * C
        factor = tl.full((BLOCK_ROWS,), 2.0, tl.float32)
        if not SOFTMIN and not OF_Y:
            factor *= row_scales[0]
        if EXACT:
            scale_pulls(target, wanted, seen, factor, C, BLOCK_ROWS, BLOCK_CHANNELS)
        elif DIRECT > 0:
            for channel in tl.static_range(DIRECT):
                pulls = totals[channel]
                if row_moves is not None:
                    u = load_values(moves_base + channel, left, BLOCK_ROWS, CHANNELS, 0.0)
                    pulls += delta_sums * u
                store_values(target + channel, left, pulls * factor, BLOCK_ROWS, C)
        else:
            for i in tl.static_range(CHANNELS // SLAB if CHANNELS <= KEPT else 1):
                channel = slab + i * SLAB
                own = load_whole(base, left, channel, CHANNELS, BLOCK_ROWS, SLAB, PRECISION)
                result = sums[:, None] * own - totals[i]
                if row_moves is not None:
                    own_moves = load_whole(
                        moves_base, left, channel, CHANNELS, BLOCK_ROWS, SLAB, PRECISION
                    )
                    result += delta_sums[:, None] * own_moves
                store_gradient(target, left, channel, result * factor[:, None], C, BLOCK_ROWS, SLAB)
    if slab == 0:
        if extra is not None:
            store_each(extra, begin + moved, wanted, extras, VALUES, BLOCK_ROWS)
        if DIRECT == 0 and not EXACT:
            tl.store(flags + tl.arange(0, BLOCK_ROWS), flagged.to(tl.int8), wanted)
