"""nearest and knn: screen with a matrix product, then be exact.

The product only decides which points *can* be among the nearest: everything within twice its
rounding error of the k-th best. Distances are then recomputed from differences, so the result has
the accuracy of the inputs, not of the product. On a CPU the set of neighbors is certain for almost
every row, which is verified, and only the rows where it is not are looked at again; on an
accelerator, where asking would stall the stream, every row re-ranks a short list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fad_loss.ops._dense import accumulation_dtype
from fad_loss.ops._tiled.tiles import (
    COLUMNS,
    DIRECT_CHANNELS,
    direct_distances,
    groups,
    own_pairs,
    rounding_unit,
    steps,
    tile_size,
)

# Candidates beyond k that one pass re-ranks exactly.
SHORT_LIST = 16
# Elements of a tile on a CPU: the screening passes over a tile few times, so it need not stay in
# the innermost cache, and fewer tiles mean fewer calls.
CPU_TILE = 1 << 20
# A tile's columns are folded into 1/FOLD as many minima, which vectorises, before anyone looks for
# an index, which does not.
FOLD = 16


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k nearest points of y for each of x, ascending: distance and index, (..., k)."""
    shape = (*x.shape[:-1], k)
    distance = x.new_full(shape, torch.inf, dtype=accumulation_dtype(x.dtype))
    index = torch.full(shape, -1, dtype=torch.int64, device=x.device)
    scratch = distance.new_empty(0)
    with _full_precision(x):
        for group in groups(x, y, x_offsets, y_offsets):
            if group.of_x(x).shape[1] and group.of_y(y).shape[1]:
                search = _Search(group.of_x(x), group.of_y(y), k, exclude_self, scratch)
                search.run(group.of_x(distance), group.of_x(index))
                scratch = search.scratch
    return distance, index


@contextmanager
def _full_precision(t: Tensor) -> Iterator[None]:
    """On a CPU, let the screening multiply in float32 whatever the user allows elsewhere.

    A coarser product would leave more candidates than it saves time.
    """
    precision = torch.get_float32_matmul_precision()
    if t.device.type != "cpu" or precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _Screened(NamedTuple):
    """The k best of a tile of rows by score; every other score is at least `following`."""

    score: Tensor  # (b, r, k) ascending
    index: Tensor  # type: ignore[assignment]  # (b, r, k)
    following: Tensor  # (b, r)

    def merge(self, other: _Screened) -> _Screened:
        """The k best of both."""
        k = self.score.shape[-1]
        score, order = torch.cat([self.score, other.score], -1).sort(-1)
        index = torch.cat([self.index, other.index], -1).gather(-1, order)
        following = torch.minimum(self.following, other.following).minimum(score[..., k])
        return _Screened(score[..., :k], index[..., :k], following)


