"""Other discriminators for points that correspond: what "paired" could be, tried in the study.

Each differs from "paired" in one thing, or is another reading of the same idea. They compare 16
points of a cloud, as "paired" does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from fad_loss import TeacherDiscriminator
from fad_loss.discriminators import Discriminator, Game, Points


class SquaredDiscriminator(Discriminator):
    """Minus the squared distance from the teacher's feature of the same point, mean over channels.

    As a discriminator, so that all around it is what it is for the library's own.
    """

    corresponding, positional, default_max_points = True, True, 16  # as "paired"

    def score(self, game: Game, side: str) -> Tensor:
        return game.points(side).like(-self.distance(game, side))

    @staticmethod
    def distance(game: Game, side: str) -> Tensor:
        """Of every point."""
        return (game.points(side).features - game.teacher.features).square().mean(-1)


class HeavyTailed(SquaredDiscriminator):
    """The log density of a Cauchy distribution around the teacher's feature: a bounded pull."""

    def score(self, game: Game, side: str) -> Tensor:
        return game.points(side).like(-self.distance(game, side).log1p())


class Likeness(TeacherDiscriminator):
    """Of "paired", what pulls a point to its own alone; in units of each cloud, as there."""

    def __init__(self) -> None:
        super().__init__(condition="point")

    def _score(self, z: Points, sets: Game) -> Tensor:
        return self._log_likeness(z, sets.teacher)


class Attraction(Likeness):
    """Of "paired", what pulls: without the density of the student's own points, which pushes."""

    def _score(self, z: Points, sets: Game) -> Tensor:
        return super()._score(z, sets) + self._log_density(z, sets.teacher)


class InUnitsOfTheLayer(TeacherDiscriminator):
    """As "paired", but no cloud counts for more because its points are close together."""

    def __init__(self) -> None:
        super().__init__(condition="point")

    def _in_units(self, game: Game) -> Game:
        # Of standardised features, half of the mean squared distance is their number.
        scale = (2 * game.teacher.channels) ** -0.5
        student, teacher = (
            points.with_features(scale * points.features) for points in (game.student, game.teacher)
        )
        return replace(game, student=student, teacher=teacher)


class Contrast(Discriminator):
    """How sure it is which of the teacher's points this is, of the cloud's or of all in the batch.

    The log of the share that the own point has among kernels around all of them (as InfoNCE).
    """

    corresponding, positional, default_max_points = True, True, 16

    def __init__(self, *, batch: bool, bandwidth: float = 0.1) -> None:
        super().__init__()
        self.batch, self.bandwidth = batch, bandwidth

    def score(self, game: Game, side: str) -> Tensor:
        points, known = game.points(side), game.teacher.features.detach()
        scale = (2 * self.bandwidth) ** -0.5 * (2 * known.shape[-1]) ** -0.5
        z, t = scale * points.features, scale * known
        if self.batch:
            z, t = z.flatten(0, -2).unsqueeze(0), t.flatten(0, -2).unsqueeze(0)
        products = z @ t.mT
        distance = (z * z).sum(-1, keepdim=True) + (t * t).sum(-1).unsqueeze(-2) - 2 * products
        shares = F.log_softmax(-distance, dim=-1).diagonal(dim1=-2, dim2=-1)
        return points.like(shares.reshape(points.features.shape[:-1]))


ATTEMPTS: dict[str, Callable[[], Discriminator]] = {
    "squared": SquaredDiscriminator,
    "heavy-tailed": HeavyTailed,
    "likeness": Likeness,
    "attraction": Attraction,
    "layer-units": InUnitsOfTheLayer,
    "narrow": lambda: TeacherDiscriminator(condition="point", bandwidths=(0.1,)),
    "contrast": lambda: Contrast(batch=False),
    "contrast-batch": lambda: Contrast(batch=True),
}
