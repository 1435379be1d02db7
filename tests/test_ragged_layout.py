"""Packing, unpacking and sums over clouds of unequal size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fad_loss import _ragged, ragged

LENGTHS = [2, 0, 3, 1, 0]


def cloud(*trailing, lengths=LENGTHS, dtype=torch.float64):
    values = torch.randn(sum(lengths), *trailing, dtype=dtype).requires_grad_()
    return values, ragged(values, lengths=lengths)


def flat(x):
    return torch.cat(list(x.unbind()))


def test_is_ragged():
    assert _ragged.is_ragged(cloud(2)[1])
    assert not _ragged.is_ragged(torch.zeros(2, 3, 4))


def test_pack_and_unpack_are_inverse():
    values, x = cloud(2)
    inside, offsets = _ragged.pack(x)
    assert torch.equal(inside, values)
    assert inside.data_ptr() == values.data_ptr()
    assert offsets.tolist() == [0, 2, 2, 5, 6, 6]
    again = _ragged.unpack(2 * inside, x)
    assert again.shape == x.shape
    assert torch.equal(flat(again), 2 * values)
    assert (again + x).is_nested  # the same clouds, to PyTorch too
    assert _ragged.unpack(inside[:, 0], x).dim() == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor(
            [torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.strided
        ),
        lambda: cloud(3)[1].transpose(1, 2),
        lambda: torch.nested.narrow(
            torch.zeros(2, 5, 3), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged
        ),
    ],
    ids=["strided", "transposed", "with holes"],
)
def test_other_nested_tensors_are_errors(make):
    with pytest.raises(
        ValueError, match=r"contiguous nested tensor of layout torch.jagged.*fad_loss.ragged"
    ):
        _ragged.pack(make())


def test_derivatives_to_any_order():
    values, _ = cloud(2)

    def through(values):
        x = ragged(values, lengths=LENGTHS)
        inside, _ = _ragged.pack(_ragged.pointwise(lambda t: t**3, x))
        return inside

    assert torch.autograd.gradcheck(through, (values,))
    assert torch.autograd.gradgradcheck(through, (values,))
    (first,) = torch.autograd.grad(through(values).sum(), values, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), values, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), values)
    torch.testing.assert_close(third, torch.full_like(values, 6.0))


def test_unused_ragged_results_have_no_gradient():
    values, _ = cloud(2)
    x = ragged(values, lengths=LENGTHS)
    assert torch.autograd.grad((values * 2).sum(), [x], allow_unused=True) == (None,)
    _ragged.pack(x)[0].sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def test_pointwise():
    values, x = cloud(2)
    torch.testing.assert_close(flat(_ragged.pointwise(torch.exp, x)), values.exp())
    dense = torch.randn(2, 3)
    assert torch.equal(_ragged.pointwise(torch.exp, dense), dense.exp())


def test_lengths_and_indices():
    _, x = cloud(2)
    assert _ragged.cloud_lengths(x).tolist() == LENGTHS
    assert _ragged.cloud_lengths(torch.zeros(2, 7, 3)).tolist() == [7, 7]
    assert _ragged.cloud_index(x).tolist() == [0, 0, 2, 2, 2, 3]


def test_per_point():
    _, x = cloud(2)
    per_cloud = torch.arange(5.0)
    repeated = _ragged.per_point(per_cloud, x)
    assert [part.tolist() for part in repeated.unbind()] == [[0, 0], [], [2, 2, 2], [3], []]
    dense = _ragged.per_point(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 3, 5))
    assert dense.tolist() == [[[1.0, 2.0]] * 3, [[3.0, 4.0]] * 3]


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    trailing=st.sampled_from([(), (1,), (3,)]),
)
def test_sums_and_means_equal_a_loop(lengths, trailing):
    values, x = cloud(*trailing, lengths=lengths)
    parts = values.split(lengths)
    expected = torch.stack([part.sum(0) for part in parts])
    torch.testing.assert_close(_ragged.cloud_sum(x), expected)
    means = torch.stack([part.sum(0) / max(len(part), 1) for part in parts])
    torch.testing.assert_close(_ragged.cloud_mean(x), means)
    assert torch.autograd.gradcheck(
        lambda v: _ragged.cloud_mean(ragged(v, lengths=lengths)), (values,)
    )


def test_means_of_dense_clouds():
    x = torch.randn(3, 4, 2)
    torch.testing.assert_close(_ragged.cloud_mean(x), x.mean(1))
    torch.testing.assert_close(_ragged.cloud_sum(x), x.sum(1))
    per_cloud = torch.randn(3)
    assert _ragged.cloud_mean(per_cloud) is per_cloud
    assert torch.equal(_ragged.cloud_mean(x[:, :0]), torch.zeros(3, 2))


def test_second_derivative_of_a_mean():
    values, _ = cloud(2)
    assert torch.autograd.gradgradcheck(
        lambda v: _ragged.cloud_mean(ragged(v, lengths=LENGTHS)).square(), (values,)
    )
