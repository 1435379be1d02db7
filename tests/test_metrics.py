"""Metrics against closed forms and against slow definitions; what collapsed networks score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fad_loss import ragged
from fad_loss.metrics import cka, information_lost, neighbor_agreement, set_distances
from fad_loss.metrics.rows import accurate


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rotation(channels: int) -> Tensor:
    return torch.linalg.qr(points(channels, channels, seed=9)).Q


def gram_cka(x: Tensor, y: Tensor) -> Tensor:
    """The definition, with the n x n matrices."""
    n = len(x)
    center = torch.eye(n) - 1 / n
    center = center.double()
    K, L = center @ (x @ x.T) @ center, center @ (y @ y.T) @ center
    return (K * L).sum() / (K.norm() * L.norm())


def gram_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al., theorem 2, as it stands."""
    n = len(x)
    K, L = (x @ x.T).fill_diagonal_(0), (y @ y.T).fill_diagonal_(0)
    one = torch.ones(n, dtype=torch.float64)
    return (
        (K @ L).trace()
        + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ K @ L @ one)
    ) / (n * (n - 3))


# -- CKA -----------------------------------------------------------------------------------------


@given(n=st.integers(2, 12), channels=st.integers(1, 9), others=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_cka_is_the_definition(n, channels, others):
    x, y = points(n, channels) + 3, points(n, others, seed=1) - 5
    assert torch.allclose(cka(x, y), gram_cka(x, y), rtol=1e-9)
    assert torch.allclose(cka(y, x), cka(x, y), rtol=1e-12)
    assert -1e-12 <= cka(x, y) <= 1 + 1e-12


@given(n=st.integers(4, 12), channels=st.integers(1, 9), others=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_debiased_cka_is_the_definition(n, channels, others):
    x, y = points(n, channels) + 3, points(n, others, seed=1) - 5
    scale = gram_hsic(x, x).clamp_min(0).sqrt() * gram_hsic(y, y).clamp_min(0).sqrt()
    expected = gram_hsic(x, y) / scale if scale > 1e-9 else torch.zeros_like(scale)
    assert torch.allclose(cka(x, y, debiased=True), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_ignores_rotation_scale_and_shift(debiased):
    x = points(20, 6)
    moved = 3 * x @ rotation(6) + 100
    assert cka(x, moved, debiased=debiased).item() == pytest.approx(1, abs=1e-9)
    y = points(20, 4, seed=1)
    assert torch.allclose(
        cka(moved, y, debiased=debiased), cka(x, y, debiased=debiased), rtol=1e-7, atol=1e-9
    )


def test_debiased_cka_of_unrelated_features_is_about_zero():
    biased, debiased = [], []
    for seed in range(40):
        x, y = points(30, 100, seed=seed), points(30, 100, seed=1000 + seed)
        biased.append(cka(x, y))
        debiased.append(cka(x, y, debiased=True))
    assert torch.stack(biased).mean() > 0.7
    assert torch.stack(debiased).mean().abs() < 0.02


# -- What all of them do -------------------------------------------------------------------------

PAIRED = {
    "cka": cka,
    "debiased cka": lambda x, y, **o: cka(x, y, debiased=True, **o),
    "agreement": lambda x, y, **o: neighbor_agreement(x, y, 2, **o),
    "lost": information_lost,
}


@pytest.mark.parametrize("name", PAIRED)
def test_points_are_averaged_over_clouds(name):
    metric = PAIRED[name]
    x, y = points(6, 5, 3), points(6, 4, 2, seed=1)
    expected = metric(x.mean(1), y.mean(1))
    assert torch.allclose(metric(x, y), expected, rtol=1e-12)
    as_ragged = ragged(x.flatten(0, 1), lengths=[5] * 6)
    assert torch.allclose(metric(as_ragged, y), expected, rtol=1e-12)
    # In any order of points.
    assert torch.allclose(metric(x.flip(1), y), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["cka", "debiased cka", "lost"])
def test_paired_points_count_by_themselves(name):
    metric = PAIRED[name]
    x, y = points(3, 4, 3), points(3, 4, 2, seed=1)
    expected = metric(x.flatten(0, 1), y.flatten(0, 1))
    assert torch.equal(metric(x, y, paired=True), expected)
    lengths = [5, 1, 6]
    clouds = (ragged(t.flatten(0, 1), lengths=lengths) for t in (x, y))
    assert torch.equal(metric(*clouds, paired=True), expected)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_and_gradients(name, dtype):
    x = (points(12, 3) + 2).to(dtype).requires_grad_()
    y = (points(12, 3).square()).to(dtype).requires_grad_()
    value = PAIRED[name](x, y)
    assert value.dtype == torch.float64
    assert value.dim() == 0
    assert not value.requires_grad
    assert torch.equal(value, PAIRED[name](x.double(), y.double()))


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, -1e15])
@pytest.mark.parametrize("paired", [False, True])
def test_collapsed_features_have_a_defined_value(name, value, paired):
    x, constant = points(3, 5, 4), torch.full((3, 5, 2), value, dtype=torch.float32)
    if not paired:
        x, constant = points(6, 5, 4), constant.repeat(2, 1, 1)
    chance = 2 / 4 if paired else 2 / 5
    expected = {"cka": 0.0, "debiased cka": 0.0, "agreement": chance, "lost": 1.0}[name]
    metric = PAIRED[name]
    assert metric(constant, x, paired=paired).item() == pytest.approx(expected, abs=1e-12)
    if name == "lost":
        assert metric(x, constant, paired=paired).item() == 0
        assert metric(constant, constant, paired=paired).item() == 0
    else:
        assert metric(x, constant, paired=paired).item() == pytest.approx(expected, abs=1e-12)
        assert metric(constant, constant, paired=paired).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize(
    "x, y, error, message",
    [
        (torch.zeros(5, 2), torch.zeros(6, 2), ValueError, r"same clouds.*5 and 6 clouds"),
        (torch.zeros(1, 2), torch.zeros(1, 2), ValueError, r"at least \d clouds.*got 1 from"),
        (torch.zeros(5, 0), torch.zeros(5, 2), ValueError, r"at least one channel.*\(5, 0\)"),
        (torch.zeros(5), torch.zeros(5, 2), ValueError, r"got float32 of shape \(5\)"),
        (torch.zeros(5, 2).long(), torch.zeros(5, 2), TypeError, "expected float32.*int64"),
        (torch.full((5, 2), math.nan), torch.zeros(5, 2), ValueError, "10 of 10 values are NaN"),
        (torch.zeros(5, 2), torch.full((5, 2), math.inf), ValueError, "10 of 10 values are NaN"),
    ],
)
def test_bad_input(name, x, y, error, message):
    with pytest.raises(error, match=message):
        PAIRED[name](x, y)


def test_empty_clouds():
    x = ragged(points(7, 2), lengths=[3, 0, 4, 0])
    with pytest.raises(ValueError, match=r"x: expected no empty clouds.*got \[1, 3\] empty"):
        cka(x, points(4, 3))
    # Where points are what is compared, they do not matter.
    full = ragged(x.values(), lengths=[3, 4])
    for metric in PAIRED.values():
        assert torch.equal(metric(x, x, paired=True), metric(full, full, paired=True))


def test_bad_devices():
    x = torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"same device, got .* on cpu and .* on meta"):
        cka(x, x.to("meta"))
    with pytest.raises(ValueError, match=r"student, teacher: .* same device, got .* on meta"):
        set_distances(x, x.to("meta"))


