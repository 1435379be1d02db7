"""PyTorch Geometric: its batch vectors, its PointNet++ layer, networks that keep other points.

The teacher keeps every second point, the student every third: the loss is told where they lie.
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
    """Clouds with the graph of each point's 4 nearest."""
    random = torch.Generator().manual_seed(seed)
    graphs = []
    for points, label in zip(*toy.clouds(count, seed=seed)[:2], strict=True):
        pos = points[: int(torch.randint(40, 65, (), generator=random))]
        near = torch.cdist(pos, pos).topk(4, largest=False).indices
        edges = torch.stack([near.flatten(), torch.arange(len(pos)).repeat_interleave(4)])
        graphs.append(Data(pos=pos, y=label, edge_index=edges))
    return graphs


class Net(nn.Module):
    """A layer of PointNet++, then some of the points."""

    def __init__(self, width: int, step: int) -> None:
        super().__init__()
        self.step, self.near = step, PointNetConv(toy.mlp(3, width), add_self_loops=False)
        self.mlp, self.head = toy.mlp(width + 3, 4 * width), nn.Linear(4 * width, toy.CLASSES)

    def forward(self, data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits; features, positions and clouds of the points that were kept."""
        near = self.near(None, data.pos, data.edge_index)
        features = self.mlp(torch.cat([near, data.pos], -1))[:: self.step]
        pos, batch = data.pos[:: self.step], data.batch[:: self.step]
        return self.head(global_max_pool(features, batch, len(data.y))), features, pos, batch


def fit(args: Namespace, name: str, network: Net, teacher: nn.Module | None) -> nn.Module:
    """Train a network, with the loss if there is a teacher."""
    trained = nn.ModuleList([network])
    if teacher is not None:
        fad = FeatureAdversarialLoss(24, 96, warmup_steps=100)  # fad_loss
        trained.append(fad)  # fad_loss
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loader = DataLoader(dataset(480, 0), batch_size=32, shuffle=True)
    for _ in toy.epochs(args, name, trained=trained, optimizer=optimizer, decay=decay):
        for data in loader:
            logits, *mine = network.train()(data)
            loss = F.cross_entropy(logits, data.y)
            if teacher is not None:
                (f, p, b), (g, q, c) = mine, teacher(data)[1:]
                s, where_s = ragged(f, batch=b), ragged(p, batch=b)  # fad_loss
                t, where_t = ragged(g, batch=c), ragged(q, batch=c)  # fad_loss
                loss = loss + fad(s, t, positions=(where_s, where_t))  # fad_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return network


if __name__ == "__main__":
    arguments = toy.start(toy.parser(__doc__))
    test = next(iter(DataLoader(dataset(960, 1), batch_size=960)))
    measure = lambda network: toy.share(network(test)[0], test.y)  # noqa: E731
    toy.duel(arguments, fit, lambda: Net(24, 2), lambda: Net(6, 3), measure)
