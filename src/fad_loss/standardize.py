"""Features free of scale: each player's channels, standardised by running statistics of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fad_loss._points import Points
from fad_loss._snapshot import snapshot
from fad_loss._state import WideBuffers

__all__ = ["Standardize"]

# A channel counts as varying by at least this share of the average channel: features of a dead unit
# would otherwise be blown up without bound.
_FLOOR = 0.01
# And by at least this share of its mean square: what is left of less is rounding.
_RESOLUTION = 1e-10


class Standardize(WideBuffers):
    r"""Standardise features, channel by channel, by running statistics.

    .. math::
        \hat x_c = \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + 0.01\, \overline{\sigma^2}}}

    with :math:`\mu` and :math:`\sigma^2` the running mean and variance over all points that count,
    and :math:`\overline{\sigma^2}` the mean variance of the channels. Multiplying all features by a
    constant changes nothing. The first batch is standardised by its own statistics; the rate of
    forgetting is 1/n until it reaches `momentum`.

    In training the gradient is that of standardising by the batch's own statistics: it neither
    moves nor stretches a channel as a whole. With the running statistics taken for constants, a
    loss can be lowered by stretching all features, which the statistics then undo, and so on
    without end; the student's normalisation layers would be led astray by it.

    Args:
        channels: C of the features.
        momentum: the rate at which the past is forgotten.

    Source: a forward pass by running and a backward pass by batch statistics is Ioffe, *Batch
    renormalization*, NeurIPS 2017.

    Example:
        >>> standardize = Standardize(1, momentum=0.1)
        >>> points = Points.of(torch.tensor([[[1.0], [3.0]]]))
        >>> standardize.observe(points)
        >>> standardize(points).features.flatten()
        tensor([-0.9950,  0.9950])
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{self.mean.shape[0]}, momentum={self.momentum}"

    @torch.no_grad()
    def observe(self, points: Points) -> None:
        """Follow the mean and variance of the channels, over the points that count."""
        mean, variance = moments(points.detach().map(lambda values: values.to(self.mean.dtype)))
        finite = torch.isfinite(mean + variance).all()
        if points.mask is not None:
            finite = finite & points.mask.any()
        # A batch that overflowed (which on a GPU nobody looks for) must not spoil all that follow.
        mean = torch.where(finite, mean, self.mean)
        variance = torch.where(finite, variance, self.variance)
        self.batches.add_(finite)
        rate = (1 / self.batches.clamp(min=1)).clamp(min=self.momentum).to(mean.dtype) * finite
        # The spread of the means between batches belongs to the variance.
        shift = mean - self.mean
        within = torch.lerp(self.variance, variance, rate)
        self.variance.copy_(within + rate * (1 - rate) * shift.square())
        self.mean.lerp_(mean, rate)

    def forward(self, points: Points) -> Points:
        """The points with features in units of their spread."""
        dtype = points.features.dtype
        center, unit = snapshot(torch.stack([self.mean, self.unit()])).to(dtype).unbind()
        if not (self.training and points.features.requires_grad and torch.is_grad_enabled()):
            # The mean goes first: (x - mean) keeps digits that x * scale - mean * scale has lost.
            return points.map(lambda values: (values - center) / unit).filled()
        mean, variance = moments(points)
        spread = unit_of(mean, variance)
        ratio, shift = spread.detach() / unit, (mean.detach() - center) / unit
        return points.map(lambda values: (values - mean) / spread * ratio + shift).filled()

    def unit(self) -> Tensor:
        """What one unit is in the features' own, ``(C,)``."""
        return unit_of(self.mean, self.variance)

    def restore(self, units: Tensor) -> Tensor:
        """The inverse of `forward`."""
        unit = self.unit()
        return torch.addcmul(self.mean.to(units.dtype), units, unit.to(units.dtype))


def moments(points: Points) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, over the points that count."""
    values = points.features.flatten(0, -2)
    if points.mask is None:
        # torch.var_mean takes several times as long on a CPU.
        mean = values.mean(0)
        return mean, (values - mean).square().mean(0)
    counted = points.mask.flatten().unsqueeze(1)
    count = counted.sum().clamp_min(1)
    mean = values.sum(0) / count  # what does not count is 0
    return mean, torch.where(counted, (values - mean).square(), 0).sum(0) / count


def unit_of(mean: Tensor, variance: Tensor) -> Tensor:
    """What one unit of channels with this mean and variance is, ``(C,)``."""
    least = _FLOOR * variance.mean() + _RESOLUTION * mean.square().mean()
    return torch.where(least > 0, variance + least, 1.0).sqrt()
