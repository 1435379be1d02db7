"""Parts that the discriminators that learn share: layers, conditioning, checks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fad_loss._checks import look
from fad_loss._errors import describe, expected
from fad_loss._game import Game
from fad_loss._points import Points
from fad_loss._ragged import is_ragged, packed

SLOPE = 0.2
"""The negative slope of the LeakyReLU everywhere."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Linear(nn.Linear):
    """A linear layer whose weight, parametrised or not, is computed outside autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """The linear map."""
        return F.linear(x, _weight(self, x), self.bias)


class Embedding(nn.Embedding):
    """An embedding whose weight, parametrised or not, is computed outside autocast."""

    def forward(self, index: Tensor) -> Tensor:
        """The embedded rows."""
        return F.embedding(index, _weight(self, index))


def _weight(module: nn.Linear | nn.Embedding, x: Tensor) -> Tensor:
    # The power iteration of the spectral norm mixes matrix-vector products, which autocast would
    # do in half precision, with dot products against float32 vectors.
    kind = x.device.type
    # PyTorch 2.6 cannot compile the first question.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return module.weight
    return module.weight


def linear(inputs: int, outputs: int, spectral_norm: bool, bias: bool = True) -> nn.Module:
    """A linear layer, spectrally normalised or not."""
    layer = Linear(inputs, outputs, bias=bias)
    return _normalized(layer) if spectral_norm else layer


def _normalized(layer: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(layer)


def norm(width: int, layer_norm: bool) -> nn.Module:
    """LayerNorm over the channels of each point, or nothing."""
    return nn.LayerNorm(width) if layer_norm else nn.Identity()


def activate(x: Tensor) -> Tensor:
    """The activation of every hidden layer."""
    return F.leaky_relu(x, SLOPE)


def pooled(points: Points) -> Tensor:
    """Mean and maximum over the points of each cloud, ``(B, 2C)``."""
    return torch.cat([points.mean(points.features), points.max(points.features)], -1)


def check_width(name: str, value: object) -> None:
    """Raise unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        message = f"{name}: expected a positive integer, got {value!r}"
        raise ValueError(message)


def check_channels(game: Game, channels: int) -> None:
    """Raise unless both sides have these channels."""
    for side in ("student", "teacher"):
        points = game.points(side)
        if points.channels != channels:
            wanted = f"(B, N, {channels}) or a ragged cloud with {channels} channels"
            raise expected(side, wanted, points.tensor())


class CloudCondition(nn.Module):
    """What the teacher says about a cloud, pooled and mapped to the width of a hidden layer."""

    def __init__(self, channels: int, width: int, spectral_norm: bool) -> None:
        super().__init__()
        self.channels = channels
        self.map = linear(2 * channels, width, spectral_norm, bias=False)

    def forward(self, teacher: Points) -> Tensor:
        """``(B, width)``."""
        result: Tensor = self.map(pooled(teacher))
        return result


def cloud_condition(
    condition: str | None, channels: int, width: int, spectral_norm: bool
) -> CloudCondition | None:
    """The module for ``condition="cloud"``, None for None, an error for anything else."""
    if condition not in {None, "cloud"}:
        message = f"condition: expected None or 'cloud', got {condition!r}"
        raise ValueError(message)
    return CloudCondition(channels, width, spectral_norm) if condition else None


class ClassProjection(nn.Module):
    """The inner product of hidden features with an embedding of their class.

    Source: Miyato & Koyama, *cGANs with Projection Discriminator*, ICLR 2018.
    """

    def __init__(self, num_classes: int, width: int, spectral_norm: bool) -> None:
        super().__init__()
        check_width("num_classes", num_classes)
        self.num_classes = num_classes
        layer = Embedding(num_classes, width)
        # The size that a linear layer of this width has; the spectral norm divides it out.
        nn.init.normal_(layer.weight, std=width**-0.5)
        self.embedding = _normalized(layer) if spectral_norm else layer

    def forward(
        self, labels: Tensor | None, hidden: Tensor, points: Points, *, per_cloud: bool = False
    ) -> Tensor:
        """What to add to the scores.

        Args:
            labels: ``(B,)``, or one per point; negative ones are unknown and add nothing.
            hidden: of the points, ``(..., width)``, or of the clouds, ``(B, width)``.
            points: what is being scored.
            per_cloud: whether `hidden` is that of the clouds.
        """
        if labels is None:
            message = (
                f"labels: this discriminator was built with num_classes={self.num_classes} and "
                "needs the class of every cloud, (B,) integers, got None"
            )
            raise ValueError(message)
        index = class_index(labels, points, self.num_classes, per_cloud=per_cloud)
        known = index >= 0
        embedded: Tensor = self.embedding(index.clamp_min(0).long())
        return (embedded * hidden).sum(-1) * known


def class_index(labels: Tensor, points: Points, num_classes: int, *, per_cloud: bool) -> Tensor:
    """Check labels and bring them to the shape of what is scored.

    Args:
        labels: ``(B,)``, or one per point.
        points: what is scored.
        num_classes: labels are below it; negative ones are unknown.
        per_cloud: whether clouds are scored, or their points.

    Returns:
        ``(B,)``; or ``(B, N)``, ``(B, 1)`` or packed.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        raise expected("labels", "an integer tensor of classes", labels, error=TypeError)
    index = _aligned(labels, points, per_cloud)
    if index is None:
        each = "" if per_cloud else ", or one per point"
        message = (
            f"labels: expected one class per cloud, ({points.batch},){each}, got "
            f"{describe(labels)} for features {describe(points.tensor())}"
        )
        raise ValueError(message)
    if look(index) and index.numel() and int(index.max()) >= num_classes:
        message = (
            f"labels: expected classes below {num_classes}, the number of classes (negative ones "
            f"are unknown), got {int(index.max())}"
        )
        raise ValueError(message)
    return index


def _aligned(labels: Tensor, points: Points, per_cloud: bool) -> Tensor | None:
    """The labels in the shape of what is scored, or None if they do not fit."""
    if not is_ragged(labels) and labels.shape == (points.batch,):
        return labels if per_cloud else points.spread(labels)
    if per_cloud or is_ragged(labels) != (points.offsets is not None):
        return None
    values = packed(labels)
    rows = points.features.shape[:-1]
    if values.shape == rows:
        return values
    # Global features (B, C) arrive as one set (1, B, C), their labels still as (B,).
    one_set = len(rows) == 2 and rows[0] == 1 and values.shape == rows[1:]
    return values.unsqueeze(0) if one_set else None
