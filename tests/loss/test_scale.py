"""The loss is free of scale: nobody chose the units of the teacher's or the student's features.

`HeadDiscriminator` is not among those tried, for it takes the teacher's features in the units that
the head was trained on.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fad_loss import FeatureAdversarialLoss

from .cases import CLASSES, DISCRIMINATORS, STUDENT, TEACHER, gradients

STANDARDIZED = [name for name in DISCRIMINATORS if "head" not in name]
FACTORS = (1e-6, 1e-3, 1e3, 1e6)
STEPS = 4


def check(got: list[Tensor], expected: list[Tensor]) -> None:
    """At every step within 1e-4, of the whole: single elements may be what is left of rounding.

    So may be all of them, where a discriminator is linear ("custom"): its gradient moves all points
    alike, which is for the adapter to do; what is standardised does not feel it.
    """
    for mine, other in zip(got, expected, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-7


def run(
    name: str, student_scale: float = 1.0, teacher_scale: float = 1.0, **options
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Values, gradients at the student's features, and those of the parameters, step by step."""
    torch.manual_seed(0)
    discriminator = DISCRIMINATORS[name]()
    options.setdefault("warmup_steps", 0)
    fad = FeatureAdversarialLoss(STUDENT, TEACHER, discriminator=discriminator, **options)
    generator = torch.Generator().manual_seed(1)
    values, at_student, at_parameters = [], [], []
    for step in range(STEPS):
        # Channels of different spread, and a mean that wanders from step to step.
        student = torch.randn(3, 12, STUDENT, generator=generator)
        student = (student * torch.tensor([1.0, 0.3, 2.0, 5.0]) + 0.2 * step) * student_scale
        teacher = 2 * torch.randn(3, 12, TEACHER, generator=generator) + 1 - 0.3 * step
        student.requires_grad_()
        loss = fad(student, teacher * teacher_scale, torch.arange(3) % CLASSES)
        fad.zero_grad()
        loss.backward()
        values.append(loss.detach())
        at_student.append(student.grad)
        assert fad.adapter.weight.grad.abs().sum() > 0
        at_parameters.append(torch.cat([g.flatten() for g in gradients(fad).values()]))
    return values, at_student, at_parameters


@pytest.mark.parametrize("name", STANDARDIZED)
def test_the_teachers_scale_does_not_matter(name):
    expected = run(name)
    assert all(g.norm() > 1e-4 for g in expected[1]) or name == "custom"
    for factor in FACTORS:
        got = run(name, teacher_scale=factor)
        for mine, other in zip(got, expected, strict=True):
            check(mine, other)


@pytest.mark.parametrize("name", STANDARDIZED)
def test_the_students_scale_only_divides_its_gradient(name):
    values, at_student, at_parameters = run(name)
    for factor in FACTORS:
        got = run(name, student_scale=factor)
        check(got[0], values)
        check([g * factor for g in got[1]], at_student)
        check(got[2], at_parameters)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_the_weight_is_the_students_alone(name):
    """Neither the value nor what the adapter and the discriminator learn depends on it."""
    options = [{"weight": weight} for weight in (1.0, 1000.0, 0.0)]
    one, large, none = (run(name, **choice) for choice in options)
    check([g / 1000 for g in large[1]], one[1])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in none[1])
    for other in (large, none):
        assert other[0] == one[0]
        assert all(map(torch.equal, other[2], one[2]))
