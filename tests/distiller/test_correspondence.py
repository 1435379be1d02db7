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
        (PointNet2, PointNet2, {"sa1[1]": "sa1[1]"}, {"layout": "bcn", "positions": {}}),
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


class Samples(nn.Module):
    """Every so-many-th point and its feature, as the test wants them returned."""

    def __init__(self, width, every, returned, centered=False):
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.every, self.returned, self.centered = every, returned, centered
        self.sampling = nn.Identity()

    def forward(self, x):
        # Where a cloud has its points first, they are last here, and the other way round.
        points = (x.mT if x.shape[1] == 3 else x)[:, :: self.every]
        features = self.linear(points)
        if self.centered:
            points = points - points.mean(1, keepdim=True)
        return self.sampling(self.returned(points, features))


RETURNED = {
    "tuple": (lambda p, f: (p, f), "sampling[1]", "sampling[0]"),
    "points last": (lambda p, f: (f.mT, p.mT), "sampling[0]", "sampling[1]"),
    "mapping": (lambda p, f: {"x": f, "pos": p, "n": 3}, "sampling[x]", "sampling[pos]"),
    "nested": (lambda p, f: [None, (p.mT, f)], "sampling[1][1]", "sampling[1][0]"),
    "others beside": (
        lambda p, f: (f.mean(1), 2 * p, f, f[..., :3], p), "sampling[2]", "sampling[4]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("points_last", [False, True])
@pytest.mark.parametrize("width", [5, 8])  # 8 points: as many as channels
@pytest.mark.parametrize("kind", RETURNED)
def test_positions_are_found_beside_the_features(kind, width, points_last):
    returned, layer, place = RETURNED[kind]
    student, teacher = Samples(width, 3, returned), Samples(width + 3, 2, returned)
    points = clouds(N=24)
    points = points if points_last else points.mT
    layout = "bcn" if kind == "points last" else "bnc"
    found = Distiller(student, teacher, {layer: layer}, example=points)
    assert f"{layer!r}: {layer!r} at {place!r} and {place!r}" in repr(found)
    (fad,) = found.losses.values()
    assert paired(fad.discriminator)
    named = Distiller(
        student, teacher, {layer: layer}, example=points,
        positions={layer: (place, place)}, layout=layout,
    )  # fmt: skip
    named.losses.load_state_dict(found.losses.state_dict())
    losses = []
    for distiller in (found, named):
        torch.manual_seed(0)
        losses.append(distiller(points)[1])
    assert torch.equal(*losses)


def test_positions_that_are_given_go_before_those_that_were_found():
    returned, layer, _ = RETURNED["tuple"]
    distiller = Distiller(
        Samples(5, 3, returned), Samples(7, 2, returned), {layer: layer}, example=clouds()
    )
    points = clouds().mT
    known = points[:, ::3], points[:, ::2]
    losses = []
    for places in (None, known, (known[0].flip(1), known[1])):
        torch.manual_seed(0)
        losses.append(distiller(clouds(), positions=places)[1])
    assert torch.equal(*losses[:2])
    assert losses[2] != losses[0]


def test_as_many_channels_as_points_are_not_guessed():
    layers = {"sa1[1]": "sa1[1]"}
    networks = PointNet2(12), PointNet2(6)  # 12 points, whatever the example has
    with pytest.raises(ValueError, match=r'student layer .* say layout="bnc"'):
        Distiller(*networks, layers, example=clouds())
    assert " at " in repr(Distiller(*networks, layers, example=clouds(), layout="bcn"))


def test_positions_of_all_points_are_not_needed():
    student, teacher = (Samples(width, 1, RETURNED["tuple"][0]) for width in (5, 7))
    distiller = Distiller(student, teacher, {"sampling[1]": "sampling[1]"}, example=clouds())
    assert " at " not in repr(distiller)
    assert list(distiller._of_student.layers) == ["sampling[1]"]


@pytest.mark.parametrize(
    "options",
    [
        {"positions": {}},
        {"discriminator": "teacher"},
        {"student": Samples(5, 3, lambda p, f: (p, f), centered=True)},
        {"student": Samples(5, 3, lambda p, f: (p.double(), f))},
        {"student": Samples(5, 3, lambda p, f: (p[:, 1:], f))},
        {"teacher": Samples(5, 2, lambda p, f: (f[..., :3], f))},
        {"teacher": Samples(5, 2, lambda p, f: (f[..., :3],) * 2)},
        {"student": Samples(5, 3, lambda p, f: (p[:, :1].expand_as(p), f))},
    ],
    ids=str,
)
def test_what_is_no_position_is_not_taken_for_one(options):
    def both(points, features):
        return points, features

    torch.manual_seed(0)
    student = options.pop("student", Samples(5, 3, both))
    teacher = options.pop("teacher", Samples(7, 2, both))
    layers = {"sampling[1]": "sampling[1]"}
    made = Distiller(student, teacher, layers, example=clouds().mT, layout="bnc", **options)
    (fad,) = made.losses.values()
    assert not paired(fad.discriminator)
    assert " at " not in repr(made)


def test_positions_that_are_found_serve_who_asks_for_pairs():
    layers = {"sa1[1]": "sa1[1]", "sa2[1]": ("sa2[1]", "match")}
    torch.manual_seed(0)
    distiller = Distiller(
        PointNet2(4), PointNet2(6, (10, 5)), layers, example=clouds(), discriminator="paired"
    )
    shown = repr(distiller)
    assert "'sa1[1]': 'sa1[1]' at 'sa1[0]' and 'sa1[0]'" in shown
    assert "'sa2[1]': 'sa2[1]'}" in shown
    assert distiller(clouds())[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layers, points = {"second": "second"}, clouds().to(dtype)
    distiller = Distiller(Tuples(4).to(dtype), Tuples(6).to(dtype), layers, example=points)
    (fad,) = distiller.losses.values()
    assert paired(fad.discriminator)


def test_each_pair_of_layers_has_its_own():
    layers = {"sa1[1]": "sa1[1]", "pool": "pool"}
    of_points, of_clouds = made(PointNet2, PointNet2, layers, layout="bcn", positions={})
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
