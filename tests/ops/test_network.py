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
    if kind == "further":
        x, y = x + 1e5, y + 1e5
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
    "kind",
    [
        "normal",
        "clusters",
        "far away",
        "further",
        "nearly on a sphere",
        "duplicates",
        "huge",
        "tiny",
    ],
)
def test_neighbors_by_the_network_are_exact(kind, k, exclude_self, monkeypatch):
    rank, used = search._Search._rank, []

    def spy(self, scores, *others):  # a second time where points had to be centered
        used.append(self.centered)
        return rank(self, scores, *others)

    monkeypatch.setattr(search._Search, "_rank", spy)
    x, y = cases(kind)
    x = y if exclude_self else x
    distance, index = ops.knn(x, y, k, exclude_self=exclude_self, backend="tiled")
    assert used[:1] == [False]
    assert len(used) == (2 if kind == "further" else 1)
    exact = (x.double().unsqueeze(2) - y.double().unsqueeze(1)).square().sum(-1)
    if exclude_self:
        exact.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    torch.testing.assert_close(
        distance.double(), exact.sort(-1).values[..., :k], rtol=1e-6, atol=1e-44
    )
    torch.testing.assert_close(exact.gather(-1, index), distance.double(), rtol=1e-6, atol=1e-44)
    assert (index.sort(-1).values.diff() > 0).all()  # none twice


def test_more_neighbors_than_a_network_sorts(monkeypatch):
    """So many that keys would often agree: they are sorted by their scores."""
    monkeypatch.setattr(search, "smallest", None)
    x, y = cases("duplicates")
    distance, index = ops.knn(x, y, 103, backend="tiled")
    exact = (x.double().unsqueeze(2) - y.double().unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(
        distance.double(), exact.sort(-1).values[..., :103], rtol=1e-6, atol=0
    )
    assert torch.equal(index[0], ops.knn(x, y, 103, backend="dense")[1][0])


@pytest.mark.parametrize("k", [2, 3, 4])
def test_distances_that_float32_does_not_tell_apart_come_by_index(k):
    """Also the last one that is taken, and the first that is not."""
    y = torch.eye(24).repeat(1, 2, 1) * 5
    y[0, :3] = torch.eye(24)[0]
    y[0, :3, 1] = torch.tensor([2.0, 1.0, 0.0]) * 2.0**-14  # their squares are lost beside 1
    distance, index = ops.knn(torch.zeros(1, 1, 24), y, k, backend="tiled")
    assert index[0, 0, :3].tolist() == [0, 1, 2][:k]
    assert distance[0, 0, :3].tolist() == [1.0, 1.0, 1.0][:k]
