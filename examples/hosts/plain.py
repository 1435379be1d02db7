"""A plain training loop: features in hand, one optimizer, one backward.

`python examples/hosts/plain.py`; what concerns fad_loss is marked.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import nn
from torch.nn import functional as F

import toy
from fad_loss import FeatureAdversarialLoss  # fad_loss


def train(args: Namespace, name: str, teacher: nn.Module | None) -> nn.Module:
    """Train a student, with the loss if there is a teacher."""
    data, student = toy.clouds(800), toy.PointNet(6)
    parameters, parts = [*student.parameters()], {"student": student}
    if teacher is not None:
        # No layer samples, so point i of the student is point i of the teacher: "paired".
        fad = FeatureAdversarialLoss(24, 96, discriminator="paired", warmup_steps=100)  # fad_loss
        parameters += fad.parameters()  # fad_loss
        parts["fad"] = fad  # fad_loss
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in toy.epochs(args, name, **parts, optimizer=optimizer, decay=decay):
        student.train()
        for points, labels in toy.batches(data, epoch):
            features = student.encoder(points)
            loss = F.cross_entropy(student.head(features.amax(-2)), labels)
            if teacher is not None:
                loss = loss + fad(features, teacher.encoder(points))  # fad_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return student


if __name__ == "__main__":
    toy.compare(toy.start(toy.parser(__doc__)), train)
