"""softmin: a running log-sum-exp over tiles of distances.

Tile: BLOCK_ROWS x BLOCK_COLUMNS. In registers: the tile of distances, and for each temperature the
running minimum and sum of every row. Reread: the columns (from L2), and the rows where their
channels do not fit one block. All temperatures share the tile, so that each costs one exponential
more.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# Tuples grow in unrolled loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fad_loss.ops._triton import small
from fad_loss.ops._triton.configurations import run
from fad_loss.ops._triton.exact import measured, rows_to_do
from fad_loss.ops._triton.gradients import Moves, double_backward, gradients_of
from fad_loss.ops._triton.launch import SIZES, launch, on_device
from fad_loss.ops._triton.prepare import given, prepare_pair, sides
from fad_loss.ops._triton.tiles import hold, load_values, locate, share
from fad_loss.ops._triton.weights import LOG2_E, exponential, load_each, smooth_minimum

# ruff: noqa: RUF005, SIM108, because kernels cannot unpack tuples, nor choose in an expression

# Temperatures that share a pass: each keeps some registers for every row and column of a thread,
# and more of them beside a gradient, which leaves room for one where it is wide.
GROUP = 4
GROUP_BACKWARD = 2
WIDE = 128
# Rows of a program that brings together what the shares have found.
MERGED = 128


@triton.jit(do_not_specialize=SIZES)
def softmin_kernel(
    x,
    x_norms,
    y,
    y_norms,
    flags,
    scale,
    bias,
    out,
    least,
    total,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    splits,
    rows_total,
    rates,
    COUNT: tl.constexpr,
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
    """out[i, e] = -log(sum_j exp((h_je - d_ij) rate_e)) / rate_e, and its two parts.

    least is the smallest d_ij - h_je and total the sum of exp((least + h_je - d_ij) rate_e),
    computed as `weights.exponential` will compute it again: weights sum to 1.
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
    x_base = x + begin * STRIDE
    kept = hold(x_base, left, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS, KEPT, PRECISION)
    a = load_values(x_norms + begin, left, BLOCK_ROWS, 1, 0.0)
    smallest = ()
    sums = ()
    for _ in tl.static_range(COUNT):
        smallest = smallest + (tl.full((BLOCK_ROWS,), float("inf"), tl.float32),)
        sums = sums + (tl.zeros((BLOCK_ROWS,), tl.float32),)
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
        h = load_each(bias, at, end - j, COUNT, BLOCK_COLUMNS, 0.0)
        new_smallest = ()
        new_sums = ()
        for e in tl.static_range(COUNT):
            rate = rates[e] * LOG2_E
            if bias is not None:
                shifted = d - h[e][None, :]
            else:
                shifted = d
            new = tl.minimum(smallest[e], tl.min(shifted, 1))
            # Where nothing has been seen yet both minima are inf, and their difference NaN.
            safe = tl.where(new == float("inf"), 0.0, new)
            part = tl.sum(exponential(shifted, safe[:, None], rate), 1)
            new_smallest = new_smallest + (new,)
            new_sums = new_sums + (sums[e] * tl.exp2((safe - smallest[e]) * rate) + part,)
        smallest = new_smallest
        sums = new_sums
    point = tl.arange(0, BLOCK_ROWS)
    for e in tl.static_range(COUNT):
        target = (begin + moved) * COUNT + (point * COUNT + e)
        tl.store(least + target, smallest[e], wanted)
        tl.store(total + target, sums[e], wanted)
        result = smooth_minimum(smallest[e], sums[e], rates[e] * LOG2_E)
        tl.store(out + target, result, wanted)
    if DIRECT == 0 and not EXACT:
        tl.store(flags + point, flagged.to(tl.int8), wanted)


