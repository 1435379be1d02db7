r"""Squared distances of a tile, and gradients by the points, with a bound on their error.

A matrix product is fast, but |x|^2 + |y|^2 - 2 xy cancels: its error is some roundings of the
points' norms (from the center of y), however close the two points are. So does the gradient
2 (sum_j W_ij) x_i - 2 sum_j W_ij y_j. What is promised here, with t = 2^-14 in float32 (and half
precision) and 2^-43 in float64:

- every d_ij is off by at most t max(d_ij, s), where s is the scale that the function of it resolves
  (0 for functions with a kink at 0, such as the root);
- every row of a gradient by at most t sum_j |W_ij| |x_i - y_j|, beside t sum_j |W_ij| sqrt(s).

Three ways to compute a tile keep it, and each tile takes the first that does:

1. the product, with the few pairs that are so close that it might not do, the *near* ones,
   recomputed from their differences, which are multiplied back by themselves;
2. for float32, the product in float64, which costs about twice as much, again with its near pairs;
3. differences, channel by channel: many times as much, for clouds most of whose points nearly
   coincide at the resolution of float64.

Whether a tile has near pairs costs one look at the smallest distance of each row, and where s is
not small beside the norms not even that. Only a CPU can look without waiting. Elsewhere float32 is
always multiplied in float64, and pairs within its rounding count as coinciding; float64, and
devices without it, sum differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fad_loss.ops._dense import accumulation_dtype
from fad_loss.ops._tiled.tiles import (
    COLUMNS,
    DIRECT_CHANNELS,
    direct_distances,
    own_pairs,
    product_error,
    steps,
    tile_size,
)

# The bound t, in roundings (2^-24, 2^-53).
TOLERANCE = 2.0**10
# Near pairs beyond this share of a tile (and beyond this number) cost more than another way.
NEAR_SHARE = 32
NEAR_COUNT = 1024
# A product of weights and points errs by about so many roundings.
PULL_ERROR = 4.0


@dataclass(frozen=True)
class Points:
    """A group's points in one dtype: centered, for products, with their squared norms."""

    x: Tensor
    y: Tensor
    x_norms: Tensor
    y_norms: Tensor
    moved: bool = False  # they are centered, rather than left where they were

    @classmethod
    def of(cls, x: Tensor, y: Tensor, dtype: torch.dtype, shrinking: float = 0.25) -> Points:
        """Subtract the mean of y from both, if the squares shrink by such a share (1: never)."""
        x, y = x.to(dtype), y.to(dtype)
        y_norms = norms(y)
        if shrinking >= 1 or not y.shape[1]:
            return cls(x, y, norms(x), y_norms)
        center = y.mean(1, keepdim=True)
        # On a CPU, where looking costs nothing and a copy does: points that lie around the origin
        # stay as they are.
        near = norms(center) <= y_norms.mean(1, keepdim=True).mul_(shrinking)
        moved = x.device.type != "cpu" or not bool(near.all())
        if moved:
            x, y = x - center, y - center
            y_norms = norms(y)
        return cls(x, y, norms(x), y_norms, moved)


@dataclass(frozen=True)
class Near:
    """Pairs of a tile that a product does not resolve: where they are, and x_i - y_j."""

    at: tuple[Tensor, Tensor, Tensor]  # cloud, row, column
    difference: Tensor  # (pairs, C)


