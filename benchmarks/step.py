"""What `FeatureAdversarialLoss` costs in a training step: a DGCNN teaches a 40 times smaller one.

    python benchmarks/step.py
    python benchmarks/step.py --points 1024 --student pointnet --discriminators teacher,point

A step is the teacher's forward pass, the student's forward and backward, and the optimizer. It is
measured with and without the loss, round after round in one run; the ratio is the median over the
rounds. The student alone, without any teacher, is there for comparison.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, os.getenv("FAD_LOSS_SOURCE", str(Path(__file__).resolve().parents[1] / "src")))

from distill import networks
from fad_loss import FeatureAdversarialLoss, capture_features
from measure import by_size, interleave

CLASSES = 40
WITHOUT = "without"
ALONE = "student alone"


def training_step(
    teacher: networks.Network | None,
    student: networks.Network,
    fad: FeatureAdversarialLoss | None,
    points: torch.Tensor,
    labels: torch.Tensor,
) -> Callable[[], object]:
    """One step of the loop that users have, with the teacher and the loss if they are given."""
    parameters = [*student.parameters(), *(fad.parameters() if fad is not None else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    learned = capture_features(student, student.layer)
    known = None if teacher is None else capture_features(teacher, teacher.layer)

    def step() -> None:
        optimizer.zero_grad()
        if teacher is not None:
            with torch.no_grad():
                teacher(points)
        loss = F.cross_entropy(student(points), labels)
        if fad is not None and known is not None and teacher is not None:
            loss = loss + fad(learned[student.layer], known[teacher.layer], labels)
        loss.backward()
        optimizer.step()

    return step


def measure(arguments: argparse.Namespace, points: int) -> list[dict[str, Any]]:
    """Times of one step at one size of the clouds, without the loss and with each discriminator."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    teacher = networks.build("dgcnn", CLASSES).to(device).eval().requires_grad_(False)
    budget = networks.parameters(networks.build("dgcnn", CLASSES)) / arguments.compress
    width = networks.widest(arguments.student, CLASSES, budget)
    student = networks.build(arguments.student, CLASSES, width).to(device)
    clouds = torch.rand(arguments.batch, points, 3, device=device) * 2 - 1
    labels = torch.arange(arguments.batch, device=device) % CLASSES

    # Each has a student of its own, starting from the same weights.
    steps = {
        ALONE: training_step(None, copy.deepcopy(student), None, clouds, labels),
        WITHOUT: training_step(teacher, copy.deepcopy(student), None, clouds, labels),
    }
    for name in arguments.discriminators:
        fad = FeatureAdversarialLoss(student.channels, teacher.channels, discriminator=name)
        steps[name] = training_step(
            teacher, copy.deepcopy(student), fad.to(device).train(), clouds, labels
        )
    timings = interleave(
        steps, device, seconds=arguments.seconds, rounds=(arguments.rounds, 200), shortest=0.0
    )
    return [
        {
            "step": name,
            "points": points,
            "batch": arguments.batch,
            "student": arguments.student,
            "student_parameters": networks.parameters(student),
            **timing.summary(),
            "ratio_to_without": timing.over(timings[WITHOUT]),
        }
        for name, timing in timings.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The steps and what the loss adds to them."""
    result = Table(title="one training step, DGCNN teacher")
    for column in ("points", "batch", "student", "step"):
        result.add_column(column)
    for column in ("median", "quartiles", "added"):
        result.add_column(column, justify="right")
    for row in rows:
        low, high = row["quartiles_s"]
        known = row["step"] in {ALONE, WITHOUT}
        result.add_row(
            str(row["points"]),
            str(row["batch"]),
            f"{row['student']}, {row['student_parameters']:,}",
            row["step"] if known else f"with FAD, discriminator={row['step']!r}",
            f"{1e3 * row['median_s']:.1f} ms",
            f"{1e3 * low:.1f} – {1e3 * high:.1f}",
            "" if known else f"{100 * (row['ratio_to_without'] - 1):+.1f} %",
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--points", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--student", choices=tuple(networks.ARCHITECTURES), default="dgcnn")
    parser.add_argument("--compress", type=float, default=40.0)
    parser.add_argument("--discriminators", type=lambda text: text.split(","), default=["teacher"])
    parser.add_argument("--seconds", type=float, default=60.0, help="per size of the clouds")
    parser.add_argument("--rounds", type=int, default=7, help="at least")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's default if not given)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return by_size(arguments, "step", "steps", measure, table)


if __name__ == "__main__":
    sys.exit(main())
