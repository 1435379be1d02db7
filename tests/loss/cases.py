"""Every discriminator and every layout, as small problems that all tests of the loss share."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from fad_loss import (
    CloudDiscriminator,
    FeatureAdversarialLoss,
    HeadDiscriminator,
    MatchDiscriminator,
    NeighborhoodDiscriminator,
    PointDiscriminator,
    TeacherDiscriminator,
    ops,
    ragged,
)

B, N, M = 3, 7, 9
STUDENT, TEACHER = 4, 6
CLASSES = 5


class Custom(nn.Module):
    """What a user might write: features in, one score per point out, no keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(TEACHER, 1)

    def forward(self, features: Tensor) -> Tensor:
        if features.is_nested:
            scores = self.layer(features.values()).squeeze(-1)
            return torch.nested.nested_tensor_from_jagged(scores, features.offsets())
        return self.layer(features).squeeze(-1)


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Linear(TEACHER, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    )


EVERYTHING = {"condition": "cloud", "num_classes": CLASSES}
DISCRIMINATORS = {
    "teacher": TeacherDiscriminator,
    "paired": lambda: TeacherDiscriminator(condition="point"),
    "witness": lambda: TeacherDiscriminator(mode="witness"),
    "witness gaussian": lambda: TeacherDiscriminator(mode="witness", kernel=ops.Gaussian([1, 3])),
    "teacher embedding": lambda: TeacherDiscriminator(embedding=5, channels=TEACHER),
    "witness embedding": lambda: TeacherDiscriminator(
        mode="witness", embedding=nn.Sequential(nn.Linear(TEACHER, 5), nn.Tanh())
    ),
    "point": lambda: PointDiscriminator(TEACHER, 8, 2),
    "point conditioned": lambda: PointDiscriminator(TEACHER, 8, 1, layer_norm=True, **EVERYTHING),
    "neighborhood": lambda: NeighborhoodDiscriminator(TEACHER, 8, 2, k=3),
    "neighborhood conditioned": lambda: NeighborhoodDiscriminator(TEACHER, 8, 1, k=3, **EVERYTHING),
    "cloud": lambda: CloudDiscriminator(TEACHER, 8, heads=2),
    "cloud conditioned": lambda: CloudDiscriminator(TEACHER, 8, 1, heads=2, **EVERYTHING),
    "head": lambda: HeadDiscriminator(classifier()),
    "head of labels": lambda: HeadDiscriminator(classifier(), target="labels", pool="mean"),
    "head of points": lambda: HeadDiscriminator(classifier(), pool=None),
    "match": lambda: MatchDiscriminator(TEACHER),
    "match queue": lambda: MatchDiscriminator(TEACHER, queue=4),
    "match energy": lambda: MatchDiscriminator(TEACHER, distance="energy"),
    "match chamfer": lambda: MatchDiscriminator(TEACHER, distance="chamfer"),
    "custom": Custom,
}
LEARNING = [
    name
    for name in DISCRIMINATORS
    if "head" not in name and (name not in {"teacher", "paired", "witness", "witness gaussian"})
]
LAYOUTS = ("N == M", "N != M", "ragged", "one ragged shape", "global", "bcn")
# Scores that compare point i with point i need as many points on both sides; and a class belongs to
# a cloud, where global features are points of one set.
NOT_POSSIBLE = {
    *((n, layout) for n in ("head of points", "paired") for layout in ("N != M", "ragged", "bcn")),
    ("cloud conditioned", "global"),
    *(
        (f"match {d}", f"{r}ragged{s}")
        for d in ("energy", "chamfer")
        for r, s in (("", ""), ("one ", " shape"))
    ),
}
POSSIBLE = [
    (name, layout)
    for name in DISCRIMINATORS
    for layout in LAYOUTS
    if (name, layout) not in NOT_POSSIBLE
]


def make(name: str, dtype: torch.dtype = torch.float64, **options) -> FeatureAdversarialLoss:
    """The loss with that discriminator, the same each time."""
    torch.manual_seed(0)
    discriminator = DISCRIMINATORS[name]() if name in DISCRIMINATORS else name
    options.setdefault("normalize", "head" not in name)
    options.setdefault("weight", 1.0)
    options.setdefault("warmup_steps", 0)
    fad = FeatureAdversarialLoss(STUDENT, TEACHER, discriminator=discriminator, **options)
    return fad if dtype == torch.float32 else fad.to(dtype)


def features(
    layout: str = "N != M", dtype: torch.dtype = torch.float64, seed: int = 1, batch: int = B
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels. The student requires grad; of ragged ones, its packed values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.arange(batch) % CLASSES
    if "ragged" in layout:
        lengths = torch.arange(batch) % 3 + 4
        others = lengths if layout == "one ragged shape" else lengths.flip(0) + 2
        student = normal(int(lengths.sum()), STUDENT).requires_grad_()
        teacher = normal(int(others.sum()), TEACHER) * 2 + 1
        return student, ragged(teacher, lengths=others), labels
    if layout == "global":
        return (
            normal(batch + 4, STUDENT).requires_grad_(),
            normal(batch + 4, TEACHER) * 2 + 1,
            torch.arange(batch + 4) % CLASSES,
        )
    if layout == "bcn":
        return (
            normal(batch, STUDENT, N).requires_grad_(),
            normal(batch, TEACHER, M) * 2 + 1,
            labels,
        )
    points = N if layout == "N == M" else M
    return (
        normal(batch, N, STUDENT).requires_grad_(),
        normal(batch, points, TEACHER) * 2 + 1,
        labels,
    )


def clouds(student: Tensor, layout: str) -> Tensor:
    """The student's clouds from what requires grad."""
    if "ragged" not in layout:
        return student
    batch = B
    return ragged(student, lengths=torch.arange(batch) % 3 + 4)


def options_of(layout: str) -> dict[str, str]:
    """What the loss must be told about a layout."""
    return {"layout": "bcn"} if layout == "bcn" else {}


def blind(monkeypatch) -> None:
    """Let nothing look at values, as on a GPU, where a look would wait for the device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fad_loss") and hasattr(module, "look"):
            monkeypatch.setattr(module, "look", lambda _: False)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients of those parameters that have one."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
