"""What the two players minimise, given the scores of real (teacher) and fake (student) features.

Scores are unbounded: the higher, the more a discriminator takes the features for the teacher's.
They come per point, ``(B, N)`` or ragged, or per cloud, ``(B,)``. Whatever an objective does to
single scores is averaged over the points of each cloud, then over clouds, so that every cloud
counts the same and a ragged batch equals a loop over its clouds. All of it happens in float32 at
least: half-precision scores neither overflow nor lose their digits here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fad_loss._checks import check_finite, check_tensor
from fad_loss._errors import choose, describe, expected
from fad_loss._ragged import cloud_mean, is_ragged, pack, pointwise

__all__ = [
    "Hinge",
    "LeastSquares",
    "NonSaturating",
    "Objective",
    "Relativistic",
    "Wasserstein",
    "get_objective",
]


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in {torch.float16, torch.bfloat16} else values


Masks = tuple[Tensor | None, Tensor | None]
"""Which scores count, of the student's and of the teacher's points: ``(B, N)``, or None (all)."""


def as_scores(name: str, scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores ``(B, N)``, ``(B,)`` or ragged ``(B, j)``, checked and promoted.

    Those that a mask, ``(B, N)``, leaves to count have to be finite, where they may be looked at.
    """
    check_tensor(name, scores)
    rank = pack(scores)[0].dim() + 1 if is_ragged(scores) else scores.dim()
    if rank not in {1, 2}:
        message = (
            f"{name}: expected one score per point, (B, N), or one per cloud, (B,), got "
            f"{describe(scores)}"
        )
        raise ValueError(message)
    if scores.shape[0] == 0:
        message = f"{name}: expected the scores of at least one cloud, got {describe(scores)}"
        raise ValueError(message)
    counted = pack(scores)[0] if is_ragged(scores) else scores
    if mask is not None:
        if is_ragged(scores) or mask.shape[: scores.dim()] != scores.shape:
            wanted = f"one for every point of the scores {describe(scores)}"
            raise expected("mask", wanted, mask, "ragged scores are given without the others")
        counted = torch.where(mask if scores.dim() == 2 else mask.any(1), scores, 0)
    check_finite(name, counted)
    return pointwise(_at_least_float32, scores)


def _average(
    name: str, function: Callable[[Tensor], Tensor], scores: Tensor, mask: Tensor | None
) -> Tensor:
    """Apply `function` to every score, average over each cloud's points, then over clouds."""
    scores = as_scores(name, scores, mask)
    return cloud_mean(pointwise(function, scores), mask).mean()


class Objective(ABC):
    """What the student and the discriminator minimise. Derive from it to bring your own.

    Attributes:
        needs_real: whether the student's term depends on the scores of real features. If not, they
            are not computed for it.

    Example:
        >>> class Plain(Objective):
        ...     def student(self, fake, real=None, mask=(None, None)):
        ...         return -fake.mean()
        ...
        ...     def discriminator(self, real, fake, mask=(None, None)):
        ...         return fake.mean() - real.mean()
        >>> Plain().student(torch.tensor([1.0, 3.0]))
        tensor(-2.)
    """

    needs_real: ClassVar[bool] = False

    @abstractmethod
    def student(
        self, fake: Tensor, real: Tensor | None = None, mask: Masks = (None, None)
    ) -> Tensor:
        """The student's loss, a scalar.

        Args:
            fake: scores of the student's features, ``(B, N)``, ``(B,)`` or ragged ``(B, j)``.
            real: scores of the teacher's features, if `needs_real`.
            mask: which of the student's and of the teacher's points count, ``(B, N)`` each, or
                None. A cloud without any contributes 0. The loss passes it only if there is one.
        """

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor, mask: Masks = (None, None)) -> Tensor:
        """The discriminator's loss, a scalar.

        Args:
            real: scores of the teacher's features, ``(B, N)``, ``(B,)`` or ragged ``(B, j)``.
            fake: scores of the student's features.
            mask: as for `student`.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _PerScore(Objective):
    """An objective that is an average of functions of single scores."""

    @staticmethod
    @abstractmethod
    def _student(score: Tensor) -> Tensor:
        """What the student pays for a score of its features."""

    @staticmethod
    @abstractmethod
    def _real(score: Tensor) -> Tensor:
        """What the discriminator pays for a score of the teacher's features."""

    @staticmethod
    @abstractmethod
    def _fake(score: Tensor) -> Tensor:
        """What the discriminator pays for a score of the student's features."""

    def student(
        self,
        fake: Tensor,
        real: Tensor | None = None,  # noqa: ARG002
        mask: Masks = (None, None),
    ) -> Tensor:
        """The student's loss, a scalar; see `Objective.student`."""
        return _average("fake", self._student, fake, mask[0])

    def discriminator(self, real: Tensor, fake: Tensor, mask: Masks = (None, None)) -> Tensor:
        """The discriminator's loss, a scalar; see `Objective.discriminator`."""
        of_real = _average("real", self._real, real, mask[1])
        return of_real + _average("fake", self._fake, fake, mask[0])


