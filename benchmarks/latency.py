"""What a network forty times smaller buys: the time of one cloud, of teacher and student.

    python benchmarks/latency.py
    python benchmarks/latency.py --arch dgcnn --points 1024

Both are in evaluation mode, without a graph, on one thread, as on a robot; round after round in one
run. Weights are random: times do not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from distill import networks
from measure import by_size, interleave

CLASSES = 40


def measure(arguments: argparse.Namespace, points: int) -> list[dict[str, Any]]:
    """Times of both networks at one size of the clouds."""
    device = torch.device(arguments.device)
    budget = networks.parameters(networks.build(arguments.arch, CLASSES)) / arguments.compress
    widths = {"teacher": 1.0, "student": networks.widest(arguments.arch, CLASSES, budget)}
    torch.manual_seed(0)
    cloud = torch.rand(1, points, 3, device=device) * 2 - 1
    built = {
        name: networks.build(arguments.arch, CLASSES, width).to(device).eval()
        for name, width in widths.items()
    }
    runs: dict[str, Callable[[], object]] = {
        name: partial(network, cloud) for name, network in built.items()
    }
    with torch.inference_mode():
        timings = interleave(
            runs, device, seconds=arguments.seconds, rounds=(arguments.rounds, 400), shortest=0.0
        )
    return [
        {
            "network": name,
            "arch": arguments.arch,
            "points": points,
            "parameters": networks.parameters(built[name]),
            **timing.summary(),
            "of_teacher": timing.over(timings["teacher"]),
        }
        for name, timing in timings.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Both networks side by side."""
    result = Table(title="one cloud")
    for column in ("network", "points"):
        result.add_column(column)
    for column in ("parameters", "median", "of the teacher's"):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            f"{row['network']}, {row['arch']}",
            str(row["points"]),
            f"{row['parameters']:,}",
            f"{1e3 * row['median_s']:.2f} ms",
            f"{row['of_teacher']:.2f}",
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--arch", choices=tuple(networks.ARCHITECTURES), default="pointnet")
    parser.add_argument("--points", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--compress", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="per size of the clouds")
    parser.add_argument("--rounds", type=int, default=7, help="at least")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    return by_size(arguments, "latency", "latencies", measure, table)


if __name__ == "__main__":
    sys.exit(main())
