"""softmin: a running log-sum-exp over tiles of distances.

Tile: BLOCK_ROWS x BLOCK_COLUMNS. In registers: the tile of distances, and for each temperature the
running maximum and sum of every row. Reread: the columns (from L2), and the rows where their
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
from fad_loss.ops._triton.gradients import Moves, double_backward, gradient_like, gradients_of
from fad_loss.ops._triton.launch import SIZES, on_device
from fad_loss.ops._triton.prepare import prepare_pair, sides
from fad_loss.ops._triton.tiles import hold, load_values, locate, squared_distances
from fad_loss.ops._triton.weights import LOG2_E, load_each

# ruff: noqa: RUF005, because kernels cannot unpack tuples

# Temperatures that share a pass: each keeps some registers for every row of a thread, and more of
# them for second derivatives.
GROUP = 4
GROUP_SECOND = 2


@triton.jit(do_not_specialize=SIZES)
def softmin_kernel(
    x,
    x_norms,
    y,
    y_norms,
    bias,
    out,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    rates,
    COUNT: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RAGGED: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """out[i, e] = -log(sum_j exp((h_je - d_ij) rate_e)) / rate_e."""
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
    row = first + tl.arange(0, BLOCK_ROWS)
    x_base = x + begin * CHANNELS
    held = hold(x_base, left, CHANNELS, BLOCK_ROWS, BLOCK_CHANNELS, DIRECT)
    a = load_values(x_norms + begin, left, BLOCK_ROWS, 1, 0.0)
    largest = ()
    total = ()
    for _ in tl.static_range(COUNT):
        largest = largest + (tl.full((BLOCK_ROWS,), float("-inf"), tl.float32),)
        total = total + (tl.zeros((BLOCK_ROWS,), tl.float32),)
    for j in range(0, columns, BLOCK_COLUMNS):
        at = column_start + j
        b = load_values(y_norms + at, columns - j, BLOCK_COLUMNS, 1, float("inf"))
        d = squared_distances(
            held,
            x_base,
            y + at * CHANNELS,
            a,
            b,
            left,
            columns - j,
            CHANNELS,
            DIRECT,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_CHANNELS,
            PRECISION,
        )
        if EXCLUDE_SELF:
            column = j + tl.arange(0, BLOCK_COLUMNS)
            d = tl.where(row[:, None] == column[None, :], float("inf"), d)
        h = load_each(bias, at, columns - j, COUNT, BLOCK_COLUMNS, 0.0)
        new_largest = ()
        new_total = ()
        for e in tl.static_range(COUNT):
            rate = rates[e] * LOG2_E
            z = d * -rate
            if bias is not None:
                z += (h[e] * rate)[None, :]
            new = tl.maximum(largest[e], tl.max(z, 1))
            # Where nothing has been seen yet both maxima are -inf, and their difference NaN.
            safe = tl.where(new == float("-inf"), 0.0, new)
            part = tl.sum(tl.exp2(z - safe[:, None]), 1)
            new_largest = new_largest + (new,)
            new_total = new_total + (total[e] * tl.exp2(largest[e] - safe) + part,)
        largest = new_largest
        total = new_total
    for e in tl.static_range(COUNT):
        # log(0) - inf = -inf for a row without neighbors: the result is +inf, as it should be.
        result = -(tl.log2(total[e]) + largest[e]) / (rates[e] * LOG2_E)
        target = out + begin * COUNT + (tl.arange(0, BLOCK_ROWS) * COUNT + e)
        tl.store(target, result, tl.arange(0, BLOCK_ROWS) < left)


def softmin(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> Tensor:
    """Minus eps log sum_j exp((h_j - d_ij) / eps) for each epsilon, (..., E)."""
    if len(epsilon) > GROUP:
        parts = [
            softmin(x, y, only(part, bias), epsilon[part], exclude_self, x_offsets, y_offsets)
            for part in groups(epsilon, GROUP)
        ]
        return torch.cat(parts, -1)
    result = x.new_empty((*x.shape[:-1], len(epsilon)), dtype=torch.float32)
    h = None if bias is None else bias.contiguous()
    with on_device(x):
        if small.are_small(x, y, x_offsets):
            small.reduce(x, y, h, settings_of(epsilon, exclude_self=exclude_self), result)
            return result
        rows, columns = prepare_pair(x, y, x_offsets, y_offsets)
        arguments = {
            **sides(rows, columns),
            "bias": h,
            "out": result,
            **temperatures(epsilon),
            "EXCLUDE_SELF": exclude_self,
        }
        run("reduce", softmin_kernel, rows, columns, arguments)
    return result


def groups(epsilon: Sequence[float], size: int) -> list[slice]:
    """Temperatures that share a pass."""
    return [slice(start, start + size) for start in range(0, len(epsilon), size)]


def only(part: slice, t: Tensor | None) -> Tensor | None:
    """The values of some of the temperatures, from (..., E)."""
    return None if t is None else t[..., part]


def temperatures(epsilon: Sequence[float]) -> dict[str, Any]:
    """The arguments COUNT and rates."""
    return {"COUNT": len(epsilon), "rates": tuple(1.0 / eps for eps in epsilon)}


def settings_of(epsilon: Sequence[float], *, exclude_self: bool) -> dict[str, Any]:
    """softmin, to the kernels that know other reductions too."""
    of_softmin = {"FAMILY": "softmin", "LADDER": 0, "EXCLUDE_SELF": exclude_self}
    return {**of_softmin, **temperatures(epsilon)}


def softmin_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    out: Tensor,
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
    of_y: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, y and the bias."""
    if len(epsilon) > GROUP:
        parts = [
            softmin_backward(
                grad[..., part],
                x,
                y,
                only(part, bias),
                out[..., part],
                epsilon[part],
                exclude_self,
                x_offsets,
                y_offsets,
                of_y,
                of_bias,
            )
            for part in groups(epsilon, GROUP)
        ]
        dxs, dys, dbiases = zip(*parts, strict=True)
        return summed(dxs), summed(dys), torch.cat(dbiases, -1)
    with on_device(x):
        rows, columns, fill = gradients_of(x, y, x_offsets, y_offsets)
        settings = settings_of(epsilon, exclude_self=exclude_self)
        h = None if bias is None else bias.contiguous()
        shift, g = shift_of(out), grad.contiguous()
        dx = gradient_like(x)
        fill(rows, columns, settings, dx, row_shift=shift, column_shift=h, row_scale=g)
        dy, dbias = gradient_like(y, wanted=of_y), y.new_empty(0, dtype=torch.float32)
        if of_bias:
            dbias = y.new_empty((*y.shape[:-1], len(epsilon)), dtype=torch.float32)
        if of_y or of_bias:
            fill(
                columns,
                rows,
                settings,
                dy if of_y else None,
                extra=dbias if of_bias else None,
                row_shift=h,
                column_shift=shift,
                column_scale=g,
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
    out: Tensor,
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of S = <u, dx> + <v, dy> + <t, dh> by the incoming gradient, x, y and the bias.

    With q_ij = delta_ij - t_j and its mean under p, S = sum_i g_i mean_i(q). The mean needs a pass
    over the row before the weights of any of its pairs are known.
    """
    if len(epsilon) > GROUP_SECOND:
        parts = [
            softmin_double_backward(
                u,
                v,
                only(part, t),
                grad[..., part],
                x,
                y,
                only(part, bias),
                out[..., part],
                epsilon[part],
                exclude_self,
                x_offsets,
                y_offsets,
            )
            for part in groups(epsilon, GROUP_SECOND)
        ]
        dgrads, dxs, dys, dhs = zip(*parts, strict=True)
        return torch.cat(dgrads, -1), summed(dxs), summed(dys), torch.cat(dhs, -1)
    with on_device(x):
        rows, columns = prepare_pair(x, y, x_offsets, y_offsets, wide=True)
        of_x, of_y = Moves(rows, u), Moves(columns, v)
        settings = settings_of(epsilon, exclude_self=exclude_self)
        h = None if bias is None else bias.contiguous()
        shift, g = shift_of(out), grad.contiguous()
        t = None if t is None else t.contiguous()
        mean, dx, dy = gradient_like(grad), gradient_like(x), gradient_like(y)
        dh = y.new_empty((*y.shape[:-1], len(epsilon)), dtype=torch.float32)
        both: dict[str, Any] = {"row_shift": shift, "column_shift": h, "column_less": t}
        double_backward(rows, columns, of_x, of_y, settings, None, extra=mean, **both)
        double_backward(rows, columns, of_x, of_y, settings, dx, row_scale=g, row_less=mean, **both)
        double_backward(
            columns,
            rows,
            of_y,
            of_x,
            settings,
            dy,
            of_y=True,
            extra=dh,
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


def shift_of(out: Tensor) -> Tensor:
    """Its result as a shift: a row without neighbors is +inf, and its probabilities are 0."""
    return torch.where(out == torch.inf, -torch.inf, out).contiguous()
