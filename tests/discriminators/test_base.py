"""What a discriminator is, and the game that it is asked about."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fad_loss import FeatureAdversarialLoss, PointDiscriminator, ragged
from fad_loss.discriminators import Discriminator, Game, Scores, as_discriminator
from fad_loss.discriminators.base import held_still

X, Y = torch.randn(2, 4, 3), torch.randn(2, 6, 3)


class Norm(Discriminator):
    """The smallest discriminator there is."""

    def score(self, game, side):
        return -game.points(side).tensor().square().sum(-1)


class Recorder(nn.Module):
    """A user's module, which takes whatever it is offered."""

    standardized = False
    default_weight = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, features: Tensor, **keywords: object) -> Tensor:
        self.calls.append((features, keywords))
        return features.sum(-1)


class Placed(Recorder):
    """One that names all keywords."""

    def forward(self, features, reference=None, labels=None, mask=None, positions=None):
        keywords = {"reference": reference, "labels": labels, "mask": mask}
        return super().forward(features, **keywords, positions=positions)


def test_both_sides_or_one():
    game = Game.of(X, Y)
    both = Norm()(game)
    assert isinstance(both, Scores)
    for mine, side in zip(both, ("student", "teacher"), strict=True):
        assert torch.equal(mine, Norm()(game, side))
    assert torch.equal(both.student, -X.square().sum(-1))
    assert not Norm().learns


def test_it_is_asked_about_a_game():
    with pytest.raises(TypeError, match=r"game: expected a fad_loss.discriminators.Game, got .*of"):
        Norm()(X, "student")
    with pytest.raises(ValueError, match="side: expected 'student', 'teacher' or None"):
        Norm()(Game.of(X, Y), "pupil")
    with pytest.raises(TypeError, match="abstract"):
        Discriminator()


def test_a_module_of_ones_own_is_offered_what_there_is():
    module = Recorder()
    wrapped = as_discriminator(module)
    assert (wrapped.standardized, wrapped.default_weight) == (False, 3.0)
    assert as_discriminator(wrapped) is wrapped
    labels = torch.tensor([0, 1])
    scores = wrapped(Game.of(X, Y, labels))
    assert torch.equal(scores.student, X.sum(-1))
    assert torch.equal(scores.teacher, Y.sum(-1))
    for (features, keywords), expected in zip(module.calls, (X, Y), strict=True):
        assert torch.equal(features, expected)
        assert sorted(keywords) == ["labels", "reference"]
        assert torch.equal(keywords["reference"], Y)
        assert keywords["labels"] is labels
    assert not wrapped.positional


@pytest.mark.parametrize("uneven", [False, True])
def test_a_module_of_ones_own_gets_masks_and_positions_in_the_form_of_the_features(uneven):
    module = Placed()
    wrapped = as_discriminator(module)
    assert wrapped.positional
    places = torch.randn(2, 4, 2), torch.randn(2, 6, 2)
    if uneven:
        pair = [ragged(x.flatten(0, 1), lengths=[3, x.shape[1] * 2 - 3]) for x in (X, Y)]
        places = [ragged(p.flatten(0, 1), lengths=[3, p.shape[1] * 2 - 3]) for p in places]
        wrapped(Game.of(*pair, positions=tuple(places)))
    else:
        masks = torch.rand(2, 4) < 0.5, torch.rand(2, 6) < 0.5
        wrapped(Game.of(X, Y, mask=masks, positions=places))
    for number, (features, keywords) in enumerate(module.calls):
        assert features.is_nested == keywords["positions"].is_nested == uneven
        mine, given = keywords["positions"], places[number]
        assert torch.equal(mine.values() if uneven else mine, given.values() if uneven else given)
        if uneven:
            assert keywords["mask"] is None
        else:
            assert torch.equal(keywords["mask"], masks[number])


def test_held_still_lets_gradients_through_and_none_in():
    discriminator = PointDiscriminator(3, 8, 2).train()
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    x = X.clone().requires_grad_()
    both = held_still(discriminator, Game.of(x, Y))
    one = held_still(discriminator, Game.of(x, Y), "student")
    torch.testing.assert_close(both.student, one)
    one.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    for name, value in discriminator.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_discriminator_of_ones_own_goes_into_the_loss():
    options = {"adapter": "identity", "normalize": False, "weight": 1.0, "warmup_steps": 0}
    fad = FeatureAdversarialLoss(3, 3, discriminator=Norm(), **options)
    x = X.clone().requires_grad_()
    fad(x, Y).backward()
    # The hinge's student term is minus the mean score.
    torch.testing.assert_close(x.grad, 2 * X / (2 * 4))


GAMES = {
    "clouds": (lambda: Game.of(X, Y[:1]), "teacher: expected as many clouds as the student's"),
    "channels": (lambda: Game.of(X, Y[..., :2]), "teacher: expected as many channels C"),
    "rank": (lambda: Game.of(X[0, 0], Y), r"student: expected \(B, N, C\).*\(3\)"),
    "mask": (lambda: Game.of(X, Y, mask=torch.ones(2, 4) > 0), "mask of the teacher: expected one"),
    "one position": (lambda: Game.of(X, X, positions=X), "positions: expected a pair"),
    "positions": (
        lambda: Game.of(X, Y, positions=(X, X)),
        r"positions of the teacher: expected one position per point, \(2, 6, D\)",
    ),
}


@pytest.mark.parametrize("name", GAMES)
def test_bad_games(name):
    make, message = GAMES[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "student, mask, message",
    [
        (X.long(), None, "student: expected float32.*int64"),
        (X, (X[..., 0], None), "mask of the student: expected a boolean"),
        (X, [None], "mask: expected a tensor or a pair"),
    ],
)
def test_bad_types_in_a_game(student, mask, message):
    with pytest.raises(TypeError, match=message):
        Game.of(student, Y, mask=mask)


def test_a_game_that_stands_still():
    x = X.clone().requires_grad_()
    game = Game.of(x, Y)
    assert game.student.features.requires_grad
    assert not game.still().student.features.requires_grad


def test_which_points_count_is_said_to_objectives():
    dense, mask = Game.of(X, Y), torch.rand(2, 4) < 0.5
    assert dense.masks(X[..., 0]) == {}
    assert Game.of(X, Y, mask=(mask, None)).masks(X[..., 0])["mask"] == (mask, None)
    # Scores of ragged clouds say themselves how many points there are; those of whole ones do not.
    pair = (ragged(x.flatten(0, 1), lengths=n) for x, n in ((X, [8, 0]), (Y, [5, 7])))
    game = Game.of(*pair)
    assert game.masks(game.student.tensor()) == {}
    masks = game.masks(torch.zeros(2))["mask"]
    for one in masks:
        assert torch.equal(one, torch.tensor([[True], [False]]))