@dataclass(frozen=True)
class Tile:
    """Distances of some rows to some columns, and the points that belong to them."""

    rows: slice
    columns: slice
    d: Tensor  # (b, r, m)
    x: Tensor  # (b, r, C): centered, or for differences as they are
    y: Tensor
    near: Near | None = None
    differences: bool = False
    same: bool = False  # row i and column i are one point

    def like(self, t: Tensor) -> Tensor:
        """Bring values to the dtype of the tile."""
        return t.to(self.d.dtype)

    def directional(self, u: Tensor | None, v: Tensor | None) -> Tensor:
        """delta_ij = 2 (x_i - y_j) . (u_i - v_j) on the tile; a direction that is None is zero."""
        u = None if u is None else self.like(u[:, self.rows])
        v = None if v is None else self.like(v[:, self.columns])
        delta = torch.zeros_like(self.d)
        if self.differences:
            for difference, channel in _channels(self.x, self.y):
                moved = 0.0 if u is None else u[..., channel, None]
                moved = moved if v is None else moved - v[:, None, :, channel]
                delta.add_(difference * moved)
            return delta.mul_(2)
        if u is not None:
            delta = delta + (self.x * u).sum(-1, keepdim=True)
            delta = delta.baddbmm(u, self.y.mT, alpha=-1)
        if v is not None:
            delta = delta + (self.y * v).sum(-1).unsqueeze(-2)
            delta = delta.baddbmm(self.x, v.mT, alpha=-1)
        if self.near is not None:
            cloud, row, column = self.near.at
            moved = torch.zeros_like(self.near.difference)
            if u is not None:
                moved = moved + u[cloud, row]
            if v is not None:
                moved = moved - v[cloud, column]
            delta[self.near.at] = self.like((self.near.difference * moved).sum(-1))
        return delta.mul_(2)


_NOTHING = (torch.empty(0, dtype=torch.int64),) * 3


