"""The loss in the loops that people write."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from fad_loss import FeatureAdversarialLoss, HeadDiscriminator, capture_features, distances, ragged
from fad_loss.discriminators import Points

from .cases import DISCRIMINATORS, LEARNING, features, gradients, make

# The plan of a training run: how the student learns to be told apart no more.
GAMES = {
    "teacher": {},
    "witness": {"discriminator": "witness"},
    "teacher embedding": {"discriminator": "teacher embedding"},
    "point": {"discriminator": "point", "gradient_penalty": 0.1},
    "neighborhood": {"discriminator": "neighborhood"},
    "cloud": {"discriminator": "cloud", "objective": "relativistic"},
}


def arrived(fad, student):
    """The student's features in the teacher's units."""
    fad.eval()
    units = fad.student_units(Points.of(student)).features
    result = fad.teacher_units.restore(fad.adapter(units))
    fad.train()
    return result


@pytest.mark.parametrize("game", GAMES)
def test_a_student_learns_the_teacher_s_set(game):
    """A small network towards a teacher's features of the same clouds; other points of them."""
    options = dict(GAMES[game])
    fad = make(options.pop("discriminator", "teacher"), dtype=torch.float32, **options)
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6)).requires_grad_(False)
    student = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 4))
    clouds = torch.randn(4, 64, 3)
    teacher = 2 * network(clouds[:, 32:]) + 3

    def distance():
        with torch.no_grad():
            return distances.energy(arrived(fad, student(clouds[:, :32])), teacher)

    fad(student(clouds[:, :32]), teacher)  # statistics
    start = distance()
    rates = [
        {"params": [*student.parameters(), *fad.adapter.parameters()], "lr": 0.005},
        {"params": list(fad.discriminator.parameters()), "lr": 0.02},
    ]
    optimizer = torch.optim.Adam([r for r in rates if r["params"]], betas=(0.5, 0.9))
    for _ in range(150):
        optimizer.zero_grad()
        fad(student(clouds[:, :32]), teacher).backward()
        optimizer.step()
    # Mean and spread agree from the start, where features are standardised.
    assert distance() < 0.5 * start
    # Where scores are only compared, their common bias has no gradient.
    assert fad.statistics()["untrained_parameters"] <= (game == "cloud")


def test_the_teacher_s_head_teaches_its_classes():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    teacher = torch.randn(8, 16, 6) * 2
    with torch.no_grad():
        answers = head(teacher.amax(1)).argmax(1)
    fad = FeatureAdversarialLoss(
        6,
        6,
        adapter="identity",
        discriminator=HeadDiscriminator(head),
        objective="wasserstein",
        normalize=False,
    )
    student = torch.randn(8, 16, 6, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        fad(student, teacher).backward()
        optimizer.step()
    assert (head(student.amax(1)).argmax(1) == answers).all()


@pytest.mark.parametrize("name", ["teacher", "witness", "point", "neighborhood", "cloud"])
def test_accumulated_gradients_are_those_of_the_big_batch(name):
    # Whatever is averaged over clouds: not the running statistics, which see one batch at a time.
    fad = make(name, normalize=False)
    fad.discriminator.eval()  # nor the power iteration, which every forward advances
    parts = copy.deepcopy(fad)
    student, teacher, _ = features(batch=4)
    fad(student, teacher).backward()
    whole, student.grad = student.grad, None
    for chunk in (slice(0, 2), slice(2, 4)):
        (parts(student[chunk], teacher[chunk]) / 2).backward()
    torch.testing.assert_close(student.grad, whole)
    expected, got = gradients(fad), gradients(parts)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("name", LEARNING)
def test_two_forwards_before_one_backward(name):
    # Buffers change in place in every forward; what the first graph saved must not be among them.
    fad = make(name, warmup_steps=5, gradient_penalty=0.1, lecam=0.1)
    student, teacher, labels = features("N == M")
    first = fad(student, teacher, labels)
    second = fad(student * 0.9, teacher + 0.1, labels)
    (first + second).backward()
    assert student.grad.isfinite().all()


def test_checkpointed_and_captured_features():
    """The three lines, on a model that is not ours."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)).eval()
    student = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    fad = FeatureAdversarialLoss(4, 8)
    optimizer = torch.optim.AdamW([*student.parameters(), *fad.parameters()], lr=1e-2)
    x = torch.randn(24, 3)
    with capture_features(teacher, "1") as t, capture_features(student, "1") as s:
        for _ in range(3):
            with torch.no_grad():
                teacher(x)
            logits = student(x)
            optimizer.zero_grad()
            loss = logits.square().mean() + fad(s["1"].view(2, 12, 4), t["1"].view(2, 12, 8))
            loss.backward()
            optimizer.step()
    assert fad.statistics()["untrained_parameters"] == 0


def test_under_no_grad_of_the_student_alone():
    # A frozen student: the discriminator still learns.
    fad = make("point")
    student, teacher, _ = features()
    fad(student.detach(), teacher).backward()
    assert fad.discriminator.score_layer.bias.grad is not None


def test_gradients_reach_the_values_of_a_ragged_cloud_from_an_offset():
    values = torch.randn(11, 4, requires_grad=True)
    student = ragged(values, offset=torch.tensor([5, 11]))
    teacher = ragged(torch.randn(13, 6), offset=torch.tensor([4, 13]))
    make("teacher", dtype=torch.float32)(student, teacher).backward()
    assert (values.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", ["teacher", "cloud"])
def test_clouds_of_different_sizes_in_every_step(name):
    fad = make(name, dtype=torch.float32)
    for n, m in ((5, 9), (12, 3), (2, 2)):
        student = torch.randn(2, n, 4, requires_grad=True)
        fad(student, torch.randn(2, m, 6)).backward()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_warns_about_nothing(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student, teacher, labels = features("N == M", dtype=torch.float32)
        make(name, dtype=torch.float32)(student, teacher, labels).backward()
