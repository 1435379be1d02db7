"""How much of the teacher's features can be found again in the student's."""

from __future__ import annotations

import torch
from torch import Tensor

from fad_loss import ops
from fad_loss._checks import check_finite, check_tensor, look
from fad_loss._errors import describe
from fad_loss._points import as_points
from fad_loss._ragged import (
    cloud_index,
    cloud_lengths,
    cloud_sum,
    is_ragged,
    pack,
    pointwise,
    unpack,
)
from fad_loss.metrics.rows import accurate, promoted, row_pair

__all__ = ["cka", "information_lost", "neighbor_agreement"]


@torch.no_grad()
def cka(x: Tensor, y: Tensor, *, paired: bool = False, debiased: bool = False) -> Tensor:
    r"""Linear centred kernel alignment: how similar the two networks arrange the same inputs.

    With centred rows X and Y,

    .. math::
        \mathrm{CKA}(X, Y) = \frac{\|X^T Y\|_F^2}{\|X^T X\|_F \, \|Y^T Y\|_F}

    1 if the features agree up to rotation, scale and shift; 0 if no linear map of the one
    correlates with the other, and also, by definition, if either is constant. With few rows and
    many channels the plain estimate is far above 0 even for unrelated features; `debiased` replaces
    the inner products by the unbiased estimates of HSIC, which average 0 for unrelated features
    (and may be slightly negative).

    Args:
        x: ``(n, C)``, ``(B, N, C)`` or ragged; see the module's description.
        y: the same clouds, with any number of channels.
        paired: whether point i of `x` corresponds to point i of `y`.
        debiased: use the unbiased estimate; needs at least four rows.

    Returns:
        A scalar.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different clouds, fewer than two of them, or values that are not finite.

    Source: Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019;
    the unbiased HSIC is Song et al., *Feature Selection via Dependence Maximization*, JMLR 2012,
    theorem 2.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [5.0, 1.0]])
        >>> round(float(cka(x, 3 * x.flip(1) + 7)), 6)
        1.0
    """
    x, y = row_pair(("x", "y"), x, y, paired, least=4 if debiased else 2)
    inner = _unbiased_hsic if debiased else _biased_hsic
    scale = inner(x, x).clamp_min(0).sqrt() * inner(y, y).clamp_min(0).sqrt()
    return torch.where(scale > 0, inner(x, y) / scale, 0.0)


def _biased_hsic(x: Tensor, y: Tensor) -> Tensor:
    return (x.T @ y).square().sum()


