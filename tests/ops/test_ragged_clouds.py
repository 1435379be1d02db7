"""Ragged clouds equal a loop over the clouds, in every operation, with its derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FEW, FLOATS, LENGTHS, SMOOTH, device_of, make_ragged, packed, points, split

from fad_loss import ops

lengths = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def loop(case, x, y, values, n, m, **options):
    """The operation on each cloud, one after the other."""
    along = [split(t, m) for t in values]
    parts = zip(split(x, n), split(y, m), *along, strict=True)
    return torch.cat([case.operation(*part, **options).squeeze(0) for part in parts])


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    C=st.sampled_from([1, 3, 16, 17, 40]),
    dtype=st.sampled_from(FLOATS),
)
def test_smooth_operations(backend, seed, pairs, C, dtype):
    torch.manual_seed(seed)
    n, m = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    device = device_of(backend)
    for case in SMOOTH:
        x, y, *values = case.inputs(1, sum(n), sum(m), C, dtype, device)
        inputs = [t.detach()[0].requires_grad_() for t in (x, y, *values)]
        x, y, *values = inputs
        along = [make_ragged(t, m) for t in values]
        result = case.operation(make_ragged(x, n), make_ragged(y, m), *along, backend=backend)
        assert result.is_nested
        assert [len(part) for part in result.unbind()] == n
        result = packed(result)
        expected = loop(case, x, y, values, n, m, backend="dense")
        tolerance = {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(result, expected, **tolerance)
        results = torch.autograd.grad(result.sum(), inputs)
        gradients = torch.autograd.grad(expected.sum(), inputs)
        for got, want in zip(results, gradients, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=1e-3) if (
                dtype in {torch.bfloat16, torch.float16}
            ) else torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    C=st.sampled_from([1, 3, 17]),
    k=st.integers(1, 8),
    dtype=st.sampled_from(FLOATS),
)
def test_searches(backend, seed, pairs, C, k, dtype):
    """Clouds with fewer than k points have (inf, -1) for the rest, and indices are local."""
    torch.manual_seed(seed)
    n, m = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    device = device_of(backend)
    x, y = (
        points(sum(n), C, dtype=dtype, device=device),
        points(sum(m), C, dtype=dtype, device=device),
    )
    distance, index = ops.knn(make_ragged(x, n), make_ragged(y, m), k, backend=backend)
    near, at = ops.nearest(make_ragged(x, n), make_ragged(y, m), backend=backend)
    # One may round from float32, the other from float64.
    torch.testing.assert_close(packed(near), packed(distance)[:, 0], rtol=1e-6, atol=0)
    assert torch.equal(packed(at), packed(index)[:, 0])
    parts = zip(distance.unbind(), index.unbind(), split(x, n), split(y, m), strict=True)
    for d, i, a, b in parts:
        size = min(k, b.shape[1])
        if size:
            expected, neighbors = ops.knn(a, b, size, backend=backend)
            torch.testing.assert_close(d[:, :size], expected[0])
            assert torch.equal(i[:, :size], neighbors[0])
        assert (d[:, size:] == torch.inf).all()
        assert (i[:, size:] == -1).all()


@pytest.mark.parametrize("C", [2, 20])
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_a_cloud_with_itself(case, C, backend, device):
    _, m = LENGTHS
    x, _, *values = case.inputs(1, sum(m), sum(m), C, torch.float64, device)
    inputs = [t.detach()[0].requires_grad_() for t in (x, *values)]
    x, *values = inputs
    cloud, along = make_ragged(x, m), [make_ragged(t, m) for t in values]
    result = packed(case.operation(cloud, cloud, *along, exclude_self=True, backend=backend))
    expected = loop(case, x, x, values, m, m, exclude_self=True, backend="dense")
    torch.testing.assert_close(result, expected)
    cotangent = torch.rand_like(result)
    results = torch.autograd.grad(result, inputs, cotangent, create_graph=True)
    gradients = torch.autograd.grad(expected, inputs, cotangent, create_graph=True)
    for got, want in zip(results, gradients, strict=True):
        torch.testing.assert_close(got, want)
    second = torch.autograd.grad(sum(g.square().sum() for g in results), inputs)
    wanted = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
    for got, want in zip(second, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("C", [2, 20])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_neighbors_within_a_cloud(C, k, backend, device):
    _, m = LENGTHS
    x = points(sum(m), C, dtype=torch.float64, device=device).requires_grad_()
    cloud = make_ragged(x, m)
    distance, index = ops.knn(cloud, cloud, k, exclude_self=True, backend=backend)
    for d, i, a in zip(distance.unbind(), index.unbind(), split(x, m), strict=True):
        size = min(k, max(a.shape[1] - 1, 0))
        if size:
            expected, neighbors = ops.knn(a, a, size, exclude_self=True, backend="dense")
            torch.testing.assert_close(d[:, :size], expected[0])
            assert torch.equal(i[:, :size], neighbors[0])
        assert (i[:, size:] == -1).all()
        assert (d[:, size:] == torch.inf).all()
    flat = packed(distance)
    (gradient,) = torch.autograd.grad(flat[flat.detach().isfinite()].square().sum(), x)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for a in split(x, m):
        size = min(k, max(a.shape[1] - 1, 0))
        if size:
            total = (
                total + ops.knn(a, a, size, exclude_self=True, backend="dense")[0].square().sum()
            )
    (expected,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("C", [2, 20])
def test_missing_neighbors_have_no_gradient(C, backend, device):
    """Also when somebody sums the infinities."""
    n, m = LENGTHS
    x, y = points(sum(n), C, device=device).requires_grad_(), points(sum(m), C, device=device)
    distance, _ = ops.knn(make_ragged(x, n), make_ragged(y, m), 4, backend=backend)
    (gradient,) = torch.autograd.grad(packed(distance).sum(), x)
    assert gradient.isfinite().all()
    near, _ = ops.nearest(make_ragged(x, n), make_ragged(y, m), backend=backend)
    (gradient,) = torch.autograd.grad(packed(near).sum(), x)
    assert (gradient[n[0] + n[1] : n[0] + n[1] + n[2]] == 0).all()  # their cloud of y is empty


@pytest.mark.parametrize("n, m", [([0, 0], [0, 0]), ([0], [3]), ([2, 1], [0, 0])])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_only_empty_clouds(case, n, m, backend, device):
    x, y = points(sum(n), 3, device=device).requires_grad_(), points(sum(m), 3, device=device)
    along = [make_ragged(torch.ones(sum(m), device=device), m) for _ in range(case.along_y)]
    out = packed(case.operation(make_ragged(x, n), make_ragged(y, m), *along, backend=backend))
    assert (out == (torch.inf if case.name.startswith("softmin") else 0.0)).all()
    if len(out):
        assert (torch.autograd.grad(out.sum(), x)[0] == 0).all()


def test_gradients_reach_a_ragged_leaf(backend, device):
    """Through the nested tensor itself, not only through the values that it was made of."""
    n, m = LENGTHS
    x = make_ragged(points(sum(n), 3, device=device), n).detach().requires_grad_()
    y = make_ragged(points(sum(m), 3, device=device), m)
    packed(ops.kernel_mean(x, y, ops.Gaussian(1.0), backend=backend)).sum().backward()
    assert x.grad.is_nested
    assert packed(x.grad).shape == (sum(n), 3)
    assert packed(x.grad).abs().sum() > 0
