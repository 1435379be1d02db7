"""Properties of the four operations."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from fad_loss import ops

from . import formulas
from .formulas import Bound
from .problems import Problem, problems, typical, wide

BACKENDS = st.sampled_from(["auto", "auto", "auto", "dense"])
RATIOS = st.sampled_from([1e-4, 1e-2, 0.1, 1.0, 1.0, 10.0, 1e4])


def close(what: str, problem: Problem, got: Tensor, true: Tensor, off: Tensor) -> None:
    """Points are compared by the norm of their error, numbers one by one."""
    assert not got.isnan().any(), f"{what} is NaN: {problem.description}"
    got, true = got.detach().double(), true.double()
    error = (got - true).abs()
    error = torch.where((got == true) | ((got == math.inf) & (true == math.inf)), 0.0, error)
    if error.dim() > off.dim():
        error = error.norm(dim=-1)
    wrong = ~(error <= off)
    assert not wrong.any(), (
        f"{what} is off by {float(error[wrong][0]):.2e}, allowed {float(off[wrong][0]):.2e}: "
        f"{problem.description}"
    )


def size_of(t: Tensor, off: Tensor) -> Tensor:
    """The sizes of numbers, or of vectors."""
    return t.double().abs() if t.dim() == off.dim() else t.double().norm(dim=-1)


def rounded(off: Tensor, true: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients are rounded to the dtype of what they belong to, each of several parts."""
    finfo = torch.finfo(dtype)
    overflow = torch.where(size > finfo.max / 4, math.inf, 0.0)
    channels = true.shape[-1] ** 0.5 if true.dim() > off.dim() else 1.0
    return off + size * finfo.eps + finfo.tiny * channels + overflow


def clouds_of(t: Tensor, problem: Problem, side: int) -> list[Tensor]:
    """The clouds of a batched or packed tensor."""
    return [t[b][(rows, columns)[side]] for rows, columns, b in problem.clouds]


def search(data) -> None:
    """nearest and knn, against sorting."""
    own = data.draw(st.booleans())
    problem = data.draw(problems(same_size=own, extreme=False))
    backend = data.draw(BACKENDS)
    x, y = problem.x, problem.x if own else problem.y
    count = y.shape[1]
    if problem.lengths is not None:
        count = max([1, *problem.lengths[1]])
    available = count - own
    k = data.draw(st.integers(1, max(1, min(available, 20))))
    if problem.lengths is None and available < 1:
        return
    a, b = (t.detach().clone().requires_grad_() for t in (x, y))
    left = problem.given(a, 0)
    right = left if own else problem.given(b, 1)
    if k == 1 and not own:
        found = [problem.taken(t).unsqueeze(-1) for t in ops.nearest(left, right, backend=backend)]
    else:
        result = ops.knn(left, right, k, exclude_self=own, backend=backend)
        found = [problem.taken(t) for t in result]
    cotangent = problem.random(*found[0].shape, dtype=found[0].dtype)
    finite = torch.where(found[0].isfinite(), found[0], 0.0)
    gradients = torch.autograd.grad((finite * cotangent).sum(), [a] if own else [a, b])
    bound = Bound.of(x.dtype)
    true_gradients = [torch.zeros(t.shape, dtype=torch.float64) for t in (x, y)]
    sizes_of = [torch.zeros(t.shape[:-1], dtype=torch.float64) for t in (x, y)]
    for rows, columns, batch in problem.clouds:
        part = columns if not own else rows
        p, q = x[batch][rows], y[batch][part]
        d = formulas.distances(p, q)
        if own:
            d.fill_diagonal_(math.inf)
        distance, index = (t[batch][rows] for t in found)
        true = d.sort(dim=1, stable=True).values[:, :k]
        got = distance[:, : true.shape[1]]
        relative = (8 + x.shape[-1]) * bound.unit
        allowed = relative * torch.where(true.isfinite(), true, 0.0) + 1e-36
        close("distance", problem, got, true, allowed)
        none = distance == math.inf
        assert (index[none] == -1).all(), problem.description
        assert (distance.diff(dim=1)[~none[:, 1:]] >= 0).all(), problem.description
        ordered = (distance.diff(dim=1) > 0) | (index.diff(dim=1) > 0) | none[:, 1:]
        assert ordered.all(), f"ties out of order: {problem.description}"
        if not len(q):
            continue
        at = index.clamp_min(0)
        difference = p.double()[:, None] - q.double()[at]
        owned = difference.square().sum(-1)
        close(
            "owner",
            problem,
            torch.where(none, math.inf, owned),
            distance.double(),
            relative * torch.where(none, 0.0, owned) + 1e-36,
        )
        pull = 2 * torch.where(none, 0.0, cotangent[batch][rows].double())[..., None] * difference
        true_gradients[0][batch][rows] += pull.sum(1)
        sizes_of[0][batch][rows] += pull.norm(dim=-1).sum(1)
        true_gradients[1][batch][part] -= torch.zeros(q.shape, dtype=torch.float64).index_put(
            (at.flatten(),), pull.flatten(0, 1), accumulate=True
        )
        sizes_of[1][batch][part] += torch.zeros(len(q), dtype=torch.float64).index_put(
            (at.flatten(),), pull.norm(dim=-1).flatten(), accumulate=True
        )
    if own:
        true_gradients = [true_gradients[0] + true_gradients[1]]
        sizes_of = [sizes_of[0] + sizes_of[1]]
    for got, true, size in zip(gradients, true_gradients, sizes_of, strict=True):
        off = rounded(32 * bound.unit * size + 1e-36, true, size, x.dtype)
        close("gradient", problem, got, true, off)


