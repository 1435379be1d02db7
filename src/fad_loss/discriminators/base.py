"""What a discriminator is: a module that scores the points of a game, and says what it needs."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fad_loss._checks import look
from fad_loss._errors import expected
from fad_loss._game import Game, Side
from fad_loss._snapshot import snapshot

__all__ = ["Discriminator", "Scores", "as_discriminator"]


class Scores(NamedTuple):
    """Of both sides: one per point, ``(B, N)`` or ragged, or one per cloud, ``(B,)``.

    Example:
        >>> scores = Scores(student=torch.tensor([-1.0]), teacher=torch.tensor([2.0]))
        >>> of_student, of_teacher = scores
    """

    student: Tensor
    teacher: Tensor


class Discriminator(nn.Module, ABC):
    """Scores the points of a game: the higher, the more they are taken for the teacher's.

    Derive from it and write `score`; what the class declares tells the loss how to use it.

    Attributes:
        default_weight: what ``weight=None`` of the loss stands for.
        default_max_points: what ``max_points="auto"`` of the loss stands for; None compares all.
        standardized: whether it takes standardised features; else they come in the teacher's own
            units.
        corresponding: whether point i of the student is compared with point i of the teacher.
        positional: whether it uses the positions of points.
        least_points: clouds with fewer points on either side say nothing, and contribute 0.

    Example:
        >>> class Norm(Discriminator):
        ...     def score(self, game, side):
        ...         return -game.points(side).tensor().square().sum(-1)
        >>> game = Game.of(torch.ones(1, 2, 3), torch.zeros(1, 4, 3))
        >>> Norm()(game)
        Scores(student=tensor([[-3., -3.]]), teacher=tensor([[-0., -0., -0., -0.]]))
        >>> Norm()(game, "student")
        tensor([[-3., -3.]])
    """

    default_weight: float = 1.0
    default_max_points: int | None = None
    standardized: bool = True
    corresponding: bool = False
    positional: bool = False
    least_points: int = 1

    @abstractmethod
    def score(self, game: Game, side: Side) -> Tensor:
        """The scores of one side.

        Args:
            game: the points of both players.
            side: "student" or "teacher".

        Returns:
            One score per point, ``(B, N)`` or ragged, or one per cloud, ``(B,)``.
        """

    def scores(self, game: Game) -> Scores:
        """The scores of both sides; override it to share work between them."""
        return Scores(self.score(game, "student"), self.score(game, "teacher"))

    def prepare(self, channels: int) -> None:
        """Make room for what features of so many channels will need; the loss calls it when made.

        Buffers that change their size later would not be averaged by an EMA, nor broadcast.
        """

    def observe(self, game: Game) -> None:
        """Follow running statistics; the loss calls it once in every training step, at its end."""

    def forward(self, game: Game, side: Side | None = None) -> Scores | Tensor:
        """Scores of both sides, or of one."""
        if not isinstance(game, Game):
            remedy = "make one of two tensors with Game.of(student_features, teacher_features)"
            raise expected("game", "a fad_loss.discriminators.Game", game, remedy, error=TypeError)
        if side not in {None, "student", "teacher"}:
            raise expected("side", "'student', 'teacher' or None (both)", repr(side))
        return self.scores(game) if side is None else self.score(game, side)

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return any(p.requires_grad for p in self.parameters())


class _Wrapped(Discriminator):
    """A module that takes features, and those keywords that its forward names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        for name in ("default_weight", "default_max_points", "standardized", "corresponding"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        parameters = inspect.signature(module.forward).parameters
        takes = set(parameters)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            takes |= {"reference", "labels"}
        self.takes = tuple(n for n in ("reference", "labels", "mask", "positions") if n in takes)
        self.positional = "positions" in self.takes

    def score(self, game: Game, side: Side) -> Tensor:
        points = game.points(side)
        keywords: dict[str, Any] = {
            "reference": game.teacher.tensor(),
            "labels": game.labels,
            "mask": points.mask,
            "positions": None if points.positions is None else points.like(points.positions),
        }
        scores: Tensor = self.module(points.tensor(), **{n: keywords[n] for n in self.takes})
        return scores


def as_discriminator(module: nn.Module) -> Discriminator:
    """`module` itself, or a `Discriminator` around a module of the user's own.

    Such a module is called as ``module(features, reference=..., labels=..., mask=...,
    positions=...)``, with those of the keywords that its forward has, and returns scores.

    Example:
        >>> class Plain(nn.Module):
        ...     def forward(self, features, reference):
        ...         return -(features - reference.mean(1, keepdim=True)).square().sum(-1)
        >>> discriminator = as_discriminator(Plain())
        >>> discriminator(Game.of(torch.ones(1, 2, 3), torch.zeros(1, 4, 3)), "student")
        tensor([[-3., -3.]])
    """
    return module if isinstance(module, Discriminator) else _Wrapped(module)


def held_still(discriminator: Discriminator, game: Game, side: Side | None = None) -> Any:
    """Ask a discriminator that stands still: gradients pass through it, none reaches it.

    Buffers are copies: a spectral norm's power iteration must not run twice a step, nor where
    nothing learns.
    """
    state = {name: p.detach() for name, p in discriminator.named_parameters()}
    for name, b in discriminator.named_buffers():
        state[name] = snapshot(b.clone()) if discriminator.learns else b.clone()
    return functional_call(discriminator, state, (game, side))


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision made single."""
    return values.float() if values.dtype in {torch.float16, torch.bfloat16} else values


def same_points(game: Game) -> bool:
    """Whether every cloud of the student has as many points as the teacher's, in the same rows."""
    student, teacher = game.student, game.teacher
    if student.features.shape[:-1] != teacher.features.shape[:-1]:
        return False
    for mine, its in ((student.offsets, teacher.offsets), (student.mask, teacher.mask)):
        if (mine is None) != (its is None):
            return False
        if mine is not None and its is not None and look(mine) and not torch.equal(mine, its):
            return False
    return True
