"""Does the loss work in the loops that users have? A matrix of loops, with all defaults.

    python benchmarks/loops.py
    python benchmarks/loops.py --optimizers sgd0.1 --discriminators teacher paired --jobs 2

A loop is an optimizer (SGD with momentum as DGCNN and pointMLP have it, or AdamW), with or without
clipping, features of teacher and student of whatever scale, a precision, and a discriminator. Each
teaches a small network to tell four kinds of shapes apart, in 300 steps, on the same initial
weights, batches and clouds as the student alone in the same loop. What is wanted: no error, nothing
that is not finite, and for discriminators that do not learn an accuracy that is nowhere more than
two points below that of the student alone.

FAD_LOSS_SOURCE=folder measures another version, whose ``src`` that is:

    git worktree add /tmp/before v0.1.0
    FAD_LOSS_SOURCE=/tmp/before/src python benchmarks/loops.py --output loops-before.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, os.getenv("FAD_LOSS_SOURCE", str(Path(__file__).resolve().parents[1] / "src")))

import fad_loss
from fad_loss import FeatureAdversarialLoss, HeadDiscriminator
from measure import RESULTS, context, save

OPTIMIZERS = ("sgd0.1", "sgd0.02", "adamw0.001")
CLIPPINGS = ("none", "network", "all")
SCALES_OF_TEACHER = (1e-3, 1.0, 1e3)
SCALES_OF_STUDENT = (1e-2, 1.0, 1e2)
DISCRIMINATORS = ("teacher", "paired", "head", "cloud")
PRECISIONS = ("float32", "bfloat16")
LEARNING = {"cloud"}
KINDS, POINTS, BATCH, STEPS, SHOWN = 4, 32, 32, 300, 2048
# Two points, of a hundred.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Loop:
    """One cell of the matrix; without a discriminator, the student alone."""

    optimizer: str
    clipping: str
    teacher_scale: float
    student_scale: float
    precision: str
    discriminator: str | None


def layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """A linear layer as the networks of the field have it."""
    return nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()


class Network(nn.Module):
    """A PointNet without its transforms, whose features come in units of one's choice."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.channels = scale, 4 * width
        self.points = nn.Sequential(
            *layer(3, width), *layer(width, width), *layer(width, 4 * width)
        )
        self.head = nn.Sequential(*layer(4 * width, 32), nn.Linear(32, KINDS))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the features of the points in this network's units."""
        features = self.points(points.flatten(0, 1)).unflatten(0, points.shape[:2]) * self.scale
        return self.head(features.amax(1) / self.scale), features


class Rescaled(nn.Module):
    """The teacher's head, for features in the teacher's units."""

    def __init__(self, head: nn.Module, scale: float) -> None:
        super().__init__()
        self.head, self.scale = head, scale

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        return self.head(features / self.scale)


