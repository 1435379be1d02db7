"""What every tiled reduction shares: cutting clouds into tiles, and distances on one tile.

A tile is a few rows (points of x) against a few columns (points of y), small enough to stay in the
cache between the matrix product that fills it and the reduction that consumes it. Nothing of size
N x M ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fad_loss.ops._dense import accumulation_dtype

# Elements of a tile: 1 MiB of float32 on a CPU (half of a typical L2 cache is left for the points
# themselves), larger where launching is what costs.
CPU_TILE = 1 << 18
DEVICE_TILE = 1 << 24
COLUMNS = 2048

# Up to this many channels, summing differences costs less than a matrix product and loses nothing.
DIRECT_CHANNELS = 16


@dataclass(frozen=True)
class Group:
    """Clouds of one size that are computed together: where they are in the packed tensor."""

    rows: slice
    columns: slice
    ragged: bool

    def of_x(self, t: Tensor) -> Tensor:
        """The part of a tensor along x that belongs to this group, (b, n, ...), as a view."""
        return t[self.rows].unsqueeze(0) if self.ragged else t[self.rows]

    def of_y(self, t: Tensor) -> Tensor:
        """The part of a tensor along y that belongs to this group, (b, m, ...), as a view."""
        return t[self.columns].unsqueeze(0) if self.ragged else t[self.columns]


def tile_size(t: Tensor) -> int:
    """Elements per tile on the tensor's device."""
    return CPU_TILE if t.device.type == "cpu" else DEVICE_TILE


def groups(
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
    tile: int | None = None,
) -> Iterator[Group]:
    """Cut a batch into groups of clouds that fit into one tile; ragged clouds come one by one."""
    if x_offsets is not None and y_offsets is not None:
        x_bounds, y_bounds = x_offsets.tolist(), y_offsets.tolist()
        for cloud in range(len(x_bounds) - 1):
            rows = slice(x_bounds[cloud], x_bounds[cloud + 1])
            yield Group(rows, slice(y_bounds[cloud], y_bounds[cloud + 1]), ragged=True)
        return
    pairs = max(x.shape[1] * y.shape[1], 1)
    step = max((tile or tile_size(x)) // pairs, 1)
    for start in range(0, x.shape[0], step):
        part = slice(start, min(start + step, x.shape[0]))
        yield Group(part, part, ragged=False)


def steps(size: int, step: int) -> Iterator[slice]:
    """Cut ``range(size)`` into slices of at most `step`."""
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(start + step, size))


@dataclass(frozen=True)
class Clouds:
    """A group's points, centered for the multiplication, with their squared norms.

    The expansion |x|^2 + |y|^2 - 2 xy cancels when clouds lie far from the origin, so the mean of y
    is then taken from both. With few channels differences are summed instead, and norms are not
    needed.
    """

    x: Tensor
    y: Tensor
    x_norms: Tensor
    y_norms: Tensor
    direct: bool
    snap: bool = False

    @classmethod
    def of(cls, x: Tensor, y: Tensor, *, snap: bool = False) -> Clouds:
        """Center, and square, the points (b, n, C) and (b, m, C).

        With `snap`, distances below the rounding of the product are 0: for functions that have a
        kink there, such as the square root, which would turn an error of 1e-6 into one of 1e-3.
        """
        dtype = accumulation_dtype(x.dtype)
        x, y = x.to(dtype), y.to(dtype)
        direct = x.shape[-1] <= DIRECT_CHANNELS
        if not y.shape[1]:
            return cls(x, y, _norms(x), _norms(y), direct, snap)
        center, norms = y.mean(1, keepdim=True), _norms(y)
        # On a CPU, where looking costs nothing and a copy does: points that lie around the origin,
        # so that the squares would shrink by less than a quarter, stay as they are.
        near = _norms(center).mul_(4) <= norms.mean(1, keepdim=True)
        if x.device.type != "cpu" or not near.all():
            x, y = x - center, y - center
            norms = _norms(y)
        return cls(x, y, _norms(x), norms, direct, snap)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """The tiles: rows by rows, and within them columns by columns."""
        for rows in self.rows():
            for columns in self.columns():
                yield rows, columns

    def rows(self) -> Iterator[slice]:
        """Slices of rows such that a tile of them against a slice of columns has the right size."""
        columns = min(self.y.shape[1], COLUMNS)
        return steps(self.x.shape[1], tile_size(self.x) // max(columns * self.x.shape[0], 1))

    def columns(self) -> Iterator[slice]:
        """Slices of the columns."""
        return steps(self.y.shape[1], COLUMNS)

    def distances(self, rows: slice, columns: slice) -> Tensor:
        """The tile's squared distances, never negative."""
        x, y = self.x[:, rows], self.y[:, columns]
        if self.direct:
            return direct_distances(x, y)
        d = torch.baddbmm(self.y_norms[:, None, columns], x, y.mT, alpha=-2)
        d.add_(self.x_norms[:, rows, None])
        if not self.snap:
            return d.clamp_(min=0)
        # Where x and y coincide both norms are the same, and so is their rounding, which grows with
        # the root of C: at most 6 eps (|x|^2 + |y|^2) was seen for C up to 1024.
        rounding = (8 + 2 * x.shape[-1] ** 0.5) * rounding_unit(x)
        return d.masked_fill_(d <= self.x_norms[:, rows, None] * rounding, 0.0)


def rounding_unit(t: Tensor) -> float:
    """Half the distance between 1 and the next number that the matrix product distinguishes."""
    if t.dtype == torch.float64:
        return 2.0**-53
    coarse = {"high": 2.0**-11, "medium": 2.0**-8}
    return coarse.get(torch.get_float32_matmul_precision(), 2.0**-24)


def _norms(t: Tensor) -> Tensor:
    """Squared norms: not by vector_norm, whose square errs by a rounding more."""
    if t.device.type != "cpu":
        norms: Tensor = torch.linalg.vecdot(t, t)
        return norms
    # Squares of a few points at a time, in memory that stays in the cache: clearing new memory for
    # all of them takes the system several times as long as computing them.
    points = t.reshape(-1, t.shape[-1])
    norms = points.new_empty(len(points))
    parts = list(steps(len(points), tile_size(t) // max(t.shape[-1], 1)))
    squares = points.new_empty((parts[0].stop if parts else 0, t.shape[-1]))
    for part in parts:
        some = squares[: part.stop - part.start]
        torch.sum(torch.mul(points[part], points[part], out=some), -1, out=norms[part])
    return norms.view(t.shape[:-1])


def direct_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances as sums of differences, channel by channel: nothing cancels."""
    d = x.new_empty(*x.shape[:2], y.shape[1])
    channels = y.mT.contiguous()
    # The passes over a channel stay in the cache, however large the tile is.
    for rows in steps(x.shape[1], tile_size(x) // max(x.shape[0] * y.shape[1], 1)):
        part = d[:, rows].zero_()
        for channel in range(x.shape[-1]):
            difference = x[:, rows, channel, None] - channels[:, None, channel]
            part.addcmul_(difference, difference)
    return d


def own_pairs(tile: Tensor, rows: slice, columns: slice) -> Tensor:
    """A view of the entries of the tile in which a point meets itself (empty if there are none)."""
    return tile.diagonal(rows.start - columns.start, dim1=-2, dim2=-1)