class Hinge(_PerScore):
    r"""The hinge loss.

    .. math::
        L_D = E[\max(0, 1 - D(t))] + E[\max(0, 1 + D(s))], \qquad L_S = -E[D(s)]

    The discriminator stops pushing where the scores are beyond the margin, which keeps it from
    running away; the student's gradient never saturates.

    Source: Lim & Ye, *Geometric GAN*, arXiv:1705.02894 (2017).

    Example:
        >>> Hinge().discriminator(torch.tensor([0.5, 2.0]), torch.tensor([-0.5, -2.0]))
        tensor(0.5000)
    """

    @staticmethod
    def _student(score: Tensor) -> Tensor:
        return -score

    @staticmethod
    def _real(score: Tensor) -> Tensor:
        return F.relu(1 - score)

    @staticmethod
    def _fake(score: Tensor) -> Tensor:
        return F.relu(1 + score)


class NonSaturating(_PerScore):
    r"""The original GAN with the non-saturating student, scores being logits.

    .. math::
        L_D = -E[\log \sigma(D(t))] - E[\log(1 - \sigma(D(s)))], \qquad
        L_S = -E[\log \sigma(D(s))]

    Source: Goodfellow et al., *Generative Adversarial Nets*, NeurIPS 2014, section 3.

    Example:
        >>> NonSaturating().student(torch.zeros(2, 5))
        tensor(0.6931)
    """

    @staticmethod
    def _student(score: Tensor) -> Tensor:
        return F.softplus(-score)

    @staticmethod
    def _real(score: Tensor) -> Tensor:
        return F.softplus(-score)

    @staticmethod
    def _fake(score: Tensor) -> Tensor:
        return F.softplus(score)


class LeastSquares(_PerScore):
    r"""Least squares, towards 1 for real and 0 for fake.

    .. math::
        L_D = \tfrac12 E[(D(t) - 1)^2] + \tfrac12 E[D(s)^2], \qquad
        L_S = \tfrac12 E[(D(s) - 1)^2]

    Source: Mao et al., *Least Squares Generative Adversarial Networks*, ICCV 2017, equation 9.

    Example:
        >>> LeastSquares().student(torch.tensor([0.0, 2.0]))
        tensor(0.5000)
    """

    @staticmethod
    def _student(score: Tensor) -> Tensor:
        return 0.5 * (score - 1).square()

    @staticmethod
    def _real(score: Tensor) -> Tensor:
        return 0.5 * (score - 1).square()

    @staticmethod
    def _fake(score: Tensor) -> Tensor:
        return 0.5 * score.square()


class Wasserstein(_PerScore):
    r"""The Wasserstein critic.

    .. math::
        L_D = E[D(s)] - E[D(t)], \qquad L_S = -E[D(s)]

    Unbounded from below unless the critic is Lipschitz: leave spectral normalisation on, or add a
    gradient penalty.

    Source: Arjovsky, Chintala & Bottou, *Wasserstein GAN*, ICML 2017.

    Example:
        >>> Wasserstein().discriminator(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor(-2.)
    """

    @staticmethod
    def _student(score: Tensor) -> Tensor:
        return -score

    @staticmethod
    def _real(score: Tensor) -> Tensor:
        return -score

    @staticmethod
    def _fake(score: Tensor) -> Tensor:
        return score


