"""nearest and knn: screen with a matrix product, then be exact.

The product only decides which points *can* be among the nearest: everything within twice its
rounding error of the k-th best. Distances are then recomputed from differences, so the result has
the accuracy of the inputs, not of the product. On a CPU the set of neighbors is certain for almost
every row, which is verified, and only the rows where it is not are looked at again; on an
accelerator, where asking would stall the stream, every row re-ranks a short list.

Several of few neighbors are not worth recomputing: on a CPU float32 is then multiplied in float64,
which is exact enough, but for the few rows in which two distances are closer than its error, or one
is almost 0. They are found by a sorting network, of keys that hold the leading bits of a score and
its column; rows in which two of those agree are selected by the scores themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fad_loss.ops._dense import accumulation_dtype
from fad_loss.ops._inputs import check_range, largest_square
from fad_loss.ops._precision import rounding_unit
from fad_loss.ops._tiled.distances import Points
from fad_loss.ops._tiled.few import nearest_of_few
from fad_loss.ops._tiled.network import smallest
from fad_loss.ops._tiled.tiles import (
    DIRECT_CHANNELS,
    direct_distances,
    groups,
    own_pairs,
    score_error,
    steps,
    tile_size,
)

# Candidates beyond k that one pass re-ranks exactly.
SHORT_LIST = 16
# Elements of a tile, all columns of some rows, on a CPU: what several passes read stays in a cache,
# and one call can serve several small clouds.
CPU_TILE = 1 << 19
# Rows of a tile, at least: fewer would read all of y too often.
ROWS = 64
# A tile's columns are folded into 1/FOLD as many minima, which vectorises, before anyone looks for
# an index, which does not.
FOLD = 16
# Up to so many columns per neighbor, multiplying in float64 costs less than recomputing distances.
COLUMNS_PER_NEIGHBOR = 32
# Keys have 23 bits for the leading digits of a score and its column. While k^2 times the number of
# columns is below this, few rows have two that agree in what is left.
LONGEST_NETWORK = 1 << 20
# A network's points are centered only where float64 does not resolve more distances of a row than
# this: few are those of points that coincide, more of points far from the origin.
FAR = 2
# Elements of the candidates whose distances are computed at once on a CPU: they stay in the cache.
EXACT_TILE = 1 << 17
# Elements of points that become float64 at once for a network.
WIDE_TILE = 1 << 17


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    exclude_self: bool,
    x_offsets: Tensor | None,
    y_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k nearest points of y for each of x, ascending: distance and index, (..., k).

    On a CPU this is where values out of range are found: a search among few has their norms anyway.
    """
    shape = (*x.shape[:-1], k)
    distance = x.new_empty(shape, dtype=accumulation_dtype(x.dtype))
    index = x.new_empty(shape, dtype=torch.int64)
    buffers, checked = _Buffers(), x.device.type != "cpu"

    def check() -> None:
        check_range(x, y)

    for group in groups(x, y, x_offsets, y_offsets, _tile_size(x)):
        points = group.of_x(x), group.of_y(y)
        found = group.of_x(distance), group.of_x(index)
        if not (points[0].shape[1] and points[1].shape[1]):
            found[0].fill_(torch.inf)
            found[1].fill_(-1)
        elif k > 1 or exclude_self or not nearest_of_few(*points, *found):
            search = _Search(*points, k, exclude_self, buffers, check)
            if not (checked or search.network):
                check()
                checked = True
            search.run(*found)
    return distance, index