def test_set_distances_name_their_empty_cloud():
    values = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"teacher: expected no empty clouds.*\[1\]"):
        set_distances(ragged(values, lengths=[2, 2]), ragged(values, lengths=[4, 0]))


# -- Neighbours ----------------------------------------------------------------------------------


def slow_agreement(x: Tensor, y: Tensor, k: int) -> float:
    shared = []
    for i in range(len(x)):
        sets = []
        for z in (x, y):
            distance = (z - z[i]).square().sum(1)
            distance[i] = math.inf
            sets.append(set(distance.argsort(stable=True)[:k].tolist()))
        shared.append(len(sets[0] & sets[1]) / k)
    return sum(shared) / len(shared)


@given(n=st.integers(3, 12), data=st.data())
@settings(max_examples=25, deadline=None)
def test_agreement_is_the_definition(n, data):
    k = data.draw(st.integers(1, n - 1))
    x, y = points(n, 3), points(n, 2, seed=1)
    expected = slow_agreement(x, y, k)
    assert neighbor_agreement(x, y, k).item() == pytest.approx(expected, abs=1e-12)
    assert neighbor_agreement(y, x, k).item() == pytest.approx(expected, abs=1e-12)
    if k < n - 1:
        chance = k / (n - 1)
        adjusted = neighbor_agreement(x, y, k, adjusted=True).item()
        assert adjusted == pytest.approx((expected - chance) / (1 - chance), abs=1e-12)


