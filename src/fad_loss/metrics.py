r"""How much of the teacher's knowledge arrived in the student, and how much was lost on the way.

Nothing here has a gradient; these are numbers to report. They are never NaN: what a constant,
collapsed network scores is stated for each. Sums are taken in float64 (float32 where a device has
none), distances in the features' own precision.

**What is compared with what.** Features come as ``(n, C)``, one row per cloud (global features);
or per point, ``(B, N, C)`` or ragged. Point i of the student need not be point i of the teacher, so
features of points are first averaged over each cloud, and the clouds are what is compared. With
``paired=True`` the caller says that the points do correspond, one to one, and then every point
counts by itself. The two networks may differ in the number of channels, except for `set_distances`,
which measures distances from the one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fad_loss import distances, ops
from fad_loss._checks import check_finite, check_tensor, look
from fad_loss._errors import choose, describe
from fad_loss._points import as_points
from fad_loss._ragged import (
    cloud_index,
    cloud_lengths,
    cloud_mean,
    cloud_sum,
    is_ragged,
    pack,
    pointwise,
    unpack,
    wrap,
)

__all__ = ["cka", "knowledge_lost", "neighbor_agreement", "set_distances"]

# Features whose deviations are smaller than this, relative to their size, are called constant: it
# is far above float64's rounding of a mean, and far below float32's resolution.
_CONSTANT = 1e-12


def _accurate(x: Tensor) -> Tensor:
    """To float64, where the device has it."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return x.detach().to(dtype)


def _promoted(x: Tensor) -> Tensor:
    """To float32 at least: enough for distances, which are exact in whatever comes in."""
    x = x.detach()
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def _rows(name: str, x: Tensor, paired: bool) -> Tensor:
    """One row per item to compare, ``(n, C)``."""
    check_tensor(name, x)
    check_finite(name, pack(x)[0] if is_ragged(x) else x)
    if not is_ragged(x) and x.dim() == 2:
        rows = x.detach()
    else:
        points = as_points(x, name=name).detach()
        if not paired:
            _check_filled(name, points)
            rows = cloud_mean(pointwise(_accurate, points))
        elif is_ragged(points):
            rows = pack(points)[0]
        else:
            rows = points.flatten(0, 1)
    if rows.shape[1] == 0:
        message = f"{name}: expected at least one channel, got {describe(x)}"
        raise ValueError(message)
    return _accurate(rows)


def _check_filled(name: str, points: Tensor) -> None:
    if is_ragged(points) and look(pack(points)[1]):
        empty = (cloud_lengths(points) == 0).nonzero().flatten().tolist()
        if empty:
            message = f"{name}: expected no empty clouds, which have no mean, got {empty} empty"
            raise ValueError(message)


def _row_pair(
    names: tuple[str, str], x: Tensor, y: Tensor, paired: bool, least: int
) -> tuple[Tensor, Tensor]:
    """The centred rows of both, constant ones exactly zero."""
    first, second = _rows(names[0], x, paired), _rows(names[1], y, paired)
    if first.shape[0] != second.shape[0]:
        what = "points" if paired else "clouds"
        message = (
            f"{names[0]}, {names[1]}: expected the same {what} in both, got {describe(x)} and "
            f"{describe(y)}, that is {first.shape[0]} and {second.shape[0]} {what}"
        )
        raise ValueError(message)
    if first.device != second.device:
        message = (
            f"{names[0]}, {names[1]}: expected the same device, got {describe(x)} and {describe(y)}"
        )
        raise ValueError(message)
    if first.shape[0] < least:
        what = "paired points" if paired else "clouds (rows)"
        message = (
            f"{names[0]}, {names[1]}: expected at least {least} {what} to compare, got "
            f"{first.shape[0]} from {describe(x)}; gather the features of the whole evaluation set"
        )
        raise ValueError(message)
    return _centered(first), _centered(second)


def _centered(rows: Tensor) -> Tensor:
    """Deviations from the mean, scaled to at most 1: fourth powers of 1e100 are no numbers."""
    if rows.numel() == 0:
        return rows
    largest = rows.abs().amax()
    rows = rows / torch.where(largest > 0, largest, 1.0)
    deviation = rows - rows.mean(0)
    spread = deviation.abs().amax()
    constant = deviation.square().sum() <= _CONSTANT**2 * rows.square().sum()
    return torch.where(constant, 0.0, deviation / torch.where(spread > 0, spread, 1.0))


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
    x, y = _row_pair(("x", "y"), x, y, paired, least=4 if debiased else 2)
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
        rows = _row_pair(("x", "y"), x, y, paired=False, least=2)
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
        clouds.append(pointwise(_promoted, as_points(features, name=name)))
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
    others = _accurate(lengths) - 1
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
    return cloud_sum(unpack(_accurate(differs), clouds))[index] == 0


