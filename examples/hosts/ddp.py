"""DistributedDataParallel: one wrapper around one module, whose forward returns the loss.

On one machine, `torchrun --standalone --nproc-per-node 2 examples/hosts/ddp.py`; on several, on
each of them (here four, with 8 GPUs each; `HOST` is the name of any of them):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        --rdzv-id distill examples/hosts/ddp.py

`--gather` compares global features, where the batch is the set: that of all ranks together.
"""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import toy
from fad_loss import FeatureAdversarialLoss  # fad_loss

SHARE = {"discriminator": "paired", "balance": True, "warmup_steps": 100}  # fad_loss


class Guided(nn.Module):
    """The student and the loss, so that one wrapper sees all parameters in one forward."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, *, gather: bool) -> None:
        super().__init__()
        self.student, self.others, self.gather = student, (teacher,), gather
        if teacher is not None:
            self.fad = FeatureAdversarialLoss(24, 96, **SHARE)  # fad_loss

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """The loss of one rank's batch."""
        (teacher,), features = self.others, self.student.encoder(points)
        loss = F.cross_entropy(self.student.head(features.amax(-2)), labels)
        if teacher is None:
            return loss
        its = teacher.encoder(points)
        if self.gather:  # with gradients: each rank's features get those of all ranks' losses
            features, its = (torch.cat(all_gather(one.amax(-2))) for one in (features, its))
        return loss + self.fad(features, its)  # fad_loss


def train(args: Namespace, name: str, teacher: nn.Module | None) -> nn.Module:
    """Train a student, with the loss if there is a teacher."""
    data, student = toy.clouds(800), toy.PointNet(6)
    guided = Guided(student, teacher, gather=args.gather).to(args.device)
    network = DistributedDataParallel(guided)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in toy.epochs(args, name, guided=guided, optimizer=optimizer, decay=decay):
        network.train()
        for points, labels in toy.batches(data, epoch):
            mine = slice(args.rank, None, args.world)
            optimizer.zero_grad()
            network(points[mine].to(args.device), labels[mine].to(args.device)).backward()
            optimizer.step()
        decay.step()
    return student.cpu()


if __name__ == "__main__":
    parser = toy.parser(__doc__, seeds=5)
    parser.add_argument("--gather", action="store_true", help="global features, of all ranks")
    arguments = toy.start(parser)
    arguments.device = toy.join()
    toy.compare(arguments, train)
    dist.destroy_process_group()