def kernel_mean(data) -> None:
    """The mean of a kernel, and its gradients, against the formula."""
    own = data.draw(st.booleans())
    problem = data.draw(problems(same_size=own))
    x, y = problem.x, problem.x if own else problem.y
    if not x.shape[0]:
        return
    typical_size = typical(x, y) ** 0.5
    h = min(max(typical_size * data.draw(RATIOS), 1e-8), 1e16)
    kernel, profile = data.draw(
        st.sampled_from(
            [
                (ops.Gaussian(h), formulas.gaussian(h)),
                (ops.Laplacian(h), formulas.laplacian(h)),
                (ops.Energy(), formulas.energy()),
                (ops.InverseMultiquadric(h), formulas.multiquadric(h)),
            ]
        )
    )
    weighted = data.draw(st.booleans())
    backend = data.draw(BACKENDS)
    weights = problem.random(*y.shape[:-1], dtype=wide(x.dtype)) + 0.01
    if data.draw(st.booleans()):
        weights = weights * torch.where(problem.random(*weights.shape) < 0.1, 1e6, 1.0).to(weights)
    a, b, w = (t.detach().clone().requires_grad_() for t in (x, y, weights))
    left = problem.given(a, 0)
    right = left if own else problem.given(b, 1)
    along = problem.given(w, 1, points=False) if weighted else None
    value = problem.taken(
        ops.kernel_mean(left, right, kernel, along, exclude_self=own, backend=backend)
    )
    _smooth(
        problem, own, value, [a, b, w] if weighted else [a, b],
        lambda p, q, v, g, bound: formulas.kernel_mean(
            p, q, profile, v if weighted else torch.ones(len(q)), own, g, bound
        ),
        weights, extra=f"{kernel} own {own} {backend}",
    )  # fmt: skip


def softmin(data) -> None:
    """The smooth minimum, and its gradients, against the formula."""
    own = data.draw(st.booleans())
    problem = data.draw(problems(same_size=own))
    x, y = problem.x, problem.x if own else problem.y
    if not x.shape[0]:
        return
    size = typical(x, y)
    eps = min(max(size * data.draw(RATIOS), 1e-17), 1e33)
    backend = data.draw(BACKENDS)
    potential = ((problem.random(*y.shape[:-1]) - 0.5) * size).to(wide(x.dtype))
    a, b, f = (t.detach().clone().requires_grad_() for t in (x, y, potential))
    left = problem.given(a, 0)
    right = left if own else problem.given(b, 1)
    value = problem.taken(
        ops.softmin(left, right, eps, problem.given(f, 1, points=False), exclude_self=own,
                    backend=backend)
    )  # fmt: skip
    _smooth(
        problem, own, value, [a, b, f],
        lambda p, q, v, g, bound: formulas.softmin(p, q, eps, v, own, g, bound),
        potential, extra=f"softmin({eps}) own {own} {backend}",
    )  # fmt: skip


