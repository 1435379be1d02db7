"""The rows of the paired study: what a student learns from beside the labels, all at one weight.

Nothing is tuned. Whatever compares features pulls at the student's with a share of the task's pull,
a default of the library's; knowledge distillation has the weight that the first
study found best for it. Rows whose name begins with "fad" are this library's loss; of "squared" is
the ablation: the same layers, adapters, standardisation, points, warm-up and weight, and squared
error where the discriminator was. "fitnet" is squared error as others have it: all points, in units
of the teacher's batch, without warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.methods import Seen, Step, Supervised
from distill.networks import Network
from distill.terms import WEIGHTS, KnowledgeDistillation, SquaredError
from fad_loss import Distiller, HeadDiscriminator, capture_features, interpolate
from fad_loss.gradients import DEFAULT_SHARES, GradientBalance, weigh_gradient
from study.attempts import ATTEMPTS, SquaredDiscriminator
from study.segments import Segmenter


@dataclass(frozen=True)
class Row:
    """What is compared.

    Attributes:
        points: features of points by "fad", as the library chooses, one of `ATTEMPTS`, "squared"
            among them, or "fitnet".
        last: penultimate features by "judge", the teacher's last layer, by "fad", as the library
            chooses, "squared" or "fitnet".
        positions: say where the points lie; for networks that sample.
        kd: the logits too.
        balance: pull with a share of the task's pull; else with the discriminators' weights.
        share: which share, if not the default of ``balance=True``.
        fades: the share falls to 0 until the end of the training, linearly.
        against: rows that it is compared with, beside the student alone; the ablation first.
    """

    points: str | None = None
    last: str | None = None
    positions: bool = False
    kd: bool = False
    balance: bool = True
    share: float | None = None
    fades: bool = False
    recipe: bool = False
    against: tuple[str, ...] = ()

    @property
    def taught(self) -> bool:
        """Whether it needs a teacher."""
        return bool(self.points or self.last or self.kd)


# fmt: off
ROWS = {
    "alone": Row(),
    "kd": Row(kd=True),
    "fad-recipe": Row("fad", "fad", True, fades=True, recipe=True,
                      against=("squared-recipe", "fad-two", "fad-positions", "squared", "kd")),
    "squared-recipe": Row("squared", "squared", True, fades=True, recipe=True, against=("kd",)),
    "fad": Row("fad", against=("squared", "fitnet", "kd")),
    "fad-positions": Row("fad", positions=True, against=("squared", "fitnet", "fad", "kd")),
    "fad-two": Row("fad", "judge", True, against=("squared-two", "fitnet-two", "fitnet", "kd")),
    "fad-two+kd": Row("fad", "judge", True, kd=True, against=("squared-two", "fad-two", "kd")),
    "fad-fading": Row("fad", "judge", True, share=0.1, fades=True,
                      against=("squared-fading", "fad-two", "fad-tenth", "kd")),
    "squared-fading": Row("squared", "squared", True, share=0.1, fades=True),
    "fad-fading-more": Row("fad", "judge", True, share=0.3, fades=True,
                           against=("fad-two", "fad-fading")),
    "fad-tenth": Row("fad", "judge", True, share=0.1, against=("fad-two", "fad-fading")),
    "fad-weights": Row("fad", "judge", True, balance=False, against=("fad-two",)),
    "fad-weights-fading": Row("fad", "judge", True, balance=False, fades=True,
                              against=("fad-weights", "fad-fading")),
    "fad-chosen-fading": Row("fad", "fad", True, share=0.1, fades=True, against=("fad-fading",)),
    "squared": Row("squared", positions=True, against=("fitnet",)),
    "squared-two": Row("squared", "squared", True, against=("squared",)),
    "fitnet": Row("fitnet", positions=True),
    "fitnet-two": Row("fitnet", "fitnet", True, against=("fitnet",)),
}
# fmt: on
ROWS |= {
    f"fad-{name}": Row(name, positions=True, against=("squared", "fad-positions"))
    for name in ATTEMPTS
    if name != "squared"
}


class FitNet(nn.Module):
    """Squared error of adapted features, which pulls with a share of the task's pull."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.error = SquaredError(student_channels, teacher_channels)
        self.balance = GradientBalance()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        weight = DEFAULT_SHARES[0] * self.balance.factor()
        own = weigh_gradient(self.balance.tap(student, weight), weight)
        return self.error(own, teacher)


class Replay:
    """Makes a trained network put out what was recorded of it, instead of computing it.

    Whoever captures features of its layers, or puts out its logits, sees no difference.
    """

    def __init__(self, network: Network) -> None:
        self.known: Seen | None = None
        paths = {
            network.layer: "points",
            network.places: "positions",
            network.penultimate: "penultimate",
            "classifier": "logits",
        }
        # A path "local[1]" is of the second of what the module "local" returns.
        modules: dict[str, list[str]] = {}
        for path in sorted(paths):
            modules.setdefault(path.partition("[")[0], []).append(paths[path])
        self.modules = [network.get_submodule(path) for path in modules]
        for module, names in zip(self.modules, modules.values(), strict=True):
            module.forward = partial(self._of, names)
        network.forward = self._all

    def _of(self, names: list[str]) -> Any:
        values = tuple(getattr(self.known, name) for name in names)
        return values if len(values) > 1 else values[0]

    def _all(self, _: Tensor) -> Tensor:
        for module in self.modules:
            module()
        return self.known.logits