@triton.jit(do_not_specialize=["splits", "rows_total"])
def merge_kernel(
    leasts,
    totals,
    out,
    least,
    total,
    splits,
    rows_total,
    rates,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of softmin from those of the shares of its columns, one after another."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows_total
    step = rows_total.to(tl.int64) * COUNT
    for e in tl.static_range(COUNT):
        rate = rates[e] * LOG2_E
        at = row * COUNT + e
        smallest = tl.full((BLOCK,), float("inf"), tl.float32)
        for s in range(splits):
            smallest = tl.minimum(smallest, tl.load(leasts + (at + s * step), inside, 0.0))
        safe = tl.where(smallest == float("inf"), 0.0, smallest)
        sums = tl.zeros((BLOCK,), tl.float32)
        for s in range(splits):
            own = tl.load(leasts + (at + s * step), inside, 0.0)
            part = tl.load(totals + (at + s * step), inside, 0.0)
            sums += part * tl.exp2((safe - own) * rate)
        tl.store(least + at, smallest, inside)
        tl.store(total + at, sums, inside)
        tl.store(out + at, smooth_minimum(smallest, sums, rate), inside)


def softmin(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minus eps log sum_j exp((h_j - d_ij) / eps) for each epsilon, (..., E), and its parts.

    They are those of `_tiled.smooth.softmin`.
    """
    if len(epsilon) > GROUP:
        parts = [
            softmin(x, y, only(part, bias), epsilon[part], exclude_self, x_offsets, y_offsets)
            for part in groups(epsilon, GROUP)
        ]
        out, least, total = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        return out, least, total
    h = None if bias is None else bias.contiguous()

    def results(shares: int) -> dict[str, Tensor]:
        shape = shares, *x.shape[:-1], len(epsilon)
        return {name: x.new_empty(shape, dtype=torch.float32) for name in ("out", "least", "total")}

    with on_device(x):
        if small.are_small(x, y, x_offsets):
            found = results(1)
            settings = settings_of(epsilon, exclude_self=exclude_self)
            small.reduce(x, y, h, settings, **found)
        else:
            rows, columns = prepare_pair(x, y, x_offsets, y_offsets)
            arguments = {
                **sides(rows, columns),
                "bias": h,
                **temperatures(epsilon),
                "scale": min(epsilon),
                "EXCLUDE_SELF": exclude_self,
            }
            found = run(
                *("reduce", softmin_kernel, rows, columns, arguments, results),
                exact=given(rows, columns),
            )
            if len(found["least"]) > 1:
                found = merged(found, results(1), epsilon)
    return found["out"][0], found["least"][0], found["total"][0]


def merged(
    parts: dict[str, Tensor], result: dict[str, Tensor], epsilon: Sequence[float]
) -> dict[str, Tensor]:
    """Fill the result from those of the shares."""
    shares, rows = len(parts["least"]), result["least"].numel() // len(epsilon)
    arguments = {
        "leasts": parts["least"],
        "totals": parts["total"],
        **result,
        "splits": shares,
        "rows_total": rows,
        **temperatures(epsilon),
        "BLOCK": MERGED,
        "num_warps": 4,
    }
    launch(merge_kernel, (triton.cdiv(rows, MERGED),), arguments)
    return result


def groups(epsilon: Sequence[float], size: int) -> list[slice]:
    """Temperatures that share a pass."""
    return [slice(start, start + size) for start in range(0, len(epsilon), size)]


def group_backward(channels: int) -> int:
    """How many temperatures share a pass beside a gradient of so many channels."""
    return GROUP_BACKWARD if channels <= WIDE else 1


def only(part: slice, t: Tensor | None) -> Tensor | None:
    """The values of some of the temperatures, from (..., E)."""
    return None if t is None else t[..., part]


def temperatures(epsilon: Sequence[float]) -> dict[str, Any]:
    """The arguments COUNT and rates."""
    return {"COUNT": len(epsilon), "rates": tuple(1.0 / eps for eps in epsilon)}


def settings_of(epsilon: Sequence[float], *, exclude_self: bool) -> dict[str, Any]:
    """softmin, to the kernels that know other reductions too."""
    of_softmin = {"FAMILY": "softmin", "LADDER": 0, "EXCLUDE_SELF": exclude_self}
    return {**of_softmin, **temperatures(epsilon), "scale": min(epsilon)}


def softmin_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    least: Tensor,
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
    of_y: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, y and the bias, where `grad` is already divided by `total`."""
    size = group_backward(x.shape[-1])
    if small.are_small(x, y, x_offsets):
        size = GROUP
    if len(epsilon) > size:
        parts = [
            softmin_backward(
                grad[..., part],
                x,
                y,
                only(part, bias),
                least[..., part],
                epsilon[part],
                exclude_self,
                x_offsets,
                y_offsets,
                of_y,
                of_bias,
            )
            for part in groups(epsilon, size)
        ]
        dxs, dys, dbiases = zip(*parts, strict=True)
        return summed(dxs), summed(dys), torch.cat(dbiases, -1)
    with on_device(x):
        rows, columns, fill = gradients_of(x, y, x_offsets, y_offsets)
        settings = settings_of(epsilon, exclude_self=exclude_self)
        h = None if bias is None else bias.contiguous()
        shift, g = shift_of(least), grad.contiguous()
        dx, _ = fill(
            rows, columns, settings, x.shape, None, row_shift=shift, column_shift=h, row_scale=g
        )
        shapes = y.shape if of_y else None, (*y.shape[:-1], len(epsilon)) if of_bias else None
        dy, dbias = fill(
            columns, rows, settings, *shapes, row_shift=h, column_shift=shift, column_scale=g
        )
    return dx, dy, dbias


def softmin_double_backward(
    u: Tensor,
    v: Tensor | None,
    t: Tensor | None,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    least: Tensor,
    total: Tensor,
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of S = <u, dx> + <v, dy> + <t, dh> by the incoming gradient, x, y and the bias.

    With q_ij = delta_ij - t_j and its mean under p, S = sum_i g_i mean_i(q). The mean needs a pass
    over the row before the weights of any of its pairs are known.
    """
    if len(epsilon) > GROUP_BACKWARD:
        parts = [
            softmin_double_backward(
                u,
                v,
                only(part, t),
                grad[..., part],
                x,
                y,
                only(part, bias),
                least[..., part],
                total[..., part],
                epsilon[part],
                exclude_self,
                x_offsets,
                y_offsets,
            )
            for part in groups(epsilon, GROUP_BACKWARD)
        ]
        dgrads, dxs, dys, dhs = zip(*parts, strict=True)
        return torch.cat(dgrads, -1), summed(dxs), summed(dys), torch.cat(dhs, -1)
    with on_device(x):
        rows, columns = prepare_pair(x, y, x_offsets, y_offsets, wide=True)
        of_x, of_y = Moves(rows, u), Moves(columns, v)
        settings = settings_of(epsilon, exclude_self=exclude_self)
        h = None if bias is None else bias.contiguous()
        sums = torch.where(total > 0, total, 1.0)
        shift, g = shift_of(least), (grad / sums).contiguous()
        t = None if t is None else t.contiguous()
        shapes = None, grad.shape
        fixed: dict[str, Any] = {"row_shift": shift, "column_shift": h, "column_less": t}
        _, mean = double_backward(rows, columns, of_x, of_y, settings, *shapes, **fixed)
        mean = mean / sums
        dx, _ = double_backward(
            *(rows, columns, of_x, of_y, settings, x.shape, None),
            row_scale=g,
            row_less=mean,
            **fixed,
        )
        dy, dh = double_backward(
            *(columns, rows, of_y, of_x, settings, y.shape, (*y.shape[:-1], len(epsilon))),
            of_y=True,
            row_shift=h,
            column_shift=shift,
            column_scale=g,
            row_less=t,
            column_less=mean,
        )
    return mean, dx, dy, dh


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of gradients, in order."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def shift_of(least: Tensor) -> Tensor:
    """As a shift: a row without neighbors is +inf, and its probabilities are 0."""
    return torch.where(least == torch.inf, -torch.inf, least).contiguous()
