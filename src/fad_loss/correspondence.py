"""Point by point where points do not correspond: the teacher's features at the student's points."""

from __future__ import annotations

import torch
from torch import Tensor

from fad_loss import ops
from fad_loss._checks import check_finite, check_tensor
from fad_loss._errors import expected

__all__ = ["interpolate"]


def interpolate(
    features: Tensor, positions: Tensor, at: Tensor, k: int = 3, *, mask: Tensor | None = None
) -> Tensor:
    r"""Features where other points lie: the mean of the nearest, weighed by inverse distance.

    .. math::
        f(p) = \frac{\sum_{j \in \mathcal N_k(p)} f_j / |p - p_j|^2}
                    {\sum_{j \in \mathcal N_k(p)} 1 / |p - p_j|^2}

    It makes correspondence where student and teacher sample differently: the teacher's features at
    the student's points can be compared point by point. At a position of the cloud itself the
    result is that point's feature.

    Args:
        features: ``(B, M, C)``.
        positions: where they are, ``(B, M, D)``.
        at: where they are wanted, ``(B, N, D)``.
        k: how many neighbours; all, in a cloud with fewer.
        mask: which of `features` count, ``(B, M)``.

    Returns:
        ``(B, N, C)``, in the dtype of `features`, with a gradient to `features` alone.

    Raises:
        ValueError: shapes that do not belong together, k below 1, or NaN or infinity.
        TypeError: not floating-point tensors.

    Source: feature propagation of Qi et al., *PointNet++*, NeurIPS 2017, section 3.4.

    Example:
        >>> positions = torch.tensor([[[0.0], [1.0], [4.0]]])
        >>> at = torch.tensor([[[0.5], [3.0]]])
        >>> interpolate(10 * positions, positions, at, k=2)  # 3 is twice as near to 4 as to 1
        tensor([[[ 5.],
                 [34.]]])
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise expected("k", "a positive number of neighbours", repr(k))
    for name, given in (("features", features), ("positions", positions), ("at", at)):
        check_tensor(name, given)
    if features.dim() != 3 or positions.shape[:-1] != features.shape[:-1]:
        raise expected("positions", f"one for each of the features {_size(features)}", positions)
    if at.dim() != 3 or at.shape[::2] != positions.shape[::2]:
        raise expected("at", f"positions (B, N, D) that go with {_size(positions)}", at)
    counted = features if mask is None else torch.where(mask.unsqueeze(-1), features, 0)
    for name, given in (("features", counted), ("positions", positions), ("at", at)):
        check_finite(name, given)
    k = min(k, features.shape[1])
    where, there = positions.detach(), at.detach().to(positions.dtype)
    if mask is not None:
        # Points that do not count go further away than any other lies; of a cloud without any
        # that count nothing is used.
        span = 1 + 4 * (where.abs().amax((1, 2), keepdim=True) + there.abs().amax((1, 2), True))
        where = torch.where(mask.unsqueeze(-1), where, span)
    distance, index = ops.knn(there, where, k)
    weights = 1 / (distance + torch.finfo(distance.dtype).tiny ** 0.5)
    if mask is not None:
        known = mask.gather(1, index.flatten(1)).view_as(index)
        weights = torch.where(known, weights, 0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    rows = index.flatten(1).unsqueeze(-1).expand(-1, -1, features.shape[-1])
    near = counted.gather(1, rows).view(*index.shape, -1)
    result: Tensor = (weights.to(near.dtype).unsqueeze(-1) * near).sum(2)
    return result


def _size(t: Tensor) -> str:
    return str(tuple(t.shape))
