"""The discriminators under test, but those of the teacher's features, and what they are fed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fad_loss.discriminators import (
    CloudDiscriminator,
    Discriminator,
    Game,
    HeadDiscriminator,
    NeighborhoodDiscriminator,
    PointDiscriminator,
)

C = 5
CLASSES = 7
# Features and labels where their values do not matter.
R, L = torch.zeros(2, 4, C), torch.tensor([0, 1])
LEARNED = {
    "point": lambda **options: PointDiscriminator(C, 12, 2, **options),
    "neighborhood": lambda **options: NeighborhoodDiscriminator(C, 12, 2, k=3, **options),
    "cloud": lambda **options: CloudDiscriminator(C, 12, 2, heads=3, **options),
}
OPTIONS = {
    "plain": {},
    "unnormalised": {"spectral_norm": False},
    "everything": {"condition": "cloud", "num_classes": CLASSES, "layer_norm": True},
}


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(C, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    )


FROZEN = {
    "head": lambda: HeadDiscriminator(classifier()),
    "head of labels": lambda: HeadDiscriminator(classifier(), pool="mean", target="labels"),
    "head of points": lambda: HeadDiscriminator(classifier(), pool=None, temperature=2.0),
    "head of points and labels": lambda: HeadDiscriminator(
        classifier(), pool=None, target="labels"
    ),
    "head with levels": lambda: HeadDiscriminator(classifier(), levels=("", "2")),
    "head of points with levels": lambda: HeadDiscriminator(
        classifier(), pool=None, levels=["0", "4"]
    ),
}
EVERY = {
    **{
        f"{name}, {option}": (lambda name=name, option=option: LEARNED[name](**OPTIONS[option]))
        for name in LEARNED
        for option in OPTIONS
    },
    **FROZEN,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Discriminator:
    torch.manual_seed(0)
    discriminator = EVERY[name]().to(dtype)
    # Levels are compared in units of what was seen before.
    seen = clouds(3, 8, C, seed=2, dtype=dtype)
    discriminator.observe(Game.of(seen, seen))
    return discriminator


def clouds(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(
    name: str, B: int = 3, N: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels."""
    # A head without pooling compares point by point.
    M = N if "points" in name else 10
    labels = torch.arange(B) % CLASSES
    return (
        clouds(B, N, C, dtype=dtype),
        clouds(B, M, C, seed=1, dtype=dtype),
        labels,
    )


def ask(
    discriminator: Discriminator,
    student: Tensor,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    **options: object,
) -> Tensor:
    """The student's scores; of discriminators that never look at the teacher, without one."""
    teacher = student.detach() if teacher is None else teacher
    return discriminator(Game.of(student, teacher, labels, **options), "student")


def scored_per_cloud(name: str) -> bool:
    return name.startswith("cloud") or ("head" in name and "points" not in name)


def everything(name: str) -> Discriminator:
    return LEARNED[name](**OPTIONS["everything"])
