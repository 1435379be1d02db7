"""Hugging Face Accelerate: mixed precision, accumulation, `save_state` and `load_state`.

`accelerate launch examples/hosts/accelerate_host.py` runs it on whatever was configured. The
distiller is prepared whole: its forward returns the student's output and the loss.
"""

from __future__ import annotations

import shutil
from argparse import Namespace

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

import toy
from fad_loss import Distiller  # fad_loss

OPTIONS = {"warmup_steps": 100}  # fad_loss


class Progress:
    """How many epochs are behind us, for `save_state` to keep."""

    epochs = 0

    def state_dict(self) -> dict[str, int]:
        """What is saved."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """And taken up."""
        self.epochs = state["epochs"]


def train(args: Namespace, name: str, teacher: nn.Module | None) -> nn.Module:
    """Train a student, with the loss if there is a teacher."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    data, student, progress = toy.clouds(800), toy.PointNet(6), Progress()
    network: nn.Module = student
    if teacher is not None:
        layers, example = {"encoder": "encoder"}, data[0][:2]
        network = Distiller(student, teacher, layers, example=example, **OPTIONS)  # fad_loss
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    network, optimizer = accelerator.prepare(network, optimizer)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, args.epochs)
    accelerator.register_for_checkpointing(progress, decay)
    folder, new = args.folder / name, args.folder / f"{name}-new"
    if args.resume and folder.exists():
        accelerator.load_state(str(folder))
    for epoch in range(progress.epochs, args.epochs):
        torch.manual_seed(epoch)
        network.train()
        for points, labels in toy.batches(data, epoch, size=16):
            with accelerator.accumulate(network):
                output = network(points)
                logits, extra = output if teacher is not None else (output, 0)  # fad_loss
                accelerator.backward(F.cross_entropy(logits, labels) + extra)
                optimizer.step()
                optimizer.zero_grad()
        decay.step()
        progress.epochs = epoch + 1
        shutil.rmtree(new, ignore_errors=True)
        accelerator.save_state(str(new))
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return accelerator.unwrap_model(student)


if __name__ == "__main__":
    toy.compare(toy.start(toy.parser(__doc__)), train)
