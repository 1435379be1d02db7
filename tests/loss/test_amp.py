"""Autocast, half-precision features, and a GradScaler that has to see an overflow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from .cases import DISCRIMINATORS, blind, clouds, features, gradients, make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_autocast_gives_nearly_the_same(name, dtype):
    fad = make(name, dtype=torch.float32)
    same = copy.deepcopy(fad)
    student, teacher, labels = features("N == M", dtype=torch.float32)
    expected = same(student, teacher, labels)
    expected.backward()
    wanted, student.grad = student.grad, None
    with torch.autocast("cpu", dtype=dtype):
        loss = fad(student, teacher, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
    # A unit or two of these tiny networks is on the other side of 0; other points are nearest; and
    # a judge that is linear has no gradient that standardised features could follow.
    bound = 0.5 if "chamfer" in name else 0.2
    assert (student.grad - wanted).norm() < bound * wanted.norm() + 1e-6
    assert set(gradients(fad)) == set(gradients(same))
    assert all(g.dtype == torch.float32 for g in gradients(fad).values())


@pytest.mark.parametrize("name", ["teacher", "witness embedding", "point", "cloud conditioned"])
def test_autocast_with_the_penalties_and_ragged_clouds(name):
    learns = name != "teacher"
    options = {"gradient_penalty": 0.1, "lecam": 0.1} if learns else {}
    fad = make(name, dtype=torch.float32, **options)
    values, teacher, labels = features("ragged", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fad(clouds(values, "ragged"), teacher, labels)
    loss.backward()
    assert loss.isfinite()
    assert values.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["teacher", "point", "cloud"])
def test_half_precision_features_without_autocast(name, dtype):
    fad = make(name, dtype=torch.float32)
    student, teacher, _ = features(dtype=dtype)
    loss = fad(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == dtype
    exact = make(name, dtype=torch.float32)(student.float(), teacher.float())
    torch.testing.assert_close(loss, exact)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_loss_in_bfloat16_altogether(name):
    # What "bf16-true" of some trainers does to every module.
    fad = make(name, dtype=torch.bfloat16)
    student, teacher, labels = features("N == M", dtype=torch.bfloat16)
    fad(student, teacher, labels).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_double_precision_features_meet_a_loss_in_float32(name):
    student, teacher, labels = features("N == M")
    loss = make(name, dtype=torch.float32)(student, teacher, labels)
    expected = make(name)(student, teacher, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)


def test_mixed_precisions_of_student_and_teacher():
    student, teacher, _ = features(dtype=torch.float32)
    fad = make("teacher", dtype=torch.float32)
    loss = fad(student, teacher.to(torch.float16))
    torch.testing.assert_close(
        loss, make("teacher", dtype=torch.float32)(student, teacher), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("name", ["teacher", "point"])
def test_grad_scaler(name, monkeypatch):
    # On CPU an overflow is an error, so the step that overflows is one where nobody looks.
    torch.manual_seed(0)
    student = nn.Linear(3, 4)
    fad = make(name, dtype=torch.float32, objective="non_saturating")
    parameters = [*student.parameters(), *fad.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    teacher = torch.randn(2, 9, 6)
    for overflow in (False, True, False):
        before = [p.detach().clone() for p in parameters]
        with torch.autocast("cpu", dtype=torch.float16):
            out = student(torch.randn(2, 7, 3))
            if overflow:
                blind(monkeypatch)
                out = out * 65504
                out = out * 65504
            loss = fad(out, teacher)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p, q) for p, q in zip(parameters, before, strict=True)]
        assert any(moved) != overflow
        assert all(p.isfinite().all() for p in parameters)
    assert scaler.get_scale() == 512
    assert fad.statistics()["untrained_parameters"] == 0
