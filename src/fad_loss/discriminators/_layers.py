"""Parts that the discriminators that learn share: layers, conditioning, checks.

Inside a discriminator, features are ``(B, N, C)``, or the packed values ``(N_1 + ... + N_B, C)`` of
a ragged cloud; `spread` brings what belongs to a cloud to its points in either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fad_loss._checks import check_tensor, look
from fad_loss._errors import describe
from fad_loss._ragged import cloud_index, cloud_mean, is_ragged, pack, unpack

SLOPE = 0.2
"""The negative slope of the LeakyReLU everywhere."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Linear(nn.Linear):
    """A linear layer whose weight, parametrised or not, is computed outside autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _weight(self, x), self.bias)


class Embedding(nn.Embedding):
    """An embedding whose weight, parametrised or not, is computed outside autocast."""

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, _weight(self, index))


def _weight(module: nn.Linear | nn.Embedding, x: Tensor) -> Tensor:
    # The power iteration of the spectral norm mixes matrix-vector products, which autocast would
    # do in half precision, with dot products against float32 vectors.
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
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


def packed(x: Tensor) -> Tensor:
    """The values to compute on: packed if ragged."""
    return pack(x)[0] if is_ragged(x) else x


def repacked(values: Tensor, like: Tensor) -> Tensor:
    """Undo `packed`."""
    return unpack(values, like) if is_ragged(like) else values


def spread(per_cloud: Tensor, x: Tensor) -> Tensor:
    """A value of each cloud, ``(B, ...)``, broadcastable to the `packed` points of `x`."""
    return per_cloud[cloud_index(x)] if is_ragged(x) else per_cloud.unsqueeze(1)


def cloud_max(x: Tensor) -> Tensor:
    """Maximum over the points of each cloud, ``(B, C)``; an empty cloud has the maximum 0.

    The gradient goes to one point per channel, the first that attains the maximum, in dense and
    ragged clouds alike, and can be differentiated again.
    """
    if not is_ragged(x):
        return x.gather(1, x.detach().argmax(1, keepdim=True)).squeeze(1)
    values, offsets = pack(x)
    total = values.shape[0]
    cloud = cloud_index(x).unsqueeze(1).expand_as(values)
    fixed = values.detach()
    highest = fixed.new_full((len(offsets) - 1, values.shape[1]), -torch.inf)
    highest = highest.scatter_reduce(0, cloud, fixed, "amax")
    position = torch.arange(total, device=values.device).unsqueeze(1).expand_as(values)
    candidates = torch.where(fixed == highest.gather(0, cloud), position, total)
    first = torch.full(highest.shape, total, device=values.device)
    first = first.scatter_reduce(0, cloud, candidates, "amin")
    # Of an empty cloud nobody is first.
    return values.gather(0, first.clamp(max=total - 1)) * (first < total)


def pooled(x: Tensor) -> Tensor:
    """Mean and maximum over the points of each cloud, ``(B, 2C)``."""
    return torch.cat([cloud_mean(x), cloud_max(x)], -1)


def check_width(name: str, value: object) -> None:
    """Raise unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        message = f"{name}: expected a positive integer, got {value!r}"
        raise ValueError(message)


def check_features(name: str, features: Tensor, channels: int) -> None:
    """Raise unless `features` is ``(B, N, C)`` or ragged ``(B, j, C)`` with these channels."""
    check_tensor(name, features)
    rank = pack(features)[0].dim() + 1 if is_ragged(features) else features.dim()
    if rank != 3 or features.shape[-1] != channels:
        message = (
            f"{name}: expected (B, N, {channels}) or a ragged cloud with {channels} channels, got "
            f"{describe(features)}"
        )
        raise ValueError(message)


def check_reference(reference: Tensor, features: Tensor, channels: int) -> None:
    """Raise unless `reference` has these channels and as many clouds as `features`."""
    check_features("reference", reference, channels)
    if reference.shape[0] != features.shape[0]:
        message = (
            "reference: expected the teacher's features of the same clouds as features, got "
            f"{describe(reference)} for {describe(features)}"
        )
        raise ValueError(message)


