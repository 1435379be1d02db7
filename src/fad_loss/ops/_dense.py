"""The reference: every reduction over the full matrix of pairwise distances, in the obvious way.

Squared distances are summed from differences, coordinate by coordinate, so nothing cancels;
autograd differentiates them to any order. Memory is N x M x C: for checking and for small clouds.
Ragged clouds are a Python loop. Everything else in `ops` is tested against this page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fad_loss.ops.kernels import Kernel


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision accumulates, and is returned, in float32."""
    return torch.float32 if dtype in {torch.bfloat16, torch.float16} else dtype


def squared_distances(x: Tensor, y: Tensor, *, exclude_self: bool = False) -> Tensor:
    """The squared distances d_ij = |x_i - y_j|^2, (B, N, M); a point's own is +inf if excluded."""
    x, y = x.to(accumulation_dtype(x.dtype)), y.to(accumulation_dtype(y.dtype))
    d = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if exclude_self:
        own = torch.eye(d.shape[-1], dtype=torch.bool, device=d.device)
        d = d.masked_fill(own, torch.inf)
    return d


def per_cloud(
    function: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    y: Tensor,
    *others: Tensor | None,
) -> tuple[Tensor, ...]:
    """Apply a batched function to each ragged cloud and pack the results; `others` go along y."""
    x_bounds, y_bounds = x_offsets.tolist(), y_offsets.tolist()
    parts = []
    for cloud in range(len(x_bounds) - 1):
        rows = slice(x_bounds[cloud], x_bounds[cloud + 1])
        columns = slice(y_bounds[cloud], y_bounds[cloud + 1])
        along = [None if t is None else t[columns].unsqueeze(0) for t in (y, *others)]
        parts.append([t.squeeze(0) for t in function(x[rows].unsqueeze(0), *along)])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def knn(x: Tensor, y: Tensor, k: int, *, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """The k nearest, ascending, ties to the lowest index; (inf, -1) where a cloud has fewer."""
    d = squared_distances(x, y, exclude_self=exclude_self)
    distance, index = torch.sort(d, dim=-1, stable=True)
    missing = k - d.shape[-1]
    if missing > 0:
        distance = torch.nn.functional.pad(distance, (0, missing), value=torch.inf)
        index = torch.nn.functional.pad(index, (0, missing), value=-1)
    distance, index = distance[..., :k], index[..., :k]
    return distance, index.masked_fill(distance == torch.inf, -1)


def kernel_sum(
    x: Tensor, y: Tensor, weights: Tensor | None, kernel: Kernel, *, exclude_self: bool
) -> Tensor:
    """Sum over j of w_j k(d_ij)."""
    d = squared_distances(x, y, exclude_self=exclude_self)
    own = d == torch.inf
    value = kernel(d.masked_fill(own, 1.0)).masked_fill(own, 0.0)
    return value.sum(-1) if weights is None else (value * weights.unsqueeze(-2)).sum(-1)


def softmin(
    x: Tensor, y: Tensor, bias: Tensor | None, epsilon: Sequence[float], *, exclude_self: bool
) -> Tensor:
    """Minus eps log sum_j exp((h_j - d_ij) / eps) for each epsilon, (B, N, E); h is (B, M, E)."""
    d = squared_distances(x, y, exclude_self=exclude_self)
    results = []
    for e, eps in enumerate(epsilon):
        h = 0.0 if bias is None else bias[..., e].unsqueeze(-2)
        exponent = (h - d) / eps
        # A row without any neighbor is +inf, with a gradient of 0 instead of 0 / 0.
        empty = (exponent == -torch.inf).all(-1)
        total = exponent.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1)
        results.append((-eps * total).masked_fill(empty, torch.inf))
    return torch.stack(results, dim=-1)