def _unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al., theorem 2, up to a factor, without the n x n matrices of inner products.

    K is the matrix of inner products of x with its diagonal set to zero, L that of y; what is
    needed are tr(KL), the sum of each and the product of their row sums.
    """
    n = x.shape[0]
    diagonal_x, diagonal_y = x.square().sum(1), y.square().sum(1)
    trace = (x.T @ y).square().sum() - diagonal_x @ diagonal_y
    # The rows are centred, so the row sums of the full matrices vanish.
    rows_x, rows_y = -diagonal_x, -diagonal_y
    product = rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2))
    return trace + product - 2 / (n - 2) * (rows_x @ rows_y)


@torch.no_grad()
def neighbor_agreement(
    x: Tensor, y: Tensor, k: int = 10, *, paired: bool = False, adjusted: bool = False
) -> Tensor:
    r"""What share of the k nearest neighbours in one feature space are so in the other too.

    .. math::
        A = \frac{1}{n} \sum_i \frac{|\mathcal{N}^x_k(i) \cap \mathcal{N}^y_k(i)|}{k}

    Neighbours are other clouds (rows); with ``paired=True``, other points of the same cloud.
    Symmetric in `x` and `y`. Unrelated features agree by chance in :math:`c = k / (n - 1)`;
    `adjusted` returns :math:`(A - c) / (1 - c)`: 1 is perfect and 0 is chance. If either is
    constant (the same in every row, or in every point of a cloud), its neighbours are arbitrary,
    and the agreement is defined to be that of chance. Neighbours at equal distances are taken from
    the lowest index on.

    Args:
        x: ``(n, C)``, ``(B, N, C)`` or ragged; see the module's description.
        y: the same clouds, with any number of channels.
        k: how many neighbours; less than the number of items to choose from. In a ragged cloud of
            at most k points, all the others are neighbours.
        paired: whether point i of `x` corresponds to point i of `y`.
        adjusted: correct for chance.

    Returns:
        A scalar.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different clouds or points, a `k` out of range, or values that are not finite.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [7.0], [8.5]])
        >>> neighbor_agreement(x, x.exp(), k=1)  # only the neighbour of the fourth has changed
        tensor(0.8000, dtype=torch.float64)
    """
    _check_count("k", k)
    if paired:
        first, second = _paired_clouds(x, y)
    else:
        rows = row_pair(("x", "y"), x, y, paired=False, least=2)
        first, second = (
            row.unsqueeze(0).to(torch.promote_types(given.dtype, torch.float32))
            for row, given in zip(rows, (x, y), strict=True)
        )
    if not is_ragged(first):
        others = first.shape[1] - 1
        if k > others or (adjusted and k == others):
            limit = others - 1 if adjusted else others
            reason = " (all others agree trivially, so nothing can be adjusted)" if adjusted else ""
            message = (
                f"k: expected at most {limit} neighbours for {others + 1} items{reason}, got {k}"
            )
            raise ValueError(message)
    overlap = _overlap(
        ops.knn(first, first, k, exclude_self=True)[1],
        ops.knn(second, second, k, exclude_self=True)[1],
    )
    choices = _others(first)
    wanted = choices.clamp(max=k)
    chance = wanted / choices.clamp_min(1)
    agreement = overlap / wanted.clamp_min(1)
    constant = _is_constant(first) | _is_constant(second)
    agreement = torch.where(constant, chance, agreement)
    counted = wanted > 0
    if adjusted:
        counted = counted & (chance < 1)
        agreement = (agreement - chance) / (1 - chance).clamp_min(torch.finfo(chance.dtype).tiny)
    # Points without a choice of neighbours (in tiny clouds) say nothing.
    return torch.where(counted, agreement, 0.0).sum() / counted.sum().clamp_min(1)


def _check_count(name: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        message = f"{name}: expected a positive integer, got {count!r}"
        raise ValueError(message)


def _paired_clouds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    clouds = []
    for name, features in (("x", x), ("y", y)):
        check_tensor(name, features)
        check_finite(name, pack(features)[0] if is_ragged(features) else features)
        clouds.append(pointwise(promoted, as_points(features, name=name)))
    first, second = clouds
    if is_ragged(first) and is_ragged(second) and first.shape[0] == second.shape[0]:
        ends, other_ends = pack(first)[1], pack(second)[1]
        fits = pack(first)[0].shape[0] == pack(second)[0].shape[0]
        if fits and look(ends) and look(other_ends):
            fits = torch.equal(ends, other_ends)
    else:
        fits = (
            not is_ragged(first) and not is_ragged(second) and (first.shape[:2] == second.shape[:2])
        )
    if not fits:
        message = (
            "x, y: with paired=True expected the same clouds with the same points, got "
            f"{describe(x)} and {describe(y)}"
        )
        raise ValueError(message)
    return first, second


def _others(clouds: Tensor) -> Tensor:
    """How many other points there are in the cloud of each point, packed ``(T,)`` or ``(B, N)``."""
    lengths = cloud_lengths(clouds)
    lengths = lengths[cloud_index(clouds)] if is_ragged(clouds) else lengths.unsqueeze(1)
    others = accurate(lengths) - 1
    return others if is_ragged(clouds) else others.expand(-1, clouds.shape[1])


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """How many indices two lists of distinct neighbours share, for every point."""
    if is_ragged(first):
        first, second = pack(first)[0], pack(second)[0]
    # No index repeats within a list (but for -1, which is nobody), so what repeats is shared.
    merged = torch.cat([first, second], -1).sort(-1).values
    shared = (merged[..., 1:] == merged[..., :-1]) & (merged[..., 1:] >= 0)
    return shared.sum(-1)


def _is_constant(clouds: Tensor) -> Tensor:
    """For every point, whether all points of its cloud are the same."""
    if not is_ragged(clouds):
        return (clouds == clouds[:, :1]).all(-1).all(1, keepdim=True)
    values, offsets = pack(clouds)
    index = cloud_index(clouds)
    differs = (values != values[offsets[index]]).any(-1)
    return cloud_sum(unpack(accurate(differs), clouds))[index] == 0


@torch.no_grad()
def information_lost(student: Tensor, teacher: Tensor, *, paired: bool = False) -> Tensor:
    r"""What share of the teacher's knowledge did not arrive in the student.

    In words: of all the variation in the teacher's features, the share that cannot be read off the
    student's features by a linear map, judged on clouds that the map was not fitted to.
    0: everything arrived; whatever the teacher says about a cloud is in the student's features.
    1: nothing did; the student's features are no better a guide to the teacher's than the teacher's
    own average.

    In symbols: one ridge regression predicts the teacher's row from the student's, with each row
    predicted from all others (leave-one-out, in closed form),

    .. math::
        \text{lost} = \min_\lambda \frac{\sum_i \|t_i - \hat t^{(-i)}_\lambda(s_i)\|^2}
        {\sum_i \|t_i - \bar t^{(-i)}\|^2}

    over :math:`\lambda` from 1e-12 to 100 times the largest squared singular value of the student's
    features, and infinity, where the prediction is the mean and the ratio 1. Invariant to rotation,
    scale and shift of either side, and to any invertible linear map of the student's features up to
    what the regularisation makes of it. If the teacher is constant, there is nothing to lose, and
    the value is 0; if the student is, 1.

    Args:
        student: ``(n, C)``, ``(B, N, C)`` or ragged; see the module's description.
        teacher: the same clouds, with any number of channels.
        paired: whether point i of the student corresponds to point i of the teacher. (Points of the
            same cloud then help to predict each other.)

    Returns:
        A scalar between 0 and 1.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different clouds, fewer than three of them, or values that are not finite.

    Source: leave-one-out residuals of ridge regression, Golub, Heath & Wahba, *Generalized
    Cross-Validation*, Technometrics 1979. That linear predictability is the part of the features
    that a classifier on top can use is the reasoning of Alain & Bengio, *Understanding intermediate
    layers using linear classifier probes*, 2016.

    Example:
        >>> teacher = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> round(float(information_lost(teacher[:, :6], teacher)), 1)  # two of eight are gone
        0.3
    """
    rows, target = row_pair(("student", "teacher"), student, teacher, paired, least=3)
    n = rows.shape[0]
    left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    energy = singular.square()
    projected = left.T @ target
    total = (target.square().sum(1) / (1 - 1 / n) ** 2).sum()
    lost = torch.ones_like(total)
    for exponent in range(-12, 3):
        shrink = energy / (energy + 10.0**exponent * energy.max()).clamp_min(
            torch.finfo(energy.dtype).tiny
        )
        residual = target - left @ (shrink.unsqueeze(1) * projected)
        leverage = 1 / n + left.square() @ shrink
        error = (residual.square().sum(1) / (1 - leverage).square()).sum()
        # fmin: a row that alone decides its own prediction has 0 / 0, which says nothing.
        lost = torch.fmin(lost, error / total)
    return torch.where(total > 0, lost, 0.0)
