"""EdgeConv: every point is scored by its feature and by how its neighbours differ from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fad_loss import ops
from fad_loss._game import Game, Side
from fad_loss._points import Points
from fad_loss._ragged import packed
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


class EdgeConv(nn.Module):
    r"""One edge convolution with a single linear layer per edge.

    .. math::
        h'_i = \phi\Big(U h_i + \max_{j \in \mathcal{N}(i) \cup \{i\}} V (h_j - h_i)\Big)

    The activation is increasing, so it may follow the maximum, and V is linear, so it is applied to
    the N points rather than to the N k edges.
    """

    def __init__(self, inputs: int, outputs: int, spectral_norm: bool, layer_norm: bool) -> None:
        super().__init__()
        self.center = linear(inputs, outputs, spectral_norm)
        self.edge = linear(inputs, outputs, spectral_norm, bias=False)
        self.norm = norm(outputs, layer_norm)

    def forward(self, hidden: Tensor, neighbors: Tensor, shift: Tensor | None) -> Tensor:
        """From ``(..., inputs)`` to ``(..., outputs)``; `neighbors` are rows of the flat points."""
        mapped = self.edge(hidden)
        gathered = mapped.flatten(0, -2)[neighbors]
        outputs = self.center(hidden) + (gathered.max(-2).values - mapped)
        if shift is not None:
            outputs = outputs + shift
        result: Tensor = activate(self.norm(outputs))
        return result


class NeighborhoodDiscriminator(Discriminator):
    r"""One score per point, from edge convolutions over its neighbours in feature space.

    Where `PointDiscriminator` only sees where features lie, this sees how they lie together: the
    density and shape of the set around each point. The graph joins every point with itself and its
    k nearest neighbours in the space of the features that came in (`fad_loss.ops.knn`); which they
    are has no gradient, what they are has. Permuting the points permutes the scores. No BatchNorm.

    Args:
        channels: the features' channels.
        hidden: width of the hidden layers.
        layers: how many edge convolutions.
        k: how many neighbours; all others, in a cloud of at most k points.
        spectral_norm: divide every weight by its largest singular value.
        layer_norm: normalise the hidden features of each point.
        condition: ``"cloud"`` shows the discriminator the teacher's pooled feature of the cloud.
        num_classes: the number of classes, if labels are to be used.

    Shape:
        - a game of ``(B, N, C)`` and ``(B, M, C)``, or ragged ``(B, j, C)``
        - its labels: ``(B,)``, or per point; negative ones are unknown; ignored without
          `num_classes`
        - scores: ``(B, N)``, or ragged ``(B, j)``

    Raises:
        ValueError: a wrong number of channels, or labels that are missing.
        TypeError: labels that are no integers.

    Source: Wang et al., *Dynamic Graph CNN for Learning on Point Clouds*, ACM TOG 2019.

    Example:
        >>> import torch
        >>> discriminator = NeighborhoodDiscriminator(16, k=8)
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
        hidden: int = 64,
        layers: int = 2,
        *,
        k: int = 16,
        spectral_norm: bool = True,
        layer_norm: bool = False,
        condition: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        sizes = (("channels", channels), ("hidden", hidden), ("layers", layers), ("k", k))
        for name, value in sizes:
            check_width(name, value)
        self.channels = channels
        self.k = k
        self.convolutions = nn.ModuleList(
            EdgeConv(hidden if layer else channels, hidden, spectral_norm, layer_norm)
            for layer in range(layers)
        )
        self.score_layer = linear(hidden, 1, spectral_norm)
        self.condition = cloud_condition(condition, channels, hidden, spectral_norm)
        self.projection = (
            None if num_classes is None else ClassProjection(num_classes, hidden, spectral_norm)
        )

    def extra_repr(self) -> str:
        """How many neighbours there are."""
        return f"k={self.k}"

    def score(self, game: Game, side: Side) -> Tensor:
        """Score every point: high if it and its neighbours look like the teacher's."""
        check_channels(game, self.channels)
        points = game.points(side)
        neighbors = self._neighbors(points.detach())
        shift = None
        if self.condition is not None:
            shift = points.spread(self.condition(game.teacher))
        hidden = points.features
        for convolution in self.convolutions:
            hidden = convolution(hidden, neighbors, shift)
            shift = None
        scores: Tensor = self.score_layer(hidden).squeeze(-1)
        if self.projection is not None:
            scores = scores + self.projection(game.labels, hidden, points)
        return points.like(scores)

    def _neighbors(self, points: Points) -> Tensor:
        """For every point, rows of the flat points: itself and its neighbours."""
        values, k = points.features, self.k
        rows = values.shape[:-1]
        own = torch.arange(rows.numel(), device=values.device).view(*rows, 1)
        if points.offsets is not None:
            start = points.offsets[points.index()].unsqueeze(-1)
        else:
            B, N = rows
            start = N * torch.arange(B, device=values.device).view(B, 1, 1)
            k = min(k, N - 1)
            if k == 0:
                return own
            if points.mask is not None:
                # Points that do not count lie further away than any that do.
                away = 4 * (1 + values.abs().amax())
                points = points.with_features(points.fill(values, away))
        index = packed(ops.knn(points.tensor(), points.tensor(), k, exclude_self=True)[1])
        found = torch.where(index < 0, own, index + start)
        if points.mask is not None:
            found = torch.where(points.mask.flatten()[found], found, own)
        # In a cloud with fewer points, the missing neighbours are the point itself.
        return torch.cat([own, found], -1)
