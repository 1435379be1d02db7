"""Pooling: the cloud is scored as a whole."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fad_loss._ragged import cloud_index, cloud_sum, is_ragged, pack, unpack
from fad_loss.discriminators._layers import (
    ClassProjection,
    activate,
    check_features,
    check_width,
    cloud_condition,
    linear,
    norm,
    packed,
    pooled,
    repacked,
    spread,
)


class CloudDiscriminator(nn.Module):
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
        - features: ``(B, N, C)`` or ragged ``(B, j, C)``
        - reference: the teacher's features of the same clouds, ``(B, M, C)`` or ragged; ignored
          without `condition`
        - labels: ``(B,)``; negative ones are unknown; ignored without `num_classes`
        - output: ``(B,)``

    Raises:
        ValueError: a wrong shape, or a reference or labels that are missing.
        TypeError: labels that are no integers.

    Source: pooling by attention is Lee et al., *Set Transformer*, ICML 2019, in its simplest form;
    projection Miyato & Koyama, *cGANs with Projection Discriminator*, ICLR 2018.

    Example:
        >>> discriminator = CloudDiscriminator(16, num_classes=40)
        >>> discriminator(torch.randn(2, 100, 16), labels=torch.tensor([3, 39])).shape
        torch.Size([2])
    """

    default_weight: ClassVar[float] = 0.1
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
        self.score = linear(hidden, 1, spectral_norm)
        self.condition = cloud_condition(condition, channels, hidden, spectral_norm)
        self.projection = (
            None if num_classes is None else ClassProjection(num_classes, hidden, spectral_norm)
        )

    def extra_repr(self) -> str:
        """How many heads there are."""
        return f"heads={self.heads}"

    def forward(
        self, features: Tensor, reference: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Score every cloud: high if it looks like the teacher's."""
        check_features("features", features, self.channels)
        hidden = self.first(packed(features))
        if self.condition is not None:
            hidden = hidden + spread(self.condition(reference, features), features)
        hidden = activate(self.norms[0](hidden))
        for layer, normalize in zip(self.rest, list(self.norms)[1:], strict=True):
            hidden = activate(normalize(layer(hidden)))
        attention = self._attended(hidden, features)
        summary = torch.cat([pooled(repacked(hidden, features)), attention], -1)
        summary = activate(self.joined(summary))
        scores: Tensor = self.score(summary).squeeze(-1)
        if self.projection is not None:
            scores = scores + self.projection(labels, summary, features, per_cloud=True)
        return scores

    def _attended(self, hidden: Tensor, features: Tensor) -> Tensor:
        """The points' hidden features, weighed by attention, ``(B, hidden)``."""
        logits = self.attention(hidden)
        if is_ragged(features):
            weights = _cloud_softmax(unpack(logits, features))
        else:
            weights = logits.softmax(1)
        weights = weights.to(hidden.dtype).unsqueeze(-1)
        values = hidden.reshape(*hidden.shape[:-1], self.heads, -1)
        weighed = (weights * values).flatten(-2)
        return cloud_sum(repacked(weighed, features))


def _cloud_softmax(logits: Tensor) -> Tensor:
    """Softmax over the points of each ragged cloud, packed."""
    values, offsets = pack(logits)
    index = cloud_index(logits)
    fixed = values.detach()
    highest = fixed.new_full((len(offsets) - 1, values.shape[1]), -torch.inf)
    highest = highest.scatter_reduce(0, index.unsqueeze(1).expand_as(fixed), fixed, "amax")
    weights = (values - highest[index]).exp()
    return weights / cloud_sum(unpack(weights, logits))[index]
