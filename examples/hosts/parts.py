"""Part segmentation: a label for every point, mIoU with and without the loss.

What is compared is what the head takes, one feature for each point of the same cloud.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toy
from fad_loss import Distiller  # fad_loss

LAYERS = {"decoder": "decoder"}
OPTIONS = {"warmup_steps": 100}  # fad_loss


class Segmenter(nn.Module):
    """PointNet for segmentation: every point with the maximum over its cloud beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = toy.mlp(3, width, 2 * width, 4 * width)
        self.decoder = toy.mlp(8 * width, 4 * width, 2 * width)
        self.head = nn.Linear(2 * width, toy.PRIMITIVES)

    def forward(self, points: Tensor) -> Tensor:
        """From ``(B, N, 3)`` to logits ``(B, N, PRIMITIVES)``."""
        features = self.encoder(points)
        cloud = features.amax(-2, keepdim=True).expand_as(features)
        return self.head(self.decoder(torch.cat([features, cloud], -1)))


def fit(args: Namespace, name: str, student: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """Train a network, with the loss if there is a teacher."""
    points, _, parts = toy.clouds(800)
    network = student
    if teacher is not None:
        network = Distiller(student, teacher, LAYERS, example=points[:2], **OPTIONS)  # fad_loss
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in toy.epochs(args, name, network=network, optimizer=optimizer, decay=decay):
        network.train()
        for batch, labels in toy.batches((points, parts, parts), epoch):
            output = network(batch)
            logits, extra = output if teacher is not None else (output, 0)  # fad_loss
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + extra
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return student


if __name__ == "__main__":
    arguments = toy.start(toy.parser(__doc__))
    test = toy.clouds(800, seed=1)
    toy.duel(
        arguments,
        fit,
        lambda: Segmenter(24),
        lambda: Segmenter(4),
        lambda network: toy.miou(network(test[0]).argmax(-1), test[2]),
        "mIoU",
    )
