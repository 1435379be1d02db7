"""How strongly, and where to, the terms of a distillation pull: their gradients side by side.

    python examples/study gradients --data clouds.npz --teacher a.pt --student b.pt

For a student that `distill` trained part of the way, on its test clouds: the norm of each term's
gradient as a share of the task's, and its angle to it, at weight 1 and over the layers that both
share; and how well FAD's gradient from a few points of every cloud agrees with that from all of
them, beside how well two batches agree. Written to `results/gradients.json`, for the report.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import networks, readers
from distill.data import Clouds, Dataset, synthetic
from distill.methods import Distilled, Seen, teach
from distill.networks import Network
from distill.storage import load_checkpoint
from distill.terms import METHODS
from study.study import RESULTS, commit

DISCRIMINATORS = ("teacher", "paired", "match")
POINTS = (16, 32, 64, 128)
# What a term's own parameters are trained for before it is looked at.
STEPS = 60


def load(path: Path, classes: int) -> Network:
    """The network of a checkpoint, in evaluation mode."""
    state = load_checkpoint(path)
    description = state["description"]
    network = networks.build(description["arch"], classes, description["width"])
    network.load_state_dict(state["network"])
    return network.eval()


class Bench:
    """A student, its teacher and a few batches of clouds."""

    def __init__(self, student: Network, teacher: Network, clouds: Clouds, points: int) -> None:
        self.student, self.teacher = student, teacher.requires_grad_(False)
        # Up to the layer that is distilled: the classifier learns from the task alone.
        modules = dict(student.named_children())
        shared = list(modules)[: list(modules).index(student.layer.split("[")[0]) + 1]
        self.parameters = [p for name in shared for p in modules[name].parameters()]
        order = torch.randperm(len(clouds), generator=torch.Generator().manual_seed(0))
        self.batches = [
            (clouds.points[index, :points], clouds.labels[index]) for index in order.split(32)
        ]
        self.known: dict[int, Seen] = {}

    def take(self, number: int) -> tuple[Tensor, Tensor, Seen]:
        """A batch, with what the teacher makes of it."""
        points, labels = self.batches[number]
        if number not in self.known:
            self.known[number] = teach(self.teacher, points)
        return points, labels, self.known[number]

    def fitted(self, method: str, **options: Any) -> Distilled:
        """A term whose own parameters (the adapter) have been trained for this student."""
        torch.manual_seed(0)
        weights = {method: 1.0}
        term = Distilled(self.student, self.teacher, method, weights=weights, **options).train()
        if not list(term.parameters()):
            return term
        optimizer = torch.optim.Adam(term.parameters(), 3e-3)
        for step in range(STEPS):
            points, labels, known = self.take(4 + step % 12)
            optimizer.zero_grad()
            term(points, labels, known).loss.backward(inputs=list(term.parameters()))
            optimizer.step()
        return term

    def gradients(self, term: nn.Module, number: int) -> tuple[Tensor, Tensor]:
        """Of the task and of the term, of one batch."""
        points, labels, known = self.take(number)
        torch.manual_seed(number)
        step = term(points, labels, known)
        of_task, of_term = (
            torch.autograd.grad(value, self.parameters, retain_graph=True, materialize_grads=True)
            for value in (step.task, step.distillation)
        )
        return tuple(torch.cat([g.flatten() for g in pull]) for pull in (of_task, of_term))


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two gradients."""
    return float(torch.cosine_similarity(a, b, dim=0))


def strength(bench: Bench) -> Iterator[dict[str, Any]]:
    """Norm and direction of each term's gradient, relative to the task's."""
    terms = [(method, method, {}) for method in METHODS if method not in {"fad", "head", "last"}]
    terms += [(f"fad-{method}", method, {}) for method in ("head", "last")]
    terms += [(f"fad-{name}", "fad", {"discriminator": name}) for name in DISCRIMINATORS]
    for label, method, options in terms:
        term = bench.fitted(method, **options)
        pairs = [bench.gradients(term, number) for number in range(4)]
        yield {
            "term": label,
            "share": statistics.fmean(float(b.norm() / a.norm()) for a, b in pairs),
            "cosine": statistics.fmean(cosine(a, b) for a, b in pairs),
        }


def sampling(bench: Bench) -> Iterator[dict[str, Any]]:
    """How FAD's gradient from some of the points agrees with that from all of them."""
    for discriminator in ("teacher", "paired"):
        whole = bench.fitted("fad", discriminator=discriminator, max_points=None)
        known = whole.state_dict()
        every = [bench.gradients(whole, number)[1] for number in range(4)]
        found = {}
        for points in POINTS:
            some = bench.fitted("fad", discriminator=discriminator, max_points=points)
            some.load_state_dict(known)
            pairs = [(bench.gradients(some, number)[1], g) for number, g in enumerate(every)]
            found[str(points)] = statistics.fmean(cosine(a, b) for a, b in pairs)
        others = [cosine(a, b) for a, b in itertools.pairwise(every)]
        yield {
            "discriminator": discriminator,
            "points": found,
            "another batch": statistics.fmean(others),
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `measure`."""
    add = parser.add_argument
    add("--data", default="synthetic", help="as for distill")
    add("--teacher", type=Path, required=True)
    add("--student", type=Path, required=True)
    add("--points", type=int, default=256)
    add("--output", type=Path, default=RESULTS / "gradients.json")


def measure(options: argparse.Namespace) -> int:
    """Measure, and write."""
    if options.data == "synthetic":
        data: Dataset = synthetic(points=max(512, options.points))
    else:
        data = readers.read(Path(options.data), cache=options.output.parent, points=options.points)
    student, teacher = (load(p, len(data.classes)) for p in (options.student, options.teacher))
    bench = Bench(student, teacher, data.test, options.points)
    result = {
        "data": data.name,
        "points": options.points,
        "student": load_checkpoint(options.student)["history"][-1],
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join(sys.argv),
        "terms": list(strength(bench)),
        "sampling": list(sampling(bench)),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(options.output)
    return 0
