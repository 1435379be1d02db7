"""A shared MLP: every point is scored by its own feature alone."""

from __future__ import annotations

from torch import Tensor, nn

from fad_loss._game import Game, Side
from fad_loss.discriminators.base import Discriminator
from fad_loss.discriminators.learned.layers import (
    ClassProjection,
    activate,
    check_channels,
    check_width,
    cloud_condition,
    linear,
    norm,
)


class PointDiscriminator(Discriminator):
    r"""One score per point, from an MLP that all points share.

    .. math::
        D(z_{bi}) = w^T h(z_{bi}, r_b) + \langle e_{y_b}, h(z_{bi}, r_b) \rangle

    with the conditions, both optional, of the cloud (r, the mean and maximum of the teacher's
    features of the same cloud, added to the first layer) and of the class (e, projection).
    Permuting the points permutes the scores. No BatchNorm, so that clouds do not see each other.

    Args:
        channels: the features' channels.
        hidden: width of the hidden layers.
        layers: how many hidden layers.
        spectral_norm: divide every weight by its largest singular value (one step of power
            iteration per forward in training mode), which makes the score Lipschitz.
        layer_norm: normalise the hidden features of each point.
        condition: ``"cloud"`` shows the discriminator the teacher's pooled feature of the cloud it
            is looking at, so that features of another cloud do not pass; None does not.
        num_classes: the number of classes, if labels are to be used.

    Shape:
        - a game of ``(B, N, C)`` and ``(B, M, C)``, or ragged ``(B, j, C)``
        - its labels: ``(B,)``, or per point; negative ones are unknown; ignored without
          `num_classes`
        - scores: ``(B, N)``, or ragged ``(B, j)``

    Raises:
        ValueError: a wrong number of channels, or labels that are missing.
        TypeError: labels that are no integers.

    Source: the shared MLP is Qi et al., *PointNet*, CVPR 2017; spectral normalisation Miyato et
    al., ICLR 2018; projection Miyato & Koyama, ICLR 2018.

    Example:
        >>> import torch
        >>> discriminator = PointDiscriminator(16, condition="cloud")
        >>> game = Game.of(torch.randn(2, 100, 16), torch.randn(2, 128, 16))
        >>> discriminator(game, "student").shape
        torch.Size([2, 100])
    """

    default_weight = 0.1
    """Small, because in ``examples/study/results/report.md`` no weight of a discriminator that
    learns helped, and larger ones hurt more."""

    def __init__(
        self,
        channels: int,
        hidden: int = 128,
        layers: int = 3,
        *,
        spectral_norm: bool = True,
        layer_norm: bool = False,
        condition: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("hidden", hidden), ("layers", layers)):
            check_width(name, value)
        self.channels = channels
        self.first = linear(channels, hidden, spectral_norm)
        self.rest = nn.ModuleList(linear(hidden, hidden, spectral_norm) for _ in range(layers - 1))
        self.norms = nn.ModuleList(norm(hidden, layer_norm) for _ in range(layers))
        self.score_layer = linear(hidden, 1, spectral_norm)
        self.condition = cloud_condition(condition, channels, hidden, spectral_norm)
        self.projection = (
            None if num_classes is None else ClassProjection(num_classes, hidden, spectral_norm)
        )

    def score(self, game: Game, side: Side) -> Tensor:
        """Score every point: high if it looks like the teacher's."""
        check_channels(game, self.channels)
        points = game.points(side)
        hidden = self.first(points.features)
        if self.condition is not None:
            hidden = hidden + points.spread(self.condition(game.teacher))
        hidden = activate(self.norms[0](hidden))
        for layer, normalize in zip(self.rest, list(self.norms)[1:], strict=True):
            hidden = activate(normalize(layer(hidden)))
        scores: Tensor = self.score_layer(hidden).squeeze(-1)
        if self.projection is not None:
            scores = scores + self.projection(game.labels, hidden, points)
        return points.like(scores)
