"""Every operation in float64, in the obvious way and without fad_loss, with the error it may have.

A bound says how far the result may be off: `t` times what the promised relative error of every
squared distance (see `fad_loss.ops`) makes of it, and some roundings of what is added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of two clouds (n, C), (m, C)."""
    return (x.double()[:, None] - y.double()[None]).square().sum(-1)


@dataclass(frozen=True)
class Bound:
    """The promised error: of a squared distance, relative, and the roundings beside it."""

    t: float
    unit: float
    tiny: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Bound:
        """In the precision of results."""
        if dtype == torch.float64:
            return cls(2.0**-43, 2.0**-52, 1e-290)
        return cls(2.0**-14, 2.0**-23, 1e-30)


@dataclass(frozen=True)
class Profile:
    """A kernel as a function of the squared distance, with its derivatives and its scale."""

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    scale: float


def _root(d: Tensor) -> Tensor:
    return torch.where(d > 0, d, math.inf).sqrt()


def gaussian(h: float) -> Profile:
    """exp(-d / 2h^2)."""
    r = 0.5 / h / h
    return Profile(
        lambda d: torch.exp(-d * r),
        lambda d: -r * torch.exp(-d * r),
        lambda d: r * r * torch.exp(-d * r),
        2 * h * h,
    )


def laplacian(h: float) -> Profile:
    """exp(-sqrt(d) / h)."""

    def second(d: Tensor) -> Tensor:
        root = _root(d)
        return torch.exp(-d.sqrt() / h) * (0.25 / h / h / root**2 + 0.25 / h / root**3)

    return Profile(
        lambda d: torch.exp(-d.sqrt() / h),
        lambda d: -0.5 / h / _root(d) * torch.exp(-d.sqrt() / h),
        second,
        0.0,
    )


def energy() -> Profile:
    """-sqrt(d)."""
    return Profile(
        lambda d: -d.sqrt(), lambda d: -0.5 / _root(d), lambda d: 0.25 / _root(d) ** 3, 0.0
    )


def multiquadric(h: float) -> Profile:
    """(1 + d / h^2)^(-1/2)."""
    r = 1 / h / h
    return Profile(
        lambda d: (1 + d * r) ** -0.5,
        lambda d: -0.5 * r * (1 + d * r) ** -1.5,
        lambda d: 0.75 * r * r * (1 + d * r) ** -2.5,
        h * h,
    )


def pulled(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of sum_ij W_ij |x_i - y_j|^2 with W held."""
    x, y = x.double(), y.double()
    difference = x[:, None] - y[None]
    pull = 2 * weights[..., None] * difference
    return pull.sum(1), -pull.sum(0)


def kernel_mean(
    x: Tensor, y: Tensor, profile: Profile, w: Tensor, own: bool, cotangent: Tensor, bound: Bound
) -> tuple[list[Tensor], list[Tensor]]:
    """Value, gradients by x, y, w; and how far each may be off (of points: their norm)."""
    d = distances(x, y)
    w = w.double().expand(d.shape).clone()
    if own:
        w.fill_diagonal_(0.0)
    total = w.sum(1, keepdim=True)
    mass = torch.where(total > 0, total, 1.0)
    k, first, second = profile.value(d), profile.first(d), profile.second(d)
    value = (w * k).sum(1) / mass[:, 0]
    g = cotangent.double()[:, None]
    pull = g * w * first / mass
    dx, dy = pulled(x, y, pull)
    dw = g * (k - value[:, None]) / mass
    if own:
        dw = dw.masked_fill(torch.eye(len(d)) > 0, 0.0)
    dw = dw.sum(0)
    # Errors.
    off = bound.t * d.clamp_min(profile.scale) + bound.tiny
    root = d.sqrt()
    k_off = (first.abs() * off).minimum(2 * k.abs() + bound.tiny**0.5) + 16 * bound.unit * k.abs()
    lost = d <= bound.tiny  # these distances underflow
    k_off = k_off + lost * bound.tiny**0.5
    added = 4 * bound.unit * (w * k.abs()).sum(1)
    value_off = ((w * k_off).sum(1) + added) / mass[:, 0] + 1e-37  # where exponentials underflow
    share = g.abs() * w / mass
    first_off = (second.abs() * off).minimum(2 * first.abs()) + bound.t * first.abs()
    w_off = share * first_off * root
    w_off = w_off + share * bound.t * first.abs() * profile.scale**0.5
    w_off = w_off + torch.where(lost, share * first.abs() * root, 0.0)
    w_off = w_off * 2 + bound.tiny**0.5
    dw_off = (g.abs() / mass * (k_off + value_off[:, None] + 32 * bound.unit * k.abs())).sum(0)
    return [value, dx, dy, dw], [value_off, w_off.sum(1), w_off.sum(0), dw_off]


def softmin(
    x: Tensor, y: Tensor, eps: float, h: Tensor, own: bool, cotangent: Tensor, bound: Bound
) -> tuple[list[Tensor], list[Tensor]]:
    """Value, gradients by x, y, h; and how far each may be off."""
    d = distances(x, y)
    exponent = (h.double()[None] - d) / eps
    if own:
        exponent.fill_diagonal_(-math.inf)
    value = -eps * exponent.logsumexp(1)
    log_p = exponent + value[:, None] / eps
    empty = (exponent == -math.inf).all(1) if exponent.shape[1] else torch.ones(len(d)) > 0
    log_p = log_p.masked_fill(empty[:, None], -math.inf)
    p, g = log_p.exp(), cotangent.double()[:, None]
    dx, dy = pulled(x, y, g * p)
    dh = -(g * p).sum(0)
    sizes = torch.where(h.isfinite(), h.double().abs(), 0.0)[None]
    off = bound.t * d.clamp_min(eps) + 8 * bound.unit * (d + sizes) + bound.tiny
    average = (p * off).sum(1, keepdim=True)
    count = max(d.shape[1], 1)
    value_off = average[:, 0] + 8 * bound.unit * (value.abs() + eps * math.log(count + 1))
    # Where the distances' errors exceed the temperature, any weight is possible: at most 1.
    drift = torch.expm1(2 * (off + average).div(eps).clamp(max=300.0))
    p_off = (p * drift).clamp(max=1.0)
    p_off = torch.maximum(p_off, (log_p + 2 * (off + average) / eps).clamp(max=0).exp() - p)
    w_off = 2 * g.abs() * ((p_off + bound.t * p) * d.sqrt() + bound.t * p * eps**0.5)
    w_off = torch.where(empty[:, None], 0.0, w_off) + bound.tiny**0.5
    dh_off = (g.abs() * (p_off + 16 * bound.unit * p)).sum(0) + bound.tiny**0.5
    value = value.masked_fill(empty, math.inf)
    return [value, dx, dy, dh], [value_off, w_off.sum(1), w_off.sum(0), dh_off]
