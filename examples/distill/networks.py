"""PointNet, PointNet++ and DGCNN, scalable in width, points last: ``(B, N, 3)`` in, logits out.

They are the published classifiers. Every channel count is multiplied by ``width``, which is how a
student 40 times smaller than its teacher is found (`widest`). The module path `layer` of a network
names the layer to distil: it puts out one feature per point, ``(B, N, channels)``, and nothing but
pooling and the classifier follows it; `places`, what puts out where those points lie; and
`penultimate`, the layer before the classifier's last one. A network that `samples` chooses points
for itself: point i of one is then not point i of another. PointNet takes ragged clouds as well
(`RAGGED`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scale:
    """Multiplies a published channel count by the width of a network."""

    def __init__(self, width: float) -> None:
        self.width = width

    def __call__(self, channels: int) -> int:
        return max(1, round(channels * self.width))


def per_point(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Apply what knows of no clouds: to ``(..., C)`` as rows, to ragged clouds packed."""
    if points.is_nested:
        made = function(points.values())
        return torch.nested.nested_tensor_from_jagged(made, points.offsets())
    return function(points.flatten(0, -2)).unflatten(0, points.shape[:-1])


def pool(points: Tensor, how: str) -> Tensor:
    """The "max" or "mean" over the points of each cloud, ``(B, N, C)`` or ragged, to ``(B, C)``."""
    if points.is_nested:
        return torch.segment_reduce(points.values(), how, lengths=points.offsets().diff())
    return points.amax(dim=1) if how == "max" else points.mean(dim=1)


class PointLayer(nn.Module):
    """A linear layer shared by all points, batch norm over all of them, an activation.

    The same as a 1 x 1 convolution on ``(B, C, N)``, but on ``(..., C)``: no transposes.
    """

    def __init__(self, inputs: int, outputs: int, slope: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)
        self.activation = nn.LeakyReLU(slope) if slope else nn.ReLU()

    def forward(self, points: Tensor) -> Tensor:
        return per_point(lambda rows: self.activation(self.norm(self.linear(rows))), points)


