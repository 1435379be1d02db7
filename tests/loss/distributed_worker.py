"""What each process of the distributed test runs: half the batch, one wrapped module."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .cases import TEACHER, make

GAMES = {
    "teacher": {"normalize": False},
    "witness embedding": {"normalize": False},
    "point": {"normalize": False, "gradient_penalty": 0.2, "warmup_steps": 4},
    "neighborhood": {"normalize": False},
    "cloud": {"normalize": False, "objective": "relativistic"},
    "head": {"normalize": False},
    "point, standardised": {"normalize": True, "lecam": 0.1},
    "teacher, balanced": {"normalize": True, "balance": True},
    "teacher, balanced, buffers of each": {"normalize": True, "balance": True},
}


class Step(nn.Module):
    """Student and loss in one module, as one wraps them for DDP."""

    def __init__(self, game: str) -> None:
        super().__init__()
        self.fad = make(game.partition(",")[0], **GAMES[game])
        torch.manual_seed(3)
        self.student = nn.Linear(3, 4).double()

    def forward(self, points: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        features = self.student(points)
        return features.square().mean() + self.fad(features, teacher)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    points = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    return points, torch.randn(4, 8, TEACHER, generator=generator, dtype=torch.float64) + 1


def train(step: nn.Module, points: torch.Tensor, teacher: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step(points, teacher).backward()
        optimizer.step()


def work(rank: int, folder: str) -> None:
    """Train every game on this rank's half, and leave the parameters."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    half = slice(2 * rank, 2 * rank + 2)
    points, teacher = (t[half] for t in batch())
    results = {}
    for game in GAMES:
        step = Step(game)
        wrapped = DistributedDataParallel(step, broadcast_buffers="of each" not in game)
        train(wrapped, points, teacher)
        if rank == 0:
            # Alone, as one who validates on the first rank does: nobody answers a collective.
            step.eval()(points, teacher)
            with torch.no_grad():
                step.train()(points, teacher)
        results[game] = {**step.state_dict(), "weight": step.fad.statistics()["weight"]}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
