"""What there is to log, and what it tells about a run that goes wrong."""

from __future__ import annotations

import copy

import pytest
import torch

from fad_loss import FeatureAdversarialLoss

from .cases import STUDENT, TEACHER, blind, features, make

NAMES = {
    "student_loss",
    "discriminator_loss",
    "real_score",
    "fake_score",
    "separability",
    "penalty",
    "weight",
    "non_finite",
    "small_clouds",
    "untrained_parameters",
}


@pytest.mark.parametrize("name", ["teacher", "point", "cloud"])
def test_are_detached_scalars_that_stay(name):
    fad = make(name, weight=3.0)
    student, teacher, _ = features()
    loss = fad(student, teacher)
    statistics = fad.statistics()
    assert set(statistics) == NAMES
    assert all(v.shape == () and not v.requires_grad for v in statistics.values())
    # The weight is that of the gradient; a discriminator that does not learn has no loss.
    total = statistics["student_loss"]
    if fad.discriminator.learns:
        total = total + statistics["discriminator_loss"]
    torch.testing.assert_close(total, loss.detach())
    assert statistics["weight"] == 3
    assert statistics["non_finite"] == 0
    assert 0 <= statistics["separability"] <= 1
    before = {k: v.item() for k, v in statistics.items()}
    fad(student * 2, teacher)
    assert {k: v.item() for k, v in statistics.items()} == before


def test_separability_says_whether_features_can_be_told_apart():
    fad = FeatureAdversarialLoss(
        TEACHER, TEACHER, adapter="identity", normalize=False, max_points=None
    )
    teacher = torch.randn(4, 200, TEACHER)
    fad(teacher + 5, teacher)
    assert fad.statistics()["separability"] > 0.95
    assert fad.statistics()["real_score"] > fad.statistics()["fake_score"] + 1
    fad(teacher[:, torch.randperm(200)], teacher)
    torch.testing.assert_close(fad.statistics()["separability"], torch.tensor(0.5))


def test_parameters_that_no_optimizer_got_are_counted():
    fad = make("point", objective="non_saturating")
    count = len(list(fad.parameters()))
    student, teacher, _ = features()
    forgotten = torch.optim.SGD([student], lr=0.1)
    fad(student, teacher).backward()
    forgotten.step()
    assert fad.statistics()["untrained_parameters"] == count
    half = torch.optim.SGD(fad.adapter.parameters(), lr=0.1)
    half.step()
    assert fad.statistics()["untrained_parameters"] == count - 2
    everything = torch.optim.SGD(fad.parameters(), lr=0.1)
    everything.step()
    assert fad.statistics()["untrained_parameters"] == 0


def test_moving_converting_copying_and_loading_train_nothing():
    fad = make("point", dtype=torch.float32)
    count = len(list(fad.parameters()))
    for other in (
        copy.deepcopy(fad).double(),
        copy.deepcopy(fad).bfloat16(),
        copy.deepcopy(fad).to("cpu"),
    ):
        assert other.statistics()["untrained_parameters"] == count
    with torch.no_grad():
        fad.adapter.weight.add_(1)
    assert fad.bfloat16().statistics()["untrained_parameters"] == count - 1
    other = make("point", dtype=torch.bfloat16)
    other.load_state_dict(fad.state_dict())
    assert other.statistics()["untrained_parameters"] == count


def test_made_on_meta_and_loaded():
    with torch.device("meta"):
        fad = FeatureAdversarialLoss(STUDENT, TEACHER, discriminator="point")
    fad = fad.to_empty(device="cpu")
    fad.load_state_dict(
        FeatureAdversarialLoss(STUDENT, TEACHER, discriminator="point").state_dict()
    )
    student, teacher, _ = features(dtype=torch.float32)
    assert fad(student, teacher).isfinite()
    assert fad.statistics()["untrained_parameters"] == len(list(fad.parameters()))


def test_swapped_weights_are_trained_weights():
    fad = make("teacher")
    with torch.no_grad():
        fad.adapter.weight.copy_(fad.adapter.weight.flip(0))
    assert fad.statistics()["untrained_parameters"] == 1


def test_frozen_parameters_are_not_expected_to_train():
    fad = make("point")
    fad.discriminator.requires_grad_(False)
    assert fad.statistics()["untrained_parameters"] == 2
    fad.adapter.requires_grad_(False)
    assert fad.statistics()["untrained_parameters"] == 0


def test_non_finite_features_are_counted_where_nobody_looks(monkeypatch):
    # As on a GPU, where a look would wait for the device: the loss is NaN for a GradScaler to see,
    # the count tells why, and the state is not spoilt for the steps that follow.
    blind(monkeypatch)
    fad = make("point", lecam=0.1, dtype=torch.float32)
    student, teacher, _ = features(dtype=torch.float32)
    fad(student, teacher)
    state = copy.deepcopy(fad.state_dict())
    broken = student.detach().clone()
    broken[0, 0, 0], broken[1, 2, 3] = torch.nan, torch.inf
    assert not fad(broken, teacher).isfinite()
    assert fad.statistics()["non_finite"] == 2 * TEACHER
    overflowed = teacher.clone()
    overflowed[0, 0, 0] = torch.inf
    assert not fad(student, overflowed).isfinite()
    assert fad.statistics()["non_finite"] == 1
    for name in ("average_scores", "teacher_units.mean", "teacher_units.variance"):
        assert fad.get_buffer(name).isfinite().all()
    torch.testing.assert_close(fad.average_scores, state["average_scores"])
    assert fad.teacher_units.batches == 2
    assert fad(student, teacher).isfinite()
    assert fad.statistics()["non_finite"] == 0


def test_nothing_is_logged_from_a_loss_that_has_not_run():
    statistics = make("teacher").statistics()
    assert set(statistics) == NAMES
    assert statistics["discriminator_loss"] == 0


def test_are_those_of_training():
    fad = make("teacher")
    student, teacher, _ = features()
    fad(student, teacher)
    before = fad.statistics()
    with torch.no_grad():
        fad(student + 10, teacher)
    fad.eval()(student + 10, teacher)
    assert fad.statistics() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stay_in_float32_where_half_precision_would_overflow(dtype):
    fad = FeatureAdversarialLoss(4, 4, weight=1e5, warmup_steps=0).to(dtype)
    student, teacher = torch.randn(2, 64, 4), 1000 * torch.randn(2, 64, 4)
    fad(student.to(dtype), teacher.to(dtype))
    assert fad.teacher_units.batches == 1
    torch.testing.assert_close(
        fad.teacher_units.variance, teacher.flatten(0, 1).var(0, correction=0), rtol=0.02, atol=0
    )
    assert fad.statistics()["weight"] == 1e5
