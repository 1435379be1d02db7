"""PyTorch Geometric: its batch vectors, its PointNet++ layer, networks that sample.

Both keep the same third of the points, so the features of the layer correspond: "paired". Sampling
and neighbours are plain PyTorch, so no compiled extension is needed.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import PointNetConv, global_max_pool

import toy
from fad_loss import FeatureAdversarialLoss, ragged  # fad_loss


def dataset(count: int, seed: int) -> list[Data]:
    """Clouds of 40 to 64 points in random order."""
    random, clouds = torch.Generator().manual_seed(seed), toy.clouds(count, seed=seed)
    sizes = torch.randint(40, 65, (count,), generator=random).tolist()
    orders = [torch.randperm(64, generator=random)[:size] for size in sizes]
    return [Data(pos=p[i], y=y) for p, y, i in zip(*clouds[:2], orders, strict=True)]


class Net(nn.Module):
    """PointNet++: every third point of the batch with its 8 nearest, then the maximum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = PointNetConv(toy.mlp(6, width, 2 * width, 4 * width), add_self_loops=False)
        self.head = nn.Sequential(toy.mlp(4 * width, 2 * width), nn.Linear(2 * width, toy.CLASSES))

    def forward(self, data: Data) -> tuple[Tensor, Tensor, Tensor]:
        """Logits; features and clouds of the points that are kept."""
        pos, batch = data.pos[::3], data.batch[::3]
        far = torch.cdist(pos, data.pos) + 1e9 * (batch.unsqueeze(1) != data.batch)
        near = far.topk(8, largest=False).indices
        edges = torch.stack([near.flatten(), torch.arange(len(pos)).repeat_interleave(8)])
        features = self.near((data.pos, None), (data.pos, pos), edges)
        return self.head(global_max_pool(features, batch, len(data.y))), features, batch


def fit(args: Namespace, name: str, network: Net, teacher: nn.Module | None) -> nn.Module:
    """Train a network, with the loss if there is a teacher."""
    trained = nn.ModuleList([network])
    if teacher is not None:
        fad = FeatureAdversarialLoss(24, 96, discriminator="paired", warmup_steps=100)  # fad_loss
        trained.append(fad)  # fad_loss
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loader = DataLoader(dataset(800, 0), batch_size=32, shuffle=True)
    for _ in toy.epochs(args, name, trained=trained, optimizer=optimizer, decay=decay):
        for data in loader:
            logits, features, batch = network.train()(data)
            loss = F.cross_entropy(logits, data.y)
            if teacher is not None:
                both = features, teacher(data)[1]
                loss = loss + fad(*(ragged(one, batch=batch) for one in both))  # fad_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return network


if __name__ == "__main__":
    arguments = toy.start(toy.parser(__doc__))
    test = next(iter(DataLoader(dataset(480, 1), batch_size=480)))
    measure = lambda network: toy.share(network(test)[0], test.y)  # noqa: E731
    toy.duel(arguments, fit, lambda: Net(24), lambda: Net(6), measure)