@torch.no_grad()
def knowledge_lost(student: Tensor, teacher: Tensor, *, paired: bool = False) -> Tensor:
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
        >>> round(float(knowledge_lost(teacher[:, :6], teacher)), 1)  # two of eight are gone
        0.3
    """
    rows, target = _row_pair(("student", "teacher"), student, teacher, paired, least=3)
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


_Distance = Callable[[Tensor, Tensor], Tensor]


def _sinkhorn(x: Tensor, y: Tensor) -> Tensor:
    return distances.sinkhorn(x, y, 0.05, tolerance=1e-2)


_DISTANCES: Mapping[str, _Distance] = {
    "chamfer": distances.chamfer,
    "energy": distances.energy,
    "sinkhorn": _sinkhorn,
}


@torch.no_grad()
def set_distances(
    student: Tensor,
    teacher: Tensor,
    which: str | Sequence[str] = ("chamfer", "energy"),
) -> dict[str, Tensor]:
    r"""How far the student's sets of features are from the teacher's, relative to knowing nothing.

    .. math::
        \frac{\sum_b d(s_b, t_b)}{\sum_b d(\bar t, t_b)}

    where :math:`\bar t` is the mean of all the teacher's features: 0 if the sets agree, 1 if the
    student does no better than returning one and the same point, the teacher's average, for
    everything. It can exceed 1. Points need no correspondence and may differ in number; channels
    must agree, so pass what the adapter returns: ``fad.adapter(student_features)``. If the teacher
    itself is constant, the value is 0 for a student that returns the same, and infinity otherwise.

    Args:
        student: ``(B, N, C)``, ragged, or ``(n, C)``, where the batch is the set.
        teacher: ``(B, M, C)``, ragged, or ``(n, C)``.
        which: one or several of ``"chamfer"``, ``"energy"`` and ``"sinkhorn"`` (with an epsilon of
            0.05 times the teacher's mean squared deviation).

    Returns:
        A scalar for every name.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: an unknown name, different clouds or channels, or values that are not finite.

    Example:
        >>> teacher = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [4.0, 3.0]]])
        >>> set_distances(teacher.flip(1), teacher)["chamfer"]
        tensor(0.)
        >>> round(float(set_distances(teacher.mean(1, keepdim=True), teacher)["energy"]), 6)
        1.0
    """
    names = tuple(which) if isinstance(which, (list, tuple)) else (which,)
    chosen = {name: choose("which", name, _DISTANCES) for name in names}
    pair = []
    for name, features in (("student", student), ("teacher", teacher)):
        check_tensor(name, features)
        check_finite(name, pack(features)[0] if is_ragged(features) else features)
        pair.append(pointwise(_promoted, as_points(features, name=name)))
        _check_filled(name, pair[-1])
    if pair[0].device != pair[1].device:
        message = (
            "student, teacher: expected the same device, got "
            f"{describe(student)} and {describe(teacher)}"
        )
        raise ValueError(message)
    if pair[0].dtype != pair[1].dtype:
        pair = [pointwise(_accurate, cloud) for cloud in pair]
    if pair[0].shape[0] != pair[1].shape[0] or pair[0].shape[-1] != pair[1].shape[-1]:
        message = (
            "student, teacher: expected the same number of clouds and channels, got "
            f"{describe(student)} and {describe(teacher)}; map the student's features first, for "
            "example with fad.adapter"
        )
        raise ValueError(message)
    values = _accurate(pack(pair[1])[0] if is_ragged(pair[1]) else pair[1].flatten(0, 1))
    largest = values.abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)  # squares of 1e200 are no numbers
    values = values / largest
    center = values.mean(0)
    spread = (values - center).square().sum(1).mean()
    constant = spread <= _CONSTANT**2 * values.square().sum(1).mean()
    center = torch.where(constant, values[0], center)
    # A distance of 1 is then the teacher's spread, and epsilon a plain number.
    scale = torch.where(constant, 1.0, spread.sqrt())
    x, y = (
        pointwise(lambda z: ((_accurate(z) / largest - center) / scale).to(z.dtype), cloud)
        for cloud in pair
    )
    x, y = _alike(x, y)
    nothing = _origin(y)
    result = {}
    for name, distance in chosen.items():
        measured, worst = distance(x, y).clamp_min(0), distance(nothing, y).clamp_min(0)
        undefined = torch.where(measured > 0, torch.inf, 0.0)
        result[name] = torch.where(worst > 0, measured / worst, undefined)
    return result


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both ragged, if one is."""
    if is_ragged(x) == is_ragged(y):
        return x, y
    return (x, _as_ragged(y)) if is_ragged(x) else (_as_ragged(x), y)


def _as_ragged(x: Tensor) -> Tensor:
    offsets = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    return wrap(x.flatten(0, 1), offsets, x.shape[1], x.shape[1])


def _origin(y: Tensor) -> Tensor:
    """Clouds of a few points at the origin, in the layout of `y`."""
    # Two, so that a distance that leaves a point out of its own mean has one left.
    values = pack(y)[0] if is_ragged(y) else y
    origin = values.new_zeros(y.shape[0], 2, y.shape[-1])
    return _as_ragged(origin) if is_ragged(y) else origin
