"""First and second derivatives of the smooth operations in every argument, checked numerically."""

from __future__ import annotations

import pytest
import torch
from op_cases import FEW, LENGTHS, SMOOTH, make_ragged, widest

from fad_loss import ops
from fad_loss._ragged import pack

# Directly summed distances, and distances from a matrix product.
CHANNELS = [2, 17]


def check(function, inputs):
    # Random projections of both Jacobians: one of all their columns takes C x M times as long.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_every_argument(case, C, fused, device):
    inputs = case.inputs(2, 3, 4, C, torch.float64, device)
    check(lambda *t: case.operation(*t, backend=fused), inputs)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_entry_of_the_jacobians(case, backend, device):
    """The slow mode compares all entries, not a projection."""
    inputs = case.inputs(1, 2, 3, 2, torch.float64, device)
    assert torch.autograd.gradcheck(lambda *t: case.operation(*t, backend=backend), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: case.operation(*t, backend=backend), inputs)


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_a_cloud_with_itself(case, C, fused, device):
    x, _, *values = case.inputs(2, 4, 4, C, torch.float64, device)

    def self_term(x, *values):
        return case.operation(x, x, *values, exclude_self=True, backend=fused)

    check(self_term, [x, *values])


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_ragged(case, C, fused, device):
    n, m = LENGTHS
    x, y, *values = (t[0] for t in case.inputs(1, sum(n), sum(m), C, torch.float64, device))

    def packed(x, y, *values):
        along = [make_ragged(t, m) for t in values]
        out = case.operation(make_ragged(x, n), make_ragged(y, m), *along, backend=fused)
        result, _ = pack(out)  # PyTorch cannot differentiate unbind twice
        return result[result.detach().isfinite()]

    check(packed, [t.detach().requires_grad_() for t in (x, y, *values)])

    def self_term(x, *values):
        cloud = make_ragged(x, m)
        along = [make_ragged(t, m) for t in values]
        out = case.operation(cloud, cloud, *along, exclude_self=True, backend=fused)
        result, _ = pack(out)  # PyTorch cannot differentiate unbind twice
        return result[result.detach().isfinite()]

    check(self_term, [t.detach().requires_grad_() for t in (y, *values)])


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_second_derivatives_equal_those_of_the_reference(case, C, fused, device):
    """Over several tiles, and with some of the directions missing."""
    inputs = case.inputs(2, 5, 2100, C, torch.float64, device)
    results = []
    for backend in (fused, "dense"):
        out = case.operation(*inputs, backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view(out.shape)
        first = torch.autograd.grad((out * weights).sum(), inputs, create_graph=True)
        results.append(
            [torch.autograd.grad(g.square().sum(), inputs, retain_graph=True) for g in first]
        )
    for got, want in zip(*results, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["energy", "laplacian"])
@pytest.mark.parametrize("C", CHANNELS)
def test_derivatives_where_points_coincide_are_those_of_the_others(name, C, fused, device):
    case = next(case for case in SMOOTH if case.name == name)
    x, _ = case.inputs(1, 6, 6, C, torch.float64, device)
    results = []
    for backend in (fused, "dense"):
        out = case.operation(x, x, backend=backend)
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((out, first, second))
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_third_derivatives(case, fused, device):
    """The reference has them; the others say that they do not."""
    inputs = case.inputs(1, 2, 3, 2, widest(fused), device)

    def second(backend):
        out = case.operation(*inputs, backend=backend)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        total = sum(g.square().sum() for g in first)
        return torch.autograd.grad(total, inputs, create_graph=True)

    third = torch.autograd.grad(sum(g.sum() for g in second("dense")), inputs)
    assert all(g.isfinite().all() for g in third)
    with pytest.raises(RuntimeError, match=r'third derivatives.*backend="dense"'):
        torch.autograd.grad(sum(g.sum() for g in second(fused)), inputs)


@pytest.mark.parametrize(
    "kernel",
    [ops.Gaussian([0.5, 2.0]), ops.Laplacian(0.7), ops.Energy(), ops.InverseMultiquadric(1.3)],
    ids=str,
)
def test_closed_form_derivatives_of_the_kernels(kernel):
    d = torch.rand(20, dtype=torch.float64).add(0.1).requires_grad_()
    value = kernel(d)
    (first,) = torch.autograd.grad(value.sum(), d, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), d)
    torch.testing.assert_close(kernel.first(d), first)
    torch.testing.assert_close(kernel.second(d), second)
    zero = torch.zeros(1, requires_grad=True)
    (at_zero,) = torch.autograd.grad(kernel(zero).sum(), zero)
    torch.testing.assert_close(kernel.first(zero.detach()), at_zero)
    assert kernel.second(zero.detach()).isfinite().all()
