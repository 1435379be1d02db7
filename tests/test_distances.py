"""Distances between sets: closed forms, laws, derivatives, ragged clouds, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fad_loss import distances, ops, ragged
from fad_loss.ops import _inputs

F64 = torch.float64
EPSILON = 2.0


def exact(x, y, **options):
    """Sinkhorn, converged."""
    options = {"tolerance": 1e-11, "max_iterations": 500} | options
    return distances.sinkhorn(x, y, EPSILON, **options)


def nearly(x, y, **options):
    """Sinkhorn, as good as converged; laws hold at every step on the way."""
    return exact(x, y, tolerance=1e-8, max_iterations=60, diameter=20.0, **options)


DISTANCES = {
    "chamfer": distances.chamfer,
    "energy": distances.energy,
    "gaussian": lambda x, y, **o: distances.mmd(x, y, ops.Gaussian([0.5, 2.0]), **o),
    "laplacian": lambda x, y, **o: distances.mmd(x, y, ops.Laplacian(1.0), **o),
    "multiquadric": lambda x, y, **o: distances.mmd(x, y, ops.InverseMultiquadric(1.0), **o),
    "sinkhorn": nearly,
}
SMOOTH = [name for name in DISTANCES if name != "sinkhorn"]


def cloud(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def points(*values):
    return torch.tensor(values, dtype=F64).view(1, len(values), -1)


# -------------------------------------------------------------------------------- closed forms


def test_chamfer_by_hand():
    x, y = points(0, 1, 5), points(0, 3)
    # Forth 0, 1, 4; back 0, 4.
    assert distances.chamfer(x, y).item() == pytest.approx(5 / 3 + 2)
    assert distances.chamfer(points((0, 0)), points((3, 4))).item() == 50


def test_energy_by_hand():
    # 2 * mean(1, 1, 1, 1) - mean(0, 2, 2, 0) - 0
    assert distances.energy(points(0, 2), points(1, 1)).item() == pytest.approx(1)
    assert distances.energy(points(0), points(-7)).item() == pytest.approx(14)
    # Unbiased: 2 * 1 - 2 - 0
    assert distances.energy(points(0, 2), points(1, 1), unbiased=True).item() == pytest.approx(0)


@given(
    x=st.lists(st.integers(-20, 20), min_size=1, max_size=6),
    y=st.lists(st.integers(-20, 20), min_size=1, max_size=6),
)
@settings(max_examples=30)
def test_energy_in_one_dimension_is_the_area_between_the_distributions(x, y):
    # Twice the integral of the squared difference of the cumulative distribution functions.
    area = 0.0
    for a, b in itertools.pairwise(sorted({*x, *y})):
        F = sum(v <= a for v in x) / len(x)
        G = sum(v <= a for v in y) / len(y)
        area += (b - a) * (F - G) ** 2
    assert distances.energy(points(*x), points(*y)).item() == pytest.approx(2 * area, abs=1e-9)


def test_energy_of_two_gaussians():
    # Quantiles stand in for samples. E|N(mu, 2)| has a closed form.
    n, mu = 400, 1.5
    grid = (torch.arange(n, dtype=F64) + 0.5) / n
    x = torch.special.ndtri(grid).view(1, n, 1)

    def folded(mean):
        return 2 / math.sqrt(math.pi) * math.exp(-(mean**2) / 4) + mean * math.erf(mean / 2)

    expected = 2 * folded(mu) - 2 * folded(0)
    assert distances.energy(x, x + mu).item() == pytest.approx(expected, rel=1e-2)


def test_mmd_by_hand():
    k = math.exp(-4 / (2 * 9))
    x, y = points(0, 2), points(0)
    # 1/4 (2 + 2k) + 1 - 2 * 1/2 (1 + k)
    biased = distances.mmd(x, y, ops.Gaussian(3.0)).item()
    assert biased == pytest.approx((2 + 2 * k) / 4 + 1 - (1 + k))
    unbiased = distances.mmd(x, points(0, 0), ops.Gaussian(3.0), unbiased=True).item()
    assert unbiased == pytest.approx(k + 1 - (1 + k))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    "kernel",
    [ops.Gaussian([0.5, 2.0]), ops.Laplacian(0.7), ops.Energy(), ops.InverseMultiquadric(2.0)],
    ids=lambda k: k.name,
)
def test_mmd_by_loops(kernel, unbiased):
    x, y = cloud(2, 4, 3), cloud(2, 6, 3, seed=1)

    def mean(a, b, skip):
        pairs = [
            kernel((a[i] - b[j]).square().sum())
            for i in range(len(a))
            for j in range(len(b))
            if not (skip and i == j)
        ]
        return sum(pairs) / len(pairs)

    expected = [
        mean(a, a, unbiased) + mean(b, b, unbiased) - 2 * mean(a, b, False)
        for a, b in zip(x, y, strict=True)
    ]
    got = distances.mmd(x, y, kernel, unbiased=unbiased, reduction="none")
    torch.testing.assert_close(got, torch.stack(expected))


@given(seed=st.integers(0, 1000), n=st.integers(2, 8))
@settings(max_examples=5)
def test_sinkhorn_in_one_dimension_sorts(seed, n):
    # Shuffled points a unit apart, give or take: at this temperature nothing is undecided.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(F64).view(1, n, 1)
    x = order + 0.1 * cloud(1, n, 1, seed=seed)
    y = order.flip(1) + 0.4 + 0.1 * cloud(1, n, 1, seed=seed + 1)
    matched = (x.sort(1).values - y.sort(1).values).square().mean()
    torch.testing.assert_close(distances.sinkhorn(x, y, 0.02), matched, rtol=0.02, atol=2e-3)


@given(seed=st.integers(0, 1000), epsilon=st.sampled_from([3.0, 10.0]))
@settings(max_examples=3)
def test_sinkhorn_of_a_translated_set_is_the_squared_shift(seed, epsilon):
    x, shift = cloud(1, 6, 3, seed=seed), cloud(1, 1, 3, seed=seed + 1)
    got = distances.sinkhorn(x, x + shift, epsilon, tolerance=1e-8, max_iterations=500)
    torch.testing.assert_close(got, shift.square().sum(), rtol=1e-5, atol=1e-7)


def test_sinkhorn_of_single_points_is_their_squared_distance():
    x, y = points((0, 0)), points((3, 4))
    for debiased in (True, False):
        assert distances.sinkhorn(x, y, 0.1, debiased=debiased).item() == pytest.approx(25)


def test_sinkhorn_at_high_temperature_is_the_mean_distance():
    x, y = cloud(1, 5, 3), cloud(1, 7, 3, seed=1)
    mean = (x[:, :, None] - y[:, None]).square().sum(-1).mean()
    got = distances.sinkhorn(x, y, 1e5, debiased=False)
    torch.testing.assert_close(got, mean, rtol=1e-3, atol=0)


def test_sinkhorn_is_the_entropic_optimum():
    # Against the primal problem: the plan that plain Sinkhorn scaling converges to.
    x, y = cloud(1, 5, 2), cloud(1, 4, 2, seed=1)
    d = (x[0, :, None] - y[0, None]).square().sum(-1)
    K, u, v = torch.exp(-d / EPSILON), torch.ones(5, dtype=F64), torch.ones(4, dtype=F64)
    for _ in range(2000):
        u = 0.2 / (K @ v)
        v = 0.25 / (K.T @ u)
    plan = u[:, None] * K * v[None]
    independent = torch.full_like(plan, 0.05)
    value = (plan * d).sum() + EPSILON * (plan * (plan / independent).log()).sum()
    torch.testing.assert_close(exact(x, y, debiased=False), value)
    biased = [exact(a, b, debiased=False) for a, b in ((x, y), (x, x), (y, y))]
    torch.testing.assert_close(exact(x, y), biased[0] - biased[1] / 2 - biased[2] / 2)


def test_sinkhorn_at_a_fixed_cost_is_near_the_converged():
    # What compiles, and what a GPU never waits for.
    x, y = cloud(2, 8, 3), cloud(2, 6, 3, seed=1)
    fixed = distances.sinkhorn(x, y, EPSILON, diameter=10.0, tolerance=None, max_iterations=50)
    torch.testing.assert_close(fixed, exact(x, y), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", DISTANCES)
@given(seed=st.integers(0, 1000), n=st.integers(1, 6), m=st.integers(1, 6))
@settings(max_examples=3)
def test_laws(name, seed, n, m):
    distance = DISTANCES[name]
    x, y = cloud(2, n, 3, seed=seed), 2 * cloud(2, m, 3, seed=seed + 1) + 1
    value = distance(x, y, reduction="none")
    assert (value > -1e-9).all()
    same = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(distance(y, x, reduction="none"), value, **same)
    shuffled = distance(x[:, torch.randperm(n)], y[:, torch.randperm(m)], reduction="none")
    torch.testing.assert_close(shuffled, value, **same)
    torch.testing.assert_close(distance(x + 3, y + 3, reduction="none"), value, **same)
    rotation, _ = torch.linalg.qr(cloud(3, 3, seed=seed + 2))
    torch.testing.assert_close(
        distance(x @ rotation, y @ rotation, reduction="none"), value, **same
    )


@pytest.mark.parametrize("name", DISTANCES)
def test_a_set_is_at_no_distance_from_itself(name):
    x = (cloud(3, 9, 4) * 5 + 3).float()
    order = torch.randperm(9)
    value = (
        DISTANCES[name](x, x[:, order], reduction="none")
        if name != "sinkhorn"
        else (distances.sinkhorn(x, x[:, order], EPSILON, reduction="none"))
    )
    torch.testing.assert_close(value, torch.zeros(3), rtol=0, atol=2e-5)


def test_scaling():
    x, y = cloud(2, 5, 3), cloud(2, 6, 3, seed=1)
    torch.testing.assert_close(distances.chamfer(3 * x, 3 * y), 9 * distances.chamfer(x, y))
    torch.testing.assert_close(distances.energy(3 * x, 3 * y), 3 * distances.energy(x, y))
    torch.testing.assert_close(
        distances.mmd(3 * x, 3 * y, ops.Gaussian(3.0)), distances.mmd(x, y, ops.Gaussian(1.0))
    )
    torch.testing.assert_close(
        distances.sinkhorn(3 * x, 3 * y, 9 * EPSILON, tolerance=1e-10, max_iterations=500),
        9 * exact(x, y),
        rtol=1e-6,
        atol=1e-8,
    )


def test_energy_is_mmd_with_its_kernel():
    x, y = cloud(2, 5, 3), cloud(2, 6, 3, seed=1)
    assert torch.equal(distances.energy(x, y), distances.mmd(x, y, ops.Energy()))


# ------------------------------------------------------------------- derivatives, layouts, dtypes


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives(name, unbiased):
    if name == "chamfer" and unbiased:
        options = {"backend": "dense"}
    else:
        options = {"unbiased": True} if unbiased else {}
    x, y = cloud(2, 3, 2).requires_grad_(), (cloud(2, 4, 2, seed=1) + 0.5).requires_grad_()

    def distance(x, y):
        return DISTANCES[name](x, y, reduction="none", **options)

    assert gradcheck(distance, (x, y))
    assert gradgradcheck(distance, (x, y))


@pytest.mark.parametrize("debiased", [True, False])
def test_sinkhorn_has_an_exact_gradient(debiased):
    x, y = cloud(1, 2, 2).requires_grad_(), (cloud(1, 3, 2, seed=1) + 0.5).requires_grad_()

    def distance(x, y):
        # Hot, so that it converges quickly.
        return distances.sinkhorn(x, y, 4.0, debiased=debiased, tolerance=1e-10)

    assert gradcheck(distance, (x, y))


@pytest.mark.parametrize("shape", ["batched", "ragged"])
def test_sinkhorn_refuses_the_second_derivative(shape):
    values, y = cloud(6, 2).requires_grad_(), cloud(2, 4, 2, seed=1)
    x = values.view(2, 3, 2)
    if shape == "ragged":
        x, y = ragged(values, lengths=[2, 4]), ragged(y.flatten(0, 1), lengths=[4, 4])
    (first,) = torch.autograd.grad(distances.sinkhorn(x, y, 0.5), values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"sinkhorn: no second derivatives.*energy or mmd"):
        first.square().sum().backward()


@pytest.mark.parametrize("name", DISTANCES)
def test_only_one_side_requires_grad(name):
    x, y = cloud(1, 4, 2).requires_grad_(), cloud(1, 5, 2, seed=1)
    (alone,) = torch.autograd.grad(DISTANCES[name](x, y), x)
    (other,) = torch.autograd.grad(DISTANCES[name](y, x), x)
    torch.testing.assert_close(alone, other, rtol=1e-6, atol=1e-9)
    assert alone.abs().sum() > 0


@pytest.mark.parametrize("name", DISTANCES)
def test_ragged_is_a_loop(name):
    lengths, others = [4, 2, 7], [3, 9, 2]
    values, other = cloud(13, 3).requires_grad_(), cloud(14, 3, seed=1) + 1
    x, y = ragged(values, lengths=lengths), ragged(other, lengths=others)
    options = {} if name in {"chamfer", "sinkhorn"} else {"unbiased": True}
    got = DISTANCES[name](x, y, reduction="none", **options)
    pairs = zip(values.split(lengths), other.split(others), strict=True)
    alone = torch.stack([DISTANCES[name](a[None], b[None], **options) for a, b in pairs])
    torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-8)
    (g,) = torch.autograd.grad(got.square().sum(), values)
    (h,) = torch.autograd.grad(alone.square().sum(), values)
    torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", DISTANCES)
def test_padding_a_cloud_is_not_the_same_as_a_ragged_one(name):
    # What padding silently changes is what ragged clouds are for.
    x, y = cloud(1, 5, 3), cloud(1, 5, 3, seed=1)
    padded = torch.cat([x, x.new_zeros(1, 2, 3)], 1)
    assert not torch.isclose(DISTANCES[name](padded, y), DISTANCES[name](x, y))


@pytest.mark.parametrize("name", DISTANCES)
def test_reductions(name):
    x, y = cloud(3, 4, 2), cloud(3, 5, 2, seed=1)
    each = DISTANCES[name](x, y, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(DISTANCES[name](x, y), each.mean())
    torch.testing.assert_close(DISTANCES[name](x, y, reduction="sum"), each.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DISTANCES)
def test_half_precision_is_computed_in_float32(name, dtype):
    x, y = cloud(2, 20, 4, dtype=dtype), cloud(2, 24, 4, seed=1, dtype=dtype) + 1
    x.requires_grad_()
    distance = DISTANCES[name]
    if name == "sinkhorn":  # cannot converge to 1e-8 in float32

        def distance(x, y):
            return distances.sinkhorn(x, y, EPSILON)

    value = distance(x, y)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    torch.testing.assert_close(
        value.double(), distance(x.double(), y.double()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", DISTANCES)
def test_coinciding_points_have_a_finite_gradient(name):
    x = cloud(1, 4, 3).requires_grad_()
    DISTANCES[name](x, x.detach().clone()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("name", DISTANCES)
def test_backends_agree(name, backend):
    x, y = cloud(2, 7, 3), cloud(2, 5, 3, seed=1)
    torch.testing.assert_close(
        DISTANCES[name](x, y, backend=backend), DISTANCES[name](x, y), rtol=1e-7, atol=1e-9
    )


def test_compiled():
    x, y = cloud(2, 7, 3).requires_grad_(), cloud(2, 5, 3, seed=1)

    def total(x, y):
        fixed = {"diameter": 2.0, "tolerance": None, "max_iterations": 1}
        return (
            distances.chamfer(x, y)
            + distances.energy(x, y)
            + distances.sinkhorn(x, y, 2.0, **fixed)
        )

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(total(x, y), x)
    value = compiled(x, y)
    torch.testing.assert_close(value, total(x, y))
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected)


# -------------------------------------------------------------------------------------- errors

X, Y = cloud(2, 4, 3), cloud(2, 5, 3, seed=1)
EMPTY = ragged(X.flatten(0, 1), lengths=[8, 0])
SINGLE = ragged(X.flatten(0, 1), lengths=[7, 1])
ERRORS = {
    "reduction": (
        lambda: distances.chamfer(X, Y, reduction="max"),
        ValueError,
        "reduction: expected one of 'mean', 'sum', 'none', got 'max'",
    ),
    "sinkhorn's reduction": (
        lambda: distances.sinkhorn(X, Y, 1.0, reduction="avg"),
        ValueError,
        "reduction: expected",
    ),
    "rank": (
        lambda: distances.chamfer(X[0], Y[0]),
        ValueError,
        r"x: expected .* got float64 of shape \(4, 3\) on cpu; .*unsqueeze\(0\)",
    ),
    "batch": (lambda: distances.energy(X[:1], Y), ValueError, "same number of clouds B"),
    "channels": (
        lambda: distances.energy(X[..., :2], Y),
        ValueError,
        r"channels C.*\(2, 4, 2\).*\(2, 5, 3\)",
    ),
    "dtype": (lambda: distances.energy(X.float(), Y), TypeError, "one dtype"),
    "integers": (lambda: distances.chamfer(X.long(), Y.long()), TypeError, r"x: .*x\.float\(\)"),
    "not a tensor": (
        lambda: distances.chamfer([[0.0]], Y),
        TypeError,
        "x: expected a torch.Tensor",
    ),
    "no points": (
        lambda: distances.energy(X[:, :0], Y),
        ValueError,
        r"x: expected at least one cloud.* got float64 of shape \(2, 0, 3\)",
    ),
    "no clouds": (lambda: distances.chamfer(X[:0], Y[:0]), ValueError, "x: expected at least one"),
    "an empty ragged cloud": (
        lambda: distances.chamfer(EMPTY, EMPTY),
        ValueError,
        "x: expected at least one cloud, and at least one point in every cloud",
    ),
    "one ragged, one not": (lambda: distances.energy(SINGLE, Y), ValueError, "both ragged"),
    "NaN": (
        lambda: distances.chamfer(X / 0, Y),
        ValueError,
        "x: 24 of 24 values are NaN or infinite",
    ),
    "unbiased with one point": (
        lambda: distances.energy(X[:, :1], Y, unbiased=True),
        ValueError,
        r"x: unbiased=True needs at least 2 points.*\(2, 1, 3\).*unbiased=False",
    ),
    "unbiased with one ragged point": (
        lambda: distances.mmd(SINGLE, SINGLE, ops.Energy(), unbiased=True),
        ValueError,
        "x: unbiased=True needs at least 2 points",
    ),
    "kernel": (
        lambda: distances.mmd(X, Y, "gaussian"),
        TypeError,
        "kernel: expected Gaussian, .* got str 'gaussian'",
    ),
    "epsilon": (lambda: distances.sinkhorn(X, Y, 0.0), ValueError, "epsilon: .* got 0.0"),
    "epsilon's type": (lambda: distances.sinkhorn(X, Y, "1"), TypeError, "epsilon: .* got str '1'"),
    "scaling": (
        lambda: distances.sinkhorn(X, Y, 1.0, scaling=1.0),
        ValueError,
        "scaling: expected a number between 0 and 1, got 1.0",
    ),
    "diameter": (lambda: distances.sinkhorn(X, Y, 1.0, diameter=-1.0), ValueError, "diameter: "),
    "tolerance": (lambda: distances.sinkhorn(X, Y, 1.0, tolerance=0.0), ValueError, "tolerance: "),
    "max_iterations": (
        lambda: distances.sinkhorn(X, Y, 1.0, max_iterations=0),
        ValueError,
        "max_iterations: expected at least 1, got 0",
    ),
    "max_iterations' type": (
        lambda: distances.sinkhorn(X, Y, 1.0, max_iterations=10.0),
        TypeError,
        "max_iterations: expected an int, got float",
    ),
    "backend": (lambda: distances.energy(X, Y, backend="gpu"), ValueError, "backend: expected one"),
    "triton without a GPU": (
        lambda: distances.energy(X, Y, backend="triton"),
        RuntimeError,
        "backend='triton' cannot run: .*cpu",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


BAD_PAIRS = {
    "rank": (X[0], Y[0], ValueError, r"x: expected clouds of shape"),
    "no axis but one": (X[0, 0], Y[0, 0], ValueError, r"x: expected clouds of shape"),
    "batch": (X[:1], Y, ValueError, "same number of clouds B"),
    "channels": (X[..., :2], Y, ValueError, "same number of channels C"),
    "dtype": (X.float(), Y, TypeError, "one dtype"),
    "integers": (X.long(), Y.long(), TypeError, r"x: .*x\.float\(\)"),
    "device": (X, Y.to("meta"), ValueError, "one device"),
    "one ragged": (SINGLE, Y, ValueError, "both ragged"),
    "NaN": (X / 0, Y, ValueError, "x: 24 of 24 values are NaN or infinite"),
    "too large": (X * 1e160, Y, ValueError, "x: expected magnitudes of at most"),
}


ALL = DISTANCES | {"sinkhorn, measured": lambda x, y: distances.sinkhorn(x, y, 1.0)}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", BAD_PAIRS)
def test_every_distance_refuses(case, name):
    x, y, error, message = BAD_PAIRS[case]
    with pytest.raises(error, match=message):
        ALL[name](x, y)


def test_sinkhorn_measures_half_precision_without_overflow():
    x = torch.tensor([[[-6e4], [6e4]]], dtype=torch.float16)
    assert distances.sinkhorn(x, x, 1e6).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sinkhorn_refuses_what_it_cannot_measure(bad, monkeypatch):
    monkeypatch.setattr(_inputs, "_check_range", lambda name, t: None)  # as for values on a GPU
    x = X.index_fill(1, torch.tensor([1]), bad)
    with pytest.raises(
        ValueError, match=r"x and y: expected finite values, but .* (nan|inf) apart"
    ):
        distances.sinkhorn(x, Y, 1.0)


def test_compiling_sinkhorn_that_measures_says_what_to_pass():
    compiled = torch.compile(
        lambda x, y: distances.sinkhorn(x, y, 1.0), backend="eager", fullgraph=True
    )
    # PyTorch 2.6 does not say what was raised.
    old = torch.__version__ < "2.7"
    said = "Observed exception" if old else "pass diameter= and tolerance=None"
    with pytest.raises(RuntimeError, match=said):
        compiled(X, Y)
