"""Small networks of the kinds that people distil, and points for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = 24


def clouds(B: int = 4, N: int = POINTS, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, N, generator=generator)


class DGCNN(nn.Module):
    """EdgeConv, then a convolution over all points, then a head: features (B, C, N)."""

    def __init__(self, width: int, norm: bool = True) -> None:
        super().__init__()
        self.edge = nn.Conv2d(6, width, 1)
        self.conv5 = nn.Sequential(
            nn.Conv1d(width, 2 * width, 1),
            nn.BatchNorm1d(2 * width) if norm else nn.Identity(),
            nn.LeakyReLU(0.2),
        )
        self.linear2 = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.cdist(x.mT, x.mT).topk(4, largest=False).indices
        near = x.unsqueeze(2).expand(-1, -1, x.shape[2], -1)
        near = near.gather(3, index.unsqueeze(1).expand(-1, 3, -1, -1))
        edges = torch.cat([near - x.unsqueeze(3), x.unsqueeze(3).expand_as(near)], 1)
        features = self.conv5(F.leaky_relu(self.edge(edges)).amax(3))
        return self.head(F.relu(self.linear2(features.amax(2))))


class Abstraction(nn.Module):
    """Farthest points, and the features of the ball around each: returns (positions, features)."""

    def __init__(self, count: int, channels: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.mlp = nn.Sequential(nn.Conv2d(channels + 3, width, 1), nn.ReLU(inplace=True))

    def forward(self, xyz: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, chosen = torch.arange(len(xyz)), [torch.zeros(len(xyz), dtype=torch.int64)]
        nearest = torch.full((len(xyz), xyz.shape[2]), torch.inf, dtype=xyz.dtype)
        for _ in range(self.count - 1):
            last = xyz[rows, :, chosen[-1]].unsqueeze(2)
            nearest = nearest.minimum((xyz - last).square().sum(1))
            chosen.append(nearest.argmax(1))
        picked = torch.stack(chosen, 1).unsqueeze(1).expand(-1, 3, -1)
        centers = xyz.gather(2, picked)
        index = torch.cdist(centers.mT, xyz.mT).topk(4, largest=False).indices.unsqueeze(1)
        known = xyz if features is None else torch.cat([xyz, features], 1)
        group = known.unsqueeze(2).expand(-1, -1, self.count, -1)
        group = group.gather(3, index.expand(-1, known.shape[1], -1, -1))
        relative = group[:, :3] - centers.unsqueeze(3)
        own = group if features is None else torch.cat([relative, group[:, 3:]], 1)
        own = torch.cat([relative, own], 1) if features is None else own
        return centers, self.mlp(own).amax(3)


class PointNet2(nn.Module):
    """Two levels that sample points, then one feature per cloud, (B, C, 1)."""

    def __init__(self, width: int, counts: tuple[int, int] = (12, 6)) -> None:
        super().__init__()
        self.sa1 = Abstraction(counts[0], 3, width)
        self.sa2 = Abstraction(counts[1], width, 2 * width)
        self.last = nn.Conv1d(2 * width, 2 * width, 1)
        self.pool = nn.AdaptiveMaxPool1d(1)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, xyz: Tensor) -> Tensor:
        at1, features = self.sa1(xyz, None)
        _, features = self.sa2(at1, features)
        return self.head(self.pool(self.last(features)).squeeze(2))


class Output(NamedTuple):
    logits: Tensor
    features: Tensor


class Tuples(nn.Module):
    """A network that returns its features beside its logits, (B, N, C), as many do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Output:
        features = self.second(F.relu(self.first(x.mT)))
        return Output(self.head(F.relu(features).amax(1)), features)
