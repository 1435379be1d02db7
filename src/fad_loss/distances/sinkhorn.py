"""The Sinkhorn divergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fad_loss import ops
from fad_loss._errors import choose, describe, expected, switch
from fad_loss._ragged import cloud_lengths, cloud_mean, is_ragged, pack, per_point, pointwise
from fad_loss.distances.sets import REDUCTIONS, check_sets, reduce
from fad_loss.ops._inputs import Pair, check_pair
from fad_loss.ops.kernels import _positive, bandwidth_range, within_range

__all__ = ["sinkhorn"]


def sinkhorn(
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    debiased: bool = True,
    scaling: float = 0.5,
    diameter: float | None = None,
    max_iterations: int = 100,
    tolerance: float | None = 1e-3,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Sinkhorn divergence: entropic optimal transport between the sets, debiased.

    .. math::
        S(x, y) = \mathrm{OT}(x, y) - \tfrac12 \mathrm{OT}(x, x) - \tfrac12 \mathrm{OT}(y, y),
        \quad
        \mathrm{OT}(x, y) = \min_\pi \sum_{ij} \pi_{ij} |x_i - y_j|^2
            + \varepsilon\, \mathrm{KL}(\pi \,|\, a \otimes b)

    with uniform a and b. Potentials are iterated from the squared diameter down to epsilon
    (epsilon-scaling) and then until they change by less than the tolerance. The gradient is the
    envelope theorem's, exact at convergence; a second derivative, for which it would be wrong, is
    refused. The tolerance is looked at every ten iterations, which on a GPU synchronises; with
    ``tolerance=None`` and a `diameter` nothing does.

    Args:
        x: clouds `(B, N, C)`, or ragged.
        y: clouds `(B, M, C)`, or ragged.
        epsilon: the temperature, in units of squared distance, > 0.
        debiased: subtract the self-terms; without them it is :math:`\mathrm{OT}(x, y)`, which is
            not 0 for equal sets.
        scaling: the factor by which the temperature's root falls per iteration, in (0, 1).
        diameter: an upper bound on the distance between any two points; measured if None.
        max_iterations: at the final temperature.
        tolerance: relative to epsilon: stop when no potential changes by more. None: never look,
            and run all `max_iterations`.
        reduction: over clouds: "mean", "sum" or "none".
        backend: see `fad_loss.ops`.

    Returns:
        A scalar, or `(B,)` for ``reduction="none"``; float32 for half precision.

    Raises:
        ValueError: an empty cloud, a number out of its range, an unknown reduction, or what
            `fad_loss.ops.softmin` raises.
        TypeError: see `fad_loss.ops.softmin`.
        RuntimeError: on differentiating twice, or compiling without a `diameter` and with a
            tolerance.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn
    divergences", AISTATS 2019; Cuturi, "Sinkhorn distances", NeurIPS 2013.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> y = torch.tensor([[[1.0], [2.0]]])
        >>> sinkhorn(x, y, 1e-3).round(decimals=2)
        tensor(1.)
    """
    check_sets(x, y)
    pair = check_pair(x, y)
    within_range("epsilon", [_positive("epsilon", epsilon)], pair.x.dtype, power=2)
    switch("debiased", debiased)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise expected("scaling", "a number between 0 and 1", describe(scaling), error=TypeError)
    if not 0 < scaling < 1:
        message = f"scaling: expected a number between 0 and 1, got {scaling!r}"
        raise ValueError(message)
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int):
        message = f"max_iterations: expected an int, got {type(max_iterations).__name__}"
        raise TypeError(message)
    if max_iterations < 1:
        message = f"max_iterations: expected at least 1, got {max_iterations}"
        raise ValueError(message)
    if tolerance is not None:
        _positive("tolerance", tolerance)
    if torch.compiler.is_compiling() and (diameter is None or tolerance is not None):
        message = (
            "sinkhorn: under torch.compile nothing can be measured while running; pass diameter= "
            "and tolerance=None"
        )
        raise RuntimeError(message)
    choose("reduction", reduction, REDUCTIONS)
    with torch.no_grad():
        widest = _diameter(pair) if diameter is None else _positive("diameter", diameter)
        widest = min(widest, bandwidth_range(pair.x.dtype)[1])
        schedule = _schedule(widest, epsilon, scaling)
        solve = _Solver(schedule, epsilon, max_iterations, tolerance, backend)
        f, g = solve.pair(x.detach(), y.detach())
        f_own = solve.own(x.detach()) if debiased else None
        g_own = solve.own(y.detach()) if debiased else None

    # One more step carries the gradient: at the optimum the potentials do not depend on the points
    # to first order. `_FirstOrder` refuses the second, where they do.
    x, y = _once(x), _once(y)

    def extrapolate(of: Tensor, to: Tensor, potential: Tensor) -> Tensor:
        log_b = per_point(-cloud_lengths(to).to(potential.dtype).log(), to)
        return cloud_mean(ops.softmin(of, to, epsilon, potential, log_b, backend=backend))

    # <a, f> carries the gradient of x, <b, g> that of y.
    total = extrapolate(x, y.detach(), g) + extrapolate(y, x.detach(), f)
    if f_own is not None and g_own is not None:
        own = extrapolate(x, x.detach(), f_own) + extrapolate(y, y.detach(), g_own)
        total = total - own
    return reduce(total, reduction)


