"""The losses that the main job can compare: the library's, and what others have proposed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fad_loss import (
    CloudDiscriminator,
    FeatureAdversarialLoss,
    HeadDiscriminator,
    TeacherDiscriminator,
    distances,
    ops,
)


class KnowledgeDistillation(nn.Module):
    """Divergence from the teacher's softened class probabilities (Hinton et al., 2015).

    A teacher trained with smoothed labels says little about wrong classes, and softening makes
    noise of it (Müller et al., 2019): the temperature is 1 unless said otherwise.
    """

    def __init__(self, *_: int, temperature: float = 1.0, **__: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        guess = F.log_softmax(student.flatten(0, -2) / self.temperature, dim=-1)
        target = F.log_softmax(teacher.flatten(0, -2) / self.temperature, dim=-1)
        divergence = F.kl_div(guess, target, reduction="batchmean", log_target=True)
        return self.temperature**2 * divergence


class LogitDiscriminator(nn.Module):
    """A discriminator that learns to tell the networks' logits apart, as in PointKAD.

    Zhang et al., "PointKAD: adversarial knowledge distillation for point clouds".
    """

    def __init__(self, *_: int, classes: int, **__: float) -> None:
        super().__init__()
        self.fad = FeatureAdversarialLoss(
            classes,
            classes,
            discriminator=CloudDiscriminator(classes),
            adapter="identity",
            weight=1.0,
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        # One "point" per cloud: its logits.
        return self.fad(student.unsqueeze(1), teacher.unsqueeze(1))


class Matched(nn.Module):
    """A distance between the student's adapted features and the teacher's.

    Both are standardised by the mean and the spread of the teacher's features in the batch.
    """

    def __init__(self, student_channels: int, teacher_channels: int, **_: int) -> None:
        super().__init__()
        self.adapter = nn.Linear(student_channels, teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        variance, mean = torch.var_mean(teacher.flatten(0, -2), dim=0)
        scale = torch.rsqrt(variance + 0.01 * variance.mean() + 1e-12)
        return self.distance((self.adapter(student) - mean) * scale, (teacher - mean) * scale)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError


class SquaredError(Matched):
    """FitNet (Romero et al., 2015): squared error of the features."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher)


class SimilarityPreserving(nn.Module):
    """Which clouds of a batch are alike, for the student and the teacher (Tung and Mori, 2019)."""

    def __init__(self, *_: int, **__: int) -> None:
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (self.similarity(features) for features in (student, teacher))
        return len(student) * F.mse_loss(ours, theirs)

    @staticmethod
    def similarity(features: Tensor) -> Tensor:
        return F.normalize(features @ features.mT, dim=1)


class Relational(nn.Module):
    """RKD (Park et al., 2019): distances and angles between the clouds of a batch."""

    def __init__(self, *_: int, **__: int) -> None:
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        distance = F.smooth_l1_loss(self.lengths(student), self.lengths(teacher))
        return distance + 2 * F.smooth_l1_loss(self.angles(student), self.angles(teacher))

    @staticmethod
    def lengths(pooled: Tensor) -> Tensor:
        lengths = F.pdist(pooled)
        return lengths / lengths.mean().clamp_min(1e-12)

    @staticmethod
    def angles(pooled: Tensor) -> Tensor:
        edges = F.normalize(pooled.unsqueeze(0) - pooled.unsqueeze(1), dim=-1)
        return edges @ edges.mT


class Contrastive(nn.Module):
    """CRD (Tian et al., 2020) among the clouds of a batch: both features mapped to one space."""

    def __init__(
        self, student_channels: int, teacher_channels: int, width: int = 128, **_: int
    ) -> None:
        super().__init__()
        self.student = nn.Linear(student_channels, width)
        self.teacher = nn.Linear(teacher_channels, width)
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours = F.normalize(self.student(student), dim=-1)
        theirs = F.normalize(self.teacher(teacher), dim=-1)
        logits = ours @ theirs.mT / self.log_temperature.exp()
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2


class SetDistance(Matched):
    """A distance between sets, over at most 64 points of each cloud (they come in random order).

    Divided by the number of channels, or its root, so that the weight means the same for all.
    """

    def __init__(self, name: str, *channels: int, **_: int) -> None:
        super().__init__(*channels)
        self.name = name

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        x, y, channels = student[:, :64], teacher[:, :64], student.shape[-1]
        if self.name == "chamfer":
            return distances.chamfer(x, y) / channels
        if self.name == "energy":
            return distances.energy(x, y) / channels**0.5
        if self.name == "mmd":
            return distances.mmd(x, y, gaussians(channels))
        plan = distances.sinkhorn(x, y, 0.1 * channels, max_iterations=10, tolerance=None)
        return plan / channels


