"""What the two players are asked about: the points of the same clouds, of student and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fad_loss._errors import expected
from fad_loss._points import Points

Side = Literal["student", "teacher"]
"""Whose points are scored."""


@dataclass(eq=False)
class Game:
    """The points of both players, in one space, and the clouds' labels.

    Attributes:
        student: the student's points; scores carry a gradient to their features.
        teacher: the teacher's points of the same clouds.
        labels: the class of each cloud, ``(B,)``, or of each point, or None.

    Example:
        >>> import torch
        >>> game = Game.of(torch.zeros(2, 5, 3), torch.zeros(2, 7, 3))
        >>> game.points("teacher").features.shape
        torch.Size([2, 7, 3])
    """

    student: Points
    teacher: Points
    labels: Tensor | None = None

    @staticmethod
    def of(
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Game:
        """The game between two tensors of features.

        Args:
            student: ``(B, N, C)``, global ``(B, C)``, or ragged (`fad_loss.ragged`).
            teacher: of the same clouds, with as many channels.
            labels: ``(B,)``, or one per point.
            mask: which points count, for both, or a pair.
            positions: where the points lie, a pair of ``(B, N, D)`` and ``(B, M, D)``.

        Raises:
            ValueError: different numbers of clouds or channels.

        Example:
            >>> import torch
            >>> game = Game.of(torch.zeros(2, 5, 3), torch.zeros(2, 7, 3))
            >>> game.student.lengths(), game.teacher.lengths()
            (tensor([5, 5]), tensor([7, 7]))
        """
        masks, places = both_sides("mask", mask), both_sides("positions", positions)
        game = Game(
            Points.of(student, masks[0], places[0], name="student"),
            Points.of(teacher, masks[1], places[1], name="teacher"),
            labels,
        )
        if game.student.batch != game.teacher.batch:
            remedy = "feed both the same batch"
            raise expected("teacher", "as many clouds as the student's", teacher, remedy)
        if game.student.channels != game.teacher.channels:
            remedy = "map one to the channels of the other first"
            raise expected("teacher", "as many channels C as the student's", teacher, remedy)
        return game

    def points(self, side: Side) -> Points:
        """The points of that side."""
        return self.student if side == "student" else self.teacher

    def with_features(self, side: Side, features: Tensor) -> Game:
        """The same game with other features of one side's points."""
        if side == "student":
            return Game(self.student.with_features(features), self.teacher, self.labels)
        return Game(self.student, self.teacher.with_features(features), self.labels)

    def filled(self) -> Game:
        """The same game, with features of 0 where points do not count."""
        return Game(self.student.filled(), self.teacher.filled(), self.labels)

    def masks(self, scores: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Which points count on either side, as the keyword of an objective; {} if all do."""
        masks = self.student.mask, self.teacher.mask
        if scores.dim() == 1 and self.student.offsets is not None:
            # One score per ragged cloud: nothing else says which of them have points.
            counted = (self.student.lengths() > 0) & (self.teacher.lengths() > 0)
            masks = counted.unsqueeze(1), counted.unsqueeze(1)
        return {} if masks == (None, None) else {"mask": masks}

    def still(self) -> Game:
        """The same game, in which no gradient reaches the student's features."""
        return Game(self.student.detach(), self.teacher, self.labels)


def both_sides(
    name: str, given: Tensor | tuple[Tensor | None, Tensor | None] | None
) -> tuple[Tensor | None, Tensor | None]:
    """The student's and the teacher's: a pair as it is, one tensor for both."""
    if given is None:
        return None, None
    if isinstance(given, Tensor):
        if name == "positions":
            remedy = "positions=(xyz, xyz) if both networks see the same points"
            raise expected(name, "a pair, (student_positions, teacher_positions)", given, remedy)
        return given, given
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        wanted = f"a tensor or a pair, (student_{name}, teacher_{name})"
        raise expected(name, wanted, given, error=TypeError)
    for one in given:
        if not isinstance(one, Tensor) and not (one is None and name == "mask"):
            raise expected(name, "tensors in the pair", one, error=TypeError)
    return given[0], given[1]
