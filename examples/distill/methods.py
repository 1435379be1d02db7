"""What the student learns from: the labels alone, or the teacher too, in one of several ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.networks import DGCNN, PointNet
from fad_loss import (
    CloudDiscriminator,
    Distiller,
    FeatureAdversarialLoss,
    HeadDiscriminator,
    TeacherDiscriminator,
    capture_features,
    distances,
    ops,
)

Network = PointNet | DGCNN


class Seen(NamedTuple):
    """What a network makes of a batch of clouds."""

    points: Tensor  # features (B, N, C), of the layer that is distilled
    pooled: Tensor  # their maximum over all points, (B, C)
    penultimate: Tensor  # what the last layer of the classifier takes, (B, C')
    logits: Tensor  # (B, classes)


def watch(network: Network) -> Any:
    """Captures the features that are compared."""
    return capture_features(network, [network.layer, network.penultimate, "classifier"])


def seen(network: Network, features: Mapping[str, Tensor]) -> Seen:
    """What `watch` saw."""
    points = features[network.layer]
    return Seen(points, points.amax(dim=1), features[network.penultimate], features["classifier"])


@torch.no_grad()
def teach(teacher: Network, points: Tensor) -> Seen:
    """What the teacher makes of a batch of clouds."""
    with watch(teacher) as features:
        teacher(points)
        return seen(teacher, features)


class Step(NamedTuple):
    """What a batch gave: the terms to minimise, apart, and the student's logits."""

    task: Tensor
    distillation: Tensor | None
    logits: Tensor

    @property
    def loss(self) -> Tensor:
        """What is minimised."""
        return self.task if self.distillation is None else self.task + self.distillation


class Supervised(nn.Module):
    """Cross entropy with the labels.

    Whoever trains it sets `progress`, the share of the training that is over.
    """

    progress = 0.0

    def __init__(self, network: nn.Module, smoothing: float = 0.1) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: its weights are not part of the objective's
        self.smoothing = smoothing

    def forward(
        self,
        points: Tensor,
        labels: Tensor,
        known: Seen | None = None,  # noqa: ARG002
    ) -> Step:
        logits = self._network[0](points)
        return Step(self.task(logits, labels), None, logits)

    def task(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the labels say."""
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def statistics(self) -> dict[str, Tensor]:
        return {}


def distiller(
    student: Network, teacher: Network, discriminator: str | None = None, **options: Any
) -> Distiller:
    """The library's loss between the layers that the networks name.

    Without options it is what the README shows, all defaults:
    ``FeatureAdversarialLoss(student_channels, teacher_channels)``.
    """
    options |= of_discriminator(discriminator, teacher.channels)
    weight = next(student.parameters())
    example = torch.linspace(-1, 1, 2 * 32 * 3, device=weight.device, dtype=weight.dtype)
    return Distiller(
        student,
        teacher,
        {student.layer: teacher.layer},
        example=example.view(2, 32, 3),
        layout="bnc",
        **options,
    )


class Distilled(Supervised):
    """Cross entropy, plus terms that compare the student with the teacher on the same points.

    Args:
        student: the network to train.
        teacher: a trained network; it is not changed.
        method: names from `METHODS`, joined by "+".
        weights: of the terms; of those that are not named, FAD's own default, or that of `WEIGHTS`.
            FAD's multiplies its gradient at the student, the others' what is added to the loss.
        temperature: of knowledge distillation.
        smoothing: of the labels.
        curriculum: "first" spends the first quarter of the training on the terms alone, "fade" lets
            them fade linearly to nothing.
        discriminator: of "fad": from `DISCRIMINATORS`, or a name that the library knows; None is
            the library's default.
        options: more of them for "fad", as `FeatureAdversarialLoss` takes them.

    Its forward takes what the teacher makes of the clouds, if that is known already; the teacher's
    features may then be of the first points only.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        method: str,
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        smoothing: float = 0.1,
        curriculum: str | None = None,
        discriminator: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student, smoothing)
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._features = watch(student)
        self._known = watch(teacher)
        self._distiller: tuple[Distiller, ...] = ()
        self.curriculum = curriculum
        given = dict(weights or {})
        self.terms = nn.ModuleDict()
        self.weights = {}
        for name in method.split("+"):
            if name == "fad":
                made = distiller(student, teacher, discriminator, weight=given.get(name), **options)
                self._distiller = (made,)
                (self.terms[name],) = made.losses.values()
            else:
                sizes = [
                    network.classifier[-1].in_features
                    if COMPARED.get(name) == "penultimate"
                    else network.channels
                    for network in (student, teacher)
                ]
                self.terms[name] = METHODS[name](
                    *sizes,
                    classes=teacher.classes,
                    temperature=temperature,
                    head=teacher.classifier[-1],
                    weight=given.get(name),
                )
            term = self.terms[name]
            own = isinstance(term, FeatureAdversarialLoss)
            self.weights[name] = term.weight if own else given.get(name, WEIGHTS.get(name, 1.0))

    def forward(self, points: Tensor, labels: Tensor, known: Seen | None = None) -> Step:
        found: dict[str, Tensor] = {}
        if self._distiller and known is None:
            logits, found["fad"] = self._distiller[0](points)
            known = seen(self._teacher[0], self._known)
        else:
            logits = self._network[0](points)
            known = teach(self._teacher[0], points) if known is None else known
        student = seen(self._network[0], self._features)
        student = student._replace(points=student.points[:, : known.points.shape[1]])
        for name, term in self.terms.items():
            if name not in found:
                what = COMPARED.get(name, "points")
                found[name] = term(getattr(student, what), getattr(known, what))
            if not isinstance(term, FeatureAdversarialLoss):
                found[name] = self.weights[name] * found[name]
        task = self.task(logits, labels)
        if self.curriculum == "first" and self.progress < 0.25:
            task = 0.0 * task
        fading = 1.0 - self.progress if self.curriculum == "fade" else 1.0
        return Step(task, fading * torch.stack(list(found.values())).sum(), logits)

    def statistics(self) -> dict[str, Tensor]:
        """The scores of the adversarial loss, if it takes part."""
        if "fad" not in self.terms:
            return {}
        names = ("student_loss", "discriminator_loss", "real_score", "fake_score", "separability")
        values = self.terms["fad"].statistics()
        return {f"fad_{name}": values[name] for name in names}


class KnowledgeDistillation(nn.Module):
    """Divergence from the teacher's softened class probabilities (Hinton et al., 2015).

    A teacher trained with smoothed labels says little about wrong classes, and softening makes
    noise of it (Müller et al., 2019): the temperature is 1 unless said otherwise.
    """

    def __init__(self, *_: int, temperature: float = 1.0, **__: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        guess = F.log_softmax(student / self.temperature, dim=-1)
        target = F.log_softmax(teacher / self.temperature, dim=-1)
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
    return f"student {names}" if method == "none" else f"student with {names}"