def gaussians(channels: int) -> ops.Gaussian:
    """Kernels around the distance of two standardised features."""
    return ops.Gaussian([factor * channels**0.5 for factor in (0.5, 1.0, 2.0)])


def judged(
    *channels: int, head: nn.Module, weight: float | None = None, **_: Any
) -> FeatureAdversarialLoss:
    """FAD by the teacher's last layer: what does it make of the student's penultimate features?"""
    discriminator = HeadDiscriminator(head, pool=None)
    return FeatureAdversarialLoss(*channels, discriminator=discriminator, weight=weight)


def last(*channels: int, weight: float | None = None, **_: Any) -> FeatureAdversarialLoss:
    """FAD on penultimate features: the batch is the set, and each cloud knows its own."""
    return FeatureAdversarialLoss(*channels, discriminator="paired", weight=weight)


# Called with the channels of student and teacher, classes=, temperature=, head= and weight=.
METHODS: dict[str, Callable[..., nn.Module]] = {
    "fad": FeatureAdversarialLoss,
    "head": judged,
    "last": last,
    "kd": KnowledgeDistillation,
    "logit": LogitDiscriminator,
    "mse": SquaredError,
    "fitnet": SquaredError,
    "fitnet-last": SquaredError,
    "sp": SimilarityPreserving,
    "rkd": Relational,
    "crd": Contrastive,
    **{name: partial(SetDistance, name) for name in ("chamfer", "energy", "mmd", "sinkhorn")},
}
# The weights that the study found best (examples/study/results/report.md); 1 for all others. FAD,
# also that on the penultimate features, knows its own.
WEIGHTS = {
    "kd": 3.0, "logit": 0.03,
    "mse": 0.03, "fitnet": 30.0, "fitnet-last": 3.0, "sp": 30.0, "rkd": 3.0, "crd": 0.3,
    "chamfer": 30.0, "energy": 30.0, "mmd": 300.0, "sinkhorn": 30.0,
}  # fmt: skip
BROAD = (0.3, 1.0, 3.0)
# Variants that have no name in the library; called with the teacher's channels.
DISCRIMINATORS: dict[str, Callable[[int], nn.Module]] = {
    "witness": lambda channels: TeacherDiscriminator(mode="witness", kernel=gaussians(channels)),
    "energy-witness": lambda _: TeacherDiscriminator(mode="witness", kernel=ops.Energy()),
    "embedded": lambda channels: TeacherDiscriminator(
        bandwidths=BROAD, embedding=32, channels=channels
    ),
    "broad": lambda _: TeacherDiscriminator(bandwidths=BROAD),
    "near": lambda _: TeacherDiscriminator(bandwidths=[0.1, 0.3, 1.0]),
    "sharp": lambda _: TeacherDiscriminator(bandwidths=[0.1]),
    "sharper": lambda _: TeacherDiscriminator(bandwidths=[0.03]),
    "narrow": lambda _: TeacherDiscriminator(condition="point", bandwidths=[0.3]),
    "wide": lambda _: TeacherDiscriminator(condition="point", bandwidths=[3.0]),
}


def of_discriminator(name: str | None, channels: int) -> dict[str, Any]:
    """The option for a discriminator by its name here or in the library; none for the default."""
    if name is None:
        return {}
    make = DISCRIMINATORS.get(name)
    return {"discriminator": make(channels) if make else name}


# What they are called with, if not the features of points.
COMPARED = {
    "kd": "logits", "logit": "logits",
    "head": "penultimate", "last": "penultimate", "fitnet-last": "penultimate",
    "mse": "pooled", "sp": "pooled", "rkd": "pooled", "crd": "pooled",
}  # fmt: skip
TITLES = {
    "none": "alone", "fad": "FAD", "head": "the teacher's last layer",
    "last": "FAD on penultimate features", "kd": "KD", "logit": "logit discriminator", "mse": "MSE",
    "fitnet": "FitNet", "fitnet-last": "FitNet on penultimate features", "sp": "SP",
    "rkd": "RKD", "crd": "CRD", "chamfer": "Chamfer", "energy": "energy distance",
    "mmd": "MMD", "sinkhorn": "Sinkhorn",
}  # fmt: skip


def title(method: str) -> str:
    """What to call the row of a method."""
    names = " + ".join(TITLES[name] for name in method.split("+"))
    names = names.replace(f"{TITLES['fad']} + {TITLES['last']}", "FAD on two layers")
    return f"student {names}" if method == "none" else f"student with {names}"
