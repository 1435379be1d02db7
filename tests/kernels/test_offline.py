"""The kernels as GPUs would run them, on a machine without one: compiled, and what came of it.

The committed reports, one for each version of Triton, have every kernel and every entry of the
table of tiles. They are checked to be of these sources and without a problem, and a few kernels are
compiled again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kernels_report.py"
REPORTS = sorted((ROOT / "benchmarks" / "results").glob("kernels-report-*.json"))
# One of each kind: what is compiled again here.
SAMPLES = [("backward", "90"), ("shortlist", "80"), ("scan", "100")]
ARCHITECTURES = {80, 90, 100, 120}


def run(*arguments):
    """The report's script, never in the interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_reports_are_of_these_sources_and_have_no_problem():
    code, text = run("--check")
    assert code == 0, f"{text}\nmake kernels-report renews the one of the installed Triton"


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_no_kernel_spills_on_any_architecture(path):
    entries = json.loads(path.read_text())["kernels"]
    assert {entry["architecture"] for entry in entries} == ARCHITECTURES
    assert not any(entry["stack"] or entry["local"] for entry in entries)
    assert not any(entry["narrow_offsets"] for entry in entries)


def test_reports_of_the_oldest_and_the_newest_supported_triton():
    versions = {json.loads(path.read_text())["triton"][:3] for path in REPORTS}
    assert {"3.6", "3.9"} <= versions


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_every_entry_says_what_limits_it(path):
    for entry in json.loads(path.read_text())["kernels"]:
        cycles = entry["limits"]
        assert set(cycles) == {"issue", "tensor", "l2", "exponential"}
        # Of few channels and few columns there is no loop to count.
        looped = entry["format"] != "direct" or not entry["kernel"].startswith("small_")
        assert cycles["issue"] > 0 or not looped
        exact = entry["kernel"].startswith("exact_")
        assert (cycles["tensor"] == 0) == (exact or entry["format"] == "direct")
        assert entry["registers"] <= 255


def test_the_page_shows_the_estimates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import estimates

    report = json.loads(estimates.OUTPUT.read_text())
    assert estimates.page(report["kernels"]) in estimates.PAGE.read_text()
    assert [(e["kernel"], e["format"], e["channels"]) for e in report["kernels"]] == (
        estimates.KERNEL_CASES
    )


@pytest.mark.parametrize("kernel, architecture", SAMPLES)
def test_compiled_again(kernel, architecture, tmp_path):
    output = tmp_path / "report.json"
    code, text = run(
        "--only", kernel, "--arch", architecture, "--formats", "half", "--output", str(output)
    )
    assert code == 0, text
    assert json.loads(output.read_text())["kernels"]


def test_the_other_kernels_compile():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(Path(__file__).with_name("compiled.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
