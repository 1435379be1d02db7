"""Second derivatives in float64 of distances, penalties and the loss: ragged, masked, self-terms.

Those of the operations are in tests/ops/test_gradients.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fad_loss import (
    FeatureAdversarialLoss,
    TeacherDiscriminator,
    discriminators,
    distances,
    objectives,
    ops,
    penalties,
    ragged,
)
from fad_loss._game import Game
from fad_loss._ragged import packed

KERNELS = [
    ops.Gaussian([0.7, 2.0]),
    ops.Laplacian(1.3),
    ops.Energy(),
    ops.InverseMultiquadric(1.1),
]
LENGTHS = [3, 2, 4], [2, 5, 3]


def pair(C: int, n: int = 9, m: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed points of two ragged batches."""
    return tuple(torch.randn(k, C, dtype=torch.float64).requires_grad_() for k in (n, m))


def check(function, *inputs):
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("C", [2, 17])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_mmd_of_ragged_clouds(kernel, unbiased, C):
    def distance(x, y):
        clouds = (ragged(t, lengths=n) for t, n in zip((x, y), LENGTHS, strict=True))
        return distances.mmd(*clouds, kernel, unbiased=unbiased, reduction="none")

    check(distance, *pair(C))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_mmd_of_a_set_that_moves_as_a_whole(kernel):
    """x and y depend on each other: all three terms are self-terms."""

    def distance(x):
        return distances.mmd(x.unsqueeze(0), x.unsqueeze(0).square() + 2, kernel)

    check(distance, pair(3)[0])


@pytest.mark.parametrize("C", [2, 17])
def test_chamfer_of_ragged_clouds(C):
    def distance(x, y):
        clouds = (ragged(t, lengths=n) for t, n in zip((x, y), LENGTHS, strict=True))
        return distances.chamfer(*clouds, reduction="none")

    check(distance, *pair(C))


DISCRIMINATORS = {
    "log_ratio": TeacherDiscriminator(bandwidths=[0.3, 1.0]),
    "witness": TeacherDiscriminator(mode="witness"),
}


@pytest.mark.parametrize("form", ["dense", "masked", "ragged"])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_scores_and_their_penalty(name, form):
    """Scores twice; R1, which is made of first derivatives, once. The sets stand still."""
    discriminator = DISCRIMINATORS[name]
    student, teacher = (torch.randn(2, n, 3, dtype=torch.float64) for n in (4, 5))
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    masks = (mask, torch.tensor([[True] * 5, [True, True, False, True, False]]))

    def game(features):
        if form == "ragged":
            clouds = ragged(features.flatten(0, 1), lengths=[3, 5])
            return Game.of(clouds, ragged(teacher.flatten(0, 1), lengths=[6, 4]))
        return Game.of(features, teacher, mask=masks if form == "masked" else None)

    sets = discriminator._compared(game(student))[1]

    def score(features):
        return discriminator._score(discriminator._in_units(game(features)).student, sets)

    def penalty(features):
        return penalties.r1(score(features).view(2, -1), features)

    points = torch.randn(2, 4, 3, dtype=torch.float64).requires_grad_()
    check(score, points)
    assert gradcheck(penalty, (points,), fast_mode=True)


@pytest.mark.parametrize("discriminator", ["point", "cloud"])
@pytest.mark.parametrize("objective", ["non_saturating", "wasserstein"])
def test_the_loss(discriminator, objective):
    """The student's term by the student's features; in evaluation, so that nothing drifts."""
    torch.manual_seed(0)
    options = {"objective": objective, "adapter": "identity", "weight": 1.0, "warmup_steps": 0}
    fad = FeatureAdversarialLoss(3, 3, discriminator=discriminator, **options).double()
    student, teacher = (torch.randn(2, n, 3, dtype=torch.float64) for n in (5, 6))
    fad(student.requires_grad_(), teacher)
    fad.eval()
    check(lambda s: fad(s, teacher), torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_())


def smooth_head() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))


LEARNED = {
    "point": lambda: discriminators.PointDiscriminator(3, hidden=4),
    "neighborhood": lambda: discriminators.NeighborhoodDiscriminator(3, hidden=4, k=2),
    "cloud": lambda: discriminators.CloudDiscriminator(3, hidden=4),
    "match": lambda: discriminators.MatchDiscriminator(3),
    "match by energy": lambda: discriminators.MatchDiscriminator(3, distance="energy"),
    "match by chamfer": lambda: discriminators.MatchDiscriminator(3, distance="chamfer"),
    "head": lambda: discriminators.HeadDiscriminator(smooth_head()),
    "head of means": lambda: discriminators.HeadDiscriminator(smooth_head(), pool="mean"),
    "head with levels": lambda: discriminators.HeadDiscriminator(smooth_head(), levels=["0", ""]),
    "head of points": lambda: discriminators.HeadDiscriminator(smooth_head(), pool=None),
}


DENSE_ONLY = {"match by energy", "match by chamfer"}


@pytest.mark.parametrize(
    "name, form",
    [(n, f) for n in LEARNED for f in ("dense", "masked", "ragged")[: 2 if n in DENSE_ONLY else 3]],
)
def test_discriminators_with_layers(name, form):
    """Scores and R1 by the student's features; and R1 by the parameters, as training has it."""
    torch.manual_seed(0)
    discriminator = LEARNED[name]().double().eval()
    discriminator.prepare(3)
    student, teacher = (torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])

    def game(features):
        if form == "ragged":
            clouds = (ragged(t.flatten(0, 1), lengths=[3, 5]) for t in (features, teacher))
            return Game.of(*clouds)
        return Game.of(features, teacher, mask=mask if form == "masked" else None)

    def score(features):
        return packed(discriminator(game(features), "student"))

    def penalty(features):
        scores = score(features)
        return penalties.r1(scores if len(scores) == 2 else scores.view(2, -1), features)

    check(score, student.requires_grad_())
    assert gradcheck(penalty, (student,), fast_mode=True)
    parameters = tuple(p for p in discriminator.parameters() if p.requires_grad)
    if parameters:
        fixed = student.detach().requires_grad_()
        assert gradcheck(lambda *_: penalty(fixed), parameters, fast_mode=True)


@pytest.mark.parametrize("objective", list(objectives.OBJECTIVES))
def test_objectives_and_lecam(objective):
    fake, real = (torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    mask = torch.rand(3, 4) > 0.3
    judge = objectives.get_objective(objective)
    check(lambda f, r: judge.student(f, r, mask=(mask, None)), fake, real)
    check(lambda f, r: judge.discriminator(r, f, mask=(mask, None)), fake, real)
    check(lambda f, r: penalties.lecam(r, f, 0.3, -0.2, mask=(mask, None)), fake, real)