def clouds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ellipsoids, boxes, tubes and octahedra, a little flattened, and noise: clouds and kinds."""
    kind = torch.randint(KINDS, (count,), generator=generator)
    x = torch.randn(count, POINTS, 3, generator=generator)
    unit = x / x.norm(dim=-1, keepdim=True)
    box = x / x.abs().amax(-1, keepdim=True)
    ring = x[..., :2] / x[..., :2].norm(dim=-1, keepdim=True)
    tube = torch.cat([ring, 2 * torch.rand(count, POINTS, 1, generator=generator) - 1], -1)
    diamond = x / x.abs().sum(-1, keepdim=True)
    surface = torch.stack([unit, box, tube, diamond], 1)[torch.arange(count), kind]
    flat = 0.8 + 0.2 * torch.rand(count, generator=generator)
    stretch = torch.stack([torch.ones(count), flat, torch.ones(count)], -1).unsqueeze(1)
    size = 0.9 + 0.2 * torch.rand(count, 1, 1, generator=generator)
    noise = 0.02 * torch.randn(count, POINTS, 3, generator=generator)
    return size * surface * stretch + noise, kind


def taught(scale: float) -> Network:
    """The teacher, trained as a well-kept network is, once per process."""
    torch.manual_seed(1)
    teacher = Network(32)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=600)
    generator = torch.Generator().manual_seed(2)
    for _ in range(600):
        points, kinds = clouds(BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(teacher(points)[0], kinds).backward()
        optimizer.step()
        schedule.step()
    teacher.scale = scale
    return teacher.eval().requires_grad_(False)


def make_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """By the name of the matrix."""
    if name.startswith("sgd"):
        return torch.optim.SGD(parameters, lr=float(name[3:]), momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(parameters, lr=float(name[5:]))


_TEACHERS: dict[float, Network] = {}


def run(loop: Loop, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train, and say how it went."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    if loop.teacher_scale not in _TEACHERS:
        _TEACHERS[loop.teacher_scale] = taught(loop.teacher_scale)
    teacher = _TEACHERS[loop.teacher_scale]
    torch.manual_seed(3)
    student = Network(16, loop.student_scale)
    fad = None
    if loop.discriminator is not None:
        judge: Any = loop.discriminator
        if judge == "head":
            judge = HeadDiscriminator(Rescaled(teacher.head, teacher.scale))
        fad = FeatureAdversarialLoss(
            student.channels, teacher.channels, discriminator=judge, **(options or {})
        )
    parameters = [*student.parameters(), *(fad.parameters() if fad is not None else ())]
    optimizer = make_optimizer(loop.optimizer, parameters)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    clipped = {"none": [], "network": list(student.parameters()), "all": parameters}[loop.clipping]
    generator = torch.Generator().manual_seed(4)
    shown, of_shown = clouds(SHOWN, torch.Generator().manual_seed(5))
    # The last steps' mean: one of them says little where the learning rate stays high.
    accuracies: list[float] = []
    shares, losses, error, began = [], [], "", time.perf_counter()
    try:
        for step in range(STEPS):
            points, kinds = clouds(BATCH, generator)
            half = loop.precision == "bfloat16"
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                with torch.no_grad():
                    _, known = teacher(points)
                logits, features = student(points)
                task = F.cross_entropy(logits, kinds)
                own = task.new_zeros(()) if fad is None else fad(features, known)
            if fad is not None and step % 30 == 5:
                pulls = [
                    torch.autograd.grad(one, features, retain_graph=True)[0] for one in (task, own)
                ]
                of_task, of_own = (pull.float().norm() for pull in pulls)
                shares.append(float((of_own / of_task).detach()))
            optimizer.zero_grad()
            (task + own).backward()
            if clipped:
                nn.utils.clip_grad_norm_(clipped, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(own.detach()))
            if step >= STEPS - 50 and step % 10 == 9:
                with torch.no_grad():
                    right = student.eval()(shown)[0].argmax(-1) == of_shown
                student.train()
                accuracies.append(float(right.float().mean()))
    except (ValueError, RuntimeError, UserWarning) as failure:
        error = f"step {step}: {failure}"
    finite = not error and all(map(torch.isfinite, map(torch.tensor, losses)))
    finite = bool(finite and all(p.isfinite().all() for p in parameters))
    return asdict(loop) | {
        "accuracy": sum(accuracies) / max(len(accuracies), 1),
        "finite": finite,
        "error": error[:200],
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "share": sorted(shares)[len(shares) // 2] if shares else None,
        "seconds": round(time.perf_counter() - began, 2),
    }


def matrix(arguments: argparse.Namespace) -> list[Loop]:
    """Every loop that was asked for, the student alone among them."""
    scales = itertools.product(arguments.teacher_scales, arguments.student_scales)
    return [
        Loop(optimizer, clipping, *scale, precision, judge)
        for optimizer, clipping, scale, precision in itertools.product(
            arguments.optimizers, arguments.clippings, list(scales), arguments.precisions
        )
        for judge in (None, *arguments.discriminators)
    ]


def commit_of(source: Path) -> str:
    """What is measured."""
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def finished(journal: Path, run_of: dict[str, Any]) -> dict[Loop, dict[str, Any]]:
    """The loops that an earlier call, of the same commit and options, has left behind."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    if not lines or json.loads(lines[0]) != run_of:
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_text(json.dumps(run_of) + "\n")
        return {}
    rows = [json.loads(line) for line in lines[1:]]
    names = [field.name for field in fields(Loop)]
    return {Loop(**{name: row[name] for name in names}): row for row in rows}