def _smooth(problem, own, value, inputs, formula, values, *, extra) -> None:
    problem.description += f" {extra}"
    x, y = problem.x, problem.x if own else problem.y
    bound = Bound.of(x.dtype)
    assert value.dtype == wide(x.dtype)
    cotangent = (problem.random(*value.shape) - 0.5).to(value.dtype)
    gradients = []
    if value.requires_grad:
        finite = torch.where(value.isfinite(), value, 0.0)
        wanted = [inputs[0], *inputs[2:]] if own else inputs
        gradients = torch.autograd.grad((finite * cotangent).sum(), wanted, allow_unused=True)
    shapes = [t.shape for t in (x, y, values)]
    true = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    off = [torch.zeros(s[:2], dtype=torch.float64) for s in shapes]
    for rows, columns, batch in problem.clouds:
        part = rows if own else columns
        p, q, v = x[batch][rows], y[batch][part], values[batch][part]
        exact, allowed = formula(p, q, v, cotangent[batch][rows], bound)
        close("value", problem, value[batch][rows], exact[0], allowed[0])
        for t, o, where, e, a in zip(
            true, off, (rows, part, part), exact[1:], allowed[1:], strict=True
        ):
            t[batch][where] += e
            o[batch][where] += a
    sizes = [size_of(t, o) for t, o in zip(true, off, strict=True)]
    if own:
        true, off, sizes = ([p[0] + p[1], p[2]] for p in (true, off, sizes))
    names = "xz" if own else "xyz"
    for name, got, t, o, size in zip(names, gradients, true, off, sizes, strict=False):
        if got is not None:
            close(f"gradient by {name}", problem, got, t, rounded(o, t, size, got.dtype))


def mistakes(data) -> None:
    """Whatever is wrong, a ValueError or TypeError names the argument."""
    x, y = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    w = torch.ones(2, 5)
    junk = st.sampled_from(
        [None, "a", 1, 1.5, [], {}, object(), True, torch.zeros(3), torch.zeros(2, 3, 4).long(),
         torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4), math.nan), torch.full((2, 3, 4), math.inf),
         torch.zeros(2, 3, 4).to_sparse(), torch.zeros(2, 3, 4, dtype=torch.complex64),
         torch.zeros(2, 3, 7), torch.zeros(5, 3, 4), torch.zeros(2, 3, 4).double(),
         torch.zeros(2, 3, 0), torch.full((2, 3, 4), 1e30)]
    )  # fmt: skip
    number = st.sampled_from(
        [None, "a", 0, -1, math.nan, math.inf, [], {}, True, 1e300, 1e-300, torch.ones(1)]
    )
    operation = data.draw(st.integers(0, 11))
    bad = data.draw(junk)
    value = data.draw(number)
    wrong_k = data.draw(st.sampled_from([None, "a", 0, -1, 6, 1.0, True, [2], torch.tensor(2)]))
    calls = [
        ("x", lambda: ops.nearest(bad, y)),
        ("y", lambda: ops.nearest(x.mT.mT, bad)),
        ("x", lambda: ops.knn(bad, y, 2)),
        ("k", lambda: ops.knn(x, y, wrong_k)),
        ("x", lambda: ops.kernel_mean(bad, y, ops.Energy())),
        ("kernel", lambda: ops.kernel_mean(x, y, bad)),
        ("weights", lambda: ops.kernel_mean(x, y, ops.Energy(), bad if bad is not None else 1)),
        ("epsilon", lambda: ops.softmin(x, y, value)),
        ("potential", lambda: ops.softmin(x, y, 1.0, bad if bad is not None else 1)),
        ("log_weights", lambda: ops.softmin(x, y, 1.0, None, bad if bad is not None else 1)),
        ("bandwidth", lambda: ops.Gaussian(value)),
        ("backend", lambda: ops.softmin(x, y, 1.0, w, backend=bad)),
    ]
    name, call = calls[operation]
    fits = isinstance(bad, torch.Tensor) and bad.shape == (2, 3, 4) and bad.dtype == torch.float32
    fits = fits and bad.layout == torch.strided and bool((bad == 0).all())
    try:
        call()
    except (ValueError, TypeError) as error:
        assert name in str(error), f"{error} does not name {name}"  # noqa: PT017
        return
    assert fits, f"{name} accepted {bad!r}, {value!r}, {wrong_k!r}"
