"""The kernels without a GPU, in a process where triton is its own interpreter.

The files that such a process runs are `interpreted.py` and `interpreted_near.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What of interpreted.py runs in which process, so that processes can share the work.
PARTS = {
    "softmin": "softmin or temperatures",
    "kernel_sum": "kernel_sum or coinciding or bandwidths",
    "search": "knn or nearest or ties or list",
}
PARTS["rest"] = " and ".join(f"not ({part})" for part in PARTS.values())
FILES = dict.fromkeys(PARTS, "interpreted.py")
PARTS |= {"near, small": "small", "near, tiles": "not small"}


@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part):
    if sys.platform != "linux":
        # Triton exists for Linux only; there is nothing to interpret.
        assert find_spec("triton") is None
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", PARTS[part]]
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parents[1] / "src"),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    if part != "rest":
        # Tracing the interpreter triples the time, for a few lines of ours that "rest" does not do.
        environment.pop("COVERAGE_PROCESS_CONFIG", None)
    done = subprocess.run(
        [*command, str(HERE / FILES.get(part, "interpreted_near.py"))],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
