"""The kernels as GPUs would run them, on a machine without one: compiled, and what came of it.

The committed report has every kernel and every entry of the table of tiles. Here it is checked to
be of these sources and without a problem, and a few kernels are compiled again.
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
REPORT = ROOT / "benchmarks" / "results" / "kernels-report.json"
# One of each kind: what is compiled again here.
SAMPLES = [("pull", "90"), ("shortlist", "80"), ("scan", "100")]
ARCHITECTURES = {80, 90, 100}


def run(*arguments):
    """The report's script, never in the interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_report_is_of_these_sources_and_has_no_problem():
    code, text = run("--check")
    assert code == 0, f"{text}\nmake kernels-report renews it"


def test_the_report_has_every_architecture():
    entries = json.loads(REPORT.read_text())["kernels"]
    assert {entry["architecture"] for entry in entries} == ARCHITECTURES
    assert not any(entry["stack"] for entry in entries)
    assert not any(entry["narrow_offsets"] for entry in entries)


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
