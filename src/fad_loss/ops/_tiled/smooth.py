r"""kernel_sum and softmin: forward, backward and double backward, a tile at a time.

With d_ij the squared distances, both are sums over j of a smooth function of d_ij. Let u_i, v_j be
directions in which x and y move: d_ij changes by delta_ij = 2 (x_i - y_j) . (u_i - v_j). Then

- the backward needs one weight per pair, W_ij = dL/d(d_ij), and
  `Gradient` multiplies it back: dx_i = 2 sum_j W_ij (x_i - y_j);
- the double backward is the gradient of S = sum_ij W_ij delta_ij + ..., which needs two weights per
  pair: A_ij = dS/d(d_ij), for x and y, and P_ij = dS/d(delta_ij) = W_ij, for u and v.

Weights are recomputed on each tile from the points, so memory stays O(N + M). How far distances and
gradients can be off is said in `distances.py`; a tile has the dtype that this takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fad_loss.ops._dense import accumulation_dtype
from fad_loss.ops._tiled.distances import Clouds, Gradient, Tile
from fad_loss.ops._tiled.tiles import groups, own_pairs
from fad_loss.ops.kernels import Kernel

Offsets = Tensor | None


def _wide(t: Tensor) -> Tensor:
    return t.to(accumulation_dtype(t.dtype))


def _like(t: Tensor, *, wanted: bool = True) -> Tensor:
    """A zero accumulator for a gradient of `t`, or an empty one if nobody wants it."""
    dtype = accumulation_dtype(t.dtype)
    # Contiguous whatever the strides of `t`, as the operators' fake implementations promise.
    return t.new_zeros(t.shape if wanted else 0, dtype=dtype)


# ---------------------------------------------------------------------------------- kernel_sum


def kernel_sum(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    kernel: Kernel,
    exclude_self: bool,
    x_offsets: Offsets,
    y_offsets: Offsets,
) -> Tensor:
    """Sum over j of w_j k(d_ij)."""
    total = _like(x[..., 0])
    for group in groups(x, y, x_offsets, y_offsets):
        clouds = Clouds(group.of_x(x), group.of_y(y), kernel.scale, exclude_self=exclude_self)
        w = None if weights is None else group.of_y(weights).unsqueeze(-1)
        out = group.of_x(total)
        for tile in clouds:
            value = _without_own(kernel(tile.d), tile, exclude_self)
            if w is None:
                out[:, tile.rows] += value.sum(-1)
            else:
                out[:, tile.rows] += (value @ tile.like(w[:, tile.columns])).squeeze(-1)
    return total


def _without_own(values: Tensor, tile: Tile, exclude_self: bool) -> Tensor:
    """Zero for a point and itself, where they are left out: their distance is infinite."""
    if exclude_self:
        own_pairs(values, tile.rows, tile.columns).zero_()
    return values


def kernel_sum_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    kernel: Kernel,
    exclude_self: bool,
    x_offsets: Offsets,
    y_offsets: Offsets,
    of_y: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, y and the weights."""
    grads = _like(x), _like(y, wanted=of_y), _like(y[..., 0], wanted=of_weights)
    for group in groups(x, y, x_offsets, y_offsets):
        points = group.of_x(x), group.of_y(y)
        clouds = Clouds(*points, kernel.scale, exclude_self=exclude_self, backward=True)
        g = group.of_x(grad).unsqueeze(-1)
        w = None if weights is None else group.of_y(weights).unsqueeze(-2)
        pull = Gradient(group.of_x(grads[0]), group.of_y(grads[1]) if of_y else None)
        for tile in clouds:
            first = _without_own(kernel.first(tile.d), tile, exclude_self).mul_(g[:, tile.rows])
            if of_weights:
                value = _without_own(kernel(tile.d), tile, exclude_self)
                group.of_y(grads[2])[:, tile.columns] += (g[:, tile.rows] * value).sum(-2)
            if w is not None:
                first.mul_(w[..., tile.columns])
            pull.add(tile, first)
        pull.finish(*clouds.first)
    return grads


