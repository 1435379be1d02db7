"""What every tiled reduction shares: cutting clouds into tiles, and sums of differences.

A tile is a few rows (points of x) against a few columns (points of y), small enough to stay in the
cache between the matrix product that fills it and the reduction that consumes it. Nothing of size
N x M ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

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


def product_error(channels: int) -> float:
    """The error of |x|^2 + |y|^2 - 2 xy, in roundings of |x|^2 + |y|^2.

    It is that of the points (which were centered) and of sums of C products. On points along the
    diagonal (1, ..., 1), where all products are alike and round the same way, up to 2.4 sqrt(C)
    were seen; on others, half of that.
    """
    return 4 + 3 * math.sqrt(channels)


def score_error(channels: int) -> float:
    """The error of |y|^2 - 2 xy, in roundings of |x|^2 + |y|^2.

    It is that of the points (which may have been centered) and of a sum of C products. On points
    along the diagonal (1, ..., 1), where all products are alike and round the same way, up to
    3 sqrt(C) were seen; on others, a fifth.
    """
    return 8 + 4 * math.sqrt(channels)


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
