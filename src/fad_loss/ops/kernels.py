r"""Kernels of the squared distance d, for `kernel_mean` and everything built on it.

A kernel is a small immutable value. It can evaluate itself (`__call__`, differentiable to any
order) and its first two derivatives in closed form, which the tiled reductions use so that no
graph is ever recorded over N x M pairs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fad_loss._errors import expected


class Kernel(ABC):
    """A function of the squared distance between two points.

    The operations know the kernels of this module; each can also be called by itself.

    Example:
        >>> kernel = Gaussian(1.0)
        >>> isinstance(kernel, Kernel), kernel.parameters, kernel.first(torch.zeros(1))
        (True, (1.0,), tensor([-0.5000]))
    """

    name: str

    @abstractmethod
    def __call__(self, d: Tensor) -> Tensor:
        """Value at the squared distance `d`, element-wise."""

    @abstractmethod
    def first(self, d: Tensor) -> Tensor:
        """First derivative by d."""

    @abstractmethod
    def second(self, d: Tensor) -> Tensor:
        """Second derivative by d."""

    @property
    def parameters(self) -> tuple[float, ...]:
        """The bandwidths, as they travel through operators."""
        return ()

    @property
    def scale(self) -> float:
        """The squared distance below which it hardly changes; 0 if it has a kink at d = 0."""
        return 0.0


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        message = f"{name}: expected a positive number, got {type(value).__name__} {value!r}"
        raise TypeError(message)
    if not (math.isfinite(value) and value > 0):
        message = f"{name}: expected a positive finite number, got {value!r}"
        raise ValueError(message)
    return float(value)


# Bandwidths whose fourth power, which second derivatives contain, and its inverse are numbers.
# Temperatures are squares of bandwidths.
def bandwidth_range(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest for points of a dtype; half precision is computed in float32."""
    return (1e-75, 1e75) if dtype == torch.float64 else (1e-9, 1e17)


def within_range(
    name: str, values: Sequence[float], dtype: torch.dtype = torch.float64, *, power: int = 1
) -> None:
    """Raise if a bandwidth (or, with power 2, a temperature) is out of range."""
    low, high = (end**power for end in bandwidth_range(dtype))
    for value in values:
        if not low <= value <= high:
            kind = str(dtype).removeprefix("torch.")
            remedy = "rescale the features" + (", or use float64" if low > 1e-20 else "")
            raise expected(name, f"{low:.0e} to {high:.0e} for {kind}", f"{value!r}", remedy)


def _bandwidth(value: object) -> float:
    h = _positive("bandwidth", value)
    within_range("bandwidth", [h])
    return h


@dataclass(frozen=True, init=False)
class Gaussian(Kernel):
    r"""Gaussian kernel, averaged over its bandwidths.

    .. math:: k(d) = \frac{1}{|H|} \sum_{h \in H} \exp\left(-\frac{d}{2 h^2}\right)

    Args:
        bandwidth: one h > 0, or several.

    Raises:
        ValueError: no bandwidth, or one that is not from 1e-75 to 1e75; in float32, `kernel_mean`
            takes 1e-9 to 1e17.
        TypeError: a bandwidth that is not a number.

    Source: Gretton et al., "A kernel two-sample test", JMLR 2012; the sum over several bandwidths
    is from Li, Swersky and Zemel, "Generative moment matching networks", ICML 2015.

    Example:
        >>> import torch
        >>> Gaussian(1.0)(torch.tensor([0.0, 2.0]))
        tensor([1.0000, 0.3679])
        >>> Gaussian([0.5, 1.0, 2.0])
        Gaussian(bandwidth=(0.5, 1.0, 2.0))
    """

    bandwidth: tuple[float, ...]
    name = "gaussian"

    def __init__(self, bandwidth: float | Sequence[float]) -> None:
        """Accept one bandwidth or several."""
        several = bandwidth if isinstance(bandwidth, (tuple, list)) else (bandwidth,)
        if not several:
            message = "bandwidth: expected at least one number, got an empty sequence"
            raise ValueError(message)
        object.__setattr__(self, "bandwidth", tuple(_bandwidth(h) for h in several))

    @property
    def parameters(self) -> tuple[float, ...]:
        """The bandwidths."""
        return self.bandwidth

    @property
    def scale(self) -> float:
        """Twice the square of the smallest bandwidth."""
        return 2 * min(self.bandwidth) ** 2

    def _derivative(self, d: Tensor, order: int) -> Tensor:
        total: Tensor | None = None
        for h in self.bandwidth:
            rate = -0.5 / (h * h)
            term = torch.exp(d * rate) * (rate**order / len(self.bandwidth))
            total = term if total is None else total + term
        return torch.zeros_like(d) if total is None else total

    def __call__(self, d: Tensor) -> Tensor:
        """Value at the squared distance `d`, element-wise."""
        return self._derivative(d, 0)

    def first(self, d: Tensor) -> Tensor:
        """First derivative by d."""
        return self._derivative(d, 1)

    def second(self, d: Tensor) -> Tensor:
        """Second derivative by d."""
        return self._derivative(d, 2)


def _safe_root(d: Tensor, power: int = 1) -> Tensor:
    """sqrt(d) with d = 0 replaced by infinity: what is divided by it vanishes for equal points.

    Points so close that a power of it underflows count as equal.
    """
    least = 0.0 if power == 1 else torch.finfo(d.dtype).tiny ** (2 / power)
    return torch.where(d > least, d, torch.inf).sqrt()


