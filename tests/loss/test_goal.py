"""Zero at the goal: where the student's set is the teacher's, nothing is left to be learnt.

Tried are the discriminators that promise it: the teacher's densities in both modes, and the
teacher's head. It is not meant for those that learn, whose opinion of the teacher's features is no
constant; for a head of labels, which knows better than the teacher; nor for `MatchDiscriminator`,
which always wants a cloud to be told still more surely from the others.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fad_loss import FeatureAdversarialLoss, HeadDiscriminator, TeacherDiscriminator, ops, ragged
from fad_loss.discriminators import Game

from .cases import CLASSES, TEACHER

B, N, C = 3, 24, TEACHER


def embedding() -> nn.Module:
    return nn.Sequential(nn.Linear(C, 5), nn.Tanh())


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(C, 8), nn.Tanh(), nn.Linear(8, CLASSES))


DENSITIES = {
    "teacher": TeacherDiscriminator,
    "bandwidths": lambda: TeacherDiscriminator(bandwidths=(0.03, 0.3, 3.0)),
    "teacher embedding": lambda: TeacherDiscriminator(embedding=embedding()),
    "witness": lambda: TeacherDiscriminator(mode="witness"),
    "witness gaussian": lambda: TeacherDiscriminator(mode="witness", kernel=ops.Gaussian([1, 3])),
    "witness embedding": lambda: TeacherDiscriminator(mode="witness", embedding=embedding()),
}
SETS = {
    **DENSITIES,
    "head": lambda: HeadDiscriminator(head()),
    "head of means": lambda: HeadDiscriminator(head(), pool="mean"),
    "head with levels": lambda: HeadDiscriminator(head(), levels=("", "1")),
}
CORRESPONDING = {
    "paired": lambda: TeacherDiscriminator(condition="point"),
    "head of points": lambda: HeadDiscriminator(head(), pool=None),
    "head of points with levels": lambda: HeadDiscriminator(head(), pool=None, levels=["1"]),
}
EVERY = {**SETS, **CORRESPONDING}


def build(name: str):
    torch.manual_seed(0)
    return EVERY[name]().double()


def features(seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 0.1, 3.0, 1.0, 10.0, 0.5], dtype=torch.float64)
    return torch.randn(B, N, C, generator=generator, dtype=torch.float64) * spread + 2


def order(name: str) -> torch.Tensor:
    """Points in another order, unless point i is point i."""
    generator = torch.Generator().manual_seed(5)
    return torch.arange(N) if name in CORRESPONDING else torch.randperm(N, generator=generator)


def into_loss(discriminator, **options) -> FeatureAdversarialLoss:
    """The loss whose adapter is the identity, but may learn."""
    options |= {"max_points": None, "warmup_steps": 0}
    fad = FeatureAdversarialLoss(C, C, discriminator=discriminator, **options)
    with torch.no_grad():
        fad.adapter.weight.copy_(torch.eye(C))
        fad.adapter.bias.zero_()
    return fad.double()


def check(scores, leaf):
    for one in scores:
        flat = one.values() if one.is_nested else one
        torch.testing.assert_close(flat, torch.zeros_like(flat), rtol=0, atol=1e-9)
    mine = scores.student.values() if scores.student.is_nested else scores.student
    (gradient,) = torch.autograd.grad(mine.sum(), leaf)
    torch.testing.assert_close(gradient, torch.zeros_like(leaf), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", EVERY)
def test_scores_and_gradients_vanish(name):
    teacher = features()
    student = teacher[:, order(name)].requires_grad_()
    check(build(name)(Game.of(student, teacher)), student)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("padded", [False, True])
def test_so_they_do_in_uneven_clouds(name, padded):
    teacher, there = features(), torch.rand(B, N) < 0.7
    here = there[:, order(name)]
    student = teacher[:, order(name)].requires_grad_()
    if padded:
        game = Game.of(
            student.masked_fill(~here[..., None], 7.0),
            teacher.masked_fill(~there[..., None], -7.0),
            mask=(here, there),
        )
        scores = build(name)(game)
        if scores.student.dim() == 2:
            scores = type(scores)(scores.student[here], scores.teacher[there])
    else:
        pair = (ragged(x[m], lengths=m.sum(1)) for x, m in ((student, here), (teacher, there)))
        scores = build(name)(Game.of(*pair))
    check(scores, student)


@pytest.mark.parametrize("name", DENSITIES)
def test_so_they_do_where_the_points_are_known(name):
    teacher, places = features(), torch.rand(B, N, 3, dtype=torch.float64)
    student = teacher[:, order(name)].requires_grad_()
    positions = places[:, order(name)], places
    check(build(name)(Game.of(student, teacher, positions=positions)), student)
    # The same features at other places are not the same.
    moved = build(name)(Game.of(student, teacher, positions=(places.roll(1, 1), places)))
    assert moved.student.abs().max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_so_does_the_loss(name):
    """Through the adapter, once that is the identity, step after step."""
    # A distance has a kink where two points meet: there a rounding error, as standardising both
    # sides makes, decides on the direction of what is then no small gradient.
    kink = name in {"witness", "witness embedding"}
    fad = into_loss(build(name), normalize=not kink)
    for step in range(5):
        teacher = features(step)
        student = teacher[:, order(name)].requires_grad_()
        loss = fad.student_loss(student, teacher)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-7)
        loss.backward()
        # The weight multiplies what is left of rounding.
        zero = torch.zeros_like(student)
        torch.testing.assert_close(student.grad / fad.weight, zero, rtol=0, atol=1e-7)
        adapter = fad.adapter.weight.grad
        torch.testing.assert_close(adapter, torch.zeros_like(adapter), rtol=0, atol=1e-7)
        fad(student.detach().requires_grad_(), teacher)  # what follows the statistics
        fad.zero_grad()


# ---------------------------------------------------------------------------------------- a stray

PULLING = {name: make for name, make in DENSITIES.items() if "embedding" not in name}
PULLING["paired"] = CORRESPONDING["paired"]


def strays(seed: int, distances):
    """A set, and in each copy of it one point moved away: in a random direction, and so far."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(len(distances), N, C, generator=generator, dtype=torch.float64)
    direction = torch.randn(len(distances), C, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    center = teacher.mean(1)
    student = teacher.clone()
    student[:, 0] = center + direction * distances[:, None]
    return student.requires_grad_(), teacher, direction


@pytest.mark.parametrize("name", PULLING)
@pytest.mark.parametrize("seed", range(3))
def test_a_stray_is_pulled_inward(name, seed):
    """In every direction, from the edge of the set to where no density is left of it."""
    # The spread of the set is sqrt(6); a Gaussian witness does not reach as far.
    furthest = 12 if "gaussian" in name else 1e4
    distances = torch.logspace(0.7, torch.tensor(furthest).log10(), 100, dtype=torch.float64)
    student, teacher, direction = strays(seed, distances)
    discriminator = PULLING[name]()
    scores = discriminator(Game.of(student, teacher), "student")
    (gradient,) = torch.autograd.grad(-scores.sum(), student)
    inward = (-gradient[:, 0] * -direction).sum(-1)
    assert (inward > 0).all()
    # And is by far the one that is pulled most, and thought least of.
    if not discriminator.witness:
        assert (scores[:, 0] == scores.amin(1)).all()
        assert (gradient.norm(dim=-1).argmax(1) == 0).all()


@pytest.mark.parametrize("name", PULLING)
def test_one_more_point_is_pulled_inward(name):
    """A point too many, where all the others agree."""
    distances = torch.logspace(0.7, 1, 100, dtype=torch.float64)
    student, teacher, direction = strays(0, distances)
    more = torch.cat([teacher[:, torch.randperm(N)], student[:, :1]], 1)
    if PULLING[name]().corresponding:
        teacher = torch.cat([teacher, teacher.mean(1, keepdim=True)], 1)
        more = torch.cat([teacher[:, :-1], student[:, :1]], 1)
    scores = PULLING[name]()(Game.of(more, teacher), "student")
    (gradient,) = torch.autograd.grad(-scores.sum(), student)
    assert ((-gradient[:, 0] * -direction).sum(-1) > 0).all()


@pytest.mark.parametrize("name", PULLING)
def test_a_stray_is_pulled_inward_by_the_loss(name):
    """Through the standardisation, whose gradient neither moves nor stretches a channel."""
    distances = torch.linspace(5, 10, 50, dtype=torch.float64)
    student, teacher, direction = strays(1, distances)
    fad = into_loss(PULLING[name]())
    fad(student, teacher).backward()
    assert ((-student.grad[:, 0] * -direction).sum(-1) > 0).all()
