"""Laws that hold for every input, on generated problems, and problems whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import KERNELS, SMOOTH, device_of, points

from fad_loss import ops


@st.composite
def problems(draw, *, same_size=False):
    """Two clouds with any scale and offset, in float64."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, N, M = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    C = draw(st.sampled_from([1, 2, 3, 16, 17, 33]))
    M = N if same_size else M
    offset = draw(st.sampled_from([0.0, 4.0]))
    x, y = torch.randn(B, N, C) / C**0.5 + offset, torch.randn(B, M, C) / C**0.5 + offset
    return x.double(), y.double()


def along(case, y):
    return [y[..., 0].sigmoid() for _ in range(case.along_y)]


def everything(x, y, backend):
    """Values and gradients of every operation."""
    a, b = (t.to(device_of(backend)).requires_grad_() for t in (x, y))
    k = min(3, y.shape[1])
    found = []
    for case in SMOOTH:
        values = along(case, y.to(device_of(backend)))
        out = case.operation(a, b, *values, backend=backend)
        found.extend([out, *torch.autograd.grad(out.square().sum(), (a, b))])
    distance, index = ops.knn(a, b, k, backend=backend)
    found.extend([distance, *torch.autograd.grad(distance.sum(), (a, b)), index])
    return [t.detach().cpu() for t in found]