def kernel_sum_double_backward(
    u: Tensor,
    v: Tensor | None,
    t: Tensor | None,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    kernel: Kernel,
    exclude_self: bool,
    x_offsets: Offsets,
    y_offsets: Offsets,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of S = <u, dx> + <v, dy> + <t, dw> by the incoming gradient, x, y, the weights."""
    grads = _like(grad), _like(x), _like(y), _like(y[..., 0])
    for group in groups(x, y, x_offsets, y_offsets):
        points = group.of_x(x), group.of_y(y)
        clouds = Clouds(*points, kernel.scale, exclude_self=exclude_self, backward=True)
        gu, gv = _wide(group.of_x(u)), None if v is None else _wide(group.of_y(v))
        gt = None if t is None else group.of_y(t).unsqueeze(-2)
        g = group.of_x(grad).unsqueeze(-1)
        w = None if weights is None else group.of_y(weights).unsqueeze(-2)
        gradients = group.of_x(grads[1]), group.of_y(grads[2])
        pull, directions = Gradient(*gradients), Gradient(*gradients)
        for tile in clouds:
            rows, columns = tile.rows, tile.columns
            delta = tile.directional(gu, gv)
            first = _without_own(kernel.first(tile.d), tile, exclude_self)
            second = _without_own(kernel.second(tile.d), tile, exclude_self)
            moved = first * delta
            group.of_y(grads[3])[:, columns] += (g[:, rows] * moved).sum(-2)
            weighted = moved if w is None else moved * w[..., columns]
            a = second * delta
            p = first if w is None else first * w[..., columns]
            if w is not None:
                a = a * w[..., columns]
            if gt is not None:
                value = _without_own(kernel(tile.d), tile, exclude_self)
                weighted = weighted + gt[..., columns] * value
                a = a + gt[..., columns] * first
            group.of_x(grads[0])[:, rows] += weighted.sum(-1)
            pull.add(tile, a * g[:, rows])
            _pull_directions(directions, tile, p * g[:, rows], gu, gv)
        pull.finish(*clouds.first)
        directions.finish(gu, _zeros(gv, points[1]))
    return grads


def _pull_directions(
    gradient: Gradient, tile: Tile, weights: Tensor, u: Tensor, v: Tensor | None
) -> None:
    """Pull along the directions of the points instead of the points."""
    v = torch.zeros_like(tile.y) if v is None else tile.like(v[:, tile.columns])
    gradient.add_products(tile, weights, tile.like(u[:, tile.rows]), v)


def _zeros(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t


# ------------------------------------------------------------------------------------- softmin


def softmin(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Offsets,
    y_offsets: Offsets,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minus eps log sum_j exp((h_j - d_ij) / eps) for each epsilon, (..., E), in two parts.

    The result is least - eps log total, with least_i = min_j (d_ij - h_j) and total_i the sum of
    exp((least_i - d_ij + h_j) / eps). All three are returned: the probabilities, which the backward
    needs, sum to 1 if they are made from the parts, but not if they are made from the result, whose
    rounding would be divided by eps.
    """
    dtype = accumulation_dtype(x.dtype)
    shape = (*x.shape[:-1], len(epsilon))
    least = x.new_full(shape, torch.inf, dtype=dtype)
    total = x.new_zeros(shape, dtype=dtype)
    for group in groups(x, y, x_offsets, y_offsets):
        points = group.of_x(x), group.of_y(y)
        clouds = Clouds(*points, min(epsilon), exclude_self=exclude_self)
        h = None if bias is None else _wide(group.of_y(bias)).mT.unsqueeze(-2)
        smallest, sums = group.of_x(least), group.of_x(total)
        for tile in clouds:
            rows = tile.rows
            for e, eps in enumerate(epsilon):
                shifted = tile.d if h is None else tile.d - h[:, e, :, tile.columns]
                before = smallest[:, rows, e]
                new = torch.minimum(before, shifted.amin(-1))
                # Where nothing has been seen yet both minima are inf, and their difference NaN.
                safe = torch.where(new == torch.inf, 0.0, new)
                sums[:, rows, e] *= (safe - before).div_(eps).exp_()
                sums[:, rows, e] += (safe.unsqueeze(-1) - shifted).mul_(1 / eps).exp_().sum(-1)
                smallest[:, rows, e] = new
    # log(0) = -inf for a row without neighbors: the result is +inf, as it should be.
    logs = zip(total.log().unbind(-1), epsilon, strict=True)
    return least - torch.stack([log * eps for log, eps in logs], -1), least, total


class _Exponentials:
    """Recomputes exp((least_i - d_ij + h_j) / eps) for one group of clouds, tile by tile.

    Divided by its sum over j, `total` of the forward, it is the probability p_ij.
    """

    def __init__(self, bias: Tensor | None, least: Tensor, epsilon: Sequence[float]) -> None:
        self.epsilon = epsilon
        self.h = None if bias is None else _wide(bias).mT.unsqueeze(-2)
        # A row without neighbors is +inf; with -inf instead all of it is exp(-inf) = 0.
        self.least = torch.where(least == torch.inf, -torch.inf, least)

    def on(self, tile: Tile) -> list[Tensor]:
        """The tile for each epsilon."""
        tiles = []
        for e, eps in enumerate(self.epsilon):
            shifted = tile.d if self.h is None else tile.d - self.h[:, e, :, tile.columns]
            # Never above 0, but for the rounding of a distance that is much larger than eps.
            above = (self.least[:, tile.rows, e, None] - shifted).mul_(1 / eps).clamp_(max=0)
            tiles.append(above.exp_())
        return tiles


def softmin_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    least: Tensor,
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Offsets,
    y_offsets: Offsets,
    of_y: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, y and the bias, where `grad` is already divided by `total`."""
    like_bias = y.new_empty((*y.shape[:-1], len(epsilon))) if bias is None else bias
    grads = _like(x), _like(y, wanted=of_y), _like(like_bias, wanted=of_bias)
    for group in groups(x, y, x_offsets, y_offsets):
        points = group.of_x(x), group.of_y(y)
        clouds = Clouds(*points, min(epsilon), exclude_self=exclude_self, backward=True)
        h = None if bias is None else group.of_y(bias)
        p = _Exponentials(h, group.of_x(least), epsilon)
        g = group.of_x(grad)
        pull = Gradient(group.of_x(grads[0]), group.of_y(grads[1]) if of_y else None)
        for tile in clouds:
            weights: Tensor | None = None
            for e, exponential in enumerate(p.on(tile)):
                weighted = exponential.mul_(g[:, tile.rows, e, None])
                if of_bias:
                    group.of_y(grads[2])[:, tile.columns, e] -= weighted.sum(-2)
                weights = weighted if weights is None else weights.add_(weighted)
            if weights is not None:
                pull.add(tile, weights)
        pull.finish(*clouds.first)
    return grads


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
    x_offsets: Offsets,
    y_offsets: Offsets,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of S = <u, dx> + <v, dy> + <t, dh> by the incoming gradient, x, y and the bias.

    With q_ij = delta_ij - t_j and its mean under p, S = sum_i g_i mean_i(q). The mean needs a pass
    over the row before the weights of any of its pairs are known.
    """
    like_bias = y.new_empty((*y.shape[:-1], len(epsilon))) if bias is None else bias
    grads = _like(grad), _like(x), _like(y), _like(like_bias)
    for group in groups(x, y, x_offsets, y_offsets):
        points = group.of_x(x), group.of_y(y)
        clouds = Clouds(*points, min(epsilon), exclude_self=exclude_self, backward=True)
        h = None if bias is None else group.of_y(bias)
        p = _Exponentials(h, group.of_x(least), epsilon)
        gu, gv = _wide(group.of_x(u)), None if v is None else _wide(group.of_y(v))
        gt = None if t is None else _wide(group.of_y(t)).mT.unsqueeze(-2)
        g = group.of_x(grad)
        # A row without neighbors has no exponentials either.
        sums = group.of_x(torch.where(total > 0, total, 1.0))
        mean = group.of_x(grads[0])
        gradients = group.of_x(grads[1]), group.of_y(grads[2])
        pull, directions = Gradient(*gradients), Gradient(*gradients)
        for rows in clouds.rows():
            for columns in clouds.columns():
                tile = clouds.tile(rows, columns)
                delta = tile.directional(gu, gv)
                for e, exponential in enumerate(p.on(tile)):
                    q = delta if gt is None else delta - gt[:, e, :, columns]
                    mean[:, rows, e] += exponential.mul_(q).sum(-1)
            mean[:, rows] /= sums[:, rows]
            scaled = g[:, rows] / sums[:, rows]
            for columns in clouds.columns():
                tile = clouds.tile(rows, columns)
                delta = tile.directional(gu, gv)
                a, w = torch.zeros_like(delta), torch.zeros_like(delta)
                for e, exponential in enumerate(p.on(tile)):
                    q = delta if gt is None else delta - gt[:, e, :, columns]
                    weighted = exponential.mul_(scaled[..., e, None])
                    w += weighted
                    change = weighted * (q - mean[:, rows, e, None]) / epsilon[e]
                    a -= change
                    group.of_y(grads[3])[:, columns, e] += change.sum(-2)
                pull.add(tile, a)
                _pull_directions(directions, tile, w, gu, gv)
        pull.finish(*clouds.first)
        directions.finish(gu, _zeros(gv, points[1]))
    return grads