def test_agreement_within_clouds():
    x, y = points(3, 7, 3), points(3, 7, 2, seed=1)
    expected = sum(slow_agreement(a, b, 3) for a, b in zip(x, y, strict=True)) / 3
    assert neighbor_agreement(x, y, 3, paired=True).item() == pytest.approx(expected, abs=1e-12)
    # Ragged: every point counts once; small clouds agree trivially, a lone point says nothing.
    lengths = [12, 3, 1, 5]
    cloud, other = (ragged(t.flatten(0, 1), lengths=lengths) for t in (x, y))
    parts = [
        (slow_agreement(a, b, 3), len(a))
        for a, b in zip(x.flatten(0, 1).split(lengths), y.flatten(0, 1).split(lengths), strict=True)
        if len(a) > 3
    ]
    total = sum(value * n for value, n in parts) + 3
    value = neighbor_agreement(cloud, other, 3, paired=True)
    assert value.item() == pytest.approx(total / 20, abs=1e-12)
    adjusted = neighbor_agreement(cloud, other, 3, paired=True, adjusted=True)
    chance = [(value, n, 3 / (n - 1)) for value, n in parts]
    expected = sum(n * (value - c) / (1 - c) for value, n, c in chance) / 17
    assert adjusted.item() == pytest.approx(expected, abs=1e-12)


def test_agreement_of_the_same_and_of_unrelated_features():
    x = points(300, 8)
    assert neighbor_agreement(x, 5 * x @ rotation(8) + 1, 10).item() == 1
    unrelated = neighbor_agreement(x, points(300, 8, seed=1), 10, adjusted=True)
    assert abs(unrelated.item()) < 0.02


@pytest.mark.parametrize(
    "k, options, message",
    [
        (0, {}, "k: expected a positive integer, got 0"),
        (2.0, {}, r"k: expected a positive integer, got 2\.0"),
        (5, {}, "k: expected at most 4 neighbours for 5 items, got 5"),
        (4, {"adjusted": True}, "at most 3 neighbours for 5 items.*nothing can be adjusted"),
    ],
)
def test_bad_neighbors(k, options, message):
    x = points(5, 2)
    with pytest.raises(ValueError, match=message):
        neighbor_agreement(x, x, k, **options)


@pytest.mark.parametrize(
    "other", [points(2, 5, 2), points(3, 4, 2), ragged(points(8, 2), lengths=[3, 5])]
)
def test_paired_points_must_be_the_same(other):
    message = "x, y: with paired=True expected the same clouds with"
    with pytest.raises(ValueError, match=message):
        neighbor_agreement(points(2, 4, 2), other, 1, paired=True)
    if other.is_nested:
        with pytest.raises(ValueError, match=message):
            neighbor_agreement(ragged(points(8, 2), lengths=[4, 4]), other, 1, paired=True)


# -- Knowledge lost ------------------------------------------------------------------------------


