"""`interpolate`: features at other points, against the formula, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fad_loss import interpolate


def clouds(B, M, N, C=2, D=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, n, c, dtype=torch.float64, generator=generator)
        for n, c in ((M, C), (M, D), (N, D))
    ]


def formula(features, positions, at, k):
    """Point by point, in the words of the docstring."""
    rows = []
    for one, where in zip(features, positions, strict=True):
        for point in at[len(rows) // at.shape[1]]:
            square = (where - point).square().sum(-1)
            near = square.argsort()[:k]
            weights = 1 / square[near]
            rows.append((weights.unsqueeze(1) * one[near]).sum(0) / weights.sum())
    return torch.stack(rows).view(*at.shape[:2], -1)


@given(
    st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 9), st.integers(0, 9)
)
@settings(max_examples=30, deadline=None)
def test_is_the_mean_of_the_nearest(B, M, N, k, seed):
    features, positions, at = clouds(B, M, N, seed=seed)
    expected = formula(features, positions, at, k)
    torch.testing.assert_close(interpolate(features, positions, at, k), expected)
    near = interpolate(features.float(), positions.float(), at.float(), k)
    torch.testing.assert_close(near, expected.float(), rtol=1e-3, atol=1e-4)


def test_is_the_point_itself_where_there_is_one():
    features, positions, _ = clouds(2, 6, 1)
    order = torch.randperm(6)
    torch.testing.assert_close(
        interpolate(features, positions, positions[:, order]), features[:, order]
    )


def test_what_does_not_count_is_as_if_it_were_not_there():
    features, positions, at = clouds(2, 6, 4)
    mask = torch.tensor([[True, False, True, True, False, True]]).expand(2, -1)
    expected = interpolate(features[:, mask[0]], positions[:, mask[0]], at)
    features = features.masked_fill(~mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(interpolate(features, positions, at, mask=mask), expected)
    nothing = interpolate(features, positions, at, mask=torch.zeros_like(mask))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_derivatives():
    features, positions, at = clouds(2, 5, 3)
    features.requires_grad_()
    assert gradcheck(lambda f: interpolate(f, positions, at).square(), features)
    assert gradgradcheck(lambda f: interpolate(f, positions, at).square(), features)
    assert not interpolate(features.detach(), positions.requires_grad_(), at).requires_grad


F, P, A = clouds(2, 5, 3)
NAN = torch.full((2, 5, 3), torch.nan)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((F, P, A, 0), ValueError, "k: expected a positive number of neighbours, got 0"),
        ((F, P[:, :4], A), ValueError, r"positions: expected one for each of the features"),
        ((F, P, A[:1]), ValueError, r"at: expected positions \(B, N, D\) that go with"),
        ((F.to_sparse(), P, A), TypeError, r"features: expected a dense tensor"),
        ((F.long(), P, A), TypeError, "features: expected float32"),
        ((F, P, None), TypeError, "at: expected a torch.Tensor, got NoneType"),
        ((NAN, P, A), ValueError, "features: 30 of 30 values are NaN or infinite"),
        ((F, NAN, A), ValueError, "positions: 30 of 30 values are NaN or infinite"),
        ((F, P, NAN), ValueError, "at: 30 of 30 values are NaN or infinite"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        interpolate(*arguments)
