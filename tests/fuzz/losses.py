"""Properties of discriminators and of the loss."""

from __future__ import annotations

import math
import warnings

import torch
from hypothesis import strategies as st

from fad_loss import (
    CloudDiscriminator,
    FeatureAdversarialLoss,
    NeighborhoodDiscriminator,
    PointDiscriminator,
    TeacherDiscriminator,
)
from fad_loss._game import Game

from . import formulas
from .problems import problems

NAMES = ("teacher", "point", "neighborhood", "cloud")


def _density(z, points, m):
    d = formulas.distances(z, points)
    return torch.logsumexp(-d / (2 * m), 1) - math.log(len(points))


def teacher(data) -> None:
    """The log ratio of two kernel densities in units of the teacher's spread."""
    problem = data.draw(problems(least=2, extreme=False))
    if not problem.x.shape[0] or problem.x.dtype in {torch.float16, torch.bfloat16}:
        return
    m = data.draw(st.sampled_from([0.1, 0.3, 1.0, 3.0]))
    game = Game.of(problem.given(problem.x, 0), problem.given(problem.y, 1))
    scores = TeacherDiscriminator(bandwidths=[m]).scores(game)
    spreads = []
    for _, columns, batch in problem.clouds:
        t = problem.y[batch][columns].double()
        spreads.append(2 * (t - t.mean(0)).square().sum(-1).mean())
        if spreads[-1] <= 1e-6 * t.mean(0).square().sum():
            return  # without spread its stand-in decides
    least = 0.1 * torch.stack(spreads).median()
    for (rows, columns, batch), own in zip(problem.clouds, spreads, strict=True):
        s, t = problem.x[batch][rows].double(), problem.y[batch][columns].double()
        center, spread = t.mean(0), own.clamp_min(least)
        s, t = ((p - center) / spread.sqrt() for p in (s, t))
        for z, part, given in ((s, rows, scores.student), (t, columns, scores.teacher)):
            true = _density(z, t, m) - _density(z, s, m)
            got = problem.taken(given)[batch][part].double()
            reach = formulas.distances(z, torch.cat([s, t])).amax() / m
            noise = 2.0**-11 * (1 + reach) * (1 + float(center.norm() / spread.sqrt()))
            assert ((got - true).abs() <= noise).all(), problem.description


def learned(data) -> None:
    """Scores do not depend on the order of points, and NaN never comes out of finite features."""
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**40)))
    kind = data.draw(
        st.sampled_from([PointDiscriminator, NeighborhoodDiscriminator, CloudDiscriminator])
    )
    B, N, C = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 12)), 5
    torch.manual_seed(int(torch.randint(0, 2**31, (1,), generator=g)))
    discriminator = kind(C).eval()
    scale = 10.0 ** data.draw(st.sampled_from([-12, -3, 0, 3, 12]))
    x, y = (torch.randn(B, N, C, generator=g) * scale for _ in range(2))
    x.requires_grad_()
    order = torch.randperm(N, generator=g)
    one = discriminator(Game.of(x, y)).student
    other = discriminator(Game.of(x[:, order], y)).student
    expected = one if one.dim() == 1 else one[:, order]
    torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(one.sum(), x)
    assert gradient.isfinite().all()


def loss(data) -> None:
    """One step: finite, routed, and free of the teacher's scale."""
    problem = data.draw(problems(least=2, extreme=False))
    if not problem.x.shape[0]:
        return
    name = data.draw(st.sampled_from(NAMES))
    objective = data.draw(
        st.sampled_from(["hinge", "non_saturating", "least_squares", "wasserstein", "relativistic"])
    )
    factor = 2.0 ** data.draw(st.sampled_from([-6, -3, 3, 6]))
    seed = data.draw(st.integers(0, 2**31))
    C = problem.x.shape[-1]
    half = problem.x.dtype in {torch.float16, torch.bfloat16}
    results = []
    for scale in (1.0, 1.0 if half else factor):  # which half precision might not hold
        torch.manual_seed(seed)
        fad = FeatureAdversarialLoss(C, C, discriminator=name, objective=objective)
        fad = fad.to(torch.float32 if half else problem.x.dtype)
        student = problem.x.detach().clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # first scores beyond any reason
            value = fad(problem.given(student, 0), problem.given(problem.y * scale, 1))
        value.backward()
        assert value.isfinite(), problem.description
        # Gradients of two points that almost coincide can be beyond half precision.
        assert half or student.grad.isfinite().all(), problem.description
        assert not student.grad.isnan().any(), problem.description
        for parameter in fad.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), problem.description
        results.append((float(value.detach()), student.grad.double().norm()))
    spread = problem.y.double().flatten(0, -2).var(0, unbiased=False)
    size = problem.y.double().abs().amax()
    if half or (spread.sqrt() < 1e-3 * size).any() or size < 1e-3:
        return  # what is constant has no scale to be free of
    (value, gradient), (scaled, scaled_gradient) = results
    assert abs(value - scaled) <= 1e-2 * (1 + abs(value)), problem.description
    assert abs(gradient - scaled_gradient) <= 2e-2 * (gradient + 1e-6), problem.description
