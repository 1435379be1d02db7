"""The loop of DGCNN and pointMLP: SGD at a rate of 0.1, step decay, the network alone clipped.

`Distiller` holds both networks and the loss, so the loop changes in three places.
`--two-optimizers` gives the loss an optimizer of its own.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import nn
from torch.nn import functional as F

import toy
from fad_loss import Distiller  # fad_loss

LAYERS = {"encoder": "encoder"}
OPTIONS = {"warmup_steps": 100}  # fad_loss


def train(args: Namespace, name: str, teacher: nn.Module | None) -> nn.Module:
    """Train a student, with the loss if there is a teacher."""
    data, student = toy.clouds(800), toy.PointNet(6)
    network: nn.Module = student
    if teacher is not None:
        network = Distiller(student, teacher, LAYERS, example=data[0][:2], **OPTIONS)  # fad_loss
    groups = [[*network.parameters()]]
    if args.two_optimizers:
        mine = {id(p) for p in student.parameters()}
        groups = [[*student.parameters()], [p for p in network.parameters() if id(p) not in mine]]
    optimizers = [
        torch.optim.SGD(group, lr=0.1, momentum=0.9, weight_decay=1e-4) for group in groups if group
    ]
    decays = [torch.optim.lr_scheduler.StepLR(o, args.epochs // 4 or 1, 0.3) for o in optimizers]
    kept = {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    kept |= {f"decay{i}": d for i, d in enumerate(decays)}
    for epoch in toy.epochs(args, name, network=network, **kept):
        network.train()
        for points, labels in toy.batches(data, epoch):
            output = network(points)
            logits, extra = output if teacher is not None else (output, 0)  # fad_loss
            loss = F.cross_entropy(logits, labels) + extra
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1)
            for optimizer in optimizers:
                optimizer.step()
        for decay in decays:
            decay.step()
    return student


if __name__ == "__main__":
    parser = toy.parser(__doc__)
    parser.add_argument("--two-optimizers", action="store_true", help="one for the loss alone")
    toy.compare(toy.start(parser), train)