class Recipe(Supervised):
    """Cross entropy, and what a row adds: an objective for `distill.training.fit`.

    Args:
        student: the network to train.
        teacher: the trained network, or None for the student alone.
        row: what is compared.
        example: two clouds.
        seed: of all random numbers of a step, so that rows share dropout masks.
        steps: of the training.
        backend: of the operations in the library's discriminators, see `fad_loss.ops`.

    Attributes:
        replay: of the teacher, if what it makes of the clouds is known.
    """

    replay: Replay | None = None

    def __init__(
        self,
        student: Network,
        teacher: Network | None,
        row: Row,
        *,
        example: Tensor,
        seed: int = 0,
        steps: int = 1000,
        backend: str = "auto",
    ) -> None:
        super().__init__(student)
        self.row, self.seed = row, seed
        # In tuples, so that neither network is part of the objective's state.
        self._teacher = (teacher,)
        self._distiller: tuple[Distiller, ...] = ()
        self.terms = nn.ModuleDict()
        if teacher is None:
            return
        watched = [[n.layer, n.places, n.penultimate, "classifier"] for n in (student, teacher)]
        self._mine, self._its = map(capture_features, (student, teacher), watched)
        if "fitnet" in {row.points, row.last}:
            sizes = (student.channels, teacher.channels), (_last(student), _last(teacher))
            for what, how, channels in zip(
                ("points", "last"), (row.points, row.last), sizes, strict=True
            ):
                if how:
                    self.terms[what] = FitNet(*channels).to(example.device)
        elif row.points or row.last:
            made = _distiller(student, teacher, row, example, steps, backend)
            self._distiller = (made,)
            self.terms = made.losses
        self.kd = KnowledgeDistillation()

    def forward(self, points: Tensor, labels: Tensor, known: Seen | None = None) -> Step:
        if self.replay is not None:
            self.replay.known = known
        torch.manual_seed((self.seed << 40) + round(self.progress * 2**40))
        (network,), (teacher,) = self._network, self._teacher
        terms = []
        if self._distiller:
            logits, distillation = self._distiller[0](points)
            terms.append(distillation)
        else:
            logits = network(points)
            if teacher is not None:
                with torch.no_grad():
                    teacher(points)
        if self.row.kd:
            terms.append(WEIGHTS["kd"] * self.kd(logits, self._its["classifier"]))
        if not self._distiller:
            terms += [term(*self._pair(what)) for what, term in self.terms.items()]
        total = torch.stack(terms).sum() if terms else None
        return Step(self.task(logits, labels), total, logits)

    def _pair(self, what: str) -> tuple[Tensor, Tensor]:
        """Features of both for FitNet: where points do not correspond, interpolated."""
        (student,), (teacher,) = self._network, self._teacher
        if what == "last":
            return self._mine[student.penultimate], self._its[teacher.penultimate]
        mine, its = self._mine[student.layer], self._its[teacher.layer]
        if student.samples:
            its = interpolate(its, self._its[teacher.places], self._mine[student.places])
        return mine, its

    def statistics(self) -> dict[str, Tensor]:
        """Of every loss of the library: its value, its scores' overlap, its weight."""
        if not self._distiller:
            return {}
        names = "student_loss", "separability", "weight"
        found = self._distiller[0].statistics().items()
        return {name: value for name, value in found if name.rpartition("/")[2] in names}


def _last(network: Network) -> int:
    return network.classifier[-1].in_features


def _distiller(
    student: Network, teacher: Network, row: Row, example: Tensor, steps: int, backend: str
) -> Distiller:
    """Both layers as a user names them, every loss with its default share of the pull."""
    per_point = isinstance(teacher, Segmenter)
    layers: dict[str, Any] = {}
    if row.points and not (row.recipe and per_point):
        layers[student.layer] = teacher.layer
        if row.points in ATTEMPTS:
            layers[student.layer] = teacher.layer, ATTEMPTS[row.points]()
    if row.last:
        # Of points with labels of their own, it judges each.
        pool = None if per_point else "max"
        others = {
            "judge": partial(HeadDiscriminator, teacher.classifier[-1], pool=pool),
            "squared": SquaredDiscriminator,
        }
        layers[student.penultimate] = teacher.penultimate
        if row.last in others:
            layers[student.penultimate] = teacher.penultimate, others[row.last]()
    options: dict[str, Any] = {} if row.recipe else {"balance": row.balance, "warmup_steps": 500}
    if row.share is not None:
        options["weight"] = row.share
    if row.fades:
        options["total_steps"] = steps
    places = {student.layer: (student.places, teacher.places)}
    made = Distiller(
        student,
        teacher,
        layers,
        example=example,
        layout="bnc",
        # None would find them; and squared error needs them to be named.
        positions=places if row.points and row.positions and student.samples else {},
        **options,
    )
    for loss in made.losses.values():
        if hasattr(loss.discriminator, "backend"):
            loss.discriminator.backend = backend
    return made