def _root(d: Tensor) -> Tensor:
    """sqrt(d) whose derivatives at 0 are 0, to any order."""
    positive = d > 0
    return torch.where(positive, torch.where(positive, d, 1.0).sqrt(), 0.0)


@dataclass(frozen=True, init=False)
class Laplacian(Kernel):
    r"""Laplacian kernel of the Euclidean distance.

    .. math:: k(d) = \exp\left(-\frac{\sqrt d}{h}\right)

    Its gradient at coinciding points, where it is not differentiable, is defined as 0.

    Args:
        bandwidth: h > 0.

    Raises:
        ValueError: the bandwidth is not from 1e-75 to 1e75; in float32, `kernel_mean` takes 1e-9
            to 1e17.
        TypeError: the bandwidth is not a number.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn
    divergences", AISTATS 2019.

    Example:
        >>> import torch
        >>> Laplacian(1.0)(torch.tensor([0.0, 4.0]))
        tensor([1.0000, 0.1353])
    """

    bandwidth: float
    name = "laplacian"

    def __init__(self, bandwidth: float) -> None:
        """Accept one bandwidth."""
        object.__setattr__(self, "bandwidth", _bandwidth(bandwidth))

    @property
    def parameters(self) -> tuple[float, ...]:
        """The bandwidth."""
        return (self.bandwidth,)

    def __call__(self, d: Tensor) -> Tensor:
        """Value at the squared distance `d`, element-wise."""
        return torch.exp(_root(d) * (-1.0 / self.bandwidth))

    def first(self, d: Tensor) -> Tensor:
        """First derivative by d."""
        root = _safe_root(d)
        return torch.exp(root * (-1.0 / self.bandwidth)) * (-0.5 / self.bandwidth) / root

    def second(self, d: Tensor) -> Tensor:
        """Second derivative by d."""
        h, root = self.bandwidth, _safe_root(d, 3)
        value = torch.exp(root * (-1.0 / h))
        # value is 0 at infinite root, so the product is 0 there, not 0 times infinity.
        curvature = 0.25 / (h * h) / root.square() + 0.25 / h / root.pow(3)
        return value * curvature.clamp_max(torch.finfo(d.dtype).max)


@dataclass(frozen=True)
class Energy(Kernel):
    r"""The kernel of the energy distance: minus the Euclidean distance.

    .. math:: k(d) = -\sqrt d

    It has no bandwidth to choose. Its gradient at coinciding points is defined as 0.

    Source: Szekely and Rizzo, "Energy statistics", Journal of Statistical Planning and Inference,
    2013; Sejdinovic et al., "Equivalence of distance-based and RKHS-based statistics", 2013.

    Example:
        >>> import torch
        >>> Energy()(torch.tensor([1.0, 4.0]))
        tensor([-1., -2.])
    """

    name = "energy"

    def __call__(self, d: Tensor) -> Tensor:
        """Value at the squared distance `d`, element-wise."""
        return -_root(d)

    def first(self, d: Tensor) -> Tensor:
        """First derivative by d."""
        return -0.5 / _safe_root(d)

    def second(self, d: Tensor) -> Tensor:
        """Second derivative by d."""
        return 0.25 / _safe_root(d, 3).pow(3)


@dataclass(frozen=True, init=False)
class InverseMultiquadric(Kernel):
    r"""Inverse multiquadric kernel, with tails heavier than a Gaussian's.

    .. math:: k(d) = \left(1 + \frac{d}{h^2}\right)^{-1/2}

    Args:
        bandwidth: h > 0.

    Raises:
        ValueError: the bandwidth is not from 1e-75 to 1e75; in float32, `kernel_mean` takes 1e-9
            to 1e17.
        TypeError: the bandwidth is not a number.

    Source: Gorham and Mackey, "Measuring sample quality with kernels", ICML 2017.

    Example:
        >>> import torch
        >>> InverseMultiquadric(1.0)(torch.tensor([0.0, 3.0]))
        tensor([1.0000, 0.5000])
    """

    bandwidth: float
    name = "inverse_multiquadric"

    def __init__(self, bandwidth: float) -> None:
        """Accept one bandwidth."""
        object.__setattr__(self, "bandwidth", _bandwidth(bandwidth))

    @property
    def parameters(self) -> tuple[float, ...]:
        """The bandwidth."""
        return (self.bandwidth,)

    @property
    def scale(self) -> float:
        """The square of the bandwidth."""
        return self.bandwidth**2

    @property
    def _rate(self) -> float:
        return 1.0 / (self.bandwidth * self.bandwidth)

    def __call__(self, d: Tensor) -> Tensor:
        """Value at the squared distance `d`, element-wise."""
        return (1 + d * self._rate).rsqrt()

    def first(self, d: Tensor) -> Tensor:
        """First derivative by d."""
        return (1 + d * self._rate).rsqrt().pow(3) * (-0.5 * self._rate)

    def second(self, d: Tensor) -> Tensor:
        """Second derivative by d."""
        return (1 + d * self._rate).rsqrt().pow(5) * (0.75 * self._rate * self._rate)


_KINDS: Final = {kind.name: kind for kind in (Gaussian, Laplacian, Energy, InverseMultiquadric)}


def kernel_from(name: str, parameters: Sequence[float]) -> Kernel:
    """Rebuild a kernel from its name and parameters (operators carry only strings and numbers)."""
    if name == Gaussian.name:
        return Gaussian(tuple(parameters))
    return _KINDS[name](*parameters)
