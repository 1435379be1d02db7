"""What the student learns from: the labels alone, or the teacher too, in one of several ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.networks import Network, pool
from distill.terms import COMPARED, METHODS, WEIGHTS, of_discriminator
from fad_loss import Distiller, FeatureAdversarialLoss, capture_features, interpolate


class Seen(NamedTuple):
    """What a network makes of a batch of clouds."""

    points: Tensor  # features (B, N, C), or ragged, of the layer that is distilled
    pooled: Tensor  # their maximum over all points, (B, C)
    penultimate: Tensor  # what the last layer of the classifier takes, (B, C')
    logits: Tensor  # (B, classes)
    positions: Tensor  # where the points lie, (B, N, 3)


def watch(network: Network) -> Any:
    """Captures the features that are compared."""
    layers = [network.layer, network.places, network.penultimate, "classifier"]
    return capture_features(network, layers)


def seen(network: Network, features: Mapping[str, Tensor]) -> Seen:
    """What `watch` saw."""
    points = features[network.layer]
    return Seen(
        points,
        pool(points, "max"),
        features[network.penultimate],
        features["classifier"],
        features[network.places],
    )


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
        logits, labels = logits.flatten(0, -2), labels.flatten()  # of clouds, or of points
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def statistics(self) -> dict[str, Tensor]:
        return {}


def distiller(
    student: Network,
    teacher: Network,
    discriminator: str | None = None,
    *,
    last: FeatureAdversarialLoss | bool = False,
    **options: Any,
) -> Distiller:
    """The library's loss between the layers that the networks name.

    Without options it is what the README shows, all defaults; with `last`, of what the last layer
    takes too.
    """
    layers: dict[str, Any] = {student.layer: teacher.layer}
    chosen = of_discriminator(discriminator, teacher.channels).get("discriminator")
    if chosen is not None:
        layers[student.layer] = teacher.layer, chosen
    if last:
        own = teacher.penultimate if last is True else (teacher.penultimate, last)
        layers[student.penultimate] = own
    # Where the points of one are not those of the other, it says where they are.
    positional = chosen in {None, "teacher", "paired"} or getattr(chosen, "positional", False)
    places = {student.layer: (student.places, teacher.places)}
    unlike = (student.samples or teacher.samples) and positional
    weight = next(student.parameters())
    example = torch.linspace(-1, 1, 2 * 32 * 3, device=weight.device, dtype=weight.dtype)
    return Distiller(
        student,
        teacher,
        layers,
        example=example.view(2, 32, 3),
        layout="bnc",
        positions=places if unlike else None,
        **options,
    )


class Distilled(Supervised):
    """Cross entropy, plus terms that compare the student with the teacher on the same points.

    Args:
        student: the network to train.
        teacher: a trained network; it is not changed.
        method: names from `METHODS`, joined by "+".
        weights: of the terms; of those that are not named, FAD's own default, or that of `WEIGHTS`.
            FAD's, of both layers unless that of "last" is named, multiplies its gradient at the
            student, the others' what is added to the loss.
        temperature: of knowledge distillation.
        smoothing: of the labels.
        curriculum: "first" spends the first quarter of the training on the terms alone, "fade" lets
            them fade linearly to nothing.
        discriminator: of "fad": from `DISCRIMINATORS`, or a name that the library knows; None is
            the library's default.
        options: more of them for "fad", and for "last" beside it, as `FeatureAdversarialLoss` takes
            them.

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
        self._unlike = student.samples or teacher.samples
        self.curriculum = curriculum
        given = dict(weights or {})
        self.terms = nn.ModuleDict()
        self.weights = {}
        names = method.split("+")
        if "fad" in names:
            beside = "last" in names
            if "last" in given:
                sizes = [network.classifier[-1].in_features for network in (student, teacher)]
                beside = METHODS["last"](*sizes, weight=given["last"])
            own = {"weight": given.get("fad"), "last": beside, **options}
            self._distiller = (distiller(student, teacher, discriminator, **own),)
            losses = self._distiller[0].losses.values()
            self.terms.update(zip(["fad", "last"], losses, strict=False))
        for name in names:
            if name not in self.terms:
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
            if "last" in self.terms:
                found["last"] = torch.zeros_like(found["fad"])  # it is in the sum
            known = seen(self._teacher[0], self._known)
        else:
            logits = self._network[0](points)
            known = teach(self._teacher[0], points) if known is None else known
        student = seen(self._network[0], self._features)
        places, matched = None, known.points
        if self._unlike:
            places = student.positions, known.positions
            if "fitnet" in self.terms:
                matched = interpolate(known.points, places[1], places[0])
        elif not known.points.is_nested:
            student = student._replace(points=student.points[:, : known.points.shape[1]])
        for name, term in self.terms.items():
            if name not in found:
                what = COMPARED.get(name, "points")
                pair = getattr(student, what), getattr(known, what)
                if name == "fitnet":
                    pair = student.points, matched
                positional = name == "fad" and places and term.discriminator.positional
                found[name] = term(*pair, positions=places) if positional else term(*pair)
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
