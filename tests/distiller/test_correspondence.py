"""The discriminator that a distiller takes if none is named: "paired" where points correspond."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fad_loss import Distiller, HeadDiscriminator, TeacherDiscriminator

from .networks import DGCNN, PointNet2, Tuples, clouds


class Sorted(DGCNN):
    """Its features are those of the points in the order of their x, whatever theirs was."""

    def forward(self, x):
        order = x[:, :1].argsort(2).expand(-1, 3, -1)
        return super().forward(x.gather(2, order))


class Along(nn.Module):
    """A convolution along the points: feature i is of three of them."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(3, width, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def made(student, teacher, layers, **options):
    torch.manual_seed(0)
    options = {"example": clouds(), **options}
    distiller = Distiller(student(4), teacher(6), layers, **options)
    return [fad.discriminator for fad in distiller.losses.values()]


def paired(discriminator):
    assert isinstance(discriminator, TeacherDiscriminator)
    return discriminator.corresponding


@pytest.mark.parametrize(
    "student, teacher, layers",
    [
        (DGCNN, DGCNN, {"conv5": "conv5"}),
        (Tuples, Tuples, {"second": "second"}),
        (Tuples, DGCNN, {"second": "conv5"}),  # points last in one of them
        (DGCNN, DGCNN, {"linear2": "linear2"}),  # cloud i is cloud i
        (PointNet2, PointNet2, {"pool": "pool"}),
        (DGCNN, PointNet2, {"linear2": "pool"}),
    ],
)
def test_paired_where_points_or_clouds_correspond(student, teacher, layers):
    (discriminator,) = made(student, teacher, layers)
    assert paired(discriminator)


@pytest.mark.parametrize(
    "student, teacher, layers, options",
    [
        (PointNet2, PointNet2, {"sa1[1]": "sa1[1]"}, {"layout": "bcn"}),
        (DGCNN, PointNet2, {"conv5": "sa1[1]"}, {"layout": "bcn"}),
        (Sorted, DGCNN, {"conv5": "conv5"}, {}),
        (DGCNN, Sorted, {"conv5": "conv5"}, {}),
        (Along, Along, {"conv": "conv"}, {}),
        (DGCNN, DGCNN, {"conv5": "conv5"}, {"example": torch.zeros(2, 3, 24)}),  # shows nothing
    ],
)
def test_sets_elsewhere(student, teacher, layers, options):
    (discriminator,) = made(student, teacher, layers, **options)
    assert not paired(discriminator)


def test_paired_where_positions_are_named():
    places = {"sa1[1]": ("sa1[0]", "sa1[0]")}
    layers = {"sa1[1]": "sa1[1]", "sa2[1]": "sa2[1]"}
    one, other = made(PointNet2, PointNet2, layers, layout="bcn", positions=places)
    assert paired(one)
    assert not paired(other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layers, points = {"second": "second"}, clouds().to(dtype)
    distiller = Distiller(Tuples(4).to(dtype), Tuples(6).to(dtype), layers, example=points)
    (fad,) = distiller.losses.values()
    assert paired(fad.discriminator)


def test_each_pair_of_layers_has_its_own():
    layers = {"sa1[1]": "sa1[1]", "pool": "pool"}
    of_points, of_clouds = made(PointNet2, PointNet2, layers, layout="bcn")
    assert not paired(of_points)
    assert paired(of_clouds)


def test_what_is_named_is_taken():
    layers = {"conv5": "conv5", "linear2": ("linear2", HeadDiscriminator(nn.Linear(6, 5)))}
    others = {"conv5": "conv5", "linear2": ("linear2", "match")}
    one, judge = made(DGCNN, DGCNN, {**layers, "conv5": ("conv5", "teacher")})
    assert not paired(one)
    assert isinstance(judge, HeadDiscriminator)
    one, other = made(DGCNN, DGCNN, others, discriminator="teacher")
    assert not paired(one)
    assert not isinstance(other, TeacherDiscriminator)
    assert paired(made(DGCNN, DGCNN, {"conv5": "conv5"}, discriminator=None)[0])


def test_looking_leaves_networks_and_random_numbers_alone():
    student, teacher = DGCNN(4), DGCNN(6)
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    states = []
    for discriminator in (None, "paired"):
        torch.manual_seed(3)
        layers = {"conv5": "conv5"}
        Distiller(student, teacher, layers, example=clouds(), discriminator=discriminator)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.testing.assert_close((student.state_dict(), teacher.state_dict()), before)
    assert student.training
