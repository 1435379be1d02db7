"""Points as the kernels multiply them: centered, rounded to the multiply's format, padded.

|x|^2 + |y|^2 - 2 xy cancels when clouds lie far from the origin, and the matrix units truncate what
does not fit their format. So float32 points lose the mean of y, are rounded to nearest, and only
then have their norms taken: norms and products see the same numbers. The mean of 16 evenly spaced
points of y is as good as that of all (any common shift is exact; it only has to be close). Half
precision is multiplied as it is: shifting would round it again.

=============  ==========  =========================  ======================
inputs         precision   stored as                  multiplied as
=============  ==========  =========================  ======================
float32        "highest"   three numbers of bfloat16  six products of them
                           (24 bits together)         (error of float32)
float32        "high"      float32 rounded to tf32    tf32
float32        "medium"    bfloat16                   bfloat16
half           any         unchanged                  as they are (tf32x2:
                                                      by weights in two parts)
=============  ==========  =========================  ======================

(precision: `torch.get_float32_matmul_precision()`; accumulation is always float32.) Second
derivatives store no half precision, because gradients do not fit it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fad_loss.ops._precision import float32_matmul_precision
from fad_loss.ops._tiled.distances import TOLERANCE
from fad_loss.ops._tiled.tiles import product_error
from fad_loss.ops._triton.launch import INTERPRETED, SIZES, launch
from fad_loss.ops._triton.tiles import locate, to_tf32

# Up to this many channels distances are sums of differences, without a matrix product.
DIRECT_CHANNELS = 16
SAMPLE = 16
Rounding = Literal["", "tf32", "bf16"]


@dataclass(frozen=True)
class Format:
    """How points are stored and multiplied."""

    storage: torch.dtype
    rounding: Rounding
    precision: str
    center: bool

    @property
    def parts(self) -> int:
        """How many numbers a channel is stored in."""
        return 3 if self.precision == "bf16x6" else 1


def multiply_format(dtype: torch.dtype, channels: int, *, wide: bool = False) -> Format:
    """The format for inputs of a dtype; `wide` keeps float32 storage (see the table above)."""
    if dtype != torch.float32:
        # The interpreter multiplies the bit patterns of bfloat16; its values fit float32 as well.
        emulate = INTERPRETED and dtype == torch.bfloat16
        widen = wide or emulate or channels <= DIRECT_CHANNELS
        return Format(torch.float32 if widen else dtype, "", "tf32x2", center=False)
    precision = float32_matmul_precision()
    if channels <= DIRECT_CHANNELS:
        return Format(dtype, "", "tf32", center=False)
    if precision == "highest":
        return Format(dtype if INTERPRETED else torch.bfloat16, "", "bf16x6", center=True)
    if precision == "high":
        return Format(dtype, "tf32", "tf32", center=True)
    storage = dtype if wide or INTERPRETED else torch.bfloat16
    return Format(storage, "bf16", "tf32", center=True)


def padded(channels: int) -> int:
    """Channels as stored: a power of two up to 64, then a multiple of 64."""
    if channels <= 64:
        return max(16, int(triton.next_power_of_2(channels)))
    return -(-channels // 64) * 64


@dataclass(frozen=True)
class Clouds:
    """The clouds of one side, flattened: where each begins, and how many points there are."""

    total: int
    each: int
    count: int
    offsets: Tensor | None

    @classmethod
    def of(cls, x: Tensor, offsets: Tensor | None) -> Clouds:
        """From (B, N, C), or (T, C) and offsets."""
        if offsets is None:
            return cls(x.shape[0] * x.shape[1], x.shape[1], x.shape[0], None)
        return cls(x.shape[0], 0, len(offsets) - 1, offsets.contiguous())


@dataclass(frozen=True)
class Points:
    """Prepared points: values (T, parts CHANNELS), squared norms (T,), 0 if there is no need.

    And the points as they were given, (T, C).
    """

    given: Tensor
    values: Tensor
    norms: Tensor
    clouds: Clouds
    channels: int
    format: Format

    @property
    def stored(self) -> int:
        """Channels as stored, of each part."""
        return self.values.shape[1] // self.format.parts

    def whole(self) -> Tensor:
        """The sum of the parts, (T, CHANNELS), in float32."""
        parts = self.values.view(-1, self.format.parts, self.stored)
        return parts.sum(1, dtype=torch.float32)

    @property
    def direct(self) -> int:
        """The number of channels if distances are summed from differences, else 0."""
        return self.channels if self.channels <= DIRECT_CHANNELS else 0


def schedule(
    rows: Clouds, columns: Clouds, block: int, splits: int | None = None
) -> tuple[int, dict[str, Any]]:
    """The number of tiles of rows, and the arguments of `tiles.locate` and `tiles.share`."""
    shares = {} if splits is None else {"splits": splits, "rows_total": rows.total}
    if rows.offsets is None or columns.offsets is None:
        tiles = rows.count * -(-rows.each // block)
    else:
        tiles = rows.total // block + rows.count
    return tiles, {
        "row_offsets": rows.offsets,
        "column_offsets": columns.offsets,
        "rows_each": rows.each,
        "columns_each": columns.each,
        "clouds": rows.count,
        "search_steps": rows.count.bit_length(),
        "RAGGED": rows.offsets is not None,
        **shares,
    }


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    points,
    others,
    values,
    norms,
    row_offsets,
    column_offsets,
    rows_each,
    columns_each,
    clouds,
    search_steps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    RAGGED: tl.constexpr,
    CENTER: tl.constexpr,
    ROUNDING: tl.constexpr,
    PARTS: tl.constexpr,
    DIRECT: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Center, round, pad and square BLOCK points; one pass, every point read and written once.

    The center is the mean of at most SAMPLE evenly spaced points of the cloud of `others`.
    """
    _, start, rows, first, other_start, other_rows = locate(
        tl.program_id(0),
        row_offsets,
        column_offsets,
        rows_each,
        columns_each,
        clouds,
        search_steps,
        BLOCK,
        RAGGED,
    )
    point = tl.arange(0, BLOCK)
    begin = start + first
    inside = (first + point < rows)[:, None]
    total = tl.zeros((BLOCK,), tl.float32)
    for channel in range(0, CHANNELS, BLOCK_CHANNELS):
        channels = channel + tl.arange(0, BLOCK_CHANNELS)
        source = points + begin * C + (point[:, None] * C + channels[None, :])
        v = tl.load(source, inside & (channels < C)[None, :], 0.0).to(tl.float32)
        if CENTER:
            # One after another: added up in whatever order, the centers of x and of y could differ.
            count = tl.minimum(other_rows, SAMPLE)
            step = tl.maximum(other_rows // SAMPLE, 1)
            mean = tl.zeros((BLOCK_CHANNELS,), tl.float32)
            for n in range(count):
                chosen = other_start + n * step
                mean += tl.load(others + chosen * C + channels, channels < C, 0.0)
            v -= (mean / tl.maximum(count, 1).to(tl.float32))[None, :]
        if ROUNDING == "tf32":
            v = to_tf32(v)
        if ROUNDING == "bf16":
            v = v.to(tl.bfloat16).to(tl.float32)
        total += tl.sum(v * v, 1)
        there = inside & (channels < CHANNELS)[None, :]
        own = values + begin * (PARTS * CHANNELS)
        target = own + (point[:, None] * (PARTS * CHANNELS) + channels[None, :])
        if PARTS == 1:
            tl.store(target, v.to(values.dtype.element_ty), there)
        else:
            for part in tl.static_range(PARTS):
                rounded = v.to(tl.bfloat16).to(tl.float32)
                tl.store(target + part * CHANNELS, rounded.to(values.dtype.element_ty), there)
                v -= rounded
    if DIRECT:
        # Differences need no norms; what remains is +inf after the last point, when loaded.
        total = tl.zeros((BLOCK,), tl.float32)
    tl.store(norms + begin + point, total, first + point < rows)


def prepare(
    x: Tensor, clouds: Clouds, form: Format, center: tuple[Tensor, Clouds] | None = None
) -> Points:
    """Prepare points (T, C) for multiplication, relative to those of `center`."""
    channels = x.shape[-1]
    stored = padded(channels)
    width = form.parts * stored
    values = torch.empty((clouds.total, width), dtype=form.storage, device=x.device)
    norms = torch.empty(clouds.total, dtype=torch.float32, device=x.device)
    block = min(stored, 64)
    rows = 2048 // block
    others, other_clouds = center or (None, clouds)
    tiles, where = schedule(clouds, other_clouds, rows)
    arguments = {
        "points": x,
        "others": others,
        "values": values,
        "norms": norms,
        "C": channels,
        "CHANNELS": stored,
        "CENTER": center is not None,
        "ROUNDING": form.rounding,
        "PARTS": form.parts,
        "DIRECT": channels <= DIRECT_CHANNELS,
        "SAMPLE": SAMPLE,
        "BLOCK": rows,
        "BLOCK_CHANNELS": block,
    }
    launch(prepare_kernel, (tiles,), {**arguments, **where})
    return Points(x, values, norms, clouds, channels, form)


def prepare_pair(
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
    *,
    wide: bool = False,
) -> tuple[Points, Points]:
    """Both sides, relative to the same point of each cloud; one object, where they are one set."""
    same = one_set(x, y) and (x_offsets is None or one_set(x_offsets, y_offsets))
    x_clouds, y_clouds = Clouds.of(x, x_offsets), Clouds.of(y, y_offsets)
    x, y = flat(x), flat(y)
    form = multiply_format(x.dtype, x.shape[-1], wide=wide)
    center = (y, y_clouds) if form.center else None
    columns = prepare(y, y_clouds, form, center)
    return columns if same else prepare(x, x_clouds, form, center), columns


def one_set(x: Tensor, y: Tensor | None) -> bool:
    """Whether both are the same numbers in the same memory."""
    return y is not None and x.device.type != "meta" and x.is_set_to(y)


def flat(t: Tensor) -> Tensor:
    """(B, N, C) or (T, C) as contiguous (T, C)."""
    return t.detach().reshape(-1, t.shape[-1]).contiguous()


def sides(rows: Points, columns: Points, row: str = "x", column: str = "y") -> dict[str, Any]:
    """The arguments that every kernel over pairs has."""
    return {
        row: rows.values,
        f"{row}_norms": rows.norms,
        column: columns.values,
        f"{column}_norms": columns.norms,
        "CHANNELS": rows.stored,
        "DIRECT": rows.direct,
        "PRECISION": rows.format.precision,
    }


def resolution(rows: Points, columns: Points, *, exclude_self: bool) -> dict[str, Any]:
    """What those kernels have besides that compute near pairs anew (`exact.py`)."""
    same = rows is columns and not exclude_self and not rows.direct
    return {"C": rows.channels, "CLOSE": close(rows.channels), "SAME": same}


def close(channels: int) -> float:
    """The share of |x|^2 + |y|^2 below which a pair is near (`exact.py`)."""
    return product_error(channels) / TOLERANCE


def given(rows: Points, columns: Points, row: str = "x", column: str = "y") -> dict[str, Any]:
    """The arguments in place of those of `sides` with which a kernel is EXACT."""
    points = {row: rows.given, column: columns.given}
    return {**points, "CHANNELS": rows.channels, "PRECISION": "tf32"}