class Clouds:
    """The points of one group of clouds (b, n, C) and (b, m, C), tile by tile."""

    def __init__(
        self, x: Tensor, y: Tensor, scale: float, *, exclude_self: bool, backward: bool = False
    ) -> None:
        """Prepare for distances resolved to `scale`, and for multiplying weights back or not."""
        dtype = accumulation_dtype(x.dtype)
        # One memory, so no need to look for the pairs in which a point meets itself.
        self.same = not exclude_self and x.is_set_to(y)
        self.x, self.y = x.to(dtype), y.to(dtype)
        self.scale, self.exclude_self, self.backward = scale, exclude_self, backward
        self.looks = x.device.type == "cpu"
        self.direct = x.shape[-1] <= DIRECT_CHANNELS
        self.error = product_error(x.shape[-1])
        wide = [] if dtype == torch.float64 or x.device.type == "mps" else [torch.float64]
        # What is left to try: products in a dtype, and at last differences.
        self.ways: list[torch.dtype | None] = [dtype, *wide, None] if self.looks else [*wide, None]
        self._prepare()
        # What gradients are multiplied with, as long as that happens in the dtype of the points.
        multiplied = self.ways[0] == dtype
        self.first = (self.points.x, self.points.y) if multiplied else (self.x, self.y)

    def _prepare(self) -> None:
        """The points for the way that is now the first."""
        self.unit = 2.0**-53 if self.ways[0] == torch.float64 else 2.0**-24
        self.tolerance = TOLERANCE * (2.0**-53 if self.x.dtype == torch.float64 else 2.0**-24)
        self.checks = False
        if self.ways[0] is None:
            return
        self.points = Points.of(self.x, self.y, self.ways[0])
        if not self.looks or not self.points.x_norms.numel() or not self.points.y_norms.numel():
            return
        largest = float(self.points.x_norms.amax() + self.points.y_norms.amax())
        self.checks = self.error * self.unit * largest > self.tolerance * self.scale
        # A pair is near if its distance is below this share of |x|^2 + |y|^2.
        self.share = self.error * self.unit / self.tolerance
        if self.direct:
            # The distances are right as they are, but not what is multiplied back.
            self.checks = self.checks and self.backward
            self.share = (PULL_ERROR * self.unit / self.tolerance) ** 2

    def __iter__(self) -> Iterator[Tile]:
        """The tiles: rows by rows, and within them columns by columns."""
        for rows in self.rows():
            for columns in self.columns():
                yield self.tile(rows, columns)

    def rows(self) -> Iterator[slice]:
        """Slices of rows such that a tile of them against a slice of columns has the right size."""
        columns = min(self.y.shape[1], COLUMNS)
        return steps(self.x.shape[1], tile_size(self.x) // max(columns * self.x.shape[0], 1))

    def columns(self) -> Iterator[slice]:
        """Slices of the columns."""
        return steps(self.y.shape[1], COLUMNS)

    def tile(self, rows: slice, columns: slice) -> Tile:
        """Distances within the bound, never negative; a point's own is infinite if left out."""
        while self.ways[0] is not None:
            tile = self._product(rows, columns)
            near = self._near(tile) if self.checks else _NOTHING
            if near is not None:
                if self.same:
                    own_pairs(tile.d, rows, columns).zero_()
                return self._mended(tile, near)
            # The other tiles of the group will be much like this one.
            del self.ways[0]
            self._prepare()
        x, y = self.x[:, rows], self.y[:, columns]
        d = self._without_own(direct_distances(x, y), rows, columns)
        return Tile(rows, columns, d, x, y, differences=True)

    def _product(self, rows: slice, columns: slice) -> Tile:
        points = self.points
        x, y = points.x[:, rows], points.y[:, columns]
        if self.direct:
            d = direct_distances(self.x[:, rows], self.y[:, columns]).to(x.dtype)
        else:
            d = torch.baddbmm(points.y_norms[:, None, columns], x, y.mT, alpha=-2)
            d.add_(points.x_norms[:, rows, None]).clamp_(min=0)
            if not self.looks:
                self._snap(d, rows, columns)
        if self.same:
            own_pairs(d, rows, columns).fill_(torch.inf)  # until the others have been looked at
        return Tile(rows, columns, self._without_own(d, rows, columns), x, y, same=self.same)

    def _without_own(self, d: Tensor, rows: slice, columns: slice) -> Tensor:
        if self.exclude_self:
            own_pairs(d, rows, columns).fill_(torch.inf)
        return d

    def _below(self, share: float, d: Tensor, rows: slice, columns: slice) -> Tensor:
        """Where a distance is less than a share of |x|^2 + |y|^2."""
        limit = (self.points.y_norms[:, None, columns] + self.points.x_norms[:, rows, None]) * share
        return d < limit

    def _snap(self, d: Tensor, rows: slice, columns: slice) -> None:
        """Let points within the rounding of the product coincide."""
        if self.scale == 0:
            d.masked_fill_(self._below(self.error * self.unit, d, rows, columns), 0.0)

    def _near(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor] | None:
        """The near pairs of a tile, or None if they are too many."""
        rows, columns, d = tile.rows, tile.columns, tile.d
        reach = self.points.y_norms[:, columns].amax(1, keepdim=True)
        if not (d.amin(-1) < (self.points.x_norms[:, rows] + reach) * self.share).any():
            return _NOTHING
        near = self._below(self.share, d, rows, columns)
        limit = max(d.numel() // NEAR_SHARE, NEAR_COUNT)
        count = int(near.count_nonzero())
        if count > limit and self.ways[0] != self.x.dtype and not self.direct:
            # Repeated points of float32. What lies within the rounding of float64 coincides.
            self._snap(d, rows, columns)
            near.logical_and_(d > 0)
            count = int(near.count_nonzero())
        if count > limit:
            return None
        cloud, row, column = near.nonzero(as_tuple=True)
        return cloud, row, column

    def _mended(self, tile: Tile, near: tuple[Tensor, Tensor, Tensor]) -> Tile:
        """The tile with the distances of near pairs from their differences."""
        cloud, row, column = near
        if not len(cloud):
            return tile
        x, y = self.x[:, tile.rows], self.y[:, tile.columns]
        difference = x[cloud, row] - y[cloud, column]
        if not self.direct:
            tile.d[near] = tile.like(difference.square().sum(-1))
        return replace(tile, near=Near(near, difference))


class Gradient:
    """Sums up the gradient of sum_ij W_ij |x_i - y_j|^2 by x, and by y if wanted.

    Products W y and W^T x are kept apart from the rest until the end, so that what is large and
    cancels rounds once.
    """

    def __init__(self, of_x: Tensor, of_y: Tensor | None) -> None:
        """Add to these gradients of one group, (b, n, C) and (b, m, C)."""
        self.of = of_x, of_y
        self.products = [torch.zeros_like(of_x), None if of_y is None else torch.zeros_like(of_y)]
        self.sums = [t if t is None else torch.zeros_like(t[..., 0]) for t in self.products]

    def add(self, tile: Tile, weights: Tensor) -> None:
        """Pull along a tile; its weights are used up."""
        of_x, of_y = self.of
        if tile.differences:
            for difference, channel in _channels(tile.x, tile.y):
                pull = difference.mul_(weights)
                of_x[:, tile.rows, channel] += 2 * pull.sum(-1)
                if of_y is not None:
                    of_y[:, tile.columns, channel] -= 2 * pull.sum(-2)
            return
        if tile.near is not None:
            cloud, row, column = tile.near.at
            pull = 2 * weights[tile.near.at].unsqueeze(-1) * tile.near.difference
            pull = pull.to(of_x.dtype)
            of_x[:, tile.rows].index_put_((cloud, row), pull, accumulate=True)
            if of_y is not None:
                of_y[:, tile.columns].index_put_((cloud, column), -pull, accumulate=True)
            weights[tile.near.at] = 0.0
        if tile.same:
            own_pairs(weights, tile.rows, tile.columns).zero_()
        if weights.dtype != of_x.dtype:
            weights.masked_fill_(tile.d == 0, 0.0)  # where many coincide, they are no near pairs
        self.add_products(tile, weights, tile.x, tile.y)

    def add_products(self, tile: Tile, weights: Tensor, x: Tensor, y: Tensor) -> None:
        """Pull by products alone, for points that stand at (b, r, C) and (b, m, C)."""
        sides = ((0, tile.rows, weights, x, y), (1, tile.columns, weights.mT, y, x))
        for side, part, pull, own, others in sides:
            result, product, sums = self.of[side], self.products[side], self.sums[side]
            if result is None or product is None or sums is None:
                continue
            if weights.dtype != result.dtype:
                result[:, part] += 2 * (own * pull.sum(-1, keepdim=True) - pull @ others)
            else:
                product[:, part].baddbmm_(pull, others)
                sums[:, part] += pull.sum(-1)

    def finish(self, x: Tensor, y: Tensor) -> None:
        """Add up, for the points that the products were taken with."""
        for side, points in enumerate((x, y)):
            result, product, sums = self.of[side], self.products[side], self.sums[side]
            if result is not None and product is not None and sums is not None:
                result.add_(points * sums.unsqueeze(-1) - product, alpha=2)


def _channels(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, int]]:
    """The tile of differences in one channel after the other."""
    for channel in range(x.shape[-1]):
        yield x[..., channel, None] - y[:, None, :, channel], channel


def norms(t: Tensor) -> Tensor:
    """Squared norms: not by vector_norm, whose square errs by a rounding more."""
    if t.device.type != "cpu" or t.numel() <= tile_size(t):
        squares: Tensor = torch.linalg.vecdot(t, t)
        return squares
    # Squares of a few points at a time, in memory that stays in the cache: clearing new memory for
    # all of them takes the system several times as long as computing them.
    points = t.reshape(-1, t.shape[-1])
    result = points.new_empty(len(points))
    parts = list(steps(len(points), tile_size(t) // max(t.shape[-1], 1)))
    buffer = points.new_empty((parts[0].stop if parts else 0, t.shape[-1]))
    for part in parts:
        some = buffer[: part.stop - part.start]
        torch.sum(torch.mul(points[part], points[part], out=some), -1, out=result[part])
    return result.view(t.shape[:-1])
