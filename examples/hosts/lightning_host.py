"""PyTorch Lightning: automatic optimization, bfloat16, accumulation, checkpoints, statistics."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import toy
from fad_loss import Distiller  # fad_loss

LAYERS = {"encoder": "encoder"}
OPTIONS = {"warmup_steps": 100}  # fad_loss


class Classifier(lightning.LightningModule):
    """A student, with the loss if there is a teacher."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, epochs: int) -> None:
        super().__init__()
        self.data, self.network, self.epochs = toy.clouds(800), student, epochs
        self.guided = teacher is not None
        if self.guided:
            x = self.data[0][:2]
            self.network = Distiller(student, teacher, LAYERS, example=x, **OPTIONS)  # fad_loss

    def train_dataloader(self) -> DataLoader:
        """The batches of this epoch."""
        return DataLoader([*toy.batches(self.data, self.current_epoch, size=16)], batch_size=None)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:  # noqa: ARG002
        """A seed of its own for every epoch, so that a run can be continued.

        Not when the epoch starts: a run that goes on makes its loader, which draws, after that.
        """
        if batch_idx == 0:
            torch.manual_seed(self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """One loss, whichever of the two it is."""
        output = self.network(batch[0])
        logits, extra = output if self.guided else (output, 0)  # fad_loss
        if self.guided:
            self.log_dict(self.network.statistics(), on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1]) + extra

    def configure_optimizers(self) -> dict[str, object]:
        """One optimizer for the student and the loss."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=5e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": decay}


def train(args: Namespace, name: str, teacher: nn.Module | None) -> nn.Module:
    """Train a student, with the loss if there is a teacher."""
    student, folder = toy.PointNet(6), args.folder / name
    keep = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    options = {"accumulate_grad_batches": 2, "reload_dataloaders_every_n_epochs": 1}
    options |= {"callbacks": [keep], "logger": CSVLogger(args.folder, name, version=0)}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=args.epochs, precision="bf16-mixed", **options
    )
    last = str(folder / "last.ckpt") if args.resume and (folder / "last.ckpt").exists() else None
    trainer.fit(Classifier(student, teacher, args.epochs), ckpt_path=last)
    return student


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    toy.compare(toy.start(toy.parser(__doc__)), train)
