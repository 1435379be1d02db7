"""nearest and knn against sorting all float64 distances: the same neighbors, exact distances."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, device_of, pairwise, selected, true_knn, wide

from fad_loss import ops
from fad_loss.ops import _library

SHAPES = [
    (1, 1, 1, 1),
    (2, 17, 17, 3),
    (1, 5, 2047, 16),
    (1, 5, 4100, 17),
    (3, 20, 33, 64),
    (1, 99, 203, 123),
]

EXACT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def clouds(B, N, M, C, dtype=torch.float32):
    x, y = torch.randn(B, N, C), torch.randn(B, M, C)
    return x.to(dtype), y.to(dtype)


def check_neighbors(x, y, distance, index, k, rtol, *, exclude_self=False):
    """The distances are the k smallest, to rtol, and each belongs to its index."""
    expected, _ = true_knn(x, y, k, exclude_self=exclude_self)
    own = selected(x.double(), y.double(), index)
    torch.testing.assert_close(distance.double(), expected, rtol=rtol, atol=1e-37)
    torch.testing.assert_close(distance.double(), own, rtol=rtol, atol=1e-37)
    assert all(len(set(row.tolist())) == k for row in index.flatten(0, 1))
    if exclude_self:
        assert not (index == torch.arange(x.shape[1])[:, None]).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_sorting(shape, dtype, backend, device):
    x, y = clouds(*shape, dtype)
    M = shape[2]
    distance, index = ops.nearest(x.to(device), y.to(device), backend=backend)
    assert distance.dtype == wide(dtype)
    assert index.dtype == torch.int64
    assert distance.shape == index.shape == shape[:2]
    check_neighbors(x, y, distance[..., None].cpu(), index[..., None].cpu(), 1, EXACT[dtype])
    for k in sorted({1, min(7, M), M} if M < 1000 else {1, 7}):
        distance, index = ops.knn(x.to(device), y.to(device), k, backend=backend)
        assert distance.dtype == wide(dtype)
        assert distance.shape == (*shape[:2], k)
        check_neighbors(x, y, distance.cpu(), index.cpu(), k, EXACT[dtype])


@pytest.mark.parametrize("C", [3, 20])
@pytest.mark.parametrize("k", [1, 2, 9, 39])
def test_a_cloud_with_itself(C, k, backend, device):
    x, _ = clouds(2, 40, 1, C)
    x[:, 7] = x[:, 3]  # equal points are neighbors of each other, not of themselves
    z = x.to(device)
    distance, index = ops.knn(z, z, k, exclude_self=True, backend=backend)
    check_neighbors(x, x, distance.cpu(), index.cpu(), k, 1e-6, exclude_self=True)
    assert (distance[:, 7, 0] == 0).all()
    assert (index[:, 7, 0] == 3).all()
    distance, index = ops.nearest(z, z, backend=backend)
    assert (distance == 0).all()
    expected = torch.arange(40).repeat(2, 1)
    expected[:, 7] = 3  # the lower index of two at the same distance
    assert torch.equal(index.cpu(), expected)


@pytest.mark.parametrize("C", [3, 64, 256, 1024])
def test_exact_where_the_expansion_cancels(C, backend, device):
    """The distillation regime: y is a permuted x with 5 % noise, and both have an offset of 4."""
    N = 60 if backend == "dense" else 300
    x = torch.randn(1, N, C)
    order = torch.randperm(N)
    y = (x + 0.05 * torch.randn_like(x))[:, order] + 4
    x = x + 4
    distance, index = ops.nearest(x.to(device), y.to(device), backend=backend)
    expected, true_index = true_knn(x, y, 8)
    assert torch.equal(index.cpu(), true_index[..., 0])
    relative = (distance.double().cpu() / expected[..., 0] - 1).abs().max()
    assert relative <= 1e-6
    distance, index = ops.knn(x.to(device), y.to(device), 8, backend=backend)
    assert (distance.double().cpu() / expected - 1).abs().max() <= 1e-6
    own = selected(x.double(), y.double(), index.cpu())
    assert (distance.double().cpu() / own - 1).abs().max() <= 1e-6
    if C > 3:
        assert torch.equal(index[..., 0].cpu(), order.argsort().expand(1, -1))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 30),
    M=st.integers(1, 60),
    C=st.sampled_from([1, 2, 3, 17, 40]),
    levels=st.integers(1, 4),
    dtype=st.sampled_from(FLOATS),
    data=st.data(),
)
def test_ties_go_to_the_lowest_index(backend, seed, N, M, C, levels, dtype, data):
    """On integer grids distances are exact in every dtype, and many of them are equal."""
    k = data.draw(st.integers(1, M))
    torch.manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (2, N, C)).to(dtype)
    y = torch.randint(-levels, levels + 1, (2, M, C)).to(dtype)
    y = torch.cat([y, y[:, torch.randperm(M)]], 1)
    distance, index = ops.knn(
        x.to(device_of(backend)), y.to(device_of(backend)), k, backend=backend
    )
    expected, expected_index = true_knn(x, y, k)
    assert torch.equal(distance.double().cpu(), expected)
    assert torch.equal(index.cpu(), expected_index)
    distance, index = ops.nearest(
        x.to(device_of(backend)), y.to(device_of(backend)), backend=backend
    )
    assert torch.equal(distance.double().cpu(), expected[..., 0])
    assert torch.equal(index.cpu(), expected_index[..., 0])


@pytest.mark.parametrize("C", [2, 40])
@pytest.mark.parametrize("M", [1, 15, 16, 17, 2047, 2048, 2049, 5000])
def test_all_points_equal(M, C, backend, device):
    """Nothing but ties: every candidate is doubtful, in every tile."""
    x = torch.full((1, 3, C), 0.1, device=device)
    y = torch.full((1, M, C), 0.3, device=device)
    k = min(M, 20)
    distance, index = ops.knn(x, y, k, backend=backend)
    assert torch.equal(index.cpu(), torch.arange(k).expand(1, 3, k))
    assert len(distance.unique()) == 1
    distance, index = ops.nearest(x, y, backend=backend)
    assert (index == 0).all()
    assert len(distance.unique()) == 1


@pytest.mark.parametrize("C", [17, 64, 256, 1024])
def test_exact_where_all_roundings_agree(C, backend, device):
    """Along (1, ..., 1) the products of a pair are alike, so that their roundings add up."""
    x, y = (torch.randn(2, 300, 1).expand(-1, -1, C) for _ in range(2))
    distance, index = ops.knn(x.to(device), y.to(device), 2, backend=backend)
    # So do those of the terms of a distance, whatever computes it.
    check_neighbors(x, y, distance.cpu(), index.cpu(), 2, 1e-5)


@pytest.mark.parametrize("C", [1, 20])
def test_closed_form_on_a_line(C, backend, device):
    """Points at 0, 1, 2, ... and x a little right of some: neighbors alternate right and left."""
    y = torch.zeros(1, 50, C, dtype=torch.float64)
    y[0, :, 0] = torch.arange(50)
    x = y[:, 10:40] + 0.25 * (y[:, :1] + 1) * torch.eye(C, dtype=torch.float64)[0]
    distance, index = ops.knn(x.to(device), y.to(device), 4, backend=backend)
    at = torch.arange(10, 40)[:, None]
    assert torch.equal(index[0].cpu(), at + torch.tensor([0, 1, -1, 2]))
    expected = torch.tensor([0.25, 0.75, 1.25, 1.75], dtype=torch.float64) ** 2
    torch.testing.assert_close(distance[0].cpu(), expected.expand(30, 4))


def test_closed_form_on_a_simplex(backend, device):
    """The corners of a simplex: all the same distance from each other, so ties throughout."""
    corners = torch.eye(24, device=device).unsqueeze(0) * 3
    distance, index = ops.knn(corners, corners, 23, exclude_self=True, backend=backend)
    assert (distance == 18).all()
    others = torch.tensor([[j for j in range(24) if j != i] for i in range(24)])
    assert torch.equal(index[0].cpu(), others)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 40),
    C=st.sampled_from([2, 16, 17, 50]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_a_known_permutation_is_found(backend, seed, N, C, scale):
    torch.manual_seed(seed)
    device = device_of(backend)
    # A jittered grid: the noise is smaller than half the distance of any two points.
    x = torch.randn(1, N, C) * 0.01
    x[..., 0] += torch.arange(N)
    order = torch.randperm(N)
    y = (x + 0.01 * torch.randn_like(x))[:, order] * scale
    distance, index = ops.nearest((x * scale).to(device), y.to(device), backend=backend)
    assert torch.equal(index[0].cpu(), order.argsort())
    expected = ((x * scale).double() - y.double()[:, order.argsort()]).square().sum(-1)
    torch.testing.assert_close(distance.double().cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_independent_of_the_matmul_precision(precision, dtype, fused, device):
    """A coarse product would only change which candidates are looked at, not the result."""
    x, y = (t.to(device) for t in clouds(2, 70, 90, 64, dtype))
    expected = ops.knn(x, y, 5, backend=fused)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        result = ops.knn(x, y, 5, backend=fused)
        single = ops.nearest(x, y, backend=fused)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for got, want in zip(result, expected, strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(single[0], expected[0][..., 0], rtol=1e-6, atol=0)
    assert torch.equal(single[1], expected[1][..., 0])


@pytest.mark.parametrize("operation", ["nearest", "knn"])
@pytest.mark.parametrize("C", [3, 20])
@pytest.mark.parametrize("wanted", ["x", "y", "both", "same"])
def test_gradients(operation, C, wanted, backend, device):
    """2 g (x_i - y_j) to x, and its negative to y_j; and the derivatives of that."""
    x, y = (t.to(device) for t in clouds(2, 6, 9, C, torch.float64))
    if wanted == "same":
        y = x
    inputs = [t.requires_grad_() for t in {"x": [x], "y": [y], "same": [x]}.get(wanted, [x, y])]
    own = wanted == "same"
    if operation == "nearest" and not own:
        distance, index = ops.nearest(x, y, backend=backend)
        distance, index = distance[..., None], index[..., None]
    else:
        distance, index = ops.knn(x, y, 3, exclude_self=own, backend=backend)
    assert not index.requires_grad
    truth = selected(x, y, index)
    cotangent = torch.randn_like(distance)
    results, expected = [], []
    for value, out in ((distance, results), (truth, expected)):
        gradient = torch.autograd.grad((value * cotangent).sum() * 2, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in gradient), inputs)
        out.extend([*gradient, *second])
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("C", [2, 17])
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(C, k, backend, device):
    x, y = (t.to(device).requires_grad_() for t in clouds(2, 2, 4, C, torch.float64))

    def distance(x, y):
        return ops.knn(x, y, k, backend=backend)[0]

    def own_distance(y):
        return ops.knn(y, y, k, exclude_self=True, backend=backend)[0]

    # Projections of the Jacobians where there are many entries.
    fast = C > 2
    for function, inputs in ((distance, (x, y)), (own_distance, (y,))):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients(dtype, backend, device):
    """Many x pull on few y: the sum is accumulated in float32 and rounded once."""
    x, y = clouds(1, 500, 4, 8, dtype)
    x, y = x.to(device).requires_grad_(), y.to(device).requires_grad_()
    distance, index = ops.nearest(x, y, backend=backend)
    distance.sum().backward()
    a, b = (t.detach().double().requires_grad_() for t in (x, y))
    selected(a, b, index[..., None]).sum().backward()
    tolerance = torch.finfo(dtype).eps / 2 + 1e-6
    torch.testing.assert_close(x.grad.double(), a.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(y.grad.double(), b.grad, rtol=tolerance, atol=tolerance)


def test_non_contiguous_and_expanded(backend, device):
    x, y = clouds(2, 20, 30, 24)
    expected = ops.knn(x.to(device), y.to(device), 3, backend=backend)
    views = [
        (x.mT.contiguous().mT, y.mT.contiguous().mT),
        (x.repeat(1, 1, 2)[..., :24], y.repeat_interleave(2, dim=1)[:, ::2]),
    ]
    for a, b in views:
        result = ops.knn(a.to(device), b.to(device), 3, backend=backend)
        for got, want in zip(result, expected, strict=True):
            torch.testing.assert_close(got, want)
    shared = y[:1].expand(2, -1, -1).to(device).requires_grad_()
    distance, index = ops.nearest(x.to(device), shared, backend=backend)
    assert torch.equal(index, ops.nearest(x.to(device), shared.clone(), backend=backend)[1])
    (gradient,) = torch.autograd.grad(distance.sum(), shared)
    assert gradient.shape == shared.shape


@pytest.mark.parametrize("C", [3, 32])
def test_far_points_and_tiny_distances(C, backend, device):
    """Scales at which squares are near the ends of float32's range."""
    x, y = clouds(1, 20, 30, C)
    for scale in (1e-15, 1e15):
        distance, index = ops.nearest(
            (x * scale).to(device), (y * scale).to(device), backend=backend
        )
        expected, expected_index = true_knn(x * scale, y * scale, 1)
        assert torch.equal(index.cpu(), expected_index[..., 0])
        torch.testing.assert_close(distance.double().cpu(), expected[..., 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("C", [2, 32])
def test_one_outlier_does_not_cost_the_others_their_accuracy(C, backend, device):
    """An outlier makes every product's error bound large: all candidates become doubtful."""
    x, y = clouds(1, 50, 400, C)
    y[0, 123] = 1e6
    distance, index = ops.knn(x.to(device), y.to(device), 5, backend=backend)
    check_neighbors(x, y, distance.cpu(), index.cpu(), 5, 1e-6)
    assert pairwise(x.double(), y.double())[0, 0, 123] > 1e11


@pytest.mark.parametrize("same", [False, True])
def test_gradients_neighbor_by_neighbor(same, monkeypatch, fused, device):
    """Where all neighbors at once would take much memory, they come one after the other."""
    x = torch.randn(2, 30, 20, dtype=torch.float64, device=device, requires_grad=True)
    y = x if same else torch.randn_like(x).requires_grad_()
    inputs, results = [x] if same else [x, y], []
    for limit in (1 << 24, 1):
        monkeypatch.setattr(_library, "_GATHERED", limit)
        distance, _ = ops.knn(x, y, 5, backend=fused)
        loss = (distance.square().sum(-1) * torch.arange(30, device=device)).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([*first, *second])
    torch.testing.assert_close(results[0], results[1])


def test_memory_of_many_neighbors_of_many_channels():
    """Neither direction holds the (N, k, C) neighbors, which would be 1 GB here."""
    script = """
import resource, sys, torch
from fad_loss import ops
from fad_loss.ops import _library
torch.set_num_threads(1)
def run(clouds):
    x = torch.rand(clouds, 64, 1024, requires_grad=True)
    ops.knn(x, x.detach() + 1, 64)[0].sum().backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(1)
before = peak()
run(64)
sys.stdout.write(str(peak() - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) / 1024 < 300


def test_few_points_far_from_the_origin():
    """So far that a product of uncentered points leaves most rows in doubt, or only a few."""
    torch.manual_seed(0)
    for offset in (10.0, 1e4):
        x, y = torch.randn(8, 90, 24) + offset, torch.randn(8, 100, 24) + offset
        distance, index = ops.nearest(x, y)
        true_d, true_i = true_knn(x, y, 1)
        assert torch.equal(index, true_i[..., 0])
        torch.testing.assert_close(distance.double(), true_d[..., 0], rtol=1e-6, atol=0)
