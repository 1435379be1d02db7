"""Features free of scale: each player's channels, standardised by running statistics of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fad_loss._points import Points

__all__ = ["Standardize"]

# A channel counts as varying by at least this share of the average channel: features of a dead unit
# would otherwise be blown up without bound.
_FLOOR = 0.01
# And by at least this share of its mean square: what is left of less is rounding.
_RESOLUTION = 1e-10


class Standardize(nn.Module):
    r"""Standardise features, channel by channel, by running statistics.

    .. math::
        \hat x_c = \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + 0.01\, \overline{\sigma^2}}}

    with :math:`\mu` and :math:`\sigma^2` the running mean and variance over all points that count,
    and :math:`\overline{\sigma^2}` the mean variance of the channels. Multiplying all features by a
    constant changes nothing. The statistics are constants to every gradient. The first batch is
    standardised by its own; the rate of forgetting is 1/n until it reaches `momentum`.

    Args:
        channels: C of the features.
        momentum: the rate at which the past is forgotten.

    Example:
        >>> standardize = Standardize(1, momentum=0.1)
        >>> points = Points.of(torch.tensor([[[1.0], [3.0]]]))
        >>> standardize.observe(points)
        >>> standardize(points.features).flatten()
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
        values = points.features.detach().to(self.mean.dtype).flatten(0, -2)
        if points.mask is None:
            # torch.var_mean takes several times as long on a CPU.
            mean = values.mean(0)
            variance = (values - mean).square_().mean(0)
            finite = torch.isfinite(mean + variance).all()
        else:
            counted = points.mask.flatten().unsqueeze(1)
            count = counted.sum()
            mean = values.sum(0) / count.clamp_min(1)  # what does not count is 0
            variance = torch.where(counted, (values - mean).square(), 0).sum(0)
            variance = variance / count.clamp_min(1)
            finite = torch.isfinite(mean + variance).all() & (count > 0)
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

    def scale(self) -> Tensor:
        """What one unit is in the features' own, ``(C,)``."""
        variance = self.variance
        least = _FLOOR * variance.mean() + _RESOLUTION * self.mean.square().mean()
        return torch.where(least > 0, variance + least, 1.0).sqrt()

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(..., C)`` in units of their spread."""
        # The mean goes first: (x - mean) keeps digits that x * scale - mean * scale has lost.
        return (features - self.mean.to(features.dtype)) / self.scale().to(features.dtype)

    def restore(self, units: Tensor) -> Tensor:
        """The inverse of `forward`."""
        return torch.addcmul(self.mean.to(units.dtype), units, self.scale().to(units.dtype))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        """Convert or move; statistics stay in float32 at least: in half precision they would
        overflow, or stand still.
        """
        given = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in given.items():
            now = getattr(self, name)
            if now.dtype in {torch.float16, torch.bfloat16}:
                setattr(self, name, before.to(now.device, torch.float32))
        return self