def test_information_lost_is_leave_one_out_ridge_regression():
    student, teacher = points(15, 3), points(15, 4, seed=1)
    teacher = teacher + 2 * student @ points(3, 4, seed=2)
    best = math.inf
    centered = student - student.mean(0)
    largest = torch.linalg.matrix_norm(centered, 2).square()
    target = teacher - teacher.mean(0)
    total = 0.0
    for i in range(15):
        rest = [j for j in range(15) if j != i]
        total += (teacher[i] - teacher[rest].mean(0)).square().sum()
    for exponent in range(-12, 3):
        # The ridge's penalty is that of the full problem, as in the closed form: augmented rows
        # express it as data, so that leaving row i out is literal.
        penalty = (10.0**exponent * largest).sqrt() * torch.eye(3, dtype=torch.float64)
        error = 0.0
        for i in range(15):
            rest = [j for j in range(15) if j != i]
            ones = torch.ones(14, 1, dtype=torch.float64)
            rows = torch.cat([torch.cat([ones, centered[rest]], 1), F_pad(penalty)])
            right = torch.cat([target[rest], torch.zeros(3, 4, dtype=torch.float64)])
            weights = torch.linalg.lstsq(rows, right).solution
            guess = weights[0] + centered[i] @ weights[1:]
            error += (target[i] - guess).square().sum()
        best = min(best, (error / total).item())
    assert information_lost(student, teacher).item() == pytest.approx(min(best, 1), rel=1e-6)


def F_pad(penalty: Tensor) -> Tensor:  # noqa: N802
    return torch.cat([torch.zeros(len(penalty), 1, dtype=torch.float64), penalty], 1)


def test_information_lost_counts_missing_variance():
    teacher = points(2000, 8)
    assert information_lost(teacher, teacher) < 1e-9
    assert information_lost(teacher @ points(8, 8, seed=3) + 5, teacher) < 1e-6
    for kept in (2, 6):
        lost = information_lost(teacher[:, :kept], teacher).item()
        assert lost == pytest.approx(1 - kept / 8, abs=0.03)
    unrelated = information_lost(points(2000, 8, seed=4), teacher).item()
    assert unrelated == pytest.approx(1, abs=0.01)
    assert unrelated <= 1


def test_many_channels_and_few_clouds_do_not_pretend():
    # Plain regression would fit this perfectly, and plain CKA is near 1.
    student, teacher = points(30, 500), points(30, 500, seed=1)
    assert cka(student, teacher) > 0.9
    assert information_lost(student, teacher) > 0.9


def test_information_lost_ignores_scale_and_shift_of_either_side():
    student, teacher = points(50, 4), points(50, 6, seed=1)
    teacher[:, :4] += 2 * student
    expected = information_lost(student, teacher)
    assert 0.05 < expected < 0.95
    moved = information_lost(1e3 * student @ rotation(4) - 7, 1e-3 * teacher @ rotation(6) + 2)
    assert torch.allclose(moved, expected, rtol=1e-6)


def test_a_row_that_alone_decides_its_prediction():
    # Without the first row the student is constant; nothing here may be NaN.
    student = torch.zeros(4, 2)
    student[0, 0] = 1
    teacher = points(4, 3)
    lost = information_lost(student, teacher)
    assert 0 <= lost <= 1


# -- Set distances -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["chamfer", "energy", "sinkhorn"])
def test_set_distances_are_0_for_the_same_and_1_for_nothing(which):
    teacher = points(3, 20, 4) + torch.arange(3.0).reshape(3, 1, 1)
    same = set_distances(teacher.flip(1), teacher, which)
    assert list(same) == [which]
    assert same[which].item() == pytest.approx(0, abs=1e-6)
    nothing = teacher.mean((0, 1)).expand(3, 7, 4)
    assert set_distances(nothing, teacher, [which])[which].item() == pytest.approx(1, rel=1e-3)
    worse = set_distances(nothing + 10, teacher, which)[which]
    assert worse > 1
    better = set_distances(teacher + 0.1 * points(3, 20, 4, seed=1), teacher, which)[which]
    assert 0 < better < 0.2


def test_set_distances_by_hand():
    student = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.0], [2.0], [4.0]]], dtype=torch.float64)
    # Chamfer: (0 + 1) / 2 + (0 + 1 + 9) / 3; of the mean, 2: 0 + (4 + 0 + 4) / 3.
    chamfer = (1 / 2 + 10 / 3) / (8 / 3)
    # Energy: 2 E|s-t| - E|s-s'| - E|t-t'|.
    across = (0 + 2 + 4 + 1 + 1 + 3) / 6
    within_s, within_t = 2 / 4, (2 + 4 + 2 + 2 + 4 + 2) / 9
    energy = (2 * across - within_s - within_t) / (2 * 4 / 3 - within_t)
    result = set_distances(student, teacher)
    assert list(result) == ["chamfer", "energy"]
    assert result["chamfer"].item() == pytest.approx(chamfer, rel=1e-9)
    assert result["energy"].item() == pytest.approx(energy, rel=1e-9)
    assert not result["energy"].requires_grad


