"""One backward, two players: each gets the gradient of its own loss and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from fad_loss.objectives import OBJECTIVES

from .cases import (
    DISCRIMINATORS,
    LEARNING,
    POSSIBLE,
    clouds,
    features,
    gradients,
    make,
    options_of,
)

# Every discriminator with every objective; then every layout, with the objective that needs most.
GAMES = [
    *((name, layout, o) for name, layout in POSSIBLE for o in OBJECTIVES if layout == "N == M"),
    *((name, layout, "relativistic") for name, layout in POSSIBLE if layout != "N == M"),
    *((name, "N != M", "hinge") for name, layout in POSSIBLE if layout == "N != M"),
]


def equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("name, layout, objective", GAMES)
def test_each_player_gets_the_gradient_of_its_own_loss(name, layout, objective):
    fad = make(name, objective=objective, **options_of(layout))
    alone, other = copy.deepcopy(fad), copy.deepcopy(fad)
    student, teacher, labels = features(layout)
    before = student.detach().clone()

    torch.manual_seed(5)  # of ragged clouds, the order of the points is drawn
    loss = fad(clouds(student, layout), teacher, labels)
    loss.backward()
    together, got = student.grad.clone(), gradients(fad)

    student.grad = None
    torch.manual_seed(5)
    of_student = alone.student_loss(clouds(student, layout), teacher, labels)
    of_student.backward()
    expected = gradients(alone)
    assert set(expected) <= {"adapter.weight", "adapter.bias"}
    assert torch.equal(together, student.grad)
    assert student.grad.abs().sum() > 0

    student.grad = None
    torch.manual_seed(5)
    of_discriminator = other.discriminator_loss(clouds(student, layout), teacher, labels)
    if name in LEARNING:
        of_discriminator.backward()
        own = gradients(other)
        assert own
        assert all(key.startswith("discriminator.") for key in own)
        assert any(g.abs().sum() > 0 for g in own.values())
        expected |= own
    else:
        assert not of_discriminator.requires_grad
    assert student.grad is None
    equal(got, expected)
    # What nobody learns from is no part of the value.
    both = of_student + of_discriminator if name in LEARNING else of_student
    torch.testing.assert_close(loss, both, rtol=1e-14, atol=0)
    assert loss.shape == ()
    assert torch.equal(student, before)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_not_the_last_layer(name):
    layout = "N == M"
    once, twice = make(name), make(name)
    student, teacher, labels = features(layout)
    once(student, teacher, labels).backward()
    single, student.grad = student.grad, None
    (2 * twice(student, teacher, labels)).backward()
    torch.testing.assert_close(student.grad, 2 * single)
    expected, got = gradients(once), gradients(twice)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], 2 * value)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_the_weight_is_of_the_students_gradient_alone(name):
    layout = "N == M"
    plain, heavy = make(name), make(name, weight=3.0)
    student, teacher, labels = features(layout)
    value = plain(student, teacher, labels)
    value.backward()
    single, student.grad = student.grad, None
    heavier = heavy(student, teacher, labels)
    heavier.backward()
    assert torch.equal(heavier, value)
    torch.testing.assert_close(student.grad, 3 * single)
    expected, got = gradients(plain), gradients(heavy)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_teacher_that_requires_grad_gets_none_and_is_not_touched(name):
    network = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6)).double()
    network.eval()
    network[0].weight.requires_grad_(False)
    state = copy.deepcopy(network.state_dict())
    fad = make(name)
    student, _, labels = features("N == M")
    teacher = network(torch.randn(21, 3, dtype=torch.float64)).view(3, 7, 6)
    values = teacher.detach().clone()
    assert teacher.requires_grad
    fad(student, teacher, labels).backward()
    assert all(p.grad is None for p in network.parameters())
    assert not network.training
    assert [p.requires_grad for p in network.parameters()] == [False, True, True, True]
    equal(network.state_dict(), state)
    assert torch.equal(teacher, values)
    assert teacher.requires_grad


@pytest.mark.parametrize("name", ["point", "teacher embedding", "witness embedding"])
def test_discriminators_frozen_by_their_owner_stay_frozen(name):
    fad = make(name)
    fad.discriminator.requires_grad_(False)
    student, teacher, labels = features()
    fad(student, teacher, labels).backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is None for p in fad.discriminator.parameters())


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_is_the_students_term_alone_and_changes_nothing(name, how):
    layout, objective = "N == M", "relativistic"
    fad = make(name, objective=objective, warmup_steps=10, **options_of(layout))
    student, teacher, labels = features(layout)
    fad(clouds(student, layout), teacher, labels)
    if how == "eval":
        fad.eval()
    state = copy.deepcopy(fad.state_dict())
    context = {"eval": torch.enable_grad, "no_grad": torch.no_grad}.get(how, torch.inference_mode)
    with context():
        values = student.detach().clone()
        got = fad(clouds(values, layout), teacher, labels)
        again = fad(clouds(values, layout), teacher, labels)
        expected = fad.student_loss(clouds(values, layout), teacher, labels)
        fad.discriminator_loss(clouds(values, layout), teacher, labels)
    assert torch.equal(got, expected)
    assert torch.equal(got, again)
    after = fad.state_dict()
    equal(after, state)


def test_evaluation_still_gives_the_student_a_gradient():
    fad = make("point").eval()
    student, teacher, labels = features()
    fad(student, teacher, labels).backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is None for p in fad.discriminator.parameters())


def test_two_optimizers_learn_what_one_does():
    one, two = make("point", normalize=False), make("point", normalize=False)
    student, teacher, _ = features("N == M")
    together = torch.optim.SGD([student, *one.parameters()], lr=0.1)
    apart = student.detach().clone().requires_grad_()
    of_student = torch.optim.SGD([apart, *two.adapter.parameters()], lr=0.1)
    of_discriminator = torch.optim.SGD(two.discriminator.parameters(), lr=0.1)
    for _ in range(4):
        together.zero_grad()
        one(student, teacher).backward()
        together.step()

        of_student.zero_grad()
        of_discriminator.zero_grad()
        two.student_loss(apart, teacher).backward()
        two.discriminator_loss(apart, teacher).backward()
        of_student.step()
        of_discriminator.step()
    torch.testing.assert_close(apart, student)
    torch.testing.assert_close(dict(two.named_parameters()), dict(one.named_parameters()))


def test_the_task_s_loss_joins_in():
    fad = make("point")
    student, teacher, labels = features()
    task = student.square().sum()
    (grad,) = torch.autograd.grad(task, student)
    fad_alone = copy.deepcopy(fad)
    fad_alone(student, teacher, labels).backward()
    alone, student.grad = student.grad, None
    (student.square().sum() + fad(student, teacher, labels)).backward()
    torch.testing.assert_close(student.grad, alone + grad)
