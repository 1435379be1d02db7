"""Measuring: times that share their noise, peak memory, and where and on what it was measured.

A ratio of two times means something only if both saw the same machine. So everything that is
compared runs in turn, round after round, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, os.getenv("FAD_LOSS_SOURCE", str(Path(__file__).resolve().parents[1] / "src")))


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pykeops",
    "geomloss",
    "flash-sinkhorn",
    "flash-kmeans",
    "pytorch3d",
    "chamferdist",
)

Run = Callable[[], object]


# ---------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Timing:
    """The times of one function, one per round, in seconds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, Any]:
        """Median and quartiles, for the JSON."""
        low, high = quartiles(self.seconds)
        return {
            "median_s": self.median,
            "quartiles_s": [low, high],
            "fastest_s": min(self.seconds),
            "rounds": len(self.seconds),
        }

    def over(self, other: Timing) -> float:
        """The median over the rounds of the ratio of both times in the same round."""
        rounds = min(len(self.seconds), len(other.seconds))
        pairs = zip(self.seconds[:rounds], other.seconds[:rounds], strict=True)
        return statistics.median(a / b for a, b in pairs)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile; of a single value, itself twice."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class _Clock:
    """Times one call: on a CPU by the wall clock, on a GPU by events behind a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(size, 1 << 20), dtype=torch.int8, device=device)

    def time(self, run: Run, calls: int) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        events = []
        for _ in range(calls):
            self.flush.zero_()
            # What the host takes to launch is hidden behind the flush, as it is in a real step.
            start_event = torch.cuda.Event(enable_timing=True)
            end_event = torch.cuda.Event(enable_timing=True)
            start_event.record()
            run()
            end_event.record()
            events.append((start_event, end_event))
        torch.cuda.synchronize(self.device)
        return statistics.median(a.elapsed_time(b) for a, b in events) / 1e3


def interleave(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 200),
    shortest: float = 2e-3,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Run everything in turn, round after round, and time each call.

    Each function is warmed up first. A round starts with another function each time, so that none
    always profits from the cache that its predecessor left behind.

    Args:
        runs: the functions, by name.
        device: what they run on.
        seconds: how long to go on, if `rounds` allows it.
        rounds: at least and at most so many. A function so slow that the fewest rounds would take
            longer than `seconds` is timed once.
        shortest: a function faster than this is called repeatedly within a round.
        warm_up: run everything once before; without, every function is timed exactly once.
    """
    clock = _Clock(device)
    if not warm_up:
        return {name: Timing([clock.time(run, 1)]) for name, run in runs.items()}
    calls, slow = {}, {}
    for name, run in runs.items():
        run()
        once = clock.time(run, 1)
        if once * rounds[0] > seconds:
            slow[name] = once
        calls[name] = max(1, min(50, round(shortest / once))) if once > 0 else 50
    times: dict[str, list[float]] = {name: [] for name in runs if name not in slow}
    names, start = list(times), time.perf_counter()
    # Together they may take long although each alone does not: then the fewest rounds it is.
    while names and len(times[names[0]]) < rounds[1]:
        done = len(times[names[0]])
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            times[name].append(clock.time(runs[name], calls[name]))
    return {name: Timing([slow[name]] if name in slow else times[name]) for name in runs}


# -------------------------------------------------------------------------------------- memory


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    message = f"/proc/self/status has no {field}"
    raise RuntimeError(message)


def _returned_bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, (tuple, list)):
        return sum(_returned_bytes(v) for v in value)
    return 0


def peak_extra_bytes(run: Run, device: torch.device) -> int:
    """The most memory that `run` takes beyond what exists before and what it returns.

    On a CPU this is the growth of the peak resident size, which Linux lets a process reset; it is
    meant for a process of its own (`memory_worker`), in which freed memory goes back at once.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before - _returned_bytes(result)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = run()
    return max(_status("VmHWM") - before - _returned_bytes(result), 0)


# Tensors of any size in pages of their own, returned to the system when freed.
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class MemoryWorker:
    """A process that runs a function of a module on request and reports its peak extra memory.

    The function is named, "module:function", and called with the arguments; it returns the function
    to measure after having prepared its inputs.
    """

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        kept = {name: os.environ.get(name) for name in _EXACT_MALLOC}
        os.environ.update(_EXACT_MALLOC)
        try:
            self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
            self._process.start()
        finally:
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()

    def measure(self, function: str, *arguments: Any) -> int | str:
        """Peak extra bytes, or why there are none."""
        try:
            self._ours.send((function, arguments))
            answer: int | str = self._ours.recv()
        except (EOFError, OSError):
            return "the process was killed, most likely for want of memory"
        return answer

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(connection: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, OSError):
            return
        module, name = function.split(":")
        answer: int | str
        try:
            run = getattr(importlib.import_module(module), name)(*arguments)
            _trim()
            answer = peak_extra_bytes(run, torch.device("cpu"))
            del run
        except Exception as reason:  # noqa: BLE001 - a peer that fails is reported, not fatal
            answer = f"{type(reason).__name__}: {reason}".splitlines()[0]
        connection.send(answer)


def _trim() -> None:
    """Give freed small blocks back to the system as well, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# ------------------------------------------------------------------------------------- context


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _matmul_precision() -> str:
    """By either of PyTorch's two settings: the older one raises once the newer one was set."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return str(torch.backends.cuda.matmul.fp32_precision)


def context(device: torch.device) -> dict[str, Any]:
    """Where, on what and with what a measurement was made."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": _matmul_precision(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _installed(name))},
        "commit": _git("rev-parse", "HEAD"),
        # Results being written do not make the code another one.
        "dirty": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def load(path: Path) -> dict[str, Any]:
    """Read a report."""
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def save(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report; an interruption leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.replace(path)


def by_size(
    arguments: argparse.Namespace,
    kind: str,
    rows: str,
    measured: Callable[[argparse.Namespace, int], list[dict[str, Any]]],
    table: Callable[[Sequence[dict[str, Any]]], Table],
) -> int:
    """Measure at every number of points, save after each, and print the table of all."""
    output = arguments.output or RESULTS / f"{kind}-{arguments.device}.json"
    console = Console()
    found = context(torch.device(arguments.device))
    report: dict[str, Any] = {"schema": 1, "context": found, rows: []}
    for points in arguments.points:
        with console.status(f"{points} points"):
            report[rows] += measured(arguments, points)
        save(output, report)
    console.print(table(report[rows]))
    console.print(f"written to {output}")
    return 0