def test_set_distances_ignore_scale_shift_and_rotation():
    student, teacher = points(2, 9, 3), points(2, 12, 3, seed=1)
    expected = set_distances(student, teacher)
    q = rotation(3)
    moved = set_distances(50 * student @ q + 3, 50 * teacher @ q + 3)
    for name, value in expected.items():
        assert torch.allclose(moved[name], value, rtol=1e-8)


def test_set_distances_of_ragged_clouds_and_global_features():
    student, teacher = points(10, 3), points(12, 3, seed=1)
    dense = set_distances(student.reshape(2, 5, 3), teacher.reshape(2, 6, 3))
    for pair in (
        (ragged(student, lengths=[5, 5]), ragged(teacher, lengths=[6, 6])),
        (student.reshape(2, 5, 3), ragged(teacher, lengths=[6, 6])),
        (ragged(student, lengths=[5, 5]), teacher.reshape(2, 6, 3)),
    ):
        for name, value in set_distances(*pair).items():
            assert torch.allclose(value, dense[name], rtol=1e-10)
    flat = set_distances(student, teacher)
    one = set_distances(student[None], teacher[None])
    assert all(torch.equal(flat[name], one[name]) for name in flat)


def test_set_distances_of_a_constant_teacher():
    for size in (0.1, 0.3, 1e-20, 1e15):
        constant = torch.full((2, 7, 3), size)
        assert all(value == 0 for value in set_distances(constant, constant).values())
        assert all(value == math.inf for value in set_distances(2 * constant, constant).values())
    mixed = set_distances(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3, dtype=torch.float64))
    assert mixed["energy"] == 0


@pytest.mark.parametrize(
    "student, teacher, which, message",
    [
        (
            points(2, 4, 3),
            points(2, 4, 2),
            "energy",
            r"same number of clouds and channels.*adapter",
        ),
        (points(2, 4, 3), points(3, 4, 3), "energy", "same number of clouds and channels"),
        (points(2, 4, 3), points(2, 4, 3), "emd", "which: expected one of 'chamfer', 'energy'"),
        (points(2, 4, 3) * math.nan, points(2, 4, 3), "energy", "student: 24 of 24 values"),
        (points(2, 4, 3), points(2, 4, 3) * math.inf, "energy", "teacher: 24 of 24 values"),
        (points(4), points(4), "energy", r"student: expected \(B, N, C\)"),
    ],
)
def test_bad_sets(student, teacher, which, message):
    with pytest.raises(ValueError, match=message):
        set_distances(student, teacher, which)


def test_nothing_is_computed_in_float64_where_there_is_none():
    # What an Apple GPU gets; the dtype is chosen by device, and nothing else depends on it.
    class Elsewhere:
        device = torch.device("mps")

        def detach(self) -> Elsewhere:
            return self

        def to(self, dtype: torch.dtype) -> torch.dtype:
            return dtype

    assert accurate(Elsewhere()) == torch.float32  # type: ignore[arg-type,comparison-overlap]


@pytest.mark.parametrize("scale", [1e-100, 1e100, 1e200])
def test_extreme_scales_in_float64(scale):
    """Fourth powers of 1e100 are no numbers."""
    x = torch.randn(30, 5, dtype=torch.float64)
    y = x + 0.3 * torch.randn(30, 5, dtype=torch.float64)
    assert float(cka(x * scale, x)) == pytest.approx(1, abs=1e-12)
    for compare in (
        cka,
        lambda a, b: cka(a, b, debiased=True),
        lambda a, b: neighbor_agreement(a, b, 3),
        information_lost,
    ):
        assert float(compare(x * scale, y)) == pytest.approx(float(compare(x, y)), rel=1e-9)
    got = set_distances(x * scale, y * scale)
    for name, want in set_distances(x, y).items():
        assert float(got[name]) == pytest.approx(float(want), rel=1e-9)
