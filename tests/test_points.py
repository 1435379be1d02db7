"""Every layout of features becomes points."""

from __future__ import annotations

import pytest
import torch

from fad_loss._game import Game
from fad_loss._points import as_points
from fad_loss.ragged import ragged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layouts_become_points_without_a_copy(dtype):
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    assert as_points(x) is x
    channels_first = as_points(x, "bcn")
    assert torch.equal(channels_first, x.mT)
    assert channels_first.data_ptr() == x.data_ptr()
    for layout in ("bnc", "bcn"):
        flat = as_points(x[0], layout)
        assert torch.equal(flat, x[:1])


def test_ragged_clouds_pass_through():
    x = ragged(torch.ones(3, 2), lengths=[1, 2])
    assert as_points(x, "bcn") is x


@pytest.mark.parametrize(
    "features, layout, error, message",
    [
        (torch.zeros(4), "bnc", ValueError, r"student: expected \(B, N, C\).*shape \(4\)"),
        (torch.zeros(4, 3, 2, 1), "bcn", ValueError, r"\(B, C, N\).*\(4, 3, 2, 1\).*flatten"),
        (torch.zeros(0, 3, 2), "bnc", ValueError, r"at least one cloud.*\(0, 3, 2\)"),
        (torch.zeros(2, 0, 2), "bnc", ValueError, r"one point.*\(2, 0, 2\)"),
        (torch.zeros(2, 3, 0), "bnc", ValueError, r"one channel.*\(2, 3, 0\)"),
        (torch.zeros(0, 3), "bnc", ValueError, r"\(0, 3\)"),
        (torch.zeros(2, 3, 4), "nbc", ValueError, "layout: expected one of 'bnc', 'bcn'"),
        (torch.zeros(2, 3, 4).long(), "bnc", TypeError, r"student: expected float32.*int64"),
        ([[1.0]], "bnc", TypeError, r"student: expected a torch.Tensor, got list"),
        (ragged(torch.zeros(3), lengths=[3]), "bnc", ValueError, r"ragged cloud \(B, j, C\)"),
        (ragged(torch.zeros(0, 2), lengths=[0]), "bnc", ValueError, r"\(0, 2\)"),
        (ragged(torch.zeros(3, 2), lengths=[3]).transpose(1, 2), "bnc", ValueError, "fad_loss.rag"),
    ],
)
def test_bad_features(features, layout, error, message):
    with pytest.raises(error, match=message):
        as_points(features, layout, "student")


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite(side, value):
    """Given directly, to any discriminator: a game of them cannot be made."""
    features = {"student": torch.zeros(2, 3, 4), "teacher": torch.zeros(2, 3, 4)}
    features[side][0, 1, 2] = value
    with pytest.raises(ValueError, match=f"{side}: 1 of 24 values are NaN or infinite"):
        Game.of(**features)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    game = Game.of(**features, mask=mask)  # that point does not count
    assert torch.isfinite(game.points(side).features).all()
