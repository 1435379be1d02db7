"""Pooling: the cloud is scored as a whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fad_loss._game import Game, Side
from fad_loss._points import Points
from fad_loss.discriminators.base import Discriminator
from fad_loss.discriminators.learned.layers import (
    ClassProjection,
    activate,
    check_channels,
    check_width,
    cloud_condition,
    linear,
    norm,
    pooled,
)


class CloudDiscriminator(Discriminator):
    r"""One score per cloud, from mean, maximum and attention pooling of a shared MLP.

    .. math::
        g_b = \Big[\tfrac1N \sum_i h_{bi},\; \max_i h_{bi},\;
        \sum_i \mathrm{softmax}_i(A h_{bi}) \odot h_{bi}\Big], \qquad
        D_b = w^T \phi(g_b) + \langle e_{y_b}, \phi(g_b) \rangle

    The attention has several heads, each of which weighs the points for its share of the channels.
    The mean sees how many points are where, the maximum which extremes are reached, the attention
    what it learns to look for. Permuting the points changes nothing. No BatchNorm.

    Args:
        channels: the features' channels.
        hidden: width of the hidden layers; a multiple of `heads`.
        layers: how many hidden layers before the pooling. One follows it.
        heads: how many attention heads.
        spectral_norm: divide every weight by its largest singular value.
        layer_norm: normalise the hidden features of each point.
        condition: ``"cloud"`` shows the discriminator the teacher's pooled feature of the cloud.
        num_classes: the number of classes, if labels are to be used (projection).

    Shape:
        - a game of ``(B, N, C)`` and ``(B, M, C)``, or ragged ``(B, j, C)``
        - its labels: ``(B,)``; negative ones are unknown; ignored without `num_classes`
        - scores: ``(B,)``

    Raises:
        ValueError: a wrong number of channels, or labels that are missing.
        TypeError: labels that are no integers.

    Source: pooling by attention is Lee et al., *Set Transformer*, ICML 2019, in its simplest form;
    projection Miyato & Koyama, *cGANs with Projection Discriminator*, ICLR 2018.

    Example:
        >>> discriminator = CloudDiscriminator(16, num_classes=40)
        >>> game = Game.of(torch.randn(2, 100, 16), torch.randn(2, 128, 16), torch.tensor([3, 39]))
        >>> discriminator(game, "student").shape
        torch.Size([2])
    """

    default_weight = 0.1
    """Small, because in ``examples/study/results/report.md`` no weight of a discriminator that
    learns helped, and larger ones hurt more."""

    def __init__(
        self,
        channels: int,
        hidden: int = 128,
        layers: int = 2,
        *,
        heads: int = 4,
        spectral_norm: bool = True,
        layer_norm: bool = False,
        condition: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        sizes = (("channels", channels), ("hidden", hidden), ("layers", layers), ("heads", heads))
        for name, value in sizes:
            check_width(name, value)
        if hidden % heads:
            message = f"hidden: expected a multiple of heads={heads}, got {hidden}"
            raise ValueError(message)
        self.channels = channels
        self.heads = heads
        self.first = linear(channels, hidden, spectral_norm)
        self.rest = nn.ModuleList(linear(hidden, hidden, spectral_norm) for _ in range(layers - 1))
        self.norms = nn.ModuleList(norm(hidden, layer_norm) for _ in range(layers))
        self.attention = linear(hidden, heads, spectral_norm)
        self.joined = linear(3 * hidden, hidden, spectral_norm)
        self.score_layer = linear(hidden, 1, spectral_norm)
        self.condition = cloud_condition(condition, channels, hidden, spectral_norm)
        self.projection = (
            None if num_classes is None else ClassProjection(num_classes, hidden, spectral_norm)
        )

    def extra_repr(self) -> str:
        """How many heads there are."""
        return f"heads={self.heads}"

    def score(self, game: Game, side: Side) -> Tensor:
        """Score every cloud: high if it looks like the teacher's."""
        check_channels(game, self.channels)
        points = game.points(side)
        hidden = self.first(points.features)
        if self.condition is not None:
            hidden = hidden + points.spread(self.condition(game.teacher))
        hidden = activate(self.norms[0](hidden))
        for layer, normalize in zip(self.rest, list(self.norms)[1:], strict=True):
            hidden = activate(normalize(layer(hidden)))
        summary = torch.cat(
            [pooled(points.with_features(hidden)), self._attended(hidden, points)], -1
        )
        summary = activate(self.joined(summary))
        scores: Tensor = self.score_layer(summary).squeeze(-1)
        if self.projection is not None:
            scores = scores + self.projection(game.labels, summary, points, per_cloud=True)
        return scores

    def _attended(self, hidden: Tensor, points: Points) -> Tensor:
        """The points' hidden features, weighed by attention, ``(B, hidden)``."""
        weights = points.softmax(self.attention(hidden)).to(hidden.dtype).unsqueeze(-1)
        values = hidden.reshape(*hidden.shape[:-1], self.heads, -1)
        return points.sum((weights * values).flatten(-2))
