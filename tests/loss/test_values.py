"""What the loss returns, against the objectives and the discriminator called by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fad_loss import (
    FeatureAdversarialLoss,
    HeadDiscriminator,
    MatchDiscriminator,
    PointDiscriminator,
    TeacherDiscriminator,
    ragged,
)
from fad_loss.discriminators import Game
from fad_loss.objectives import Hinge, LeastSquares, Relativistic
from fad_loss.penalties import lecam, r1, r2

from .cases import CLASSES, STUDENT, TEACHER, clouds, features, make


def adapted(fad, student):
    return F.linear(student, fad.adapter.weight, fad.adapter.bias)


def test_by_hand_with_the_teacher_as_discriminator():
    fad = make("teacher", normalize=False, weight=0.7)
    student, teacher, _ = features()
    fake = adapted(fad, student)
    discriminator = TeacherDiscriminator()
    of_fake, of_real = discriminator(Game.of(fake, teacher))
    torch.testing.assert_close(fad(student, teacher), -of_fake.mean())
    expected = F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()
    torch.testing.assert_close(fad.discriminator_loss(student, teacher), expected)


def test_by_hand_with_a_discriminator_that_learns():
    discriminator = PointDiscriminator(TEACHER, 8, 2, spectral_norm=False).double()
    fad = FeatureAdversarialLoss(
        STUDENT,
        TEACHER,
        discriminator=discriminator,
        objective=LeastSquares(),
        weight=1.0,
        normalize=False,
        gradient_penalty=0.3,
        lecam=0.2,
    ).double()
    fad.average_scores.copy_(torch.tensor([0.5, -0.5]))
    student, teacher, _ = features("N == M")
    fake = adapted(fad, student).detach().requires_grad_()
    real = teacher.clone().requires_grad_()
    of_fake, of_real = discriminator(Game.of(fake, real))
    expected = (
        LeastSquares().student(of_fake)
        + LeastSquares().discriminator(of_real, of_fake)
        + 0.3 * (r1(of_real, real) + r2(of_fake, fake))
        + 0.2 * lecam(of_real, of_fake, 0.5, -0.5)
    )
    torch.testing.assert_close(fad(student, teacher), expected)
    averages = torch.tensor([0.5, -0.5]) * 0.99
    averages += 0.01 * torch.stack([of_real.mean(), of_fake.mean()]).detach()
    torch.testing.assert_close(fad.average_scores, averages.double())
    # The penalty of clouds scored apart, because their numbers of points differ, is the same.
    student, teacher, _ = features("N != M")
    fake = adapted(fad, student).detach().requires_grad_()
    real = teacher.clone().requires_grad_()
    of_fake, of_real = discriminator(Game.of(fake, real))
    penalty = r1(of_real, real) + r2(of_fake, fake)
    fad(student, teacher)
    torch.testing.assert_close(fad.statistics()["penalty"], penalty)


@pytest.mark.parametrize("layout", ["ragged", "one ragged shape"])
@pytest.mark.parametrize("name", ["teacher", "point", "neighborhood", "cloud"])
def test_ragged_clouds_are_the_mean_over_a_loop(name, layout):
    fad = make(name, normalize=False)
    fad.discriminator.eval()  # one sigma for all
    alone = copy.deepcopy(fad)
    values, teacher, _ = features(layout)
    student = clouds(values, layout)
    loss = fad(student, teacher)
    each = torch.stack(
        [alone(s[None], t[None]) for s, t in zip(student.unbind(), teacher.unbind(), strict=True)]
    )
    torch.testing.assert_close(loss, each.mean())
    loss.backward()
    got, values.grad = values.grad, None
    each.mean().backward()
    torch.testing.assert_close(got, values.grad)
    for p, q in zip(fad.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("name", ["teacher", "point", "neighborhood", "cloud"])
def test_equal_ragged_clouds_are_a_batch(name):
    fad, same = make(name), make(name)
    student, teacher, _ = features("N == M")
    lengths = [7, 7, 7]
    packed = ragged(student.flatten(0, 1), lengths=lengths)
    loss = same(packed, ragged(teacher.flatten(0, 1), lengths=lengths))
    torch.testing.assert_close(loss, fad(student, teacher))


@pytest.mark.parametrize("name", ["teacher", "point", "neighborhood", "cloud"])
def test_layouts_say_the_same(name):
    student, teacher, _ = features()
    expected = make(name)(student, teacher)
    last = make(name, layout="bcn")(student.transpose(1, 2), teacher.transpose(1, 2).contiguous())
    torch.testing.assert_close(last, expected)
    # Global features are the points of one cloud.
    torch.testing.assert_close(
        make(name)(student[0], teacher[0, :7]), make(name)(student[:1], teacher[:1, :7])
    )


@pytest.mark.parametrize("name", ["teacher", "witness", "point", "neighborhood", "cloud"])
def test_order_of_points_and_of_clouds_does_not_matter(name):
    student, teacher, _ = features()
    expected = make(name)(student, teacher)
    shuffled = make(name)(student[:, torch.randperm(7)], teacher[:, torch.randperm(9)])
    torch.testing.assert_close(shuffled, expected)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(make(name)(student[order], teacher[order]), expected)


def test_padding_is_not_the_same_as_a_smaller_cloud():
    student, teacher, _ = features()
    padded = torch.cat([student, student.new_zeros(3, 4, STUDENT)], 1)
    fad = make("teacher")
    assert not torch.isclose(fad(padded, teacher), fad(student, teacher))


@pytest.mark.parametrize("name", ["teacher", "point"])
def test_the_unit_of_the_teacher_does_not_matter(name):
    # Standardised by the teacher's statistics: whoever rescales both changes nothing.
    student, teacher, _ = features()
    plain, scaled = make(name), make(name)
    torch.testing.assert_close(
        scaled(student, 100 * teacher + 7), plain(student, teacher), rtol=1e-6, atol=1e-6
    )


def test_statistics_of_the_teacher_are_followed():
    fad = make("teacher")
    batches = [2 * torch.randn(4, 9, TEACHER, dtype=torch.float64) + 3 for _ in range(5)]
    for batch in batches:
        fad(torch.randn(4, 7, STUDENT, dtype=torch.float64), batch)
    # In the first hundred steps they are the plain mean and variance of all that came.
    points = torch.cat(batches).flatten(0, 1)
    variance, mean = torch.var_mean(points, 0, correction=0)
    torch.testing.assert_close(fad.teacher_units.mean, mean)
    torch.testing.assert_close(fad.teacher_units.variance, variance)
    assert fad.teacher_units.batches == 5


def test_statistics_of_the_teacher_follow_a_drift():
    fad = make("teacher")
    student = torch.randn(2, 7, STUDENT, dtype=torch.float64)
    teacher = torch.randn(2, 9, TEACHER, dtype=torch.float64)
    fad(student, teacher)
    fad.teacher_units.batches.fill_(1000)
    before = fad.teacher_units.mean.clone()
    fad(student, teacher + 1)
    torch.testing.assert_close(fad.teacher_units.mean, before + 0.01)


def test_dead_channels_of_the_teacher_are_not_blown_up():
    fad = make("point")
    student, teacher, _ = features()
    teacher[..., 0] = 5.0
    loss = fad(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10
    # And if nothing varies at all, nothing is divided.
    flat = torch.full((3, 9, TEACHER), 2.0, dtype=torch.float64)
    assert make("point")(student, flat).isfinite()


def test_an_objective_of_ones_own():
    class Shifted(Hinge):
        def student(self, fake, real=None):
            return super().student(fake, real) + 10

    student, teacher, _ = features()
    plain = make("teacher", objective="hinge")(student, teacher)
    torch.testing.assert_close(make("teacher", objective=Shifted())(student, teacher), plain + 10)


def test_an_adapter_of_ones_own():
    student, teacher, _ = features()
    for adapter in (nn.Sequential(nn.Linear(STUDENT, 5), nn.Linear(5, TEACHER)), nn.LazyLinear(6)):
        fad = make("teacher", adapter=adapter)
        fad(student, teacher).backward()
        assert all(p.grad is not None for p in fad.adapter.parameters())


def test_the_identity_adapter():
    fad = FeatureAdversarialLoss(4, 4, adapter="identity")
    assert list(fad.parameters()) == []
    student = torch.randn(2, 5, 4, requires_grad=True)
    fad(student, torch.randn(2, 6, 4)).backward()
    assert student.grad.abs().sum() > 0


def test_warm_up_is_linear_and_the_discriminator_learns_meanwhile():
    fad = make("point", warmup_steps=4, weight=2.0)
    student, teacher, _ = features()
    weights = []
    for _ in range(6):
        fad.zero_grad()
        fad(student, teacher).backward()
        weights.append(fad.statistics()["weight"].item())
        assert fad.discriminator.first.bias.grad.abs().sum() > 0
    assert weights == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert fad.steps == 6


def test_the_weight_falls_to_nothing_until_the_last_step():
    fad = make("teacher", warmup_steps=2, total_steps=4, weight=2.0)
    weights = []

    def step():
        student, teacher, _ = features()
        fad(student, teacher).backward()
        weights.append(fad.statistics()["weight"].item())
        return student

    for _ in range(4):
        step()
    with pytest.warns(UserWarning, match=r"total_steps: .* after 4 steps.*epochs \* len"):
        student = step()
    step()
    assert weights == pytest.approx([1.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    assert not student.grad.any()


@pytest.mark.parametrize("total, warm_up", [(None, 500), (20000, 500), (600, 60), (9, 0), (1, 0)])
def test_the_warm_up_is_at_most_a_tenth_of_the_training(total, warm_up):
    assert FeatureAdversarialLoss(4, 4, total_steps=total).warmup_steps == warm_up
    assert FeatureAdversarialLoss(4, 4, total_steps=total, warmup_steps=7).warmup_steps == 7


def test_warm_up_scales_the_student_s_gradient():
    plain, slow = make("point"), make("point", warmup_steps=10)
    student, teacher, _ = features()
    plain(student, teacher).backward()
    full, student.grad = student.grad, None
    slow(student, teacher).backward()
    torch.testing.assert_close(student.grad, full / 10)
    got, wanted = slow.discriminator, plain.discriminator
    assert wanted.first.bias.grad.abs().sum() > 0
    torch.testing.assert_close(got.first.bias.grad, wanted.first.bias.grad)


@pytest.mark.parametrize("every", [1, 3])
def test_the_penalty_is_as_strong_however_often_it_is_computed(every):
    student, teacher, _ = features()
    fad = make("point", gradient_penalty=0.5, penalty_every=every)
    plain = make("point")
    extra = [(fad(student, teacher) - plain(student, teacher)).item() for _ in range(6)]
    for step, value in enumerate(extra):
        if step % every == 0:
            penalty = value / 0.5 / every
            assert penalty > 0
        else:
            assert value == 0
    torch.testing.assert_close(fad.statistics()["penalty"].item(), penalty, rtol=0.5, atol=0)


def test_relativistic_pairs_the_clouds():
    fad = make("point", objective=Relativistic(), normalize=False)
    fad.discriminator.eval()
    student, teacher, _ = features()
    of_fake, of_real = (
        scores.mean(1) for scores in fad.discriminator(Game.of(adapted(fad, student), teacher))
    )
    expected = F.softplus(of_real - of_fake).mean() + F.softplus(of_fake - of_real).mean()
    torch.testing.assert_close(fad(student, teacher), expected)


def test_labels_of_global_features_reach_the_points():
    fad = make("point conditioned")
    student, teacher, labels = features("global")
    expected = make("point conditioned")(student[None], teacher[None], labels[None])
    torch.testing.assert_close(fad(student, teacher, labels), expected)
    other = make("point conditioned")(student, teacher, labels.roll(1))
    assert not torch.isclose(expected, other)


def test_labels_per_point_of_ragged_clouds():
    fad = make("point conditioned")
    student, teacher, labels = features("one ragged shape")
    lengths = teacher.offsets().diff()
    each = ragged(labels.repeat_interleave(lengths), lengths=lengths)
    loss = fad(clouds(student, "ragged"), teacher, each)
    expected = make("point conditioned")(clouds(student, "ragged"), teacher, labels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "discriminator, expected",
    [
        ("teacher", TeacherDiscriminator().default_weight),
        ("paired", TeacherDiscriminator(condition="point").default_weight),
        (TeacherDiscriminator(mode="witness"), 1.0),
        ("match", MatchDiscriminator.default_weight),
        ("point", PointDiscriminator.default_weight),
        (torch.nn.Linear(TEACHER, 1), 1.0),
    ],
)
def test_without_a_weight_the_discriminators_own_is_taken(discriminator, expected):
    def weight(**options):
        return FeatureAdversarialLoss(
            STUDENT, TEACHER, discriminator=discriminator, **options
        ).weight

    assert weight() == expected
    assert weight(weight=0.0) == 0.0
    assert weight(weight=2) == 2.0
    assert weight(balance=True) == weight(balance="auto") == 0.3
    assert weight(balance=True, total_steps=9) == 1.0
    assert weight(total_steps=9) == expected


def test_the_weight_of_a_head_is_its_own():
    judge = HeadDiscriminator(torch.nn.Linear(TEACHER, CLASSES), pool=None)
    fad = FeatureAdversarialLoss(STUDENT, TEACHER, discriminator=judge, normalize=False)
    assert fad.weight == HeadDiscriminator.default_weight == 0.3


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_loss_in_float64_has_a_weight_in_float64(step):
    """0.3 of a warm-up of 7 steps: in single precision its gradient would be off by 1e-8."""
    options = {"weight": 0.3, "warmup_steps": 7, "adapter": "identity"}
    fad = FeatureAdversarialLoss(4, 4, **options).double()
    whole = FeatureAdversarialLoss(4, 4, **options | {"weight": 1.0, "warmup_steps": 0}).double()
    torch.manual_seed(0)
    teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    for _ in range(step):
        student = torch.randn(2, 5, 4, dtype=torch.float64).requires_grad_()
        (got,) = torch.autograd.grad(fad(student, teacher), student)
        (expected,) = torch.autograd.grad(whole(student, teacher), student)
    torch.testing.assert_close(got, 0.3 * step / 7 * expected, rtol=1e-13, atol=1e-16)
