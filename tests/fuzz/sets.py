"""Properties of distances between sets, and of metrics."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from fad_loss import distances, metrics, ops

from . import formulas
from .formulas import Bound
from .operations import BACKENDS, RATIOS, close, rounded, size_of
from .problems import problems, typical


def _kernel_distance(x, y, profile, bound, unbiased):
    """MMD of two clouds, its gradients, and how far each may be off."""
    parts = ((x, y, -2.0, False), (x, x, 1.0, unbiased), (y, y, 1.0, unbiased))
    value, off = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    dx, dy = (torch.zeros(t.shape, dtype=torch.float64) for t in (x, y))
    dx_off, dy_off = dx[..., 0].clone(), dy[..., 0].clone()
    for a, b, factor, own in parts:
        cotangent = torch.full((len(a),), factor / len(a), dtype=torch.float64)
        exact, allowed = formulas.kernel_mean(
            a, b, profile, torch.ones(len(b)), own, cotangent, bound
        )
        value = value + factor * exact[0].mean()
        off = off + abs(factor) * (allowed[0].mean() + 16 * bound.unit * exact[0].abs().mean())
        for side, t in ((1, a), (2, b)):
            target, target_off = (dx, dx_off) if t is x else (dy, dy_off)
            target += exact[side]
            # Every part is rounded by itself.
            rounding = 16 * bound.unit + torch.finfo(x.dtype).eps
            target_off += allowed[side] + rounding * exact[side].norm(dim=-1)
    return value, off, (dx, dy), (dx_off, dy_off)


def _chamfer(x, y, bound):
    d = formulas.distances(x, y)
    there, back = d.min(1).values.mean(), d.min(0).values.mean()
    off = (40 + x.shape[-1]) * bound.unit * (there + back) + 1e-36
    return there + back, off


def set_to_set(data) -> None:
    """chamfer, energy and mmd, with the gradients of the last two."""
    problem = data.draw(problems(least=2))
    which = data.draw(st.sampled_from(["chamfer", "energy", "mmd"]))
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]))
    unbiased, backend = data.draw(st.booleans()), data.draw(BACKENDS)
    x, y = problem.x, problem.y
    h = min(max(typical(x, y) ** 0.5 * data.draw(RATIOS), 1e-8), 1e16)
    kernel, profile = data.draw(
        st.sampled_from(
            [(ops.Gaussian(h), formulas.gaussian(h)), (ops.Laplacian(h), formulas.laplacian(h))]
        )
    )
    problem.description += f" {which} {reduction} unbiased {unbiased} {kernel} {backend}"
    a, b = (t.detach().clone().requires_grad_() for t in (x, y))
    left, right = problem.given(a, 0), problem.given(b, 1)
    options = {"reduction": reduction, "backend": backend}
    if which == "chamfer":
        got = distances.chamfer(left, right, **options)
    elif which == "energy":
        profile = formulas.energy()
        got = distances.energy(left, right, unbiased=unbiased, **options)
    else:
        got = distances.mmd(left, right, kernel, unbiased=unbiased, **options)
    bound, values, offs = Bound.of(x.dtype), [], []
    share = 1 / len(problem.clouds) if reduction == "mean" else 1.0
    true = [torch.zeros(t.shape, dtype=torch.float64) for t in (x, y)]
    allowed = [torch.zeros(t.shape[:-1], dtype=torch.float64) for t in (x, y)]
    for rows, columns, batch in problem.clouds:
        p, q = x[batch][rows], y[batch][columns]
        if which == "chamfer":
            value, off = _chamfer(p, q, bound)
        else:
            value, off, gradients, gradient_offs = _kernel_distance(p, q, profile, bound, unbiased)
            for t, g, o, go, part in zip(
                true, gradients, allowed, gradient_offs, (rows, columns), strict=True
            ):
                t[batch][part] += g * share
                o[batch][part] += go * share
        values.append(value)
        offs.append(off)
    exact, off = torch.stack(values), torch.stack(offs)
    if reduction != "none":
        exact, off = (
            exact.sum() * share,
            off.sum() * share + 4 * bound.unit * off.new_tensor(float(exact.abs().sum())),
        )
    close("value", problem, got, exact, off)
    found = torch.autograd.grad(got.sum(), (a, b))
    for t in found:
        assert not t.isnan().any(), problem.description
    if which != "chamfer":
        for g, t, o in zip(found, true, allowed, strict=True):
            close("gradient", problem, g, t, rounded(2 * o, t, size_of(t, o), g.dtype))


def sinkhorn(data) -> None:
    """Against the reference in float64; symmetric; 0 for equal sets."""
    problem = data.draw(problems(least=1, extreme=False))
    if problem.x.dtype in {torch.float16, torch.bfloat16}:
        return
    size = typical(problem.x, problem.y)
    epsilon = max(size * data.draw(st.sampled_from([0.02, 0.1, 1.0, 100.0])), 1e-17)
    options = {"max_iterations": 20, "tolerance": None, "reduction": "none"}
    x, y = problem.given(problem.x, 0), problem.given(problem.y, 1)
    got = distances.sinkhorn(x, y, epsilon, **options)
    wide = problem.given(problem.x.double(), 0), problem.given(problem.y.double(), 1)
    true = distances.sinkhorn(*wide, epsilon, backend="dense", **options)
    extent = torch.cat([problem.x.double().flatten(0, -2), problem.y.double().flatten(0, -2)])
    reach = float((extent - extent.mean(0)).square().sum(-1).amax()) + size
    off = torch.full_like(true, 2.0**-12 * (reach + epsilon))
    close("value", problem, got, true, off)
    close("symmetry", problem, distances.sinkhorn(y, x, epsilon, **options), true, off)
    own = distances.sinkhorn(x, x, epsilon, **options)
    close("self-distance", problem, own, torch.zeros_like(own), off)


def _rows(data, least: int) -> tuple[Tensor, Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**40)))
    n = data.draw(st.integers(least, 20))
    cs, ct = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    scale = 10.0 ** data.draw(st.sampled_from([-100, -30, -5, 0, 0, 5, 30, 100]))
    offset = data.draw(st.sampled_from([0.0, 0.0, 1.0, 100.0]))
    x = torch.randn(n, cs, generator=g, dtype=torch.float64)
    mix = torch.randn(cs, ct, generator=g, dtype=torch.float64)
    y = x @ mix + data.draw(st.sampled_from([0.0, 0.3, 3.0])) * torch.randn(
        n, ct, generator=g, dtype=torch.float64
    )
    return (x + offset) * scale, y + offset, g


def _near(got: Tensor, want: Tensor | float, what: str, tolerance: float = 1e-6) -> None:
    assert abs(float(got) - float(want)) <= tolerance, f"{what}: {float(got)}, not {float(want)}"


def similarity(data) -> None:
    """cka, neighbor_agreement and information_lost of rows, at any scale."""
    x, y, _ = _rows(data, 4)
    n = len(x)
    a, b = (t / t.abs().amax().clamp_min(1e-300) for t in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    gram_a, gram_b = a @ a.T, b @ b.T
    inner = (gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm())
    _near(metrics.cka(x, y), inner, "cka")
    _near(metrics.cka(x, x), 1.0, "cka of x with itself")
    k = data.draw(st.integers(1, n - 1))
    near = []
    for t in (a, b):
        d = formulas.distances(t, t).fill_diagonal_(math.inf)
        near.append(d.sort(dim=1, stable=True).indices[:, :k])
    shared = sum(len(set(p.tolist()) & set(q.tolist())) for p, q in zip(*near, strict=True))
    # Ties and near ties may go either way.
    _near(metrics.neighbor_agreement(x, y, k), shared / (n * k), "agreement", 2.01 / (n * k))
    _near(metrics.neighbor_agreement(x, x, k), 1.0, "agreement of x with itself")
    lost = float(metrics.information_lost(x, y))
    best, energy = 1.0, float(torch.linalg.svdvals(a).max() ** 2)
    for exponent in range(-6, 3):
        total = error = 0.0
        for i in range(n):
            rest = [j for j in range(n) if j != i]
            p, q = a[rest], b[rest]
            pm, qm = p.mean(0), q.mean(0)
            ridge = 10.0**exponent * energy * torch.eye(p.shape[1], dtype=torch.float64)
            fit = torch.linalg.solve((p - pm).T @ (p - pm) + ridge, (p - pm).T @ (q - qm))
            error += float((b[i] - qm - (a[i] - pm) @ fit).square().sum())
            total += float((b[i] - qm).square().sum())
        best = min(best, error / total)
    assert 0 <= lost <= best + 1e-4, f"information_lost: {lost}, at most {best}"


def metric_of_sets(data) -> None:
    """set_distances, against chamfer and energy in float64."""
    problem = data.draw(problems(least=2, extreme=False))
    student, teacher = problem.given(problem.x, 0), problem.given(problem.y, 1)
    if not problem.x.shape[0]:
        return
    found = metrics.set_distances(student, teacher)
    values = problem.y.double().flatten(0, -2)
    center, spread = values.mean(0), values.var(0, unbiased=False).sum()
    for value in found.values():
        assert not value.isnan(), problem.description
        assert value >= 0, problem.description
    reach = (problem.x.double().flatten(0, -2) - center).norm(dim=-1).amax()
    if problem.x.dtype != torch.float64 or spread.sqrt() * 1e6 <= center.norm() + reach:
        return  # rounded to the features' precision, or all rounding
    measured, worst = [], []
    for rows, columns, batch in problem.clouds:
        p, q = problem.x[batch][rows], problem.y[batch][columns]
        bound = Bound.of(torch.float64)
        measured.append(_chamfer(p, q, bound)[0])
        worst.append(_chamfer(center.expand(2, -1), q, bound)[0])
    true = sum(measured) / sum(worst)
    assert abs(found["chamfer"] - true) <= 1e-6 * (1 + true), problem.description
