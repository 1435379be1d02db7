"""Times, and peak memory, of the pairwise reductions beside the matrix product and their peers.

    python benchmarks/pairwise.py --device cpu                 the default cases
    python benchmarks/pairwise.py --quick                      a few seconds: does it run?
    python benchmarks/pairwise.py --large                      50,000 x 50,000 x 64
    python benchmarks/pairwise.py --accuracy                   errors where distances cancel
    python benchmarks/pairwise.py --ops nearest --passes forward --shapes 8,1024,1024,64

Everything that computes the same case runs in turn, round after round, together with `torch.bmm` of
the same shape; ratios are medians over the rounds. The table is printed, and the numbers written as
JSON, after every case; `--resume` continues a file that an interruption left.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, os.getenv("FAD_LOSS_SOURCE", str(Path(__file__).resolve().parents[1] / "src")))

from fad_loss.ops import _backends
from implementations import (
    GEMM,
    OPERATIONS,
    PEER_GROUPS,
    PEERS,
    Case,
    gemm,
    implementations,
    ours,
    passes,
    step,
)
from measure import (
    RESULTS,
    MemoryWorker,
    Timing,
    context,
    interleave,
    load,
    peak_extra_bytes,
    save,
)

PASSES = ("forward", "backward")
# The shapes of the promises made for a CPU.
_PROMISED = ((8, 1024, 1024, 64), (8, 1024, 1024, 256), (2, 4096, 4096, 256))
_EXAMPLE = (8, 1024, 1024, 64)


def default_cases(device: torch.device) -> Iterator[Case]:
    """What the results in the documentation are made of."""
    if device.type == "cpu":
        for shape in (*_PROMISED, (8, 1024, 1024, 3)):
            yield Case("nearest", *shape)
            yield Case("knn", *shape)
        for op in OPERATIONS[2:]:
            yield Case(op, *_EXAMPLE)
        yield Case("nearest", *_EXAMPLE, "bfloat16")
        yield Case("softmin", *_EXAMPLE, "bfloat16")
        for op in ("nearest", "softmin"):
            for points in (256, 512, 2048, 4096, 8192):
                yield Case(op, 1, points, points, 64)
            for channels in (16, 32, 128, 256, 512, 1024):
                yield Case(op, 4, 1024, 1024, channels)
        return
    for dtype in ("float32", "bfloat16", "float16"):
        for op in OPERATIONS:
            for channels in (3, 64, 128, 256, 512, 1024):
                yield Case(op, 1, 8192, 8192, channels, dtype)
            for batch in (16, 32):
                yield Case(op, batch, 1024, 1024, 64, dtype)
        for op in ("nearest", "knn", "gaussian", "softmin"):
            for points in (1024, 2048, 4096, 16384, 32768, 65536):
                yield Case(op, 1, points, points, 256, dtype)


def quick_cases() -> Iterator[Case]:
    """Every operation, at a size that only shows that it runs."""
    for op in OPERATIONS:
        yield Case(op, 2, 96, 80, 24)


def large_cases(device: torch.device) -> Iterator[Case]:
    """What a matrix of all pairs would make impossible."""
    for op in ("nearest", "softmin"):
        if device.type == "cpu":
            yield Case(op, 1, 50_000, 50_000, 64)
        else:
            yield Case(op, 1, 100_000, 100_000, 256)


def free_bytes(device: torch.device) -> int:
    """Memory that an implementation may take: half of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    except OSError:
        pass
    return 4 << 30


