"""torchdistill: the loss registered, used from a YAML configuration, and its adapter trained.

torchdistill's optimizer takes the student's parameters only. Those of the loss are added to it.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.common.constant import def_logger
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.registry import register_low_level_loss

import toy
from fad_loss import FeatureAdversarialLoss  # fad_loss

register_low_level_loss(FeatureAdversarialLoss)  # fad_loss


def train(args: Namespace, name: str, teacher: nn.Module | None) -> nn.Module:
    """Train a student, with the loss if there is a teacher."""
    points, labels, _ = toy.clouds(800)
    config = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    config["num_epochs"] = args.epochs
    config["train_data_loader"]["sampler"]["class_or_func"] = RandomSampler
    if teacher is None:
        del config["criterion"]["kwargs"]["sub_terms"]["features"]
    student, other = toy.PointNet(6), teacher or toy.PointNet(1)
    data, cpu = {"train": TensorDataset(points, labels)}, torch.device("cpu")
    box = DistillationBox(other, student, data, config, cpu, None, distributed=False, lr_factor=1)
    parts = {"student": student, "optimizer": box.optimizer, "decay": box.lr_scheduler}
    if teacher is not None:
        fad = box.criterion.term_dict["features"][0].low_level_loss  # fad_loss
        box.optimizer.add_param_group({"params": [*fad.parameters()]})  # fad_loss
        parts["fad"] = fad  # fad_loss
    for epoch in toy.epochs(args, name, **parts):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, extra in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(batch, targets, extra))
        box.post_epoch_process()
    box.clean_modules()
    other.requires_grad_(False)
    return student


if __name__ == "__main__":
    def_logger.setLevel("ERROR")
    toy.compare(toy.start(toy.parser(__doc__)), train)
