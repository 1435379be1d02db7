"""How far the student's sets of features are from the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fad_loss import distances
from fad_loss._checks import check_finite, check_tensor
from fad_loss._errors import choose, describe
from fad_loss._points import as_points
from fad_loss._ragged import is_ragged, pack, pointwise, wrap
from fad_loss.metrics.rows import CONSTANT, accurate, check_filled, promoted

__all__ = ["set_distances"]

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
        pair.append(pointwise(promoted, as_points(features, name=name)))
        check_filled(name, pair[-1])
    if pair[0].device != pair[1].device:
        message = (
            "student, teacher: expected the same device, got "
            f"{describe(student)} and {describe(teacher)}"
        )
        raise ValueError(message)
    if pair[0].dtype != pair[1].dtype:
        pair = [pointwise(accurate, cloud) for cloud in pair]
    if pair[0].shape[0] != pair[1].shape[0] or pair[0].shape[-1] != pair[1].shape[-1]:
        message = (
            "student, teacher: expected the same number of clouds and channels, got "
            f"{describe(student)} and {describe(teacher)}; map the student's features first, for "
            "example with fad.adapter"
        )
        raise ValueError(message)
    values = accurate(pack(pair[1])[0] if is_ragged(pair[1]) else pair[1].flatten(0, 1))
    largest = values.abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)  # squares of 1e200 are no numbers
    values = values / largest
    center = values.mean(0)
    spread = (values - center).square().sum(1).mean()
    constant = spread <= CONSTANT**2 * values.square().sum(1).mean()
    center = torch.where(constant, values[0], center)
    # A distance of 1 is then the teacher's spread, and epsilon a plain number.
    scale = torch.where(constant, 1.0, spread.sqrt())
    x, y = (
        pointwise(lambda z: ((accurate(z) / largest - center) / scale).to(z.dtype), cloud)
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
