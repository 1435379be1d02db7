"""Part segmentation for the paired study: generated shapes, a network, and its score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.data import Clouds, Dataset
from distill.networks import PointLayer, Scale
from hosts import toy

SIZE, POINTS = (2000, 1000), 128


class Segmenter(nn.Module):
    """PointNet's segmentation network without T-nets, of generated shapes: a label per point.

    Every point is classified by its own features and the largest of its cloud.

    Args:
        classes: number of parts.
        width: multiplies every channel count; 207 thousand parameters at 1.

    Shape:
        ``(B, N, 3)`` to logits ``(B, N, classes)``.
    """

    layer, places, samples = "encoder", "cloud", False
    penultimate = "classifier.1"

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        scale = Scale(width)
        self.classes, self.channels = classes, scale(256)
        self.cloud = nn.Identity()
        sizes = 3, scale(64), scale(128), self.channels
        self.encoder = nn.Sequential(*map(PointLayer, sizes[:-1], sizes[1:]))
        self.classifier = nn.Sequential(
            PointLayer(2 * self.channels, scale(256)),
            PointLayer(scale(256), scale(128)),
            nn.Linear(scale(128), classes),
        )

    def forward(self, points: Tensor) -> Tensor:
        features = self.encoder(self.cloud(points))
        largest = features.amax(dim=1, keepdim=True).expand_as(features)
        return self.classifier(torch.cat([features, largest], dim=-1))


def shapes(train: int = SIZE[0], test: int = SIZE[1], points: int = POINTS) -> Dataset:
    """Two primitives on top of each other; which of four kinds each point is on."""
    made = (toy.clouds(count, points, seed) for seed, count in enumerate((train, test)))
    splits = [Clouds(clouds, labels) for clouds, _, labels in made]
    names = ["ball", "cone", "tube", "box"]
    return Dataset("parts", *splits, names)


@torch.no_grad()
def mean_iou(network: nn.Module, clouds: Clouds, batch_size: int = 256) -> float:
    """Over the parts, the mean of the intersection of guess and truth over their union."""
    network.eval()
    guess = torch.cat([network(part).argmax(-1) for part in clouds.points.split(batch_size)])
    return toy.miou(guess, clouds.labels) / 100
