"""EdgeConv: every point is scored by its feature and by how its neighbours differ from it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fad_loss import ops
from fad_loss._ragged import cloud_index, is_ragged, pack
from fad_loss.discriminators._layers import (
    ClassProjection,
    activate,
    check_features,
    check_width,
    cloud_condition,
    linear,
    norm,
    packed,
    repacked,
    spread,
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


class NeighborhoodDiscriminator(nn.Module):
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
        - features: ``(B, N, C)`` or ragged ``(B, j, C)``
        - reference: the teacher's features of the same clouds, ``(B, M, C)`` or ragged; ignored
          without `condition`
        - labels: ``(B,)``, or per point ``(B, N)``, ragged ``(B, j)``; negative ones are unknown;
          ignored without `num_classes`
        - output: ``(B, N)``, or ragged ``(B, j)``

    Raises:
        ValueError: a wrong shape, or a reference or labels that are missing.
        TypeError: labels that are no integers.

    Source: Wang et al., *Dynamic Graph CNN for Learning on Point Clouds*, ACM TOG 2019.

    Example:
        >>> import torch
        >>> discriminator = NeighborhoodDiscriminator(16, k=8)
        >>> discriminator(torch.randn(2, 100, 16)).shape
        torch.Size([2, 100])
    """

    default_weight: ClassVar[float] = 0.1
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
        self.score = linear(hidden, 1, spectral_norm)
        self.condition = cloud_condition(condition, channels, hidden, spectral_norm)
        self.projection = (
            None if num_classes is None else ClassProjection(num_classes, hidden, spectral_norm)
        )

    def extra_repr(self) -> str:
        """How many neighbours there are."""
        return f"k={self.k}"

    def forward(
        self, features: Tensor, reference: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Score every point: high if it and its neighbours look like the teacher's."""
        check_features("features", features, self.channels)
        neighbors = self._neighbors(features.detach())
        shift = None
        if self.condition is not None:
            shift = spread(self.condition(reference, features), features)
        hidden = packed(features)
        for convolution in self.convolutions:
            hidden = convolution(hidden, neighbors, shift)
            shift = None
        scores: Tensor = self.score(hidden).squeeze(-1)
        if self.projection is not None:
            scores = scores + self.projection(labels, hidden, features)
        return repacked(scores, features)

    def _neighbors(self, features: Tensor) -> Tensor:
        """For every point, rows of the flat points: itself and its neighbours."""
        if is_ragged(features):
            values, offsets = pack(features)
            own = torch.arange(values.shape[0], device=values.device).unsqueeze(-1)
            start = offsets[cloud_index(features)].unsqueeze(-1)
            k = self.k
        else:
            B, N = features.shape[:2]
            own = torch.arange(B * N, device=features.device).view(B, N, 1)
            start = N * torch.arange(B, device=features.device).view(B, 1, 1)
            k = min(self.k, N - 1)
            if k == 0:
                return own
        index = packed(ops.knn(features, features, k, exclude_self=True)[1])
        # In a ragged cloud with fewer points, the missing neighbours are the point itself.
        return torch.cat([own, torch.where(index < 0, own, index + start)], -1)
