"""The promised error bounds, where distances, or what is multiplied back, nearly cancel.

Every number that was once wrong by per cents is here with its right value, from float64.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import true_softmin
from torch import Tensor

from fad_loss import ops


def relative(got: Tensor, true: Tensor) -> float:
    """The largest deviation relative to the largest true value."""
    return float((got.double() - true).abs().max() / true.abs().max())


# ------------------------------------------------------------ softmin's weights have a sum of 1


@pytest.mark.parametrize("C", [1, 64])
def test_the_only_neighbor_has_all_the_weight(C, backend, device):
    """d = 3600 and eps = 0.01: the rounding of the result, divided by eps, was 2.4 %."""
    x = torch.full((1, 1, C), 60 / C**0.5, device=device).requires_grad_()
    y = torch.zeros(1, 1, C, device=device).requires_grad_()
    potential = torch.tensor([[0.37]], device=device).requires_grad_()
    value = ops.softmin(x, y, 0.01, potential, backend=backend)
    assert float(value.detach()) == pytest.approx(3600 - 0.37, rel=1e-6)
    dx, dy, df = torch.autograd.grad(value.sum(), (x, y, potential))
    torch.testing.assert_close(dx, 2 * x.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(dy, -2 * x.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(df, torch.full_like(df, -1.0), rtol=1e-6, atol=0)


def test_weights_sum_to_one_over_several_tiles(fused, device):
    """The gradients of all potentials together are -1, however large the distances."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 3, device=device) + 50, torch.randn(2, 5000, 3, device=device)
    potential = torch.zeros(2, 5000, device=device).requires_grad_()
    for epsilon in (0.01, 1.0, 100.0):
        value = ops.softmin(x, y, epsilon, potential, backend=fused)
        (gradient,) = torch.autograd.grad(value.sum(), potential)
        assert float(gradient.sum()) == pytest.approx(-6, rel=1e-5)


def test_second_derivatives_of_a_distant_cloud(fused, device):
    """The double backward takes the same weights as the backward."""
    torch.manual_seed(0)
    x = (torch.randn(1, 4, 3, device=device) + 30).requires_grad_()
    y = torch.randn(1, 6, 3, device=device).requires_grad_()
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, y)]
    results = []
    for pair, function in (
        ((x, y), lambda a, b: ops.softmin(a, b, 10.0, backend=fused)),
        (wide, lambda a, b: true_softmin(a, b, [10.0])),
    ):
        out = function(*pair)
        (first,) = torch.autograd.grad(out.sum(), pair[0], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), pair))
    for got, true in zip(*results, strict=True):
        assert relative(got.cpu(), true) < 1e-4  # d / eps = 270 in float32
