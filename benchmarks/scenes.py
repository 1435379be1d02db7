"""What scenes cost: ragged or masked clouds of 100,000 points, beside a dense batch of as many.

    python benchmarks/scenes.py
    python benchmarks/scenes.py --points 20000 --channels 32

The loss draws `max_points` of each cloud, so that its work does not grow with the scene; what does
is what every point costs: standardising, and the adapter before it was drawn. Measured are the loss
alone (forward and backward) and a training step of a student that is a shared MLP, in one run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, os.getenv("FAD_LOSS_SOURCE", str(Path(__file__).resolve().parents[1] / "src")))

from fad_loss import FeatureAdversarialLoss, ragged
from measure import RESULTS, context, interleave, save

SCENES = 2
FORMS = ("dense", "ragged", "masked")


def step(form: str, points: int, channels: int, *, student: bool) -> Callable[[], object]:
    """A training step on scenes in that form: of the student and the loss, or of the loss alone."""
    torch.manual_seed(0)
    fad = FeatureAdversarialLoss(channels, 4 * channels)
    teacher = torch.randn(SCENES * points, 4 * channels)
    # As unequal as scenes are; as many points in all.
    lengths = [points - points // 4, points + points // 4]
    mask = torch.arange(points) < torch.tensor([[points], [points - points // 4]])
    inputs = torch.randn(SCENES * points, 6)
    features = torch.randn(SCENES * points, channels, requires_grad=True)
    network = nn.Sequential(nn.Linear(6, channels), nn.ReLU(), nn.Linear(channels, channels))

    def in_form(values: Tensor) -> Tensor:
        if form == "ragged":
            return ragged(values, lengths=lengths)
        return values.unflatten(0, (SCENES, points))

    def run() -> None:
        fad.zero_grad()
        network.zero_grad()
        features.grad = None
        shown = network(inputs) if student else features
        loss = fad(in_form(shown), in_form(teacher), mask=mask if form == "masked" else None)
        (loss + shown.square().mean()).backward() if student else loss.backward()

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=100_000, help="of a scene, in the mean")
    parser.add_argument("--channels", type=int, default=64, help="of the student")
    parser.add_argument("--seconds", type=float, default=20, help="for each table")
    parser.add_argument("--output", type=Path, default=RESULTS / "scenes-cpu.json")
    given = parser.parse_args(arguments)
    device = torch.device("cpu")
    rows = []
    shown = Table("what", "scenes", "ms", "times dense")
    for what, student in (("loss", False), ("step", True)):
        runs = {form: step(form, given.points, given.channels, student=student) for form in FORMS}
        timings = interleave(runs, device, seconds=given.seconds)
        for form, timing in timings.items():
            ratio = timing.over(timings["dense"])
            rows.append({"what": what, "scenes": form, "times_dense": ratio, **timing.summary()})
            shown.add_row(what, form, f"{1e3 * timing.median:.1f}", f"{ratio:.2f}")
    settings = {"scenes": SCENES, "points": given.points, "channels": given.channels}
    save(given.output, {"context": context(device), "settings": settings, "rows": rows})
    Console().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
