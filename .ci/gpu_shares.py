"""A pytest plugin: a share of the GPU tests, each result written as soon as it is there.

`gpu.sh` starts a few pytest processes with this plugin, so that kernels compile in parallel. The
environment says which share a process has (FAD_GPU_SHARE, "2/8"), the file that it appends to
(FAD_GPU_RESULTS), and when to stop (FAD_GPU_DEADLINE, in seconds of the epoch). Tests that passed
in an earlier call are left out. With FAD_GPU_REHEARSE=1 there is no GPU: kernels are compiled and
launched into nothing (tests/kernels/stub.py), and what a test says of values is not heard.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from pretend import OnCpu, pretended_gpu

REHEARSE = os.environ.get("FAD_GPU_REHEARSE") == "1"


def lines(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The results in a folder; a last line that was cut off when its process was killed is not."""
    found = []
    for path in sorted(folder.glob(pattern)):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def append(path: Path, entry: dict[str, Any]) -> None:
    """Write a result where a killed process does not take it along."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def deal(names: list[str], seconds: dict[str, float], number: int) -> list[list[str]]:
    """Split tests into shares of about the same time, the longest first."""
    usual = sum(seconds.values()) / len(seconds) if seconds else 1.0
    shares: list[list[str]] = [[] for _ in range(number)]
    loads = [0.0] * number
    for name in sorted(names, key=lambda n: (-seconds.get(n, usual), n)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += seconds.get(name, usual) + 0.05
    return shares


# What PyTorch says where it is asked for a GPU all the same.
NO_CUDA = "requires CUDA support", "not compiled with CUDA enabled"


def unheard(error: BaseException) -> bool:
    """Whether a failure only says that there is no GPU: of values, all 0 in a rehearsal, or CUDA.

    That an error did not come, or said something else, would be seen on the machine too.
    """
    if isinstance(error, subprocess.CalledProcessError):  # nothing is pretended in other processes
        return True
    text = str(error)
    raised = "DID NOT RAISE", "Regex pattern did not match"
    of_values = isinstance(error, AssertionError) and not any(words in text for words in raised)
    return of_values or any(words in text for words in NO_CUDA)


class Shares:
    """The hooks."""

    def __init__(self) -> None:
        self.results = Path(os.environ["FAD_GPU_RESULTS"])
        number, of = os.environ["FAD_GPU_SHARE"].split("/")
        self.share, self.shares = int(number), int(of)
        self.deadline = float(os.environ["FAD_GPU_DEADLINE"])
        self.counts: Any = SimpleNamespace(compiled=[], launched=[])
        self.stack = ExitStack()

    def pytest_sessionstart(self) -> None:
        """The GPU that is not there."""
        if REHEARSE:
            self.counts = self.stack.enter_context(pretended_gpu())
            # What a test says of values is not heard.
            self.stack.enter_context(mock.patch.object(torch.testing, "assert_close"))

    def pytest_sessionfinish(self) -> None:
        """As it was."""
        self.stack.close()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """This share of what has not passed yet."""
        folder = self.results.parent
        done = {"passed"} if not REHEARSE else {"passed", "unheard", "failed"}
        passed = {e["name"] for e in lines(folder, "tests-*.jsonl") if e["outcome"] in done}
        # How long each took before: in a rehearsal, or with other sources.
        seconds = {e["name"]: e["seconds"] for e in lines(folder.parent, "*/tests-*.jsonl")}
        waiting = {item.nodeid: item for item in items if item.nodeid not in passed}
        mine = deal(list(waiting), seconds, self.shares)[self.share]
        chosen = [waiting[name] for name in mine]
        # The kernels' own tests first: what fails there explains the others.
        chosen.sort(key=lambda item: "tests/kernels" not in item.nodeid)
        kept = set(map(id, chosen))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = chosen

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        """Begin no test after the end."""
        if time.time() <= self.deadline:
            return None
        item.session.shouldstop = "the time of this call is over"
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """Count what this test compiles."""
        self.counts.compiled.clear()
        self.counts.launched.clear()
        if not REHEARSE:
            return (yield)
        with OnCpu():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[Any]:
        """Write the result."""
        report = yield
        if report.when == "call" or report.failed:
            entry = {
                "name": item.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                "compiled": len(self.counts.compiled),
                "launched": len(self.counts.launched),
            }
            if report.failed:
                entry["error"] = str(call.excinfo.value)[:600]
                if REHEARSE and unheard(call.excinfo.value):
                    entry["outcome"] = "unheard"
            append(self.results, entry)
        return report


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks, where `gpu.sh` started the process."""
    if "FAD_GPU_SHARE" in os.environ:
        config.pluginmanager.register(Shares())


def summary(folder: Path) -> dict[str, Any]:
    """What is known so far: how the tests and the other parts ended, each by its last run."""
    tests = {entry["name"]: entry for entry in lines(folder, "tests-*.jsonl")}
    parts = {entry["part"]: entry["exit"] for entry in lines(folder, "parts.jsonl")}
    # A process that ran out of time says so; one that was killed says nothing at all.
    logs = [path.read_text() for path in folder.glob("tests-*.log")]
    ends = [
        re.search(r"^(=+ )?.*\b(passed|failed|deselected|no tests ran)\b", log, re.MULTILINE)
        for log in logs
    ]
    return {
        "passed": sum(entry["outcome"] == "passed" for entry in tests.values()),
        "unheard": sum(entry["outcome"] == "unheard" for entry in tests.values()),
        "failed": sorted(n for n, entry in tests.items() if entry["outcome"] == "failed"),
        "kernels": sum(entry["compiled"] for entry in tests.values()),
        "seconds": round(sum(entry["seconds"] for entry in tests.values())),
        "finished": all(ends) and not any("time of this call is over" in log for log in logs),
        "parts": parts,
    }


def main() -> int:
    """Write summary.json; 0 if all that ran has passed, 1 if not, 3 if there are tests left."""
    folder = Path(sys.argv[1])
    found = summary(folder)
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    if "--quiet" not in sys.argv:
        unheard = f", {found['unheard']} failed by values" if found["unheard"] else ""
        print(
            f"tests: {found['passed']} passed{unheard}, {len(found['failed'])} failed:", flush=True
        )
        print(*found["failed"], sep="\n")
        print(f"kernels compiled: {found['kernels']}; seconds in tests: {found['seconds']}")
    if not found["finished"]:
        return 3
    return 1 if found["failed"] or any(found["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
