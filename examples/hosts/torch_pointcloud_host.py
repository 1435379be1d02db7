"""torch-pointcloud, a zoo of models: teacher and student by `create_model`, packed clouds.

Features are those before pooling, `forward_features`; the clouds are of 40 to 64 points, with a
batch vector as in PyTorch Geometric.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_pointcloud import create_model

import toy
from fad_loss import FeatureAdversarialLoss, ragged  # fad_loss

TASK = {"task": "classification", "num_classes": toy.CLASSES, "dropout": 0.0}


def pointnet(width: int) -> nn.Module:
    """The zoo's PointNet, without its second transformer, at another width."""
    sizes = {"mlp1_channels": (width,), "mlp2_channels": (2 * width, 4 * width)}
    heads = {"head_channels": (2 * width,), "use_features_transform": False}
    transformer = {"tnet_mlp1_dims": (width, 2 * width), "tnet_mlp2_dims": (width,)}
    return create_model("pointnet.modelnet40", **TASK, **sizes, **heads, **transformer)


def pack(points: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The first 40 to 64 points of every cloud, and the cloud of each of them."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(40, 65, (len(points), 1), generator=random)
    mask = torch.arange(points.shape[1]) < lengths
    return points[mask], mask.nonzero()[:, 0]


def fit(args: Namespace, name: str, network: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """Train a network, with the loss if there is a teacher."""
    data, trained = toy.clouds(800), nn.ModuleList([network])
    if teacher is not None:
        fad = FeatureAdversarialLoss(24, 96, discriminator="paired", warmup_steps=100)  # fad_loss
        trained.append(fad)  # fad_loss
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in toy.epochs(args, name, trained=trained, optimizer=optimizer, decay=decay):
        trained.train()
        for points, labels in toy.batches(data, epoch):
            pos, batch = pack(points, epoch)
            features = network.forward_features(None, pos, batch)
            loss = F.cross_entropy(network.forward_head(features, batch), labels)
            if teacher is not None:
                both = features, teacher.forward_features(None, pos, batch)
                loss = loss + fad(*(ragged(one, batch=batch) for one in both))  # fad_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return network


def measure(network: nn.Module) -> float:
    """The accuracy on clouds that were not trained on."""
    points, labels, _ = toy.clouds(1600, seed=1)
    return toy.share(network(None, *pack(points, 0)), labels)


if __name__ == "__main__":
    arguments = toy.start(toy.parser(__doc__))
    toy.duel(arguments, fit, lambda: pointnet(24), lambda: pointnet(6), measure)