def first_largest(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)`; on a CPU by arithmetic, which vectorises, in half the time.

    How far a score lies below the largest, times 2^100, outweighs any column, but where it is 0: so
    the smallest of that and the column together is the first column of the largest score.
    """
    if scores.dtype != torch.float32 or scores.device.type != "cpu":
        return scores.argmax(dim=-1)
    columns = torch.arange(scores.shape[-1], dtype=scores.dtype)
    found = []
    # 1 MiB of scores at a time, which stays in a cache.
    for part in scores.split(max((1 << 18) // max(scores[0].numel(), 1), 1)):
        below = part.amax(dim=-1, keepdim=True) - part
        found.append(torch.add(columns, below, alpha=2.0**100, out=below).amin(dim=-1))
    first = torch.cat(found)
    return scores.argmax(dim=-1) if first.isnan().any() else first.long()


class MaxPoolLayer(nn.Module):
    """``max over points of norm(linear(points))``: ``(B, N, inputs)`` to ``(B, outputs)``.

    The widest layer of PointNet, three times over, and most of its cost if computed as written.
    But each output depends on one point of its cloud, and the batch statistics of a linear map
    follow from the covariance C of its inputs (mean ``W m``, variance ``diag(W C W^T)``). So the
    ``(B, N, outputs)`` matrix is computed once without a gradient, to find the points that win, and
    the gradient runs through those alone. Same values, same gradients, a third of the time. Ragged
    clouds are computed as written.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, points: Tensor) -> Tensor:
        if points.is_nested:
            return pool(per_point(lambda rows: self.norm(self.linear(rows)), points), "max")
        batch, count, _ = points.shape
        flat, weight, norm = points.flatten(0, 1), self.linear.weight, self.norm
        grad = torch.is_grad_enabled()
        # Norm multiplies by its weight: where that is negative, the smallest value wins.
        sign = torch.where(norm.weight < 0, -1.0, 1.0).to(flat.dtype).detach()
        with torch.no_grad():
            scores = ((weight * sign.unsqueeze(-1)) @ flat.t()).unflatten(1, (batch, count))
            found = first_largest(scores) if grad else scores.amax(dim=-1)  # (outputs, B)
        if grad:
            winner = found + torch.arange(batch, device=flat.device) * count
            won = F.embedding(winner, flat)  # (outputs, B, inputs)
            pooled = torch.bmm(won, weight.unsqueeze(-1)).squeeze(-1).t()
        else:
            pooled = found.t() * sign
        if self.training:
            center = flat.mean(dim=0)
            centered = flat - center
            covariance = centered.t() @ centered / len(flat)
            mean, variance = batch_statistics(norm, weight, center, covariance, len(flat))
        else:
            mean, variance = norm.running_mean, norm.running_var
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        return (pooled - mean) * scale + norm.bias


def batch_statistics(
    norm: nn.BatchNorm1d, weight: Tensor, mean: Tensor, covariance: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``weight x``, from those of `count` vectors x; the norm keeps them."""
    mean = weight @ mean
    variance = ((weight @ covariance) * weight).sum(dim=-1).clamp(min=0)  # rounding
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return mean, variance


class TransformNet(nn.Module):
    """PointNet's T-net: predicts a C x C matrix from the whole cloud and applies it to each point.

    The last layer starts at zero with the identity added, so training starts from "no transform".
    """

    def __init__(self, channels: int, scale: Scale) -> None:
        super().__init__()
        self.channels = channels
        self.points = nn.Sequential(
            PointLayer(channels, scale(64)),
            PointLayer(scale(64), scale(128)),
            MaxPoolLayer(scale(128), scale(1024)),
            nn.ReLU(),
        )
        self.cloud = nn.Sequential(
            PointLayer(scale(1024), scale(512)), PointLayer(scale(512), scale(256))
        )
        self.matrix = nn.Linear(scale(256), channels * channels)
        nn.init.zeros_(self.matrix.weight)
        nn.init.zeros_(self.matrix.bias)

    def forward(self, points: Tensor) -> Tensor:
        offset = self.matrix(self.cloud(self.points(points)))
        offset = offset.unflatten(-1, (self.channels, self.channels))
        if points.is_nested:
            pairs = zip(points.unbind(), offset, strict=True)
            moved = torch.cat([torch.addmm(cloud, cloud, matrix) for cloud, matrix in pairs])
            return torch.nested.nested_tensor_from_jagged(moved, points.offsets())
        return torch.baddbmm(points, points, offset)  # x (I + A), without building I


class PointNet(nn.Module):
    """PointNet (Qi et al., CVPR 2017): both T-nets, 3.5 M parameters for 40 classes at width 1.

    Args:
        classes: number of classes.
        width: multiplies every channel count.

    Shape:
        ``(B, N, 3)``, or ragged clouds, to logits ``(B, classes)``.
    """

    layer, places, samples = "encoder", "cloud", False
    penultimate = "classifier.1"

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        scale = Scale(width)
        self.classes, self.channels = classes, scale(128)
        self.cloud = nn.Identity()
        self.input_transform = TransformNet(3, scale)
        self.local = nn.Sequential(PointLayer(3, scale(64)), PointLayer(scale(64), scale(64)))
        self.feature_transform = TransformNet(scale(64), scale)
        self.encoder = nn.Sequential(
            PointLayer(scale(64), scale(64)), PointLayer(scale(64), scale(128))
        )
        self.embedding = MaxPoolLayer(scale(128), scale(1024))
        self.classifier = nn.Sequential(
            PointLayer(scale(1024), scale(512)),
            PointLayer(scale(512), scale(256)),
            nn.Dropout(0.3),
            nn.Linear(scale(256), classes),
        )

    def forward(self, points: Tensor) -> Tensor:
        local = self.local(self.input_transform(self.cloud(points)))
        return self.classifier(self.embedding(self.encoder(self.feature_transform(local))))


class EdgeConv(nn.Module):
    """EdgeConv: max over each point's neighbours of ``h(x_j - x_i, x_i)``, h a linear layer.

    ``W [x_j - x_i, x_i] = A x_j + (B - A) x_i``: two linear maps per point instead of one per edge.
    And as in `MaxPoolLayer`, only the neighbour that wins is normed, by the mean and variance of
    all edges, which follow from the covariance of ``[x_j, x_i]``: nothing is held per edge.
    """

    def __init__(self, inputs: int, outputs: int, neighbors: int) -> None:
        super().__init__()
        self.neighbors = neighbors
        self.neighbor = nn.Linear(inputs, outputs, bias=False)
        self.center = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, points: Tensor) -> Tensor:
        from fad_loss import ops  # noqa: PLC0415

        batch, count, _ = points.shape
        _, index = ops.knn(points.detach(), points.detach(), min(self.neighbors, count))
        start = torch.arange(batch, device=points.device).view(batch, 1, 1) * count
        index, flat = (index + start).flatten(0, 1), points.flatten(0, 1)
        # Norm multiplies by its weight: where that is negative, the smallest value wins.
        sign = torch.where(self.norm.weight < 0, -1.0, 1.0).to(flat.dtype).detach()
        won = F.embedding_bag(index, self.neighbor(flat) * sign, mode="max") * sign
        if self.training:
            weight = torch.cat([self.neighbor.weight, self.center.weight], dim=1)
            mean, variance = batch_statistics(self.norm, weight, *_edges(flat, index))
        else:
            mean, variance = self.norm.running_mean, self.norm.running_var
        scale = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        normed = (won + self.center(flat) - mean) * scale + self.norm.bias
        return self.activation(normed).unflatten(0, (batch, count))


def _edges(flat: Tensor, index: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and covariance of ``[x_j, x_i]`` over all edges from i to j, and how many there are."""
    center = flat.mean(dim=0)
    centered, edges = flat - center, index.numel()
    degree = torch.bincount(index.flatten(), minlength=len(flat)).to(flat.dtype)
    sums = F.embedding_bag(index, centered, mode="sum")
    mean = torch.cat([sums.sum(dim=0) / edges, torch.zeros_like(center)])
    mixed = sums.t() @ centered
    columns = [
        torch.cat([(centered * degree.unsqueeze(-1)).t() @ centered, mixed.t()]),
        torch.cat([mixed, centered.t() @ centered * index.shape[1]]),
    ]
    covariance = torch.cat(columns, dim=1) / edges - torch.outer(mean, mean)
    return mean + torch.cat([center, center]), covariance, edges


class DGCNN(nn.Module):
    """DGCNN (Wang et al., TOG 2019): 1.8 M parameters for 40 classes at width 1.

    Args:
        classes: number of classes.
        width: multiplies every channel count.
        neighbors: edges per point, found anew in the feature space of every layer; all points if
            the cloud has fewer.

    Shape:
        ``(B, N, 3)`` to logits ``(B, classes)``.
    """

    layer, places, samples = "embedding", "cloud", False
    penultimate = "classifier.2"

    def __init__(self, classes: int, width: float = 1.0, neighbors: int = 20) -> None:
        super().__init__()
        scale = Scale(width)
        self.classes, self.channels = classes, scale(1024)
        self.cloud = nn.Identity()
        sizes = [3, scale(64), scale(64), scale(128), scale(256)]
        self.edges = nn.ModuleList(
            EdgeConv(inputs, outputs, neighbors) for inputs, outputs in itertools.pairwise(sizes)
        )
        self.embedding = PointLayer(sum(sizes[1:]), scale(1024), slope=0.2)
        self.classifier = nn.Sequential(
            PointLayer(2 * scale(1024), scale(512), slope=0.2),
            nn.Dropout(0.5),
            PointLayer(scale(512), scale(256), slope=0.2),
            nn.Dropout(0.5),
            nn.Linear(scale(256), classes),
        )

    def forward(self, points: Tensor) -> Tensor:
        points = self.cloud(points)
        levels = []
        for edge in self.edges:
            points = edge(points)
            levels.append(points)
        features = self.embedding(torch.cat(levels, dim=-1))
        pooled = torch.cat([features.max(dim=1).values, features.mean(dim=1)], dim=-1)
        return self.classifier(pooled)


@torch.no_grad()
def farthest_points(points: Tensor, count: int, random: bool) -> Tensor:
    """Indices ``(B, count)`` of points, each the farthest from all before it.

    The first is any (`random`), or the one farthest from the mean, whatever the order of points is.
    """
    batch, size, _ = points.shape
    if random:
        index = torch.randint(size, (batch,), device=points.device)
    else:
        index = (points - points.mean(dim=1, keepdim=True)).square().sum(-1).argmax(dim=1)
    rows = torch.arange(batch, device=points.device)
    chosen = [index]
    distance = points.new_full((batch, size), torch.inf)
    for _ in range(count - 1):
        latest = points[rows, index].unsqueeze(1)
        distance = torch.minimum(distance, (points - latest).square().sum(-1))
        index = distance.argmax(dim=1)
        chosen.append(index)
    return torch.stack(chosen, dim=1)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each cloud: ``(B, N, C)`` and ``(B, ...)`` to ``(B, ..., C)``."""
    flat = index.flatten(1).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).unflatten(1, index.shape[1:])


class SetAbstraction(nn.Module):
    """PointNet++'s layer: sample points, group their neighbours, and a small PointNet per group.

    Args:
        sizes: channels of the features that come in, and of the layers.
        share: sample every so-many-th point, the farthest from each other.
        most: but no more than this.
        neighbors: the nearest ones make a group; all points if the cloud has fewer.

    Shape:
        Positions ``(B, N, 3)`` and features ``(B, N, C)``, or None, to those of the sample.
    """

    def __init__(self, sizes: list[int], share: int, most: int, neighbors: int) -> None:
        super().__init__()
        self.share, self.most, self.neighbors = share, most, neighbors
        widths = itertools.pairwise([3 + sizes[0], *sizes[1:]])
        self.layers = nn.Sequential(*(PointLayer(*pair) for pair in widths))

    def forward(self, positions: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        from fad_loss import ops  # noqa: PLC0415

        size = positions.shape[1]
        count = max(1, min(size // self.share, self.most))
        centers = gather(positions, farthest_points(positions, count, self.training))
        with torch.no_grad():
            _, index = ops.knn(centers, positions, min(self.neighbors, size))
        groups = gather(positions, index) - centers.unsqueeze(2)
        if features is not None:
            groups = torch.cat([groups, gather(features, index)], dim=-1)
        return centers, self.layers(groups).amax(dim=2)


class PointNet2(nn.Module):
    """PointNet++ (Qi et al., NeurIPS 2017), one scale: 1.47 M parameters for 40 classes at width 1.

    Groups are of the nearest neighbours rather than of those within a radius, so that clouds of
    few points will do. In training the sample begins anywhere, so that no two are the same.

    Args:
        classes: number of classes.
        width: multiplies every channel count.
        neighbors: the size of a group.

    Shape:
        ``(B, N, 3)`` to logits ``(B, classes)``.
    """

    layer, places, samples = "local[1]", "local[0]", True
    penultimate = "classifier.2"

    def __init__(self, classes: int, width: float = 1.0, neighbors: int = 16) -> None:
        super().__init__()
        scale = Scale(width)
        self.classes, self.channels = classes, scale(256)
        first = [0, scale(64), scale(64), scale(128)]
        second = [first[-1], scale(128), scale(128), scale(256)]
        self.first = SetAbstraction(first, 2, 512, neighbors)
        self.local = SetAbstraction(second, 2, 128, neighbors)
        self.embedding = nn.Sequential(
            PointLayer(3 + scale(256), scale(256)),
            PointLayer(scale(256), scale(512)),
            PointLayer(scale(512), scale(1024)),
        )
        self.classifier = nn.Sequential(
            PointLayer(scale(1024), scale(512)),
            nn.Dropout(0.4),
            PointLayer(scale(512), scale(256)),
            nn.Dropout(0.4),
            nn.Linear(scale(256), classes),
        )

    def forward(self, points: Tensor) -> Tensor:
        positions, features = self.local(*self.first(points, None))
        embedded = self.embedding(torch.cat([positions, features], dim=-1))
        return self.classifier(embedded.amax(dim=1))


Network: TypeAlias = PointNet | PointNet2 | DGCNN
ARCHITECTURES: dict[str, type[Network]] = {
    "pointnet": PointNet,
    "pointnet2": PointNet2,
    "dgcnn": DGCNN,
}
RAGGED = {"pointnet"}


def build(arch: str, classes: int, width: float = 1.0) -> Network:
    """A fresh network of the named architecture."""
    return ARCHITECTURES[arch](classes, width)


def parameters(network: nn.Module) -> int:
    """How many trainable numbers a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def widest(
    arch: str,
    classes: int,
    budget: float,
    steps: int = 1024,
    *,
    build: Callable[[str, int, float], nn.Module] = build,
) -> float:
    """The largest width, in steps of ``1 / steps``, at which a network fits `budget` parameters.

    Raises:
        ValueError: even the narrowest network is larger.
    """

    def fits(step: int) -> bool:
        with torch.device("meta"):
            return parameters(build(arch, classes, step / steps)) <= budget

    if not fits(1):
        message = f"no {arch} for {classes} classes has as few as {int(budget):,} parameters"
        raise ValueError(message)
    low, high = 1, 8 * steps
    while high - low > 1:  # the number of parameters grows with the width: bisect
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low / steps
