"""A teacher of another architecture: other points, of another number, in other places.

The teacher is a transformer over 64 points; the student a PointNet that sees 40 others of the same
surface. Nothing corresponds, so the loss is told where the points lie. It compares the teacher's
first block: from the last one students gained nothing.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toy
from fad_loss import FeatureAdversarialLoss  # fad_loss

POINTS, ITS, MINE = 104, slice(0, 64), slice(64, 104)


class Transformer(nn.Module):
    """Attention between points, twice, then the maximum."""

    points, rate = ITS, 2e-3

    def __init__(self, width: int) -> None:
        super().__init__()
        options = {"batch_first": True, "norm_first": True}
        blocks = [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, **options) for _ in "12"]
        self.encoder = nn.Sequential(toy.mlp(3, width, width), blocks[0])
        self.rest, self.head = blocks[1], nn.Linear(width, toy.CLASSES)


class Student(toy.PointNet):
    """A PointNet."""

    points, rate, rest = MINE, 5e-3, nn.Identity()


def classify(network: nn.Module, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits; features of the points that the network sees, and where those lie."""
    places = points[:, network.points]
    features = network.encoder(places)
    return network.head(network.rest(features).amax(-2)), features, places


def fit(args: Namespace, name: str, network: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """Train a network, with the loss if there is a teacher."""
    data, trained = toy.clouds(800, POINTS), nn.ModuleList([network])
    if teacher is not None:
        fad = FeatureAdversarialLoss(24, 64, discriminator="paired", warmup_steps=100)  # fad_loss
        trained.append(fad)  # fad_loss
    optimizer = torch.optim.AdamW(trained.parameters(), lr=network.rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in toy.epochs(args, name, trained=trained, optimizer=optimizer, decay=decay):
        trained.train()
        for points, labels in toy.batches(data, epoch):
            logits, features, places = classify(network, points)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                _, its, there = classify(teacher, points)
                loss = loss + fad(features, its, positions=(places, there))  # fad_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return network


if __name__ == "__main__":
    test = toy.clouds(1600, POINTS, seed=1)
    measure = lambda network: toy.share(classify(network, test[0])[0], test[1])  # noqa: E731
    arguments = toy.start(toy.parser(__doc__))
    toy.duel(arguments, fit, lambda: Transformer(64), lambda: Student(6), measure)