class _Buffers:
    """Memory for one cloud after the other: new memory would have to be cleared every time."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialized tensor, valid until the name is asked for again."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(shape)


class _Screened(NamedTuple):
    """What the scores of a tile of rows say."""

    index: Tensor  # type: ignore[assignment]  # (b, r, k) the k best; y's size for none
    limit: Tensor  # (b, r): no other score that is among the k nearest lies above
    doubtful: Tensor  # (b, r): whether another one lies below


class _Search:
    """The k nearest neighbors within one group of clouds, x (b, n, C) and y (b, m, C).

    The score of a pair is ``|y_j|^2 - 2 x_i y_j``: the squared distance less ``|x_i|^2``, which
    does not change the order. With few channels it is the squared distance itself, summed directly.
    `check` raises if values are out of range; where a network selects, it is called when norms say
    so, else before.
    """

    norms: Tensor  # (b, n)
    bias: Tensor  # (b, m), the norms of y

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        k: int,
        exclude_self: bool,
        buffers: _Buffers,
        check: Callable[[], None],
    ) -> None:
        dtype = accumulation_dtype(x.dtype)
        self.x, self.y = x.to(dtype), y.to(dtype)
        self.k, self.exclude_self, self.buffers, self.check = k, exclude_self, buffers, check
        self.size, channels = y.shape[1:]
        self.direct = channels <= DIRECT_CHANNELS
        self.looks = x.device.type == "cpu"
        few = 1 < k < self.size <= COLUMNS_PER_NEIGHBOR * k
        self.wide = few and self.looks and not self.direct and dtype == torch.float32
        unit = 2.0**-53 if self.wide else rounding_unit(self.x)
        self.error = score_error(channels) * unit
        self.width = 1 << self.k.bit_length()  # k and the one that follows
        self.network = self.wide and self.k**2 * self.size < LONGEST_NETWORK
        # Points are added to fill the last fold; their score is infinite.
        self.filling = -self.size % (self.width if self.network else FOLD)
        if self.direct:
            self.left = self.x
            self.right = pad(self.y, (0, 0, 0, self.filling), value=torch.inf)
        elif self.network:
            self.left, self.right = self.x, self._filled(self.y)
            self.norms = self.x.new_empty(self.x.shape[:2], dtype=torch.float64)
            self.slack, self.centered = torch.empty_like(self.norms), False
        else:
            self._center()
            self.slack = self._twice_the_error(self.norms, self.bias)
            self.bias = pad(self.bias, (0, self.filling), value=torch.inf)

    def _center(self) -> bool:
        """Put the origin among the points, if that shrinks them; whether it does.

        Uncentered points, where norms would shrink by less than nine tenths, cost some rows that
        have to be looked at again; centering costs copies of all of them.
        """
        dtype = torch.float64 if self.wide else self.x.dtype
        points = Points.of(self.x, self.y, dtype, shrinking=0.9)
        self.left, self.right = points.x, self._filled(points.y)
        self.norms, self.bias, self.centered = points.x_norms, points.y_norms, True
        return points.moved

    def _filled(self, y: Tensor) -> Tensor:
        return pad(y, (0, 0, 0, self.filling)) if self.filling else y

    def _twice_the_error(self, norms: Tensor, bias: Tensor) -> Tensor:
        """Of the scores of each row: what lies further than this behind cannot come first.

        Products of tiny numbers underflow: an error that does not shrink with them.
        """
        sums = norms + bias.amax(1, keepdim=True)
        return sums.mul_(2 * self.error).add_(torch.finfo(self.x.dtype).tiny)

    def run(self, distance: Tensor, index: Tensor) -> None:
        """Fill the results, (b, n, k)."""
        clouds, count = self.x.shape[:2]
        tile = _tile_size(self.x) // (clouds * self.size)
        for rows in steps(count, max(tile, ROWS)):
            scores = self._scores(rows)
            if self.wide:
                self._settle(scores, rows, distance, index)
                continue
            best, limit, doubtful = self._screen(scores, rows)
            if self.looks:
                self._accept(best, rows, distance[:, rows], index[:, rows])
                cloud, row = doubtful.nonzero(as_tuple=True)
            else:
                cloud = torch.arange(clouds, device=limit.device).repeat_interleave(limit.shape[1])
                row = torch.arange(limit.shape[1], device=limit.device).repeat(clouds)
            if len(row):
                score, bound = scores[cloud, row, : self.size], limit[cloud, row].unsqueeze(-1)
                possible = (score <= bound) & (score < torch.inf)
                self._resolve(cloud, row + rows.start, possible, distance, index)

    def _slack(self, last: Tensor, rows: slice) -> Tensor:
        """Twice the error of the scores of some rows, whose k-th best are known, (b, r)."""
        if self.direct:
            return (last * (2 * self.error)).add_(torch.finfo(last.dtype).tiny)
        return self.slack[:, rows]

    def _screen(self, scores: Tensor, rows: slice) -> _Screened:
        """The k best of each row, and whether the error of the scores leaves them open."""
        score, index, following = (
            _fold_minimum(scores) if self.k == 1 else _smallest(scores, self.k)
        )
        last = score[..., -1]
        limit = last + self._slack(last, rows)
        index = torch.where(score < torch.inf, index, self.size)
        return _Screened(index, limit, following <= limit)

    def _settle(self, scores: Tensor, rows: slice, distance: Tensor, index: Tensor) -> None:
        """Take the neighbors by scores in float64, and look again at rows that they do not settle.

        Distances are rounded to float32. Those that the error of a score could change by more are
        recomputed; where two neighbors could change places, all of the row is.
        """
        if self.network:
            settled = self._rank(scores, rows, distance, index)
            cloud, row = settled.logical_not_().nonzero(as_tuple=True)
        else:
            every = torch.ones(scores.shape[:2], dtype=torch.bool)
            cloud, row = every.nonzero(as_tuple=True)
        if len(cloud):
            self._sort(scores[cloud, row], cloud, row + rows.start, distance, index)

    def _rank(self, scores: Tensor, rows: slice, distance: Tensor, index: Tensor) -> Tensor:
        """Take the k smallest scores of each row, by a network; and say which rows are settled.

        What is compared is how far a score lies above the row's smallest, as float32, whose bits
        ascend as the numbers do; the last of them make room for the column. Neighbors come first
        here, (k + 1, b, r), and a row after the other in memory.
        """
        clouds, count, size = scores.shape
        columns = torch.arange(size, dtype=torch.int32)
        places = (1 << size.bit_length()) - 1
        least = scores.amin(-1)
        above = self.buffers.take("keys", (size, clouds, count), self.x)
        torch.sub(scores.permute(2, 0, 1), least, out=above)
        keys = above.view(torch.int32).bitwise_and_(~places).bitwise_or_(columns[:, None, None])
        keys = smallest(keys.flatten(1), self.width)[: self.k + 1].view(-1, clouds, count)
        order = keys & places
        # Scores are in memory column by column, (b, m, r).
        starts = torch.arange(0, scores.numel(), size * count, dtype=torch.int32)[:, None]
        at = torch.add(starts + torch.arange(count, dtype=torch.int32), order, alpha=count)
        score = scores.mT.reshape(-1).index_select(0, at.view(-1)).view(keys.shape)
        # Whatever follows has the digits of the one that was found, or larger ones.
        edge = (keys[-1] & ~places).view(torch.float32)
        torch.add(least, edge, alpha=1 - 2.0**-23, out=score[-1])
        slack = self.slack[:, rows]
        exact = score.add_(self.norms[:, rows]).clamp_(min=0)
        d = exact.to(distance.dtype)
        # Transposing is fast between matrices of one dtype.
        for result, found in ((distance, d), (index, order)):
            result[:, rows] = found[:-1].flatten(1).t().contiguous().view(clouds, count, -1)
        if (exact[0] * 2.0**-23 <= slack).any():
            place, cloud, row = (exact[:-1] * 2.0**-23 <= slack).nonzero(as_tuple=True)
            far = not self.centered and len(place) > FAR * clouds * count
            if far and self._center():
                # Where the old scores were.
                return self._rank(self._scores(rows), rows, distance, index)
            self._renew(cloud, row + rows.start, place, distance, index)
        # By more than the slack, and than twice what rounding to float32 takes off a difference.
        return (d[1:] * (1 - 2.0**-21)).sub_(d[:-1]).amin(0) > slack

    def _sort(
        self, scores: Tensor, cloud: Tensor, row: Tensor, distance: Tensor, index: Tensor
    ) -> None:
        """Take the k smallest scores (r, m) of a few rows, and look again where they are close."""
        score, order = scores.topk(self.k + 1, dim=-1, largest=False, sorted=True)
        norms, slack = self.norms[cloud, row, None], self.slack[cloud, row, None]
        exact = (score + norms).clamp_(min=0)
        d = exact.to(distance.dtype)
        distance[cloud, row], index[cloud, row] = d[:, :-1], order[:, :-1]
        near, place = (exact[:, :-1] * 2.0**-23 <= slack).nonzero(as_tuple=True)
        if len(near):
            self._renew(cloud[near], row[near], place, distance, index)
        doubtful = ((score.diff() <= slack) | (d[:, 1:] <= d[:, :-1])).any(-1)
        if doubtful.any():
            # What is no further once rounded may have a lower index.
            limit = (score + exact * 2.0**-22 + slack)[doubtful, -2, None]
            possible = scores[doubtful, : self.size] <= limit
            self._resolve(cloud[doubtful], row[doubtful], possible, distance, index)

    def _renew(
        self, cloud: Tensor, row: Tensor, place: Tensor, distance: Tensor, index: Tensor
    ) -> None:
        """Recompute distances from differences."""
        difference = self.x[cloud, row] - self.y[cloud, index[cloud, row, place]]
        distance[cloud, row, place] = difference.square_().sum(-1)

    def _scores(self, rows: slice) -> Tensor:
        """The scores of some rows against all columns (b, r, m), and against the added ones."""
        x, y = self.left[:, rows], self.right
        if self.direct:
            scores = direct_distances(x, y)
        elif self.network:  # column by column, as the network takes them
            out = self.buffers.take("scores", (len(x), y.shape[1], x.shape[1]), self.norms)
            for part in steps(len(x), WIDE_TILE // max(x[0].numel(), y[0].numel())):
                left, right = self._widened("left", x[part]), self._widened("right", y[part])
                # A root and its square: `score_error` has room for the rounding, and there is no
                # memory for all the squares.
                own, bias = (torch.linalg.vector_norm(t, dim=-1).square_() for t in (left, right))
                self.norms[part, rows] = own
                self.slack[part, rows] = self._twice_the_error(own, bias)
                bias[:, self.size :] = torch.inf
                torch.baddbmm(bias.unsqueeze(-1), right, left.mT, alpha=-2, out=out[part])
            if not self.slack[:, rows].amax().item() <= self.error * largest_square(self.x):
                self.check()
            scores = out.mT
        else:
            out = self.buffers.take("scores", (*x.shape[:2], y.shape[1]), x)
            scores = torch.baddbmm(self.bias.unsqueeze(-2), x, y.mT, alpha=-2, out=out)
        if self.exclude_self:
            own_pairs(scores, rows, slice(0, self.size)).fill_(torch.inf)
        return scores

    def _widened(self, name: str, t: Tensor) -> Tensor:
        """In float64, in memory that is used again."""
        if t.dtype == self.norms.dtype:
            return t
        return self.buffers.take(name, tuple(t.shape), self.norms).copy_(t)

    def _exact(self, x: Tensor, cloud: Tensor, index: Tensor) -> Tensor:
        """Squared distances of points x (r, C) of some clouds (r) to candidates (r, w).

        A candidate from `size` on is none, and infinitely far.
        """
        width, channels = index.shape[-1], x.shape[-1]
        y = self.y.reshape(-1, channels)
        chosen = index.clamp(max=self.size - 1).add_(cloud.unsqueeze(-1) * self.size)
        distance = x.new_empty(index.shape)
        tile = EXACT_TILE if self.looks else _tile_size(x)
        for part in steps(len(x), tile // (width * channels)):
            at = chosen[part].view(-1)
            buffer = self.buffers.take("candidates", (len(at), channels), x)
            candidates = torch.index_select(y, 0, at, out=buffer).view(-1, width, channels)
            torch.sum(candidates.sub_(x[part].unsqueeze(1)).square_(), -1, out=distance[part])
        return distance.masked_fill_(index >= self.size, torch.inf)

    def _accept(self, candidates: Tensor, rows: slice, distance: Tensor, index: Tensor) -> None:
        """Take the screened neighbors, with exact distances and in their exact order."""
        clouds, count, _ = index.shape
        if self.k > 1:
            candidates = candidates.sort(-1).values
        cloud = torch.arange(clouds, device=index.device).repeat_interleave(count)
        d = self._exact(self.x[:, rows].flatten(0, 1), cloud, candidates.flatten(0, 1))
        _write(d.view_as(candidates), candidates, self.k, distance, index)

    def _resolve(
        self, cloud: Tensor, row: Tensor, possible: Tensor, distance: Tensor, index: Tensor
    ) -> None:
        """Look at every possible neighbor (r, m) of a few rows, lowest index first."""
        columns = torch.arange(self.size, device=possible.device)
        remaining = torch.where(possible, columns, self.size)
        x = self.x[cloud, row]
        best_d = torch.full((len(row), self.k), torch.inf, dtype=x.dtype, device=x.device)
        best_index = torch.full_like(best_d, -1, dtype=torch.int64)
        width = min(self.k + SHORT_LIST, self.size)
        while True:
            candidates = remaining.topk(width, dim=-1, largest=False, sorted=True).values
            d = self._exact(x, cloud, candidates)
            # The kept ones have lower indices, and come first: a stable sort settles ties.
            d, candidates = torch.cat([best_d, d], -1), torch.cat([best_index, candidates], -1)
            _write(d, candidates, self.k, best_d, best_index)
            remaining.scatter_(-1, candidates[:, self.k :].clamp(max=self.size - 1), self.size)
            if not self.looks or not (remaining < self.size).any():
                break
        distance[cloud, row], index[cloud, row] = best_d, best_index


def _tile_size(t: Tensor) -> int:
    return CPU_TILE if t.device.type == "cpu" else tile_size(t)


def _write(d: Tensor, candidates: Tensor, k: int, distance: Tensor, index: Tensor) -> None:
    """Store the k smallest of `d`, ascending, the earlier candidate first where two are equal."""
    if k > 1 or d.shape[-1] > 1:
        d, order = d.sort(dim=-1, stable=True)
        d, candidates = d[..., :k], candidates.gather(-1, order)[..., :k]
    stored = min(k, d.shape[-1])
    distance[..., :stored] = d
    index[..., :stored] = candidates.masked_fill(d == torch.inf, -1)


def _smallest(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k smallest of each row, ascending, their columns, and the one that follows."""
    width = scores.shape[-1]
    if width <= k:
        scores = pad(scores, (0, k + 1 - width), value=torch.inf)
    if width < FOLD * (k + 1):
        score, index = scores.topk(k + 1, dim=-1, largest=False, sorted=True)
    else:
        # They are in the k + 1 places with the smallest minima: fewer than all columns to sort.
        folds = torch.unflatten(scores, -1, (FOLD // 2, -1))
        places = folds.amin(-2).topk(k + 1, dim=-1, largest=False, sorted=False).indices
        starts = torch.arange(0, width, folds.shape[-1], device=places.device)
        columns = (places.unsqueeze(-2) + starts.unsqueeze(-1)).flatten(-2)
        score, chosen = scores.gather(-1, columns).topk(k + 1, dim=-1, largest=False, sorted=True)
        index = columns.gather(-1, chosen)
    return score[..., :k], index[..., :k], score[..., k]


def _fold_minimum(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_smallest`, of one, by folding columns over each other."""
    folds = torch.unflatten(scores, -1, (FOLD, -1))
    folded = folds.amin(-2)
    score, place = folded.min(-1, keepdim=True)
    following = folded.scatter_(-1, place, torch.inf).amin(-1)
    # The winner is one of the FOLD columns that were folded into that place.
    within = folds.gather(-1, place.unsqueeze(-2).expand(*folds.shape[:-1], 1)).squeeze(-1)
    fold = within.argmin(-1, keepdim=True)
    following = torch.minimum(following, within.scatter_(-1, fold, torch.inf).amin(-1))
    return score, fold * folded.shape[-1] + place, following
