"""What a tile of squared distances becomes: kernel values and derivatives, softmin's probabilities.

An excluded or missing pair has d = +inf, for which every value and derivative here is 0.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# Tuples grow in unrolled loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

# ruff: noqa: RUF005, because kernels cannot unpack tuples

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def evaluate(d, rates, KERNEL: tl.constexpr, COUNT: tl.constexpr, LADDER: tl.constexpr):
    """k(d) and its first two derivatives; what is not used is not computed.

    LADDER > 0: each bandwidth's rate is 2**LADDER times the one before, so its exponential is the
    one before squared LADDER times: one exponential for all of them.
    """
    if KERNEL == "gaussian":
        e = tl.exp2(d * (-rates[0] * LOG2_E))
        value = e
        first = e * -rates[0]
        second = e * (rates[0] * rates[0])
        for h in tl.static_range(1, COUNT):
            if LADDER > 0:
                for _ in tl.static_range(LADDER):
                    e = e * e
            else:
                e = tl.exp2(d * (-rates[h] * LOG2_E))
            value += e
            first += e * -rates[h]
            second += e * (rates[h] * rates[h])
        value *= 1.0 / COUNT
        first *= 1.0 / COUNT
        second *= 1.0 / COUNT
    elif KERNEL == "inverse_multiquadric":
        value = tl.rsqrt(1.0 + d * rates[0])
        square = value * value
        first = (-0.5 * rates[0]) * square * value
        second = (0.75 * rates[0] * rates[0]) * square * square * value
    else:
        # Equal points: the root's derivatives there are defined as 0, as for infinitely distant
        # ones.
        positive = d > 0.0
        inverse = tl.where(positive, tl.rsqrt(tl.where(positive, d, 1.0)), 0.0)
        if KERNEL == "energy":
            value = -tl.where(d == float("inf"), 0.0, tl.sqrt_rn(d))
            first = -0.5 * inverse
            second = 0.25 * inverse * inverse * inverse
        else:
            value = tl.exp2(tl.sqrt_rn(d) * (-rates[0] * LOG2_E))
            first = value * inverse * (-0.5 * rates[0])
            second = value * inverse * inverse * (0.25 * rates[0]) * (rates[0] + inverse)
    return value, first, second


@triton.jit
def load_each(base, first, left, COUNT: tl.constexpr, BLOCK: tl.constexpr, other):
    """COUNT vectors, with a number for each of BLOCK points from `first` on; or zeros."""
    result = ()
    point = tl.arange(0, BLOCK)
    for e in tl.static_range(COUNT):
        if base is None:
            v = tl.zeros((BLOCK,), tl.float32)
        else:
            v = tl.load(base + first * COUNT + (point * COUNT + e), point < left, other)
        result = result + (v.to(tl.float32),)
    return result


@triton.jit
def zeros_each(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT vectors of zeros."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.zeros((BLOCK,), tl.float32),)
    return result


@triton.jit
def exponential(shifted, least, rate):
    """2**((least - shifted) rate), at most 1.

    Not as a difference of products, of which a compiler may round one and not the other: least is
    many times larger than what is left of it. Nor can it be more than 1, but for the rounding of a
    distance that another tile computed.
    """
    above = tl.minimum((least - shifted) * rate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(above)


@triton.jit
def smooth_minimum(least, total, rate):
    """The result from its parts; `rate` is that of powers of 2.

    log(0) = -inf for a row without neighbors: the result is +inf, as it should be.
    """
    return least - tl.log2(total) / rate


@triton.jit
def probability(
    d,
    row_shift,
    column_shift,
    rate,
    OF_Y: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
):
    """exp((least + h - d) rate) of one temperature: softmin's weight but for the row's total.

    `least` is the shift of x's points, and h, if it is there, of y's: OF_Y, y's are the rows.
    """
    if OF_Y:
        if HAS_ROW:
            d = d - row_shift[:, None]
        result = exponential(d, column_shift[None, :], rate * LOG2_E)
    else:
        if HAS_COLUMN:
            d = d - column_shift[None, :]
        result = exponential(d, row_shift[:, None], rate * LOG2_E)
    return result


@triton.jit
def weigh(
    d,
    row_shifts,
    column_shifts,
    row_scales,
    column_scales,
    extras,
    rates,
    FAMILY: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    HAS_ROW_SHIFT: tl.constexpr,
    HAS_COLUMN_SHIFT: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """The weights dL/d(d_ij) of a tile, but for a kernel's row scales; EXTRA adds to `extras`."""
    new_extras = ()
    if FAMILY == "softmin":
        weights = tl.zeros(d.shape, tl.float32)
        for e in tl.static_range(COUNT):
            # The incoming gradient is on x's side.
            p = probability(
                d,
                row_shifts[e],
                column_shifts[e],
                rates[e],
                HAS_COLUMN_SCALE,
                HAS_ROW_SHIFT,
                HAS_COLUMN_SHIFT,
            )
            if HAS_ROW_SCALE:
                p *= row_scales[e][:, None]
            if HAS_COLUMN_SCALE:
                p *= column_scales[e][None, :]
            weights += p
            if EXTRA:
                new_extras = new_extras + (extras[e] - tl.sum(p, 1),)
    else:
        value, weights, _second = evaluate(d, rates, FAMILY, COUNT, LADDER)
        if HAS_COLUMN_SCALE:
            weights *= column_scales[0][None, :]
            value *= column_scales[0][None, :]
        if EXTRA:
            new_extras = (extras[0] + tl.sum(value, 1),)
    return weights, new_extras