@settings(max_examples=25)
@given(problem=problems())
def test_all_backends_agree(fused, problem):
    for got, want in zip(everything(*problem, fused), everything(*problem, "dense"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@settings(max_examples=15)
@given(problem=problems(), data=st.data())
def test_the_order_of_points_does_not_matter(backend, problem, data):
    x, y = (t.to(device_of(backend)) for t in problem)
    p, q = torch.randperm(x.shape[1]), torch.randperm(y.shape[1])
    k = data.draw(st.integers(1, y.shape[1]))
    for case in SMOOTH:
        out = case.operation(x, y, *along(case, y), backend=backend)
        permuted = case.operation(x[:, p], y[:, q], *along(case, y[:, q]), backend=backend)
        torch.testing.assert_close(permuted, out[:, p], rtol=1e-9, atol=1e-12)
    distance, index = ops.knn(x, y, k, backend=backend)
    moved_distance, moved = ops.knn(x[:, p], y[:, q], k, backend=backend)
    torch.testing.assert_close(moved_distance, distance[:, p])
    assert torch.equal(q.to(moved.device)[moved], index[:, p])


@settings(max_examples=15)
@given(problem=problems(), shift=st.floats(-100, 100))
def test_translation_does_not_matter(backend, problem, shift):
    x, y = (t.to(device_of(backend)) for t in problem)
    for case in SMOOTH:
        out = case.operation(x, y, *along(case, y), backend=backend)
        moved = case.operation(x + shift, y + shift, *along(case, y), backend=backend)
        torch.testing.assert_close(moved, out, rtol=1e-7, atol=1e-7)
    distance, _ = ops.knn(x, y, 1, backend=backend)
    moved, _ = ops.knn(x + shift, y + shift, 1, backend=backend)
    torch.testing.assert_close(moved, distance, rtol=1e-7, atol=1e-7)


@settings(max_examples=15)
@given(problem=problems())
def test_rotation_and_scale(backend, problem):
    """Reflections of all channels; twice the size is four times the distance."""
    x, y = (t.to(device_of(backend)) for t in problem)
    out = ops.softmin(x, y, 0.7, backend=backend)
    torch.testing.assert_close(ops.softmin(-x, -y, 0.7, backend=backend), out)
    torch.testing.assert_close(ops.softmin(2 * x, 2 * y, 2.8, backend=backend), 4 * out)
    mean = ops.kernel_mean(x, y, ops.Gaussian(0.9), backend=backend)
    scaled = ops.kernel_mean(2 * x, 2 * y, ops.Gaussian(1.8), backend=backend)
    torch.testing.assert_close(scaled, mean)
    distance, index = ops.nearest(x, y, backend=backend)
    doubled, same = ops.nearest(2 * x, 2 * y, backend=backend)
    torch.testing.assert_close(doubled, 4 * distance)
    assert torch.equal(same, index)


@settings(max_examples=15)
@given(problem=problems())
def test_symmetry(backend, problem):
    """The mean over all pairs does not depend on which cloud is called x."""
    x, y = (t.to(device_of(backend)) for t in problem)
    for kernel, _ in KERNELS.values():
        there = ops.kernel_mean(x, y, kernel, backend=backend).mean(1)
        back = ops.kernel_mean(y, x, kernel, backend=backend).mean(1)
        torch.testing.assert_close(there, back)


@settings(max_examples=20)
@given(
    problem=problems(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    copies=st.integers(0, 3),
)
def test_distances_are_never_negative_and_zero_to_oneself(backend, problem, dtype, copies):
    """Exactly 0, with a finite gradient, also with points that occur several times."""
    x = problem[0].to(dtype).to(device_of(backend))
    x = torch.cat([x, *[x[:, :1]] * copies], 1).requires_grad_()
    distance, index = ops.nearest(x, x, backend=backend)
    assert (distance == 0).all()
    assert (index <= torch.arange(x.shape[1], device=index.device)).all()
    everyone, _ = ops.knn(x, x, x.shape[1], backend=backend)
    assert (everyone >= 0).all()
    assert (everyone.diff(dim=-1) >= 0).all()
    total = distance.sum() + everyone.sum()
    for kernel, _ in KERNELS.values():
        total = total + ops.kernel_mean(x, x, kernel, backend=backend).sum()
    total = total + ops.softmin(x, x, 0.1, backend=backend).sum()
    assert total.isfinite()
    assert torch.autograd.grad(total, x)[0].isfinite().all()


@settings(max_examples=15)
@given(problem=problems(), data=st.data())
def test_relations_between_the_operations(backend, problem, data):
    x, y = (t.to(device_of(backend)) for t in problem)
    M = y.shape[1]
    near, index = ops.nearest(x, y, backend=backend)
    distance, neighbors = ops.knn(x, y, M, backend=backend)
    torch.testing.assert_close(distance[..., 0], near)
    assert torch.equal(neighbors[..., 0], index)
    # A cold soft minimum is the minimum, a hot one the mean plus eps log of the count.
    torch.testing.assert_close(ops.softmin(x, y, 1e-6, backend=backend), near, rtol=0, atol=1e-5)
    hot = ops.softmin(x, y, 1e5, backend=backend) + 1e5 * math.log(M)
    torch.testing.assert_close(hot, distance.mean(-1), rtol=1e-2, atol=1e-2)
    # The mean of a kernel is that over all neighbors; a Gaussian's is a soft minimum.
    kernel, _ = KERNELS["imq"]
    torch.testing.assert_close(
        ops.kernel_mean(x, y, kernel, backend=backend), kernel(distance).mean(-1)
    )
    gaussian = ops.kernel_mean(x, y, ops.Gaussian(1.5), backend=backend)
    soft = torch.exp(-ops.softmin(x, y, 2 * 1.5**2, backend=backend) / (2 * 1.5**2)) / M
    torch.testing.assert_close(soft, gaussian)
    # Weights count points: an integer weight is a repetition, 0 leaves out, and only ratios matter.
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=M, max_size=M)))
    counts[0] = max(int(counts[0]), 1)
    weights = counts.to(x).expand(len(x), -1)
    repeated = y.repeat_interleave(counts.to(y.device), dim=1)
    weighted = ops.kernel_mean(x, y, kernel, weights * 7, backend=backend)
    torch.testing.assert_close(weighted, ops.kernel_mean(x, repeated, kernel, backend=backend))
    soft = ops.softmin(x, y, 0.5, log_weights=weights.log(), backend=backend)
    torch.testing.assert_close(soft, ops.softmin(x, repeated, 0.5, backend=backend))
    # A constant potential is subtracted; several temperatures are as many single ones.
    shifted = ops.softmin(x, y, 0.5, torch.full_like(weights, 3.0), backend=backend)
    torch.testing.assert_close(shifted, ops.softmin(x, y, 0.5, backend=backend) - 3)
    several = ops.softmin(x, y, (0.5, 2.0), weights, weights.log(), backend=backend)
    for e, epsilon in enumerate((0.5, 2.0)):
        single = ops.softmin(x, y, epsilon, weights, weights.log(), backend=backend)
        torch.testing.assert_close(several[..., e], single)


