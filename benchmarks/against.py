"""Times of the operations on a CPU beside those of another commit, in turn.

    python benchmarks/against.py HEAD~1                       the default shapes
    python benchmarks/against.py 122f0fb --ops softmin --shapes 8,1024,1024,64

The other commit is checked out beside this one, with `git worktree`. Each code runs in a process of
its own, and both wait for each other: one round here, one round there, so that both see the same
machine. Ratios are medians over the rounds. `torch.cdist` with a reduction, what users write
today, runs here too. The numbers are written as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from measure import RESULTS, ROOT, context, save

CDIST = "torch.cdist + reduce"
OPERATIONS = ("nearest", "knn", "gaussian", "energy", "softmin")
SHAPES = (
    (8, 1024, 1024, 64),
    (8, 1024, 1024, 256),
    (32, 64, 64, 128),
    (32, 128, 128, 128),
    (32, 256, 256, 128),
)


def clustered(points: torch.Tensor) -> torch.Tensor:
    """Every other point around (10, ..., 10), the rest around its negative, 800 times as close."""
    side = torch.tensor([10.0, -10.0]).repeat(points.shape[1] // 2 + 1)[: points.shape[1], None]
    return side + 0.0125 * (points - 1)


def serve() -> None:
    """Answer every line of the standard input, a case, with the seconds that it took."""
    import fad_loss  # noqa: PLC0415
    from implementations import Case, implementations, passes  # noqa: PLC0415

    print(Path(fad_loss.__file__).resolve().parents[1], flush=True)
    # As in a training process, which has freed large tensors before: from then on the C library
    # keeps memory, instead of having the system clear it anew for every call.
    torch.empty(7 << 20)
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    runs: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps(request["case"])
        if key not in runs:
            op, shape, direction, data, name = request["case"]
            case = Case(op, *shape)
            found = implementations(case, torch.device("cpu"), ("tiled",), (CDIST,), 1 << 33)
            function = next(i.function for i in found if i.name == name)
            points = case.inputs(torch.device("cpu"))
            if data == "clusters":
                points = tuple(clustered(t) for t in points)
            runs = {key: passes(function, *points, direction)}
            runs[key]()
        start = time.perf_counter()
        for _ in range(request["calls"]):
            runs[key]()
        seconds = (time.perf_counter() - start) / request["calls"]
        sys.stdout.write(json.dumps(seconds) + "\n")
        sys.stdout.flush()


class Server:
    """A process that times one code."""

    def __init__(self, source: Path, threads: int) -> None:
        here = Path(__file__).resolve()
        options = {"FAD_LOSS_SOURCE": str(source), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, str(here), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **options},
        )
        taken = self._answer("this code")
        if Path(taken) != source.resolve():
            message = f"measured would be {taken}, not {source}"
            raise RuntimeError(message)

    def time(self, case: Sequence[Any], calls: int) -> float:
        """Seconds per call."""
        if self.process.stdin is None:
            raise RuntimeError("the process has no pipes")
        self.process.stdin.write(json.dumps({"case": case, "calls": calls}) + "\n")
        self.process.stdin.flush()
        return float(self._answer(case))

    def _answer(self, case: object) -> str:
        answer = "" if self.process.stdout is None else self.process.stdout.readline()
        if not answer:
            message = f"the process that measures {case} has ended"
            raise RuntimeError(message)
        return answer.strip()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)


def measure(
    case: Sequence[Any], servers: dict[str, Server], seconds: float, rounds: int
) -> dict[str, Any]:
    """Time a case everywhere, round after round."""
    once = {name: server.time([*case, _ours(name)], 1) for name, server in servers.items()}
    # For long enough that what the other processes left in the caches does not count.
    calls = {name: max(1, min(50, round(3e-2 / took))) for name, took in once.items()}
    times: dict[str, list[float]] = {name: [] for name in servers}
    names, start = list(servers), time.perf_counter()
    while len(times["new"]) < rounds or time.perf_counter() - start < seconds:
        turn = len(times["new"]) % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(servers[name].time([*case, _ours(name)], calls[name]))
    op, (B, N, M, C), direction, data = case
    row: dict[str, Any] = {"op": op, "B": B, "N": N, "M": M, "C": C, "pass": direction}
    row["data"] = data
    row["rounds"] = len(times["new"])
    for name, values in times.items():
        row[name] = {"median_s": statistics.median(values), "fastest_s": min(values)}
    for name in ("old", "cdist"):
        pairs = zip(times["new"], times[name], strict=True)
        row[f"new_over_{name}"] = statistics.median(a / b for a, b in pairs)
    return row


def _ours(name: str) -> str:
    return CDIST if name == "cdist" else "fad_loss tiled"


def table(rows: Sequence[dict[str, Any]], old: str) -> Table:
    """What was measured."""
    shown = Table(title=f"this commit beside {old[:10]} and torch.cdist, medians")
    for column in ("operation", "pass", "B, N, M, C", "points"):
        shown.add_column(column)
    for column in ("new", "old", "cdist", "new / old", "new / cdist"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row["op"],
            row["pass"],
            ", ".join(str(row[name]) for name in "BNMC"),
            row["data"],
            *[f"{row[name]['median_s'] * 1e3:.2f} ms" for name in ("new", "old", "cdist")],
            *[f"{row[name]:.2f}" for name in ("new_over_old", "new_over_cdist")],
        )
    return shown


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(part) for part in text.split(","))
    if len(shape) != 4:
        message = f"expected B,N,M,C such as 8,1024,1024,64, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return shape


def main(argv: Sequence[str] | None = None) -> int:
    """Check the other commit out, measure, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--ops", default=",".join(OPERATIONS), help="comma-separated")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, metavar="B,N,M,C")
    parser.add_argument(
        "--data", default="normal", help="normal, clusters (where products cancel), or both"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--rounds", type=int, default=15, help="per case, at least")
    parser.add_argument("--output", type=Path, default=RESULTS / "against-cpu.json")
    arguments = parser.parse_args(argv)
    git = ["git", "-C", str(ROOT)]
    old = subprocess.run(
        [*git, "rev-parse", "--verify", f"{arguments.revision}^{{commit}}"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"context": context(torch.device("cpu")), "old": old, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "old"
        subprocess.run([*git, "worktree", "add", "--detach", "-q", str(checkout), old], check=True)
        servers = {
            "new": Server(ROOT / "src", arguments.threads),
            "old": Server(checkout / "src", arguments.threads),
            "cdist": Server(ROOT / "src", arguments.threads),
        }
        try:
            for case in itertools.product(
                arguments.ops.split(","),
                arguments.shapes,
                arguments.passes.split(","),
                arguments.data.split(","),
            ):
                row = measure(case, servers, arguments.seconds, arguments.rounds)
                report["cases"].append(row)
                save(arguments.output, report)
        finally:
            for server in servers.values():
                server.close()
            subprocess.run([*git, "worktree", "remove", "--force", str(checkout)], check=True)
    console = Console()
    console.print(table(report["cases"], old))
    console.print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