def judged(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row by how much it is ahead of the student alone, and whether that will do."""
    keys = ("optimizer", "clipping", "teacher_scale", "student_scale", "precision")
    alone = {tuple(r[k] for k in keys): r["accuracy"] for r in rows if r["discriminator"] is None}
    for row in rows:
        row["ahead"] = round(row["accuracy"] - alone[tuple(row[k] for k in keys)], 4)
        behind = row["ahead"] < -TOLERANCE and row["discriminator"] not in LEARNING
        row["good"] = row["finite"] and not behind


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per optimizer, clipping and discriminator, over all scales and precisions."""
    shown = Table("optimizer", "clipping", "discriminator", "loops", "not finite", "behind")
    for name in ("least ahead", "mean ahead", "share of the task's pull"):
        shown.add_column(name, justify="right")

    def group(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["optimizer"], row["clipping"], row["discriminator"]

    with_loss = sorted((r for r in rows if r["discriminator"]), key=group)
    for (optimizer, clipping, judge), those in itertools.groupby(with_loss, key=group):
        cell = list(those)
        ahead = [r["ahead"] for r in cell]
        shares = sorted(r["share"] for r in cell if r["share"] is not None)
        shown.add_row(
            optimizer,
            clipping,
            judge,
            str(len(cell)),
            str(sum(not r["finite"] for r in cell)),
            str(sum(r["finite"] and not r["good"] for r in cell)),
            f"{100 * min(ahead):+.1f}",
            f"{100 * sum(ahead) / len(ahead):+.1f}",
            f"{shares[0]:.2g} to {shares[-1]:.2g}" if shares else "",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix, write the JSON, print the table; 1 if a loop is not good."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, choices in (
        ("optimizers", OPTIMIZERS),
        ("clippings", CLIPPINGS),
        ("discriminators", DISCRIMINATORS),
        ("precisions", PRECISIONS),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument("--teacher-scales", nargs="+", type=float, default=SCALES_OF_TEACHER)
    parser.add_argument("--student-scales", nargs="+", type=float, default=SCALES_OF_STUDENT)
    parser.add_argument("--weight", type=float, help="instead of the default")
    parser.add_argument("--balance", action="store_true", help="the weight as a share")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=RESULTS / "loops-cpu.json")
    given = parser.parse_args(arguments)
    options: dict[str, Any] = {} if given.weight is None else {"weight": given.weight}
    if given.balance:
        options["balance"] = True
    loops = matrix(given)
    where, console = context(torch.device("cpu")), Console()
    where["commit"] = commit_of(Path(fad_loss.__file__).parent)
    journal = given.output.with_suffix(".jsonl")
    rows = finished(journal, {"commit": where["commit"], "options": options})
    open_loops = [loop for loop in loops if loop not in rows]
    with ProcessPoolExecutor(given.jobs) as pool, journal.open("a") as file:
        running = pool.map(run, open_loops, itertools.repeat(options))
        shown = track(running, "loops", total=len(open_loops), console=console)
        for loop, row in zip(open_loops, shown, strict=True):
            rows[loop] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    journal.unlink()
    rows = [rows[loop] for loop in loops]
    judged(rows)
    save(given.output, {"context": where, "options": options, "rows": rows})
    console.print(table(rows))
    bad = [row for row in rows if not row["good"]]
    console.print(f"{len(loops)} loops, {len(bad)} not good; {given.output}")
    for row in bad[:10]:
        console.print({k: v for k, v in row.items() if v not in (None, "")})
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
