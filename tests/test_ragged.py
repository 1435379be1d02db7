"""Clouds of unequal size, however they are given."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fad_loss import _checks
from fad_loss.ragged import ragged


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    as_list=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=40, deadline=None)
def test_ragged_from_lengths_offset_and_batch_agree(lengths, as_list, dtype):
    total = sum(lengths)
    values = torch.randn(total, 3, dtype=torch.float64, requires_grad=True)
    expected = values.split(lengths)

    def given_as(numbers: list[int]) -> Any:
        return numbers if as_list else torch.tensor(numbers, dtype=dtype)

    ways: list[dict[str, Any]] = [{"lengths": given_as(lengths)}]
    if lengths[0] or not total:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        ways.append({"offset": given_as(ends)})
    if total:
        batch = [cloud for cloud, length in enumerate(lengths) for _ in range(length)]
        ways.append({"batch": given_as(batch), "batch_size": len(lengths)})
        if lengths[-1]:
            ways.append({"batch": given_as(batch)})
    for way in ways:
        cloud = ragged(values, **way)
        assert cloud.layout == torch.jagged
        assert cloud.shape[0] == len(lengths)
        parts = cloud.offsets().diff().tolist()
        assert parts == lengths
        assert torch.equal(cloud.values(), values)
        for part, whole in zip(cloud.values().split(parts), expected, strict=True):
            assert torch.equal(part, whole)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    channels=st.sampled_from([(), (3,)]),
    left=st.booleans(),
)
def test_a_mask_leaves_the_padding_out(lengths, channels, left):
    clouds = [torch.randn(length, *channels, dtype=torch.float64) for length in lengths]
    padded = torch.full((len(lengths), 4, *channels), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(lengths), 4, dtype=torch.bool)
    for row, cloud in enumerate(clouds):
        place = slice(4 - len(cloud), 4) if left else slice(len(cloud))
        padded[row, place], mask[row, place] = cloud, True
    padded.requires_grad_()
    result = ragged(padded, mask=mask)
    assert result.layout == torch.jagged
    assert result.offsets().diff().tolist() == lengths
    assert torch.equal(result.values(), torch.cat(clouds))
    result.values().square().sum().backward()
    # Twice the value where a point is, 0 where none is.
    wanted = torch.zeros_like(padded)
    wanted[mask] = 2 * torch.cat(clouds)
    assert torch.equal(padded.grad, wanted)


def test_a_mask_may_have_holes():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    cloud = ragged(torch.arange(6.0).reshape(2, 3), mask=mask)
    assert [points.tolist() for points in cloud.unbind()] == [[0, 2], [4]]


def test_ragged_is_differentiable():
    def cubes(values: Tensor) -> Tensor:
        from fad_loss._ragged import cloud_sum, pointwise

        cloud = ragged(values, offset=[2, 5])
        return cloud_sum(pointwise(lambda z: z**3, cloud))

    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cubes, values)
    assert torch.autograd.gradgradcheck(cubes, values)


V = torch.zeros(6, 2)


@pytest.mark.parametrize(
    "values, kwargs, error, message",
    [
        (V, {}, ValueError, "exactly one of batch, offset, lengths and mask, got none of them"),
        (V, {"batch": [0] * 6, "offset": [6]}, ValueError, "got batch and offset"),
        (V, {"offset": [0, 2, 6]}, ValueError, r"without a leading zero.*offset\[1:\]"),
        (V, {"offset": [2, 5]}, ValueError, r"number of points, 6.*got 5 \(\[2, 5\]\)"),
        (V, {"offset": [4, 2]}, ValueError, r"ascending ends.*\[4, 2\].*lengths="),
        (V, {"offset": [-1, 6]}, ValueError, r"ascending ends.*\[-1, 6\].*lengths="),
        (V, {"lengths": [2, 2]}, ValueError, r"sum of 6 as values has rows, got 4 \(\[2, 2\]\)"),
        (V, {"lengths": [7, -1]}, ValueError, r"no negative length, got \[7, -1\]"),
        (V, {"lengths": [1] * 9}, ValueError, r"got 9 \(\[1, 1, 1, 1, 1, 1, 1, 1, \.\.\.\]\)"),
        (V, {"lengths": []}, ValueError, "at least one cloud, got an empty lengths"),
        (V, {"batch": [0, 0, 1]}, ValueError, "6 as values has rows, got 3"),
        (V, {"batch": [0, 0, 2, 1, 1, 1]}, ValueError, "got 1 after 2 at position 3; sort first"),
        (V, {"batch": [-1, 0, 0, 0, 0, 0]}, ValueError, "from 0 to 0 for 1 clouds, got -1 to 0"),
        (V, {"batch": [0, 0, 0, 0, 3, 3], "batch_size": 3}, ValueError, "got 0 to 3"),
        (V, {"batch": [0] * 6, "batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        (V, {"batch": [0] * 6, "batch_size": 1.0}, TypeError, "batch_size: expected an int, got f"),
        (V, {"lengths": [6], "batch_size": 1}, ValueError, "batch_size: only goes with batch"),
        (V, {"lengths": torch.tensor([6.0])}, TypeError, "lengths: expected integers, got float32"),
        (V, {"lengths": torch.tensor([[6]])}, ValueError, r"one dimension, got int64.*\(1, 1\)"),
        (V, {"mask": torch.ones(6, 2)}, TypeError, r"mask: .* booleans, got float32 .*mask.bool"),
        (V, {"mask": [[True]]}, TypeError, "mask: expected a torch.Tensor of booleans, got list"),
        (V, {"mask": torch.ones(6).bool()}, ValueError, r"per point of values, \(6, 2\).*\(6\)"),
        (V, {"mask": torch.ones(2, 6).bool()}, ValueError, r"got bool of shape \(2, 6\).*\(B, N\)"),
        (
            V,
            {"mask": torch.ones(6, 2, device="meta").bool()},
            ValueError,
            r"move it with .to\('cpu",
        ),
        (V[:0], {"mask": torch.ones(0, 2).bool()}, ValueError, r"mask: expected one boolean per"),
        (V, {"mask": torch.ones(6, 2).bool(), "batch_size": 6}, ValueError, "only goes with batch"),
        (V, {"mask": torch.ones(6, 2).bool(), "lengths": [6]}, ValueError, "got lengths and mask"),
        ([1.0], {"lengths": [1]}, TypeError, "values: expected a torch.Tensor, got list"),
        (torch.tensor(1.0), {"lengths": [1]}, ValueError, "values: expected the packed points"),
        (
            ragged(V, lengths=[6]),
            {"lengths": [6]},
            ValueError,
            "values: expected the packed points",
        ),
    ],
)
def test_partitions_that_do_not_add_up(values, kwargs, error, message):
    with pytest.raises(error, match=message):
        ragged(values, **kwargs)


def test_ragged_looks_at_nothing_when_it_must_not(monkeypatch):
    # What happens on a GPU: no look at the numbers, so no error from here, and no synchronisation.
    monkeypatch.setattr(sys.modules["fad_loss.ragged"], "look", lambda tensor: False)
    assert ragged(V, lengths=[3, 3]).shape[0] == 2
    assert ragged(V, batch=torch.tensor([0, 0, 2, 1, 1, 1]), batch_size=3).shape[0] == 3
    assert _checks.look(V)


def test_ragged_of_fake_tensors_has_the_right_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):
        values, batch = torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)
        cloud = ragged(values, batch=batch, batch_size=4)
        assert (cloud.shape[0], cloud.shape[2]) == (4, 2)
