r"""kernel_sum and softmin: forward, backward and double backward, a tile at a time.

With d_ij the squared distances, both are sums over j of a smooth function of d_ij. Let u_i, v_j be
directions in which x and y move: d_ij changes by delta_ij = 2 (x_i - y_j) . (u_i - v_j). Then

- the backward needs one weight per pair, W_ij = dL/d(d_ij), and
  `pull` multiplies it back: dx_i = 2 (sum_j W_ij) x_i - 2 sum_j W_ij y_j;
- the double backward is the gradient of S = sum_ij W_ij delta_ij + ..., which needs two weights per
  pair: A_ij = dS/d(d_ij), pulled to x and y, and P_ij = dS/d(delta_ij) = W_ij, pulled to u and v.

Weights are recomputed on each tile from the points, so memory stays O(N + M).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fad_loss.ops._dense import accumulation_dtype
from fad_loss.ops._tiled.tiles import Clouds, groups, own_pairs
from fad_loss.ops.kernels import Kernel

Offsets = Tensor | None
Tile = tuple[slice, slice]


def _pull(
    weights: Tensor, x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor | None, tile: Tile
) -> None:
    """Add the gradient of sum_ij W_ij |x_i - y_j|^2 to that of x, and to that of y if wanted.

    On centered points: the result is the same, and less of it cancels.
    """
    rows, columns = tile
    x, y = x[:, rows], y[:, columns]
    of_x[:, rows].addcmul_(x, weights.sum(-1, keepdim=True), value=2)
    of_x[:, rows].baddbmm_(weights, y, alpha=-2)
    if of_y is not None:
        of_y[:, columns].addcmul_(y, weights.sum(-2).unsqueeze(-1), value=2)
        of_y[:, columns].baddbmm_(weights.mT, x, alpha=-2)


def _directional(
    clouds: Clouds, u: Tensor | None, v: Tensor | None, rows: slice, columns: slice
) -> Tensor:
    """delta_ij = 2 (x_i - y_j) . (u_i - v_j) on one tile; a direction that is None is zero."""
    x, y = clouds.x[:, rows], clouds.y[:, columns]
    delta = x.new_zeros(x.shape[0], x.shape[1], y.shape[1])
    if u is not None:
        delta = delta + (x * u[:, rows]).sum(-1, keepdim=True)
        delta = delta.baddbmm(u[:, rows], y.mT, alpha=-1)
    if v is not None:
        delta = delta + (y * v[:, columns]).sum(-1).unsqueeze(-2)
        delta = delta.baddbmm(x, v[:, columns].mT, alpha=-1)
    return 2 * delta


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
        clouds = Clouds.of(group.of_x(x), group.of_y(y), snap=kernel.rough)
        w = None if weights is None else _wide(group.of_y(weights)).unsqueeze(-1)
        out = group.of_x(total)
        for rows, columns in clouds:
            value = kernel(clouds.distances(rows, columns))
            if exclude_self:
                own_pairs(value, rows, columns).zero_()
            out[:, rows] += value.sum(-1) if w is None else (value @ w[:, columns]).squeeze(-1)
    return total


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
        clouds = Clouds.of(group.of_x(x), group.of_y(y), snap=kernel.rough)
        g = group.of_x(grad).unsqueeze(-1)
        w = None if weights is None else _wide(group.of_y(weights)).unsqueeze(-2)
        dx, dy = group.of_x(grads[0]), group.of_y(grads[1]) if of_y else None
        for rows, columns in clouds:
            d = clouds.distances(rows, columns)
            first = kernel.first(d).mul_(g[:, rows])
            if exclude_self:
                own_pairs(first, rows, columns).zero_()
            if of_weights:
                value = kernel(d)
                if exclude_self:
                    own_pairs(value, rows, columns).zero_()
                group.of_y(grads[2])[:, columns] += (g[:, rows] * value).sum(-2)
            if w is not None:
                first.mul_(w[..., columns])
            _pull(first, clouds.x, clouds.y, dx, dy, (rows, columns))
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
        clouds = Clouds.of(group.of_x(x), group.of_y(y), snap=kernel.rough)
        gu = _wide(group.of_x(u))
        gv = None if v is None else _wide(group.of_y(v))
        gt = None if t is None else _wide(group.of_y(t)).unsqueeze(-2)
        g = group.of_x(grad).unsqueeze(-1)
        w = None if weights is None else _wide(group.of_y(weights)).unsqueeze(-2)
        dx, dy = group.of_x(grads[1]), group.of_y(grads[2])
        for rows, columns in clouds:
            d = clouds.distances(rows, columns)
            delta = _directional(clouds, gu, gv, rows, columns)
            first, second = kernel.first(d), kernel.second(d)
            value = kernel(d) if gt is not None else None
            if exclude_self:
                for tile in (first, second, value):
                    if tile is not None:
                        own_pairs(tile, rows, columns).zero_()
            moved = first * delta
            group.of_y(grads[3])[:, columns] += (g[:, rows] * moved).sum(-2)
            weighted = moved if w is None else moved * w[..., columns]
            a = second * delta
            p = first if w is None else first * w[..., columns]
            if w is not None:
                a = a * w[..., columns]
            if gt is not None and value is not None:
                weighted = weighted + gt[..., columns] * value
                a = a + gt[..., columns] * first
            group.of_x(grads[0])[:, rows] += weighted.sum(-1)
            _pull(a * g[:, rows], clouds.x, clouds.y, dx, dy, (rows, columns))
            _pull(p * g[:, rows], gu, _zeros(gv, clouds.y), dx, dy, (rows, columns))
    return grads


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
        clouds = Clouds.of(group.of_x(x), group.of_y(y))
        h = None if bias is None else _wide(group.of_y(bias)).mT.unsqueeze(-2)
        smallest, sums = group.of_x(least), group.of_x(total)
        for rows, columns in clouds:
            d = clouds.distances(rows, columns)
            if exclude_self:
                own_pairs(d, rows, columns).fill_(torch.inf)
            for e, eps in enumerate(epsilon):
                shifted = d if h is None else d - h[:, e, :, columns]
                before = smallest[:, rows, e]
                new = torch.minimum(before, shifted.amin(-1))
                # Where nothing has been seen yet both minima are inf, and their difference NaN.
                safe = torch.where(new == torch.inf, 0.0, new)
                sums[:, rows, e] *= (safe - before).div_(eps).exp_()
                sums[:, rows, e] += (safe.unsqueeze(-1) - shifted).mul_(1 / eps).exp_().sum(-1)
                smallest[:, rows, e] = new
    # log(0) = -inf for a row without neighbors: the result is +inf, as it should be.
    return least - total.log() * total.new_tensor(epsilon), least, total


class _Exponentials:
    """Recomputes exp((least_i - d_ij + h_j) / eps) for one group of clouds, tile by tile.

    Divided by its sum over j, `total` of the forward, it is the probability p_ij.
    """

    def __init__(
        self,
        clouds: Clouds,
        bias: Tensor | None,
        least: Tensor,
        epsilon: Sequence[float],
        exclude_self: bool,
    ) -> None:
        self.clouds, self.epsilon, self.exclude_self = clouds, epsilon, exclude_self
        self.h = None if bias is None else _wide(bias).mT.unsqueeze(-2)
        # A row without neighbors is +inf; with -inf instead all of it is exp(-inf) = 0.
        self.least = torch.where(least == torch.inf, -torch.inf, least)

    def on(self, rows: slice, columns: slice) -> list[Tensor]:
        """The tile for each epsilon."""
        d = self.clouds.distances(rows, columns)
        tiles = []
        for e, eps in enumerate(self.epsilon):
            shifted = d if self.h is None else d - self.h[:, e, :, columns]
            p = (self.least[:, rows, e, None] - shifted).mul_(1 / eps).exp_()
            if self.exclude_self:
                own_pairs(p, rows, columns).zero_()
            tiles.append(p)
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
        clouds = Clouds.of(group.of_x(x), group.of_y(y))
        h = None if bias is None else group.of_y(bias)
        p = _Exponentials(clouds, h, group.of_x(least), epsilon, exclude_self)
        g = group.of_x(grad)
        dx, dy = group.of_x(grads[0]), group.of_y(grads[1]) if of_y else None
        for rows, columns in clouds:
            weights: Tensor | None = None
            for e, tile in enumerate(p.on(rows, columns)):
                weighted = tile.mul_(g[:, rows, e, None])
                if of_bias:
                    group.of_y(grads[2])[:, columns, e] -= weighted.sum(-2)
                weights = weighted if weights is None else weights.add_(weighted)
            if weights is not None:
                _pull(weights, clouds.x, clouds.y, dx, dy, (rows, columns))
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
    epsilon: Sequence[float],
    exclude_self: bool,
    x_offsets: Offsets,
    y_offsets: Offsets,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of S = <u, dx> + <v, dy> + <t, dh> by the incoming gradient, x, y and the bias.

    With q_ij = delta_ij - t_j and its mean under p, S = sum_i g_i mean_i(q). The mean needs a pass
    over the row before the weights of any of its pairs are known, which sums the exponentials too.
    """
    like_bias = y.new_empty((*y.shape[:-1], len(epsilon))) if bias is None else bias
    grads = _like(grad), _like(x), _like(y), _like(like_bias)
    for group in groups(x, y, x_offsets, y_offsets):
        clouds = Clouds.of(group.of_x(x), group.of_y(y))
        h = None if bias is None else group.of_y(bias)
        p = _Exponentials(clouds, h, group.of_x(least), epsilon, exclude_self)
        gu = _wide(group.of_x(u))
        gv = None if v is None else _wide(group.of_y(v))
        gt = None if t is None else _wide(group.of_y(t)).mT.unsqueeze(-2)
        g = group.of_x(grad)
        mean = group.of_x(grads[0])
        dx, dy = group.of_x(grads[1]), group.of_y(grads[2])
        for rows in clouds.rows():
            total = torch.zeros_like(mean[:, rows])
            for columns in clouds.columns():
                delta = _directional(clouds, gu, gv, rows, columns)
                for e, tile in enumerate(p.on(rows, columns)):
                    q = delta if gt is None else delta - gt[:, e, :, columns]
                    total[..., e] += tile.sum(-1)
                    mean[:, rows, e] += (tile * q).sum(-1)
            total = torch.where(total > 0, total, 1.0)
            mean[:, rows] /= total
            scaled = g[:, rows] / total
            for columns in clouds.columns():
                delta = _directional(clouds, gu, gv, rows, columns)
                a, w = torch.zeros_like(delta), torch.zeros_like(delta)
                for e, tile in enumerate(p.on(rows, columns)):
                    q = delta if gt is None else delta - gt[:, e, :, columns]
                    weighted = tile.mul_(scaled[..., e, None])
                    w += weighted
                    change = weighted * (q - mean[:, rows, e, None]) / epsilon[e]
                    a -= change
                    group.of_y(grads[3])[:, columns, e] += change.sum(-2)
                _pull(a, clouds.x, clouds.y, dx, dy, (rows, columns))
                _pull(w, gu, _zeros(gv, clouds.y), dx, dy, (rows, columns))
    return grads