class _FirstOrder(torch.autograd.Function):
    """The identity, whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:  # noqa: ARG004
        return points.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        last: Tensor = _Last.apply(grad)  # type: ignore[no-untyped-call]
        return last


class _Last(torch.autograd.Function):
    """The identity, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        message = (
            "sinkhorn: no second derivatives, because the first is the envelope theorem's, which "
            "holds the potentials still; for a gradient penalty take energy or mmd"
        )
        raise RuntimeError(message)


def _once(t: Tensor) -> Tensor:
    # On the points, where what arrives depends on them; what arrives at the result need not.
    # Compiled code has no second derivatives anyway, and says so itself.
    if torch.compiler.is_compiling():
        return t

    def hold(points: Tensor) -> Tensor:
        held: Tensor = _FirstOrder.apply(points)  # type: ignore[no-untyped-call]
        return held

    return pointwise(hold, t)


def _diameter(pair: Pair) -> float:
    """An upper bound on the distance of two points of one cloud: the diagonal of all of them."""
    points = torch.cat([pair.x.flatten(0, -2), pair.y.flatten(0, -2)])
    extent = points.amax(0).double() - points.amin(0).double()
    diameter = float(extent.square().sum().sqrt())
    if not math.isfinite(diameter):  # values on a GPU were not looked at before
        message = f"x and y: expected finite values, but their points are {diameter} apart"
        raise ValueError(message)
    return diameter


def _schedule(diameter: float, epsilon: float, scaling: float) -> list[float]:
    """Temperatures from the squared diameter down to epsilon, exclusive."""
    start = diameter * diameter
    if start <= epsilon:
        return []
    steps = math.ceil(math.log(epsilon / start) / (2 * math.log(scaling)))
    return [start * scaling ** (2 * step) for step in range(steps)]


class _Solver:
    """Iterates the potentials of one problem, symmetrically and damped by averaging.

    Feydy et al. update both potentials from the same old pair and average with the old values:
    unlike alternating updates this treats both sides alike, and it converges for self-terms.
    """

    def __init__(
        self,
        schedule: list[float],
        epsilon: float,
        max_iterations: int,
        tolerance: float | None,
        backend: str,
    ) -> None:
        self.temperatures = [*schedule, *[epsilon] * max_iterations]
        self.warm, self.epsilon, self.tolerance = len(schedule), epsilon, tolerance
        self.backend = backend

    def _step(self, x: Tensor, y: Tensor, potential: Tensor | None, eps: float) -> Tensor:
        counts = cloud_lengths(y).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        log_b = per_point(-counts.log(), y)
        return ops.softmin(x, y, eps, potential, log_b, backend=self.backend)

    def _converged(self, step: int, *changes: Tensor) -> bool:
        since = step - self.warm
        if self.tolerance is None or since < 0 or since % 10:
            return False
        largest = max(float(_values(change).abs().amax()) for change in changes)
        return largest <= self.tolerance * self.epsilon

    def pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The potentials (of x, of y) of OT(x, y)."""
        first = self.temperatures[0]
        f, g = self._step(x, y, None, first), self._step(y, x, None, first)
        for step, eps in enumerate(self.temperatures):
            df = (self._step(x, y, g, eps) - f) / 2
            dg = (self._step(y, x, f, eps) - g) / 2
            f, g = f + df, g + dg
            if self._converged(step, df, dg):
                break
        return f, g

    def own(self, x: Tensor) -> Tensor:
        """The potential of OT(x, x)."""
        f = self._step(x, x, None, self.temperatures[0])
        for step, eps in enumerate(self.temperatures):
            df = (self._step(x, x, f, eps) - f) / 2
            f = f + df
            if self._converged(step, df):
                break
        return f


def _values(t: Tensor) -> Tensor:
    return pack(t)[0] if is_ragged(t) else t
