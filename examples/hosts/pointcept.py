"""Pointcept's way: packed scenes with `offset`, a criterion of (pred, target), ignored labels.

A scene is a shape of 30 to 64 points on a floor of 16 whose label is ignored. The trainer of
Pointcept calls ``model(input_dict)["loss"]``, so the loss goes where the segmentor calls its
criterion, and the points that are ignored are masked.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn

import toy
from fad_loss import FeatureAdversarialLoss, HeadDiscriminator, ragged  # fad_loss

Scene = dict[str, Tensor]
ZERO = torch.zeros(1, dtype=torch.int64)


class Segmentor(nn.Module):
    """A backbone, a head and a criterion that only gets (pred, target)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = toy.mlp(3, width, 2 * width, 4 * width)
        self.decoder = toy.mlp(8 * width, 4 * width, 2 * width)
        self.head, self.others = nn.Linear(2 * width, toy.PRIMITIVES), (None,)
        self.criterion = nn.CrossEntropyLoss(ignore_index=toy.IGNORED)

    def learn_from(self, teacher: nn.Module | None) -> None:
        """Have the loss of the features added to the criterion's."""
        self.others = (teacher,)
        if teacher is not None:
            judge = HeadDiscriminator(teacher.head, pool=None)  # fad_loss
            self.fad = FeatureAdversarialLoss(8, 48, discriminator=judge)  # fad_loss

    def features(self, scene: Scene) -> Tensor:
        """What the head takes: every point is seen with the maximum over its scene beside it."""
        encoded, lengths = self.encoder(scene["coord"]), scene["offset"].diff(prepend=ZERO)
        pooled = torch.segment_reduce(encoded, "max", lengths=lengths)
        return self.decoder(torch.cat([encoded, pooled.repeat_interleave(lengths, 0)], -1))

    def forward(self, scene: Scene) -> Scene:
        """Logits, and the loss."""
        features, (teacher,) = self.features(scene), self.others
        target, offset = scene["segment"], scene["offset"]
        logits = self.head(features)
        loss = self.criterion(logits, target)
        if teacher is not None:
            its = ragged(teacher.features(scene), offset=offset)  # fad_loss
            mine = ragged(features, offset=offset)  # fad_loss
            loss = loss + self.fad(mine, its, mask=target != toy.IGNORED)  # fad_loss
        return {"seg_logits": logits, "loss": loss}


def fit(args: Namespace, name: str, model: Segmentor, teacher: nn.Module | None) -> nn.Module:
    """Train a segmentor; the loop does not know what is in its loss."""
    model.learn_from(teacher)
    optimizer, data = torch.optim.AdamW(model.parameters(), lr=5e-3), toy.scenes(800, 0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for _ in toy.epochs(args, name, model=model, optimizer=optimizer, decay=decay):
        for index in torch.randperm(800).split(32):
            optimizer.zero_grad()
            model.train()(toy.collate([data[i] for i in index]))["loss"].backward()
            optimizer.step()
        decay.step()
    return model


def measure(model: Segmentor) -> float:
    """The mIoU on scenes that were not trained on."""
    test = toy.collate(toy.scenes(800, 1))
    return toy.miou(model(test)["seg_logits"].argmax(-1), test["segment"])


if __name__ == "__main__":
    arguments = toy.start(toy.parser(__doc__))
    toy.duel(arguments, fit, lambda: Segmentor(24), lambda: Segmentor(4), measure, "mIoU")
