"""Drawing some of the points, where comparing all pairs would cost too much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fad_loss import FeatureAdversarialLoss, MatchDiscriminator, TeacherDiscriminator, ragged


class Spy(TeacherDiscriminator):
    """Keeps what it was shown."""

    def forward(self, features, reference=None, labels=None, student=None):
        self.seen = features, reference
        return super().forward(features, reference, labels, student)


class Indifferent(nn.Module):
    """Takes whatever keywords there are, and looks at single points only."""

    def forward(self, features: Tensor, **keywords: Tensor) -> Tensor:
        assert set(keywords) == {"reference", "labels"}
        self.seen = features
        return features.sum(-1)


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
    # The last call scores the real points.
    real, _ = fad.discriminator.seen
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
        choices.append(frozenset(rows(fad.discriminator.seen[0])))
    assert len(set(choices)) > 1
    fad.eval()
    fad(student, teacher)
    assert fad.discriminator.seen[0].shape == (1, 20, 3)


def test_the_same_points_of_equal_clouds():
    # If the student had arrived, what is drawn of both would be the same set.
    fad = make(8)
    cloud = torch.randn(2, 20, 3)
    fad.student_loss(cloud.clone(), cloud)
    assert torch.equal(*fad.discriminator.seen)


def test_small_clouds_ragged_clouds_and_none_are_compared_whole():
    cloud = torch.randn(2, 20, 3)
    state = torch.get_rng_state()
    for limit, shown in (
        (20, cloud),
        (None, cloud),
        (8, ragged(cloud.flatten(0, 1), lengths=[5, 35])),
    ):
        fad = make(limit)
        fad(shown, shown)
        seen, _ = fad.discriminator.seen
        packed = seen.values() if seen.is_nested else seen
        assert packed.numel() == cloud.numel()
    assert torch.equal(torch.get_rng_state(), state)


def test_discriminators_that_look_at_single_points_see_all():
    fad = make(8, Indifferent())
    fad(torch.randn(2, 20, 3), torch.randn(2, 20, 3), torch.zeros(2, dtype=torch.int64))
    assert fad.discriminator.seen.shape == (2, 20, 3)


def test_global_features_are_compared_whole():
    fad = make(8)
    fad(torch.randn(20, 3), torch.randn(20, 3))
    assert fad.discriminator.seen[0].shape == (1, 20, 3)


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