@pytest.mark.parametrize("C", [2, 30])
def test_closed_form_on_one_distance(C, backend, device):
    """A point and M others, all at squared distance 9: sums over j are M times one term."""
    y = torch.zeros(1, 7, C, dtype=torch.float64, device=device)
    x = torch.zeros(1, 1, C, dtype=torch.float64, device=device)
    x[..., 0] = 3
    for kernel, profile in KERNELS.values():
        mean = ops.kernel_mean(x, y, kernel, backend=backend)
        torch.testing.assert_close(
            mean[0, 0].cpu(), profile(torch.tensor(9.0, dtype=torch.float64))
        )
    soft = ops.softmin(x, y, 2.0, backend=backend)
    torch.testing.assert_close(float(soft), 9 - 2 * math.log(7))


@pytest.mark.parametrize("corners", [4, 40])
def test_closed_form_on_a_simplex(corners, backend, device):
    """Every corner sees itself at 0 and all others at squared distance 2."""
    x = torch.eye(corners, dtype=torch.float64, device=device).unsqueeze(0)
    energy = ops.kernel_mean(x, x, ops.Energy(), backend=backend)
    expected = torch.full_like(energy, -(corners - 1) * 2**0.5 / corners)
    torch.testing.assert_close(energy, expected)
    alone = ops.kernel_mean(x, x, ops.Energy(), exclude_self=True, backend=backend)
    torch.testing.assert_close(alone, torch.full_like(energy, -(2**0.5)))
    soft = ops.softmin(x, x, 1.0, backend=backend)
    torch.testing.assert_close(
        soft, torch.full_like(soft, -math.log(1 + (corners - 1) * math.exp(-2)))
    )
    others = ops.softmin(x, x, 1.0, exclude_self=True, backend=backend)
    torch.testing.assert_close(others, torch.full_like(soft, 2 - math.log(corners - 1)))


# -------------------------------------------------------------------- values where little is left


def finite_but_infinite(values, gradients):
    for value in values:
        assert not value.isnan().any()
    for gradient in gradients:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("C", [3, 20])