class Relativistic(Objective):
    r"""Relativistic pairing: is this cloud more real than its counterpart?

    With :math:`\bar D` the mean score of a cloud, and pairs of the student's and the teacher's
    features of the same cloud,

    .. math::
        L_D = E[-\log \sigma(\bar D(t) - \bar D(s))], \qquad
        L_S = E[-\log \sigma(\bar D(s) - \bar D(t))]

    Student and teacher may have different numbers of points, but need the same clouds.

    Source: Jolicoeur-Martineau, *The relativistic discriminator*, ICLR 2019 (arXiv:1807.00734,
    2018); Huang et al., *The GAN is dead; long live the GAN!* (R3GAN), NeurIPS 2024.

    Example:
        >>> Relativistic().student(torch.zeros(2, 5), torch.zeros(2, 7))
        tensor(0.6931)
    """

    needs_real: ClassVar[bool] = True

    def student(
        self, fake: Tensor, real: Tensor | None = None, mask: Masks = (None, None)
    ) -> Tensor:
        """The student's loss, a scalar; see `Objective.student`."""
        if real is None:
            message = (
                "real: the relativistic objective compares the student with the teacher, and needs "
                "the scores of the teacher's features too; got None"
            )
            raise ValueError(message)
        margin, counted = self._margin(fake, real, mask)
        return (F.softplus(-margin) * counted).mean()

    def discriminator(self, real: Tensor, fake: Tensor, mask: Masks = (None, None)) -> Tensor:
        """The discriminator's loss, a scalar; see `Objective.discriminator`."""
        margin, counted = self._margin(fake, real, mask)
        return (F.softplus(margin) * counted).mean()

    @staticmethod
    def _margin(fake: Tensor, real: Tensor, mask: Masks) -> tuple[Tensor, Tensor]:
        """By how much a student's cloud scores above its teacher's, and whether it counts, (B,)."""
        if fake.shape[0] != real.shape[0]:
            message = (
                "real, fake: the relativistic objective pairs the clouds, expected the same number "
                f"of each, got {describe(real)} and {describe(fake)}"
            )
            raise ValueError(message)
        fake, real = as_scores("fake", fake, mask[0]), as_scores("real", real, mask[1])
        margin = cloud_mean(fake, mask[0]) - cloud_mean(real, mask[1])
        counted = torch.ones_like(margin)
        for scores, one in ((fake, mask[0]), (real, mask[1])):
            if one is not None:
                counted = counted * one.any(1)
            elif is_ragged(scores):
                counted = counted * (pack(scores)[1].diff() > 0)
        return margin, counted


OBJECTIVES: Mapping[str, type[Objective]] = {
    "hinge": Hinge,
    "non_saturating": NonSaturating,
    "least_squares": LeastSquares,
    "wasserstein": Wasserstein,
    "relativistic": Relativistic,
}
"""The objectives by name."""


def get_objective(objective: str | Objective) -> Objective:
    """Return the objective of that name, or the objective itself.

    Raises:
        ValueError: an unknown name; the known ones are listed.
        TypeError: neither a name nor an `Objective`.

    Example:
        >>> get_objective("hinge")
        Hinge()
    """
    if isinstance(objective, Objective):
        return objective
    _check_name(objective)
    return choose("objective", objective, OBJECTIVES)()


def _check_name(objective: object) -> None:
    if not isinstance(objective, str):
        hint = ""
        if isinstance(objective, type) and issubclass(objective, Objective):
            hint = f"; pass an instance, {objective.__name__}()"
        message = (
            f"objective: expected one of {', '.join(map(repr, OBJECTIVES))} or an Objective, got "
            f"{objective!r}{hint}"
        )
        raise TypeError(message)
