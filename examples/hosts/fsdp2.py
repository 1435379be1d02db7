"""FSDP2: `fully_shard` around the distiller, its parameters in pieces on all ranks.

On one machine, `torchrun --standalone --nproc-per-node 2 examples/hosts/fsdp2.py`; on several, as
in ddp.py. Buffers are each rank's own under FSDP2: the loop hands out rank 0's before it saves.
"""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import toy
from fad_loss import Distiller  # fad_loss

LAYERS = {"encoder": "encoder"}
SHARE = {"balance": True, "warmup_steps": 100}  # fad_loss
WHOLE = states.StateDictOptions(full_state_dict=True)


class Sharded:
    """A sharded network and its optimizer, saved whole."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.both = network, optimizer

    def state_dict(self) -> tuple[Any, Any]:
        """All pieces, from all ranks."""
        return states.get_state_dict(*self.both, options=WHOLE)

    def load_state_dict(self, state: tuple[Any, Any]) -> None:
        """To each rank its pieces."""
        network, optimizer = state
        states.set_state_dict(
            *self.both, model_state_dict=network, optim_state_dict=optimizer, options=WHOLE
        )


def train(args: Namespace, name: str, teacher: nn.Module | None) -> nn.Module:
    """Train a student, with the loss if there is a teacher."""
    data, student = toy.clouds(800), toy.PointNet(6)
    network: nn.Module = nn.Sequential(OrderedDict(student=student))
    if teacher is not None:
        network = Distiller(student, teacher, LAYERS, example=data[0][:2], **SHARE)  # fad_loss
    network = fully_shard(network.to(args.device), mesh=args.mesh)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    sharded = Sharded(network, optimizer)
    for epoch in toy.epochs(args, name, sharded=sharded, decay=decay):
        network.train()
        for points, labels in toy.batches(data, epoch):
            mine = slice(args.rank, None, args.world)
            output = network(points[mine].to(args.device))
            logits, extra = output if teacher is not None else (output, 0)  # fad_loss
            optimizer.zero_grad()
            (F.cross_entropy(logits, labels[mine].to(args.device)) + extra).backward()
            optimizer.step()
        decay.step()
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    whole = {k.removeprefix("student."): v for k, v in sharded.state_dict()[0].items()}
    student = toy.PointNet(6)
    student.load_state_dict({k: whole[k].cpu() for k in student.state_dict()})
    return student


if __name__ == "__main__":
    arguments = toy.start(toy.parser(__doc__, seeds=5))
    arguments.device = toy.join()
    arguments.mesh = init_device_mesh(arguments.device.type, (arguments.world,))
    toy.compare(arguments, train)
    dist.destroy_process_group()
