"""The sorting network of the CPU's search, against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fad_loss import ops
from fad_loss.ops._tiled import search
from fad_loss.ops._tiled.network import smallest


@given(
    power=st.integers(0, 6),
    groups=st.integers(1, 9),
    n=st.integers(1, 5),
    values=st.integers(1, 99),
)
@settings(max_examples=60, deadline=None)
def test_is_the_head_of_a_sort(power, groups, n, values):
    count = 2**power
    keys = torch.randint(-values, values, (groups * count, n), dtype=torch.int32)
    expected = keys.sort(dim=0).values[:count]
    assert torch.equal(smallest(keys, count), expected)


def test_sorts_every_sequence_of_zeros_and_ones():
    """A network that does sorts everything (Knuth's 0-1 principle)."""
    bits = torch.arange(2**16).unsqueeze(0) >> torch.arange(16).unsqueeze(1) & 1
    expected = bits.sort(dim=0).values
    assert torch.equal(smallest(bits.clone(), 16), expected)
    assert torch.equal(smallest(bits.clone(), 4), expected[:4])


def cases(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 24, generator=generator) for n in (50, 130))
    if kind == "clusters":
        x, y = (
            t * 0.0125 + torch.tensor([10.0, -10.0]).repeat(65)[: t.shape[1], None] for t in (x, y)
        )
    if kind == "far away":
        x, y = x + 1000, y + 1000
    if kind == "nearly on a sphere":  # distances agree in the digits that a key has
        x, y = 1e-4 * x, torch.nn.functional.normalize(y, dim=-1)
    if kind == "duplicates":
        y[:, ::3] = y[:, :1]
    if kind == "huge":  # beyond float32 once squared
        x, y = 1e15 * x, 1e15 * y
    if kind == "tiny":
        x, y = 1e-18 * x, 1e-18 * y
    return x, y


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", [5, 20, 31])
@pytest.mark.parametrize(
    "kind", ["normal", "clusters", "far away", "nearly on a sphere", "duplicates", "huge", "tiny"]
)
def test_neighbors_by_the_network_are_exact(kind, k, exclude_self, monkeypatch):
    ranked, used = search._Search._ranked, []

    def spy(self, scores):
        used.append(self.network)
        return ranked(self, scores)

    monkeypatch.setattr(search._Search, "_ranked", spy)
    x, y = cases(kind)
    x = y if exclude_self else x
    distance, index = ops.knn(x, y, k, exclude_self=exclude_self, backend="tiled")
    assert used
    assert all(used)
    exact = (x.double().unsqueeze(2) - y.double().unsqueeze(1)).square().sum(-1)
    if exclude_self:
        exact.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    torch.testing.assert_close(
        distance.double(), exact.sort(-1).values[..., :k], rtol=1e-6, atol=1e-44
    )
    torch.testing.assert_close(exact.gather(-1, index), distance.double(), rtol=1e-6, atol=1e-44)
    assert (index.sort(-1).values.diff() > 0).all()  # none twice
