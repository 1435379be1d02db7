"""Drawing some of the points, where comparing all pairs would cost too much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fad_loss import FeatureAdversarialLoss, MatchDiscriminator, TeacherDiscriminator, ragged
from fad_loss.discriminators import Points


class Spy(TeacherDiscriminator):
    """Keeps what it was shown."""

    def forward(self, game, side=None):
        SEEN[:] = [game.student.detach(), game.teacher]
        return super().forward(game, side)


class Indifferent(nn.Module):
    """Takes whatever keywords there are, and looks at single points only."""

    def forward(self, features: Tensor, **keywords: Tensor) -> Tensor:
        assert set(keywords) == {"reference", "labels"}
        SEEN[:] = [features]
        return features.sum(-1)


SEEN: list = []


def make(limit, discriminator=None):
    discriminator = discriminator or Spy()
    return FeatureAdversarialLoss(
        3, 3, discriminator=discriminator, adapter="identity", normalize=False, max_points=limit
    )


def rows(points):
    return {tuple(p) for p in points.flatten(0, 1).tolist()}


@pytest.mark.parametrize("counts", [(20, 30), (30, 4), (20, 20)])
def test_at_most_so_many_of_each_cloud_and_each_once(counts):
    fad = make(8)
    student, teacher = torch.randn(2, counts[0], 3), torch.randn(2, counts[1], 3)
    fad(student.requires_grad_(), teacher).backward()
    real = SEEN[1].features
    assert real.shape == (2, min(8, counts[1]), 3)
    assert len(rows(real)) == real.shape[0] * real.shape[1]
    for drawn, cloud in zip(real, teacher, strict=True):
        assert rows(drawn[None]) <= rows(cloud[None])
    touched = (student.grad.abs().sum(-1) > 0).sum(1)
    assert touched.tolist() == [min(8, counts[0])] * 2


def test_another_choice_at_every_step_and_all_in_evaluation():
    fad = make(8)
    student, teacher = torch.randn(1, 20, 3), torch.randn(1, 20, 3)
    choices = []
    for _ in range(4):
        fad(student, teacher)
        choices.append(frozenset(rows(SEEN[0].features)))
    assert len(set(choices)) > 1
    fad.eval()
    fad(student, teacher)
    assert SEEN[0].features.shape == (1, 20, 3)


def test_the_same_points_of_equal_clouds():
    # If the student had arrived, what is drawn of both would be the same set.
    fad = make(8)
    cloud = torch.randn(2, 20, 3)
    fad.student_loss(cloud.clone(), cloud)
    assert torch.equal(*(points.features for points in SEEN))


def test_small_clouds_and_none_are_compared_whole():
    cloud = torch.randn(2, 20, 3)
    state = torch.get_rng_state()
    for limit in (20, None):
        make(limit)(cloud, cloud)
        assert SEEN[0].features.shape == cloud.shape
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("masked", [False, True])
def test_uneven_clouds_are_drawn_and_smaller_ones_whole(masked):
    cloud = torch.randn(40, 3)
    if masked:
        counted = torch.arange(35) < torch.tensor([[5], [35]])
        shown = torch.full((2, 35, 3), torch.nan)
        shown[counted] = cloud
        make(8)(shown, shown, mask=counted)
    else:
        shown = ragged(cloud, lengths=[5, 35])
        make(8)(shown, shown)
    student, teacher = SEEN
    assert student.mask.sum(1).tolist() == [5, 8]
    assert torch.equal(student.features, teacher.features)
    first, second = (rows(f[None]) for f in student.features)
    assert first - {(0.0, 0.0, 0.0)} == rows(cloud[None, :5])
    assert second <= rows(cloud[None, 5:])
    assert len(second) == 8


def test_every_point_is_as_likely_as_any_other():
    points = Points.of(torch.arange(7.0).reshape(1, 7, 1).expand(20_000, 7, 1))
    generator = torch.Generator().manual_seed(0)
    drawn = points.draw(3, torch.rand(20_000, 4, generator=generator)).features.long()
    assert (drawn.flatten(1).sort(1).values.diff() > 0).all()  # no point twice
    share = torch.bincount(drawn.flatten(), minlength=7) / 20_000
    torch.testing.assert_close(share, torch.full((7,), 3 / 7), rtol=0, atol=0.015)


def test_discriminators_that_look_at_single_points_see_all_unless_told():
    fad = make("auto", Indifferent())
    fad(torch.randn(2, 20, 3), torch.randn(2, 20, 3), torch.zeros(2, dtype=torch.int64))
    assert SEEN[0].shape == (2, 20, 3)
    fad = make(8, Indifferent())
    fad(torch.randn(2, 20, 3), torch.randn(2, 20, 3), torch.zeros(2, dtype=torch.int64))
    assert SEEN[0].shape == (2, 8, 3)


def test_global_features_are_compared_whole():
    fad = make(8)
    fad(torch.randn(20, 3), torch.randn(20, 3))
    assert SEEN[0].features.shape == (1, 20, 3)


def test_without_a_limit_the_discriminators_own_is_taken():
    def limit(discriminator, **options):
        return FeatureAdversarialLoss(3, 3, discriminator=discriminator, **options).max_points

    assert limit("teacher") == TeacherDiscriminator().default_max_points == 64
    assert limit("paired") == TeacherDiscriminator(condition="point").default_max_points == 16
    assert limit("paired", max_points=5) == 5
    assert limit("paired", max_points=None) is None
    assert limit("point") is limit("match") is limit(nn.Linear(3, 1)) is None
    assert limit(MatchDiscriminator(3, distance="energy")) == 64


@pytest.mark.parametrize("limit, error", [(1, ValueError), (8.0, TypeError), ("all", ValueError)])
def test_errors(limit, error):
    with pytest.raises(error, match="max_points: expected"):
        make(limit)


def test_points_that_cannot_correspond_are_refused_before_they_are_drawn():
    fad = FeatureAdversarialLoss(3, 3, discriminator="paired", max_points=4)
    student, teacher = torch.randn(2, 8, 3), torch.randn(2, 16, 3)
    for _ in (fad.train(), fad.eval()):
        with pytest.raises(ValueError, match=r"condition: .*\(2, 8, 3\).*\(2, 16, 3\)"):
            fad(student, teacher)


def test_what_pads_small_clouds_does_not_reach_the_gradient():
    """Two points that coincide, far from 0: in their units, 0 would be 1e5 away."""
    torch.manual_seed(0)
    x, y = (torch.full((2, 17), value, dtype=torch.bfloat16) for value in (0.01, -0.01))
    student = x.clone().requires_grad_()
    fad = FeatureAdversarialLoss(17, 17)
    fad(ragged(student, lengths=[2]), ragged(y, lengths=[2])).backward()
    assert student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in fad.parameters())
    game = fad._game(ragged(student, lengths=[2]), ragged(y, lengths=[2]), None, None, None)
    for points in (game.student, game.teacher):
        assert (points.features[~points.mask] == 0).all()