class _Search:
    """The k nearest neighbors within one group of clouds, x (b, n, C) and y (b, m, C).

    The score of a pair is ``|y_j|^2 - 2 x_i y_j``: the squared distance less ``|x_i|^2``, which
    does not change the order. With few channels it is the squared distance itself, summed directly.
    """

    def __init__(self, x: Tensor, y: Tensor, k: int, exclude_self: bool, scratch: Tensor) -> None:
        dtype = accumulation_dtype(x.dtype)
        self.x, self.y = x.to(dtype), y.to(dtype)
        self.k, self.exclude_self, self.size = k, exclude_self, y.shape[1]
        self.direct = x.shape[-1] <= DIRECT_CHANNELS
        self.scratch = scratch
        # Rounding of a sum of C products grows like the root of C at most; errors up to 12 units of
        # |x|^2 + |y|^2 were seen for C up to 1024.
        self.error: float = (16 + x.shape[-1] ** 0.5) * rounding_unit(self.x)
        # Points are added to fill the last fold; their score is infinite.
        filling = -self.size % FOLD
        if self.direct:
            self.left, self.right = self.x, pad(self.y, (0, 0, 0, filling), value=torch.inf)
            return
        center = self.y.mean(1, keepdim=True)
        left, right = self.x - center, self.y - center
        self.x_norms = torch.linalg.vecdot(left, left)
        y_norms = torch.linalg.vecdot(right, right)
        self.largest = y_norms.amax(1, keepdim=True)
        # One more channel, 1 against |y|^2, spares a pass over the tile that would add the norms.
        self.left = pad(left, (0, 1), value=1.0)
        self.right = pad(right.mul_(-2), (0, 1, 0, filling))
        self.right[:, : self.size, -1] = y_norms
        self.right[:, self.size :, -1] = torch.inf

    def run(self, distance: Tensor, index: Tensor) -> None:
        """Fill the results, (b, n, k)."""
        on_cpu = self.x.device.type == "cpu"
        width = min(self.right.shape[1], COLUMNS) * self.x.shape[0]
        tile = CPU_TILE if on_cpu else tile_size(self.x)
        for rows in steps(self.x.shape[1], tile // width):
            best = self._screen(rows)
            slack = self._slack(rows, best.score[..., -1])
            limit = best.score[..., -1] + slack
            if on_cpu:
                self._accept(best, rows, distance, index)
                doubtful = best.following <= limit
                if not doubtful.any():
                    continue
            else:
                doubtful = torch.ones_like(limit, dtype=torch.bool)
            for cloud in range(len(limit)):
                chosen = doubtful[cloud].nonzero().squeeze(-1) if on_cpu else slice(None)
                self._resolve(cloud, rows, chosen, limit, distance, index)

    def _scores(self, cloud: slice, rows: slice | Tensor, columns: slice) -> Tensor:
        x, y = self.left[cloud, rows], self.right[cloud, columns]
        if self.direct:
            return direct_distances(x, y)
        # One buffer for all tiles: a new one would have to be cleared by the system every time.
        shape = (x.shape[0], x.shape[1], y.shape[1])
        size = shape[0] * shape[1] * shape[2]
        if self.scratch.numel() < size:
            self.scratch = x.new_empty(size)
        return torch.bmm(x, y.mT, out=self.scratch[:size].view(shape))

    def _slack(self, rows: slice, score: Tensor) -> Tensor:
        """Twice the error of a score: what lies further than this behind cannot come first."""
        if self.direct:
            return score * (2 * self.error)
        slack: Tensor = (self.x_norms[:, rows] + self.largest) * (2 * self.error)
        # Products of tiny numbers underflow: an error that does not shrink with them.
        return slack + torch.finfo(slack.dtype).tiny

    def _screen(self, rows: slice) -> _Screened:
        """The k best by score, over all columns."""
        best: _Screened | None = None
        for columns in steps(self.right.shape[1], COLUMNS):
            scores = self._scores(slice(None), rows, columns)
            if self.exclude_self:
                own_pairs(scores, rows, columns).fill_(torch.inf)
            found = _fold_minimum(scores) if self.k == 1 else _smallest(scores, self.k)
            found = found._replace(index=found.index + columns.start)
            best = found if best is None else best.merge(found)
        if best is None:
            message = "a search over no points"
            raise ValueError(message)
        return best

    def _exact(self, x: Tensor, y: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """Squared distances of points x (r, C) to their candidates in y (m, C), index (r, k)."""
        shape = (*index.shape, y.shape[-1])
        candidates = y.index_select(0, index.clamp(0, self.size - 1).reshape(-1)).view(shape)
        distance = candidates.sub_(x.unsqueeze(1)).square_().sum(-1)
        return distance.masked_fill_(~valid, torch.inf)

    def _accept(self, best: _Screened, rows: slice, distance: Tensor, index: Tensor) -> None:
        """Take the screened neighbors, with exact distances and in their exact order."""
        for cloud in range(len(best.score)):
            candidates, valid = best.index[cloud], best.score[cloud] < torch.inf
            if self.k > 1:
                candidates, order = candidates.sort(-1)
                valid = valid.gather(-1, order)
            d = self._exact(self.x[cloud, rows], self.y[cloud], candidates, valid)
            _write(d, candidates, self.k, distance[cloud, rows], index[cloud, rows])

    def _resolve(
        self,
        cloud: int,
        rows: slice,
        chosen: Tensor | slice,
        limit: Tensor,
        distance: Tensor,
        index: Tensor,
    ) -> None:
        """Look at every candidate of the chosen rows of one cloud, lowest index first."""
        numbers = torch.arange(rows.start, rows.stop, device=limit.device)[chosen]
        if len(numbers) == 0:
            return
        scores = self._scores(slice(cloud, cloud + 1), numbers, slice(0, self.size))[0]
        possible = scores <= limit[cloud, chosen].unsqueeze(-1)
        columns = torch.arange(self.size, device=limit.device)
        if self.exclude_self:
            possible &= columns != numbers.unsqueeze(-1)
        remaining = torch.where(possible, columns, self.size)
        x, y = self.x[cloud, numbers], self.y[cloud]
        best_d = torch.full((len(numbers), self.k), torch.inf, dtype=x.dtype, device=x.device)
        best_index = torch.full_like(best_d, -1, dtype=torch.int64)
        width = min(self.k + SHORT_LIST, self.size)
        while True:
            candidates = remaining.topk(width, dim=-1, largest=False, sorted=True).values
            d = self._exact(x, y, candidates, candidates < self.size)
            # The kept ones have lower indices, and come first: a stable sort settles ties.
            d, candidates = torch.cat([best_d, d], -1), torch.cat([best_index, candidates], -1)
            _write(d, candidates, self.k, best_d, best_index)
            remaining.scatter_(-1, candidates[:, self.k :].clamp(max=self.size - 1), self.size)
            if x.device.type != "cpu" or not (remaining < self.size).any():
                break
        distance[cloud, numbers], index[cloud, numbers] = best_d, best_index


def _write(d: Tensor, candidates: Tensor, k: int, distance: Tensor, index: Tensor) -> None:
    """Store the k smallest of `d`, ascending, the earlier candidate first where two are equal."""
    if k > 1 or d.shape[-1] > 1:
        d, order = d.sort(dim=-1, stable=True)
        d, candidates = d[..., :k], candidates.gather(-1, order)[..., :k]
    stored = min(k, d.shape[-1])
    distance[..., :stored] = d
    index[..., :stored] = candidates.masked_fill(d == torch.inf, -1)


def _smallest(scores: Tensor, k: int) -> _Screened:
    """The k smallest of each row, and the one that follows."""
    width = scores.shape[-1]
    if width <= k:
        scores = pad(scores, (0, k + 1 - width), value=torch.inf)
    score, index = scores.topk(k + 1, dim=-1, largest=False, sorted=True)
    return _Screened(score[..., :k], index[..., :k], score[..., k])


def _fold_minimum(scores: Tensor) -> _Screened:
    """The smallest of each row, and the one that follows, by folding columns over each other."""
    folds = torch.unflatten(scores, -1, (FOLD, -1))
    folded = folds.amin(-2)
    score, place = folded.min(-1, keepdim=True)
    following = folded.scatter_(-1, place, torch.inf).amin(-1)
    # The winner is one of the FOLD columns that were folded into that place.
    within = folds.gather(-1, place.unsqueeze(-2).expand(*folds.shape[:-1], 1)).squeeze(-1)
    fold = within.argmin(-1, keepdim=True)
    following = torch.minimum(following, within.scatter_(-1, fold, torch.inf).amin(-1))
    return _Screened(score, fold * folded.shape[-1] + place, following)
