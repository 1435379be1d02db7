"""What the hosts share, so that each shows its framework alone: clouds, networks, a teacher.

A cloud is one primitive below another: its class says which two, its part labels which of the two
each point is on. Everything follows from seeds. `epochs` writes a checkpoint after each, whole or
not at all, so that a run that is killed at any moment continues, with ``--resume``, to the same
weights, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRIMITIVES = 4
CLASSES = PRIMITIVES * PRIMITIVES
IGNORED = -1
Clouds = tuple[Tensor, Tensor, Tensor]


def clouds(count: int, points: int = 64, seed: int = 0) -> Clouds:
    """Points ``(count, points, 3)``, classes ``(count,)`` and part labels ``(count, points)``."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    above = torch.arange(points).expand(count, -1) % 2
    parts = torch.where(
        above == 1, (labels // PRIMITIVES).unsqueeze(1), labels.unsqueeze(1) % PRIMITIVES
    )
    u, v, w = torch.rand(3, count, points, generator=random)
    angle, z = 2 * math.pi * u, 2 * v - 1
    circle = torch.stack([angle.cos(), angle.sin()], -1)

    def around(radius: Tensor, height: Tensor) -> Tensor:
        return torch.cat([circle * radius.unsqueeze(-1), height.unsqueeze(-1)], -1)

    cube = 2 * torch.stack([u, v, w], -1) - 1
    kinds = [
        around((1 - z**2).sqrt(), z),  # ball
        around((0.5 - z / 2).sqrt(), 1 - 2 * (0.5 - z / 2).sqrt()),  # cone
        around(torch.full_like(z, 0.8), z),  # tube
        cube / cube.abs().amax(-1, keepdim=True),  # box
    ]
    cloud = torch.stack(kinds).gather(0, parts.view(1, count, points, 1).expand(1, -1, -1, 3))[0]
    # The two are of different size; then all is stretched, turned about z, and noisy.
    size = 0.4 + 0.4 * torch.rand(count, 2, 3, generator=random)
    cloud = cloud * size.gather(1, above.unsqueeze(-1).expand(-1, -1, 3))
    cloud[..., 2] += 1.2 * above - 0.6
    turn = 0.3 * math.pi * torch.rand(count, 1, generator=random)
    x, y, height = cloud.unbind(-1)
    cloud = torch.stack(
        [x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos(), height], -1
    )
    return cloud + 0.03 * torch.randn(cloud.shape, generator=random), labels, parts


def scenes(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Shapes of 30 to 64 points, each on a floor of 16: coordinates, and labels of each point."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for points, parts in zip(*clouds(count, seed=seed)[::2], strict=True):
        size = int(torch.randint(30, 65, (), generator=random))
        floor = 3 * torch.rand(16, 3, generator=random) - 1.5
        floor[:, 2] = -1.5
        labels = torch.cat([parts[:size], torch.full((16,), IGNORED)])
        found.append((torch.cat([points[:size], floor]), labels))
    return found


def collate(chosen: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What Pointcept's collate function makes of a batch."""
    coordinates, labels = zip(*chosen, strict=True)
    ends = torch.tensor([len(one) for one in labels]).cumsum(0)
    return {"coord": torch.cat(coordinates), "segment": torch.cat(labels), "offset": ends}


def batches(data: Clouds, epoch: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of points and labels: the same for the same epoch."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(epoch))
    for index in order.split(size):
        yield data[0][index], data[1][index]


class PointLayer(nn.Module):
    """A linear layer shared by all points, batch norm over all of them: ``(..., C)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, points: Tensor) -> Tensor:
        features = self.linear(points)
        return self.norm(features.flatten(0, -2)).relu().view(features.shape)


def mlp(*sizes: int) -> nn.Sequential:
    """Layers shared by all points."""
    return nn.Sequential(*itertools.starmap(PointLayer, itertools.pairwise(sizes)))


class PointNet(nn.Module):
    """``(B, N, 3)`` to logits: `encoder` puts out one feature per point, `head` pools them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = mlp(3, width, 2 * width, 4 * width)
        self.head = nn.Sequential(mlp(4 * width, 2 * width), nn.Linear(2 * width, CLASSES))

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.encoder(points).amax(-2))


Train = Callable[[argparse.Namespace, str, nn.Module | None], nn.Module]


def parser(doc: str, seeds: int = 2) -> argparse.ArgumentParser:
    """The options that all hosts have; more seeds where students of a kind differ much."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--epochs", type=int, default=20, help="of each training [20]")
    text = f"students of either kind [{seeds}]"
    options.add_argument("--seeds", type=int, default=seeds, help=text)
    options.add_argument("--resume", action="store_true", help="go on where a run stopped")
    options.add_argument("--folder", type=Path, default=None, help="checkpoints [runs/SCRIPT]")
    return options


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


def epochs(args: argparse.Namespace, name: str, **parts: Any) -> Iterator[int]:
    """The numbers of the epochs that are left; after each, the state of `parts` is written.

    Each epoch begins with a seed of its own, so the state of the random numbers need not be kept.
    """
    path, start = args.folder / f"{name}.pt", 0
    if args.resume and path.exists():
        state = torch.load(path, weights_only=True)
        start = state.pop("epochs")
        for key, part in parts.items():
            part.load_state_dict(state[key])
    for epoch in range(start, args.epochs):
        torch.manual_seed(epoch)
        yield epoch
        state = {key: part.state_dict() for key, part in parts.items()}  # of FSDP2, by all ranks
        if args.rank == 0:
            save(path, {**state, "epochs": epoch + 1})


@torch.no_grad()
def accuracy(network: nn.Module, data: Clouds) -> float:
    """Per cent of the clouds that are classified correctly."""
    network.eval()
    return share(network(data[0]), data[1])


def train_teacher(args: argparse.Namespace, network: nn.Module, data: Clouds) -> nn.Module:
    """Train a network in the plainest way, and freeze it."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in epochs(args, "teacher", network=network, optimizer=optimizer, decay=decay):
        network.train()
        for points, labels in batches(data, epoch):
            optimizer.zero_grad()
            F.cross_entropy(network(points), labels).backward()
            optimizer.step()
        decay.step()
    return network.eval().requires_grad_(False)


def report(results: dict[str, list[float]], what: str = "accuracy") -> None:
    """One line for each network: the mean over the seeds, and each."""
    if os.environ.get("RANK", "0") != "0":
        return
    for name, values in results.items():
        each = " ".join(f"{value:.1f}" for value in values)
        print(f"{name:22} {what} {sum(values) / len(values):5.1f} %   ({each})", flush=True)


def compare(
    args: argparse.Namespace,
    train: Train,
    *,
    teacher: nn.Module | None = None,
    measure: Callable[[nn.Module], float] | None = None,
    what: str = "accuracy",
) -> None:
    """Train a teacher, then students alone and with the loss, and print what they are worth.

    Args:
        args: the options.
        train: called with them, the name of the run, and the teacher or None; returns the student.
        teacher: trained already; None trains a wide PointNet.
        measure: what a network is worth, in per cent; None is the accuracy on clouds.
        what: its name.
    """
    if teacher is None:
        torch.manual_seed(100)
        teacher = train_teacher(args, PointNet(24), clouds(800))
    if measure is None:
        test = clouds(1600, seed=1)

        def measure(network: nn.Module) -> float:
            return accuracy(network, test)

    results = {"teacher": [measure(teacher)]}
    for kind, guide in (("student alone", None), ("student with the loss", teacher)):
        results[kind] = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            name = f"{'alone' if guide is None else 'with'}-{seed}"
            results[kind].append(measure(train(args, name, guide).eval()))
    report(results, what)


def duel(
    args: argparse.Namespace,
    fit: Callable[[argparse.Namespace, str, nn.Module, nn.Module | None], nn.Module],
    teacher: Callable[[], nn.Module],
    student: Callable[[], nn.Module],
    measure: Callable[[nn.Module], float],
    what: str = "accuracy",
) -> None:
    """`compare` for networks that are not PointNets: `fit` trains the teacher too."""
    torch.manual_seed(100)
    large = fit(args, "teacher", teacher(), None).eval().requires_grad_(False)

    def train(args: argparse.Namespace, name: str, guide: nn.Module | None) -> nn.Module:
        return fit(args, name, student(), guide)

    compare(args, train, teacher=large, measure=torch.no_grad()(measure), what=what)


def share(logits: Tensor, labels: Tensor) -> float:
    """Per cent of the logits whose largest is that of the label."""
    return 100 * (logits.argmax(-1) == labels).float().mean().item()


def miou(guess: Tensor, truth: Tensor) -> float:
    """Mean over the primitives of the intersection of guess and truth over their union."""
    kinds = torch.arange(PRIMITIVES).unsqueeze(1)
    mine, its = guess.flatten() == kinds, truth.flatten() == kinds
    its_union = (mine | its)[:, truth.flatten() >= 0].sum(1)
    return 100 * ((mine & its).sum(1) / its_union).mean().item()


def start(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, and fill in where the checkpoints go."""
    torch.set_num_threads(1)
    args = options.parse_args()
    args.rank, args.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    args.folder = args.folder or Path("runs") / Path(options.prog).stem
    return args


def join() -> torch.device:
    """Join the processes that torchrun started: NCCL where there are GPUs, gloo elsewhere."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device
