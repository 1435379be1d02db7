"""A teacher that is asked once: its features of augmented clouds, recorded and replayed.

Four views of every cloud are recorded as safetensors: float16, ragged (an augmentation drops
points), with what they were made from. Views are made again from their seeds. What was recorded
of other clouds, another teacher or other augmentations is refused.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import nn
from torch.nn import functional as F

import toy
from fad_loss import FeatureAdversarialLoss, ragged  # fad_loss
from recording import VIEWS, record, replay, view


def train(args: Namespace, name: str, teacher: nn.Module | None) -> nn.Module:
    """Train a student on the views, with the loss if there is a teacher."""
    (points, labels, _), student = toy.clouds(800), toy.PointNet(6)
    trained, views = nn.ModuleList([student]), [view(points, number) for number in range(VIEWS)]
    if teacher is not None:
        path = args.folder / "features.safetensors"
        if not path.exists():
            record(path, points, teacher)
        known = replay(path, points, teacher)
        fad = FeatureAdversarialLoss(24, 96, discriminator="paired", warmup_steps=100)  # fad_loss
        trained.append(fad)  # fad_loss
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in toy.epochs(args, name, trained=trained, optimizer=optimizer, decay=decay):
        trained.train()
        seen, lengths = views[epoch % VIEWS]
        rows = torch.arange(len(seen)).split(lengths.tolist())
        for index in torch.randperm(len(points)).split(32):
            packed, sizes = torch.cat([rows[i] for i in index]), lengths[index]
            features = student.encoder(seen[packed])
            pooled = torch.segment_reduce(features, "max", lengths=sizes)
            loss = F.cross_entropy(student.head(pooled), labels[index])
            if teacher is not None:
                both = features, known[epoch % VIEWS][packed].float()
                loss = loss + fad(*(ragged(one, lengths=sizes) for one in both))  # fad_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return student


if __name__ == "__main__":
    toy.compare(toy.start(toy.parser(__doc__)), train)
