"""`make gpu`: tests dealt out by what they take, and nothing lost when a call is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CI = ROOT / ".ci"


@pytest.fixture
def shares(monkeypatch):
    monkeypatch.syspath_prepend(str(CI))
    import gpu_shares

    return gpu_shares


def test_the_longest_are_dealt_first_and_loads_are_even(shares):
    seconds = {f"t{i}": float(i) for i in range(1, 13)}
    dealt = shares.deal([*seconds, "unknown"], seconds, 3)
    assert sorted(name for share in dealt for name in share) == sorted([*seconds, "unknown"])
    loads = [sum(seconds.get(name, 6.5) for name in share) for share in dealt]
    assert max(loads) - min(loads) < 3
    assert {share[0] for share in dealt} == {"t12", "t11", "t10"}


def test_a_rehearsal_hears_all_but_values(shares):
    assert shares.unheard(AssertionError("assert 0.0 == 1.0"))
    assert shares.unheard(RuntimeError("torch.cuda.Stream requires CUDA support"))
    assert shares.unheard(RuntimeError("failed with Torch not compiled with CUDA enabled"))
    for error in (
        AssertionError("Regex pattern did not match.\n  Expected regex: 'third derivatives'"),
        RuntimeError("backend='triton' cannot run: these tensors are float64"),
        AttributeError("'tuple' object has no attribute 'isinf'"),
    ):
        assert not shares.unheard(error)


TESTS = """
import time
def test_first(): pass
def test_fails(): assert 0, "on purpose"
def test_slow(): time.sleep({seconds})
def test_last(): pass
"""


def start(folder, state, deadline=600.0):
    """A share of one, of tests that need no GPU."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(CI), str(ROOT / "src")]),
        "FAD_GPU_SHARE": "0/1",
        "FAD_GPU_RESULTS": str(state / "tests-0.jsonl"),
        "FAD_GPU_DEADLINE": str(time.time() + deadline),
        "FAD_GPU_REHEARSE": "0",
    }
    options = ["-q", "-p", "gpu_shares", "-p", "no:cacheprovider", "-p", "no:cov"]
    command = [sys.executable, "-m", "pytest", *options, "-o", "addopts=", "test_some.py"]
    with (state / "tests-0.log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def outcomes(state):
    path = state / "tests-0.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(e["name"].rpartition("::")[2], e["outcome"]) for e in map(json.loads, lines)]


def test_what_was_found_before_a_call_was_killed_is_kept_and_not_done_again(shares, tmp_path):
    folder, state = tmp_path / "code", tmp_path / "state"
    folder.mkdir()
    state.mkdir()
    (folder / "test_some.py").write_text(TESTS.format(seconds=600))
    process = start(folder, state)
    done = set()
    for _ in range(600):
        done = set(outcomes(state))
        if len(done) >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert done == set(outcomes(state)) != set()
    assert not shares.summary(state)["finished"]
    # The next call does the rest, and what has failed once more.
    (folder / "test_some.py").write_text(TESTS.format(seconds=0))
    assert start(folder, state).wait() == 1
    found = outcomes(state)
    assert [name for name, outcome in found if outcome == "passed"].count("test_first") == 1
    assert {name for name, _ in found} == {"test_first", "test_fails", "test_slow", "test_last"}
    summary = shares.summary(state)
    assert summary["finished"]
    assert summary["passed"] == 3
    assert [name.rpartition("::")[2] for name in summary["failed"]] == ["test_fails"]


def test_no_test_begins_after_the_end(shares, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS.format(seconds=0))
    start(tmp_path, tmp_path, deadline=-1.0).wait()
    assert outcomes(tmp_path) == []
    assert not shares.summary(tmp_path)["finished"]


def test_a_line_that_was_cut_off_is_not_a_result(shares, tmp_path):
    (tmp_path / "tests-0.jsonl").write_text('{"name": "a", "outcome": "passed"}\n{"name": "b", "o')
    assert [entry["name"] for entry in shares.lines(tmp_path, "tests-*.jsonl")] == ["a"]