@pytest.mark.parametrize("B, N, M", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
def test_nothing_there(B, N, M, C, backend, device):
    """Empty sets have the neutral result: infinitely far, a mean of 0; and gradients of 0."""
    x, y = points(B, N, C, device=device), points(B, M, C, device=device)
    x, y = x.requires_grad_(), y.requires_grad_()
    distance, index = ops.nearest(x, y, backend=backend)
    assert distance.shape == index.shape == (B, N)
    assert distance.shape == ops.softmin(x, y, 1.0, backend=backend).shape
    assert ops.softmin(x, y, [1.0, 2.0], backend=backend).shape == (B, N, 2)
    outs = [distance]
    for case in SMOOTH:
        values = [torch.ones(B, M, device=device, requires_grad=True) for _ in range(case.along_y)]
        outs.append(case.operation(x, y, *values, backend=backend))
        if M == 0:
            expected = torch.inf if case.name.startswith("softmin") else 0.0
            assert (outs[-1] == expected).all()
    if M == 0:
        assert (distance == torch.inf).all()
        assert (index == -1).all()
    for out in outs:
        first = torch.autograd.grad(out.sum(), (x, y), create_graph=True)
        finite_but_infinite([out], first)
        assert all((g == 0).all() for g in first) or M > 0
        second = torch.autograd.grad(sum(g.sum() for g in first), (x, y), allow_unused=True)
        finite_but_infinite([], [g for g in second if g is not None])


@pytest.mark.parametrize("C", [3, 20])
def test_a_single_point_without_itself(C, backend, device):
    x = points(2, 1, C, device=device).requires_grad_()
    for case in SMOOTH:
        values = [torch.ones(2, 1, device=device, requires_grad=True) for _ in range(case.along_y)]
        out = case.operation(x, x, *values, exclude_self=True, backend=backend)
        expected = torch.inf if case.name.startswith("softmin") else 0.0
        assert (out == expected).all()
        gradients = torch.autograd.grad(out.sum(), [x, *values], create_graph=True)
        assert all((g == 0).all() for g in gradients)
        second = torch.autograd.grad(
            sum(g.sum() for g in gradients), [x, *values], allow_unused=True
        )
        finite_but_infinite([], [g for g in second if g is not None])


@pytest.mark.parametrize("C", [3, 20])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_points_left_out_by_their_log_weight(C, exclude_self, backend, device):
    """-inf leaves a point out; where all are left out there is nothing, and no gradient."""
    x = points(2, 5, C, dtype=torch.float64, device=device).requires_grad_()
    log_weights = torch.zeros(2, 5, dtype=torch.float64, device=device)
    log_weights[0, 1:] = -torch.inf
    log_weights[1] = -torch.inf
    log_weights.requires_grad_()
    options = {"exclude_self": exclude_self, "backend": backend}
    out = ops.softmin(x, x, 0.5, log_weights=log_weights, **options)
    alone = (x[0] - x[0, :1]).square().sum(-1)
    torch.testing.assert_close(out[0, int(exclude_self) :], alone[int(exclude_self) :])
    assert (out[1] == torch.inf).all()
    assert not exclude_self or out[0, 0] == torch.inf
    finite = out[out.detach().isfinite()].sum()
    for total in (finite, out.sum()):
        first = torch.autograd.grad(total, (x, log_weights), create_graph=True)
        finite_but_infinite([], first)
        squares = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(squares, (x, log_weights), retain_graph=True)
        finite_but_infinite([], second)
        assert (first[0][1] == 0).all()


@pytest.mark.parametrize("exclude_self", [False, True])
def test_all_the_weight_on_one_point(exclude_self, backend, device):
    """Its own mean without itself is that over nothing: 0, and not a rounding error's quotient."""
    x = points(1, 40, 3, device=device).requires_grad_()
    weights = torch.zeros(1, 40, device=device)
    weights[0, 7] = 0.3
    weights.requires_grad_()
    options = {"exclude_self": exclude_self, "backend": backend}
    out = ops.kernel_mean(x, x, ops.Gaussian(1.0), weights, **options)
    expected = torch.exp(-(x - x[:, 7:8]).square().sum(-1) / 2)
    if exclude_self:
        expected = torch.where(torch.arange(40, device=device) == 7, 0.0, expected)
    torch.testing.assert_close(out, expected)
    finite_but_infinite([out], torch.autograd.grad(out.sum(), (x, weights)))


@pytest.mark.parametrize("C", [2, 20])
def test_extreme_temperatures_and_potentials(C, backend, device):
    """Exponents far beyond float32's range: the logarithm is taken of numbers around 1."""
    x, y = points(1, 10, C, device=device), points(1, 20, C, device=device)
    x.requires_grad_(), y.requires_grad_()
    potential = torch.linspace(-1e4, 1e4, 20, device=device).unsqueeze(0).requires_grad_()
    for epsilon in (1e-6, 1e-3, 1e6):
        out = ops.softmin(x, y, epsilon, potential, backend=backend)
        gradients = torch.autograd.grad(out.sum(), (x, y, potential))
        assert out.isfinite().all()
        finite_but_infinite([out], gradients)
    cold = ops.softmin(x, y, 1e-3, potential, backend=backend)
    last = (x - y[:, -1:]).square().sum(-1) - 1e4
    torch.testing.assert_close(cold, last, rtol=1e-6, atol=0)