class CloudCondition(nn.Module):
    """What the teacher says about a cloud, pooled and mapped to the width of a hidden layer."""

    def __init__(self, channels: int, width: int, spectral_norm: bool) -> None:
        super().__init__()
        self.channels = channels
        self.map = linear(2 * channels, width, spectral_norm, bias=False)

    def forward(self, reference: Tensor | None, features: Tensor) -> Tensor:
        """``(B, width)``, or an error if `reference` does not belong to `features`."""
        if reference is None:
            message = (
                "reference: this discriminator was built with condition='cloud' and needs the "
                "teacher's features of the same clouds, got None; pass reference=teacher_features"
            )
            raise ValueError(message)
        check_reference(reference, features, self.channels)
        result: Tensor = self.map(pooled(reference))
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
        self, labels: Tensor | None, hidden: Tensor, features: Tensor, *, per_cloud: bool = False
    ) -> Tensor:
        """What to add to the scores.

        Args:
            labels: ``(B,)``, or one per point; negative ones are unknown and add nothing.
            hidden: of the `packed` points, ``(..., width)``, or of the clouds, ``(B, width)``.
            features: what is being scored.
            per_cloud: whether `hidden` is that of the clouds.
        """
        index = self._index(labels, features, per_cloud)
        known = index >= 0
        embedded: Tensor = self.embedding(index.clamp_min(0).long())
        return (embedded * hidden).sum(-1) * known

    def _index(self, labels: Tensor | None, features: Tensor, per_cloud: bool) -> Tensor:
        if labels is None:
            message = (
                f"labels: this discriminator was built with num_classes={self.num_classes} and "
                "needs the class of every cloud, (B,) integers, got None"
            )
            raise ValueError(message)
        return class_index(labels, features, self.num_classes, per_cloud=per_cloud)


def class_index(labels: Tensor, features: Tensor, num_classes: int, *, per_cloud: bool) -> Tensor:
    """Check labels and bring them to the shape of what is scored.

    Args:
        labels: ``(B,)``, or one per point of `features`.
        features: ``(B, N, C)`` or ragged.
        num_classes: labels are below it; negative ones are unknown.
        per_cloud: whether clouds are scored, or the `packed` points.

    Returns:
        ``(B,)``; or ``(B, N)``, ``(B, 1)`` or packed.
    """
    _check_integers(labels)
    index = _aligned(labels, features, per_cloud)
    if index is None:
        points = "" if per_cloud else ", or one per point"
        message = (
            f"labels: expected one class per cloud, ({features.shape[0]},){points}, got "
            f"{describe(labels)} for features {describe(features)}"
        )
        raise ValueError(message)
    if look(index) and index.numel() and int(index.max()) >= num_classes:
        message = (
            f"labels: expected classes below {num_classes}, the number of classes (negative ones "
            f"are unknown), got {int(index.max())}"
        )
        raise ValueError(message)
    return index


def _check_integers(labels: object) -> None:
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        message = f"labels: expected an integer tensor of classes, got {describe(labels)}"
        raise TypeError(message)


def _aligned(labels: Tensor, features: Tensor, per_cloud: bool) -> Tensor | None:
    """The labels in the shape of what is scored, or None if they do not fit."""
    ragged = is_ragged(features)
    if not is_ragged(labels) and labels.shape == features.shape[:1]:
        return labels if per_cloud else spread(labels, features)
    if per_cloud or is_ragged(labels) != ragged:
        return None
    if ragged:
        values = pack(labels)[0]
        return values if values.shape == pack(features)[0].shape[:1] else None
    if labels.shape == features.shape[:2]:
        return labels
    # Global features (B, C) arrive as one set (1, B, C), their labels still as (B,).
    one_set = features.shape[0] == 1 and labels.shape == features.shape[1:2]
    return labels.unsqueeze(0) if one_set else None