class Benchmark:
    """Measures cases on one device, as the command line says."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.free = free_bytes(self.device)
        on_linux = Path("/proc/self/clear_refs").exists()
        self.worker = None
        if arguments.memory and self.device.type == "cpu" and on_linux:
            self.worker = MemoryWorker(torch.get_num_threads())

    def close(self) -> None:
        """End the process that measures memory."""
        if self.worker is not None:
            self.worker.close()

    def measure(self, case: Case, direction: str) -> list[dict[str, Any]]:
        """Rows for the matrix product and every implementation of a case."""
        x, y = case.inputs(self.device)
        runs = {GEMM: gemm(x, y, self.free)}
        skipped: dict[str, str] = {}
        found = implementations(
            case, self.device, self.arguments.backends, self.arguments.peers, self.free
        )
        for implementation in found:
            name, function, reason = (
                implementation.name,
                implementation.function,
                implementation.reason,
            )
            if (
                function is not None
                and direction == "backward"
                and not implementation.differentiable
            ):
                function, reason = None, "no gradient"
            if function is None:
                skipped[name] = reason or "not possible"
                continue
            try:
                run = passes(function, x, y, direction)
                if not self.arguments.large:
                    run()
            except Exception as problem:
                if name.startswith("fad_loss"):
                    raise
                skipped[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
                continue
            runs[name] = run
        once = self.arguments.large and self.device.type == "cpu"
        timings = interleave(
            runs,
            self.device,
            seconds=self.arguments.seconds,
            rounds=(1, 1) if once else (self.arguments.rounds, 200),
            warm_up=not once,
        )
        del runs
        rows = [self._row(case, direction, name, timings) for name in timings]
        base = {**asdict(case), "pass": direction}
        rows += [{**base, "implementation": n, "skipped": why} for n, why in skipped.items()]
        return rows

    def _row(
        self, case: Case, direction: str, name: str, timings: dict[str, Timing]
    ) -> dict[str, Any]:
        timing = timings[name]
        row = {
            **asdict(case),
            "pass": direction,
            "implementation": name,
            **timing.summary(),
            "ratio_to_gemm": timing.over(timings[GEMM]),
        }
        if name.startswith("fad_loss"):
            # How many times longer each peer takes.
            row["faster_than"] = {
                peer: other.over(timing)
                for peer, other in timings.items()
                if peer != GEMM and not peer.startswith("fad_loss")
            }
        extra = None if name == GEMM else self._extra_bytes(case, name, direction)
        if isinstance(extra, str):
            row["extra_bytes_unknown"] = extra
        elif extra is not None:
            row["extra_bytes"] = extra
        return row

    def _extra_bytes(self, case: Case, name: str, direction: str) -> int | str | None:
        """Peak memory beyond inputs and results; for the backward, of forward and backward."""
        if not self.arguments.memory:
            return None
        if self.device.type == "cpu":
            if self.worker is None:
                return "measured on Linux only"
            arguments = (case, name, direction, self.free)
            return self.worker.measure("implementations:memory_step", *arguments)
        x, y = case.inputs(self.device)
        names = tuple(b for b in _backends.BACKENDS if b in name.split())
        found = implementations(case, self.device, names, (name,), self.free)
        function = next(iter(found)).function
        if function is None:
            return "not possible"
        try:
            return peak_extra_bytes(step(function, x, y, direction), self.device)
        except torch.cuda.OutOfMemoryError:
            return "out of memory"


# ------------------------------------------------------------------------------------ accuracy


def _cdist_nearest(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, y).amin(-1).square()


def accuracy(
    device: torch.device, backends: Sequence[str], *, points: int, channels: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Relative errors of distances where they cancel: nearly matching clouds far from the origin.

    y is a permuted x with 5 % noise, and both carry an offset of 4. The reference is the float64
    sum of differences of the inputs as given.
    """
    for C in channels:
        generator = torch.Generator().manual_seed(C)
        x = torch.randn(1, points, C, generator=generator)
        order = torch.randperm(points, generator=generator)
        y = x[:, order] + 0.05 * torch.randn(1, points, C, generator=generator)
        x, y = x + 4, y + 4
        wide = y.double()
        # A few rows at a time: the differences are N x M x C numbers.
        rows = max(1, (1 << 26) // (points * C))
        exact = torch.cat(
            [(part.double().unsqueeze(2) - wide).square_().sum(-1) for part in x.split(rows, 1)], 1
        )
        case = Case("knn", 1, points, points, C)
        reference = exact.topk(min(20, points), largest=False).values
        found = [
            (f"fad_loss {b}", op, ours(Case(op, *case.shape), b))
            for b in backends
            if b != "dense" and _backends.why_not(b, device) is None
            for op in ("nearest", "knn")
        ]
        found.append(
            ("torch.cdist + reduce", "nearest", lambda a, b: torch.cdist(a, b).amin(-1) ** 2)
        )
        for name, op, function in found:
            result = function(x.to(device), y.to(device)).cpu().double()
            expected = reference[..., 0] if op == "nearest" else reference
            error = ((result - expected).abs() / expected).amax()
            yield {
                "op": op,
                "C": C,
                "N": points,
                "dtype": "float32",
                "implementation": name,
                "largest_relative_error": float(error),
            }


# --------------------------------------------------------------------------------- on the screen


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _bytes(row: dict[str, Any]) -> str:
    if "extra_bytes" not in row:
        return "" if "extra_bytes_unknown" not in row else "?"
    return f"{row['extra_bytes'] / 2**20:.1f} MiB"


def times_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What was measured, case by case."""
    table = Table(title="times (median, quartiles), peak memory beyond inputs and results")
    for column in ("operation", "pass", "B, N, M, C", "dtype", "implementation"):
        table.add_column(column)
    for column in ("time", "quartiles", "of GEMM", "memory"):
        table.add_column(column, justify="right")
    before = None
    for row in rows:
        key = [str(row[name]) for name in ("op", "pass", "B", "N", "M", "C", "dtype")]
        if before is not None and key != before:
            table.add_section()
        shown = [key[0], key[1], ", ".join(key[2:6]), key[6]] if key != before else [""] * 4
        before = key
        if "skipped" in row:
            table.add_row(*shown, row["implementation"], f"[dim]{row['skipped']}[/dim]")
            continue
        low, high = row["quartiles_s"]
        table.add_row(
            *shown,
            row["implementation"],
            _seconds(row["median_s"]),
            f"{_seconds(low)} – {_seconds(high)}",
            f"{row['ratio_to_gemm']:.2f}×",
            _bytes(row),
        )
    return table


def accuracy_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The errors of distances that cancel."""
    table = Table(title="relative error of distances: permuted, 5 % noise, offset 4")
    for column in ("operation", "C", "implementation", "largest relative error"):
        table.add_column(column)
    for row in rows:
        error = f"{row['largest_relative_error']:.1e}"
        table.add_row(row["op"], str(row["C"]), row["implementation"], error)
    return table


# ------------------------------------------------------------------------------ the command line


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                message = f"expected some of {', '.join(known)}, got {name!r}"
                raise argparse.ArgumentTypeError(message)
        return names

    return parse


def _peers(text: str) -> tuple[str, ...]:
    if text in PEER_GROUPS:
        return PEER_GROUPS[text]
    names: tuple[str, ...] = _names([peer.name for peer in PEERS])(text)
    return names


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        B, N, M, C = (int(part) for part in text.split(","))
    except ValueError:
        message = f"expected B,N,M,C such as 8,1024,1024,64, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return B, N, M, C


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="tiny cases: does it run?")
    preset.add_argument("--large", action="store_true", help="50,000 (CUDA: 100,000) points")
    preset.add_argument("--accuracy", action="store_true", help="errors where distances cancel")
    parser.add_argument("--ops", type=_names(OPERATIONS), default=None, help="comma-separated")
    parser.add_argument("--passes", type=_names(PASSES), default=PASSES)
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="B,N,M,C")
    parser.add_argument(
        "--dtypes", type=_names(("float32", "float64", "bfloat16", "float16")), default=None
    )
    parser.add_argument("--backends", type=_names(_backends.BACKENDS[1:]), default=None)
    parser.add_argument(
        "--peers", type=_peers, default=None, help="all, none, torch, or names, comma-separated"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's default if not given)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--rounds", type=int, default=7, help="per case, at least")
    parser.add_argument("--output", type=Path, help="the JSON (in benchmarks/results by default)")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that are already there"
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    preset_name = next((p for p in ("quick", "large", "accuracy") if getattr(arguments, p)), None)
    if arguments.backends is None:
        arguments.backends = ("tiled",) if arguments.device == "cpu" else ("triton", "tiled")
        if arguments.quick:
            arguments.backends = _backends.BACKENDS[1:]
    if arguments.peers is None:
        # KeOps compiles for minutes, and at the large shape KeOps takes them.
        arguments.peers = PEER_GROUPS["torch" if arguments.quick or arguments.large else "all"]
    if arguments.output is None:
        suffix = f"-{preset_name}" if preset_name else ""
        arguments.output = RESULTS / f"pairwise-{arguments.device}{suffix}.json"
    if arguments.quick:
        arguments.seconds, arguments.rounds = min(arguments.seconds, 0.02), 3
    return arguments


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases of the preset, or of the shapes and dtypes that were named."""
    device = torch.device(arguments.device)
    if arguments.shapes:
        ops = arguments.ops or OPERATIONS
        dtypes = arguments.dtypes or ("float32",)
        return [Case(op, *s, dtype) for op in ops for s in arguments.shapes for dtype in dtypes]
    if arguments.quick:
        cases = quick_cases()
    elif arguments.large:
        cases = large_cases(device)
    else:
        cases = default_cases(device)
    return [
        case
        for case in cases
        if (arguments.ops is None or case.op in arguments.ops)
        and (arguments.dtypes is None or case.dtype in arguments.dtypes)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    console = Console()
    report = {"schema": 1, "context": context(device), "cases": [], "accuracy": []}
    if arguments.resume and arguments.output.exists():
        before = load(arguments.output)
        report["cases"], report["accuracy"] = before["cases"], before["accuracy"]
        report["resumed_from"] = before["context"]

    if arguments.accuracy:
        arguments_of = {"points": 1024, "channels": (3, 64, 256, 1024)}
        report["accuracy"] = list(accuracy(device, arguments.backends, **arguments_of))
        save(arguments.output, report)
        console.print(accuracy_table(report["accuracy"]))
        console.print(f"written to {arguments.output}")
        return 0

    benchmark = Benchmark(arguments)
    cases = chosen_cases(arguments)
    known = {_key(row) for row in report["cases"]}
    try:
        for number, case in enumerate(cases):
            shape = ", ".join(map(str, case.shape))
            progress = f"{number + 1} of {len(cases)}: {case.op} ({shape}) {case.dtype}"
            with console.status(progress):
                for direction in arguments.passes:
                    if _key({**asdict(case), "pass": direction}) not in known:
                        report["cases"] += benchmark.measure(case, direction)
                        save(arguments.output, report)
    finally:
        benchmark.close()
    console.print(times_table(report["cases"]))
    console.print(f"written to {arguments.output}")
    return 0


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("op", "pass", "B", "N", "M", "C", "dtype"))


if __name__ == "__main__":
    sys.exit(main())
