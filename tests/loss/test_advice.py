"""What is probably not meant is said, once, and names the remedy."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from fad_loss import FeatureAdversarialLoss

from .cases import STUDENT, TEACHER, blind, features, make


class Sum(nn.Module):
    """A judge that adds up what it sees."""

    def forward(self, features):
        return features.sum(-1)


def messages(caught):
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def said(function):
    """The warnings of a function, every one of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return messages(caught)


def loop(fad, student, parameters, steps=12, momentum=0.0):
    teacher = torch.randn(3, 9, TEACHER)
    points = torch.randn(3, 7, 3)
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        fad(student(points), teacher).backward()
        optimizer.step()


def test_student_features_without_a_graph_once():
    fad = make("teacher")
    student, teacher, _ = features()
    texts = said(lambda: [fad(student.detach(), teacher) for _ in range(3)])
    assert len(texts) == 1
    assert "student: the features carry no graph" in texts[0]
    assert "do not detach them" in texts[0]


def test_swapped_networks_where_channels_agree():
    fad = FeatureAdversarialLoss(4, 4)
    student, teacher = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    (text,) = said(lambda: fad(teacher, student))
    assert "are they swapped? It is fad(student, teacher)" in text


def test_where_nothing_is_learnt_nothing_is_said():
    fad = make("teacher")
    student, teacher, _ = features()

    def evaluate():
        with torch.no_grad():
            fad(student.detach(), teacher)
        fad.eval()(student.detach(), teacher)

    assert said(evaluate) == []


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["teacher", "point"])
def test_parameters_that_no_optimizer_moves(name, momentum):
    fad = make(name, dtype=torch.float32)
    student = nn.Linear(3, STUDENT)
    (text,) = said(lambda: loop(fad, student, student.parameters(), 30, momentum))
    assert "the student was updated 10 times, and none of the loss's" in text
    assert "[*student.parameters(), *fad.parameters()]" in text
    assert "adapter.weight" in text
    # And it is found where a user looks for it.
    assert fad.statistics()["untrained_parameters"] == len(list(fad.parameters()))


def test_not_before_ten_updates():
    fad = make("teacher", dtype=torch.float32)
    student = nn.Linear(3, STUDENT)
    assert said(lambda: loop(fad, student, student.parameters(), 9)) == []


@pytest.mark.parametrize("name", ["teacher", "point"])
def test_a_loop_as_it_should_be_is_left_in_peace(name):
    fad = make(name, dtype=torch.float32)
    student = nn.Linear(3, STUDENT)
    assert said(lambda: loop(fad, student, [*student.parameters(), *fad.parameters()], 30)) == []


def test_what_is_frozen_on_purpose_is_left_in_peace():
    fad = make("teacher", dtype=torch.float32).requires_grad_(False)
    student = nn.Linear(3, STUDENT)
    assert said(lambda: loop(fad, student, student.parameters(), 30)) == []


def test_accumulation_is_not_ten_updates():
    fad = make("teacher", dtype=torch.float32)
    student = nn.Linear(3, STUDENT)

    def accumulate():
        for _ in range(40):
            fad(student(torch.randn(3, 7, 3)), torch.randn(3, 9, TEACHER)).backward()

    assert said(accumulate) == []


def test_scores_beyond_reason():
    fad = FeatureAdversarialLoss(4, 4, discriminator=Sum(), normalize=False)
    student = 1e6 * torch.randn(3, 5, 4, requires_grad=True)
    (text,) = said(lambda: [fad(student, 1e6 * torch.randn(3, 5, 4)) for _ in range(2)])
    assert "the student's first scores are" in text
    assert "normalize=True" in text


def test_where_looking_would_wait_scores_are_not_looked_at(monkeypatch):
    blind(monkeypatch)
    fad = FeatureAdversarialLoss(4, 4, discriminator=Sum(), normalize=False)
    student = 1e6 * torch.randn(3, 5, 4, requires_grad=True)
    assert said(lambda: fad(student, 1e6 * torch.randn(3, 5, 4))) == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda fad: pickle.loads(pickle.dumps(fad))])
def test_a_copy_advises_anew(how):
    fad = make("teacher")
    student, teacher, _ = features()
    assert len(said(lambda: fad(student.detach(), teacher))) == 1
    assert len(said(lambda: how(fad)(student.detach(), teacher))) == 1
