"""A GPU that is not there, for rehearsals: tensors are on the CPU, and kernels are compiled.

    python .ci/pretend.py benchmarks/pairwise.py --device cuda ...
    python .ci/pretend.py -m fad_loss --json

Everything runs as on a GPU up to the launch, which is into nothing (`tests/kernels/stub.py`):
results are 0 and times are 1 ms. So a rehearsal shows that what will run on a GPU does run, and how
long its kernels take to compile, but nothing of what they compute.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = 90
MEMORY = 80 * 10**9


class OnCpu(TorchFunctionMode):
    """What asks for the GPU gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Replace the device among the arguments."""
        if function is torch.device:  # its name, by which code for GPUs is chosen
            return function(*args, **(kwargs or {}))
        kwargs = {name: self.replaced(value) for name, value in (kwargs or {}).items()}
        return function(*[self.replaced(value) for value in args], **kwargs)

    @staticmethod
    def replaced(value: Any) -> Any:
        """The CPU for the GPU, and everything else as it is."""
        if isinstance(value, str) and value.startswith("cuda"):
            return "cpu"
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return value


class _Event:
    def __init__(self, **_: Any) -> None:
        """Nothing is recorded."""

    def record(self) -> None:
        """Nothing is recorded."""

    def elapsed_time(self, _: _Event) -> float:
        """A millisecond."""
        return 1.0


@contextmanager
def pretended_gpu() -> Iterator[Any]:
    """As if there were one; what is compiled and launched is counted."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    from stub import MACHINES, stub_gpu  # noqa: PLC0415

    properties = SimpleNamespace(
        name="no GPU",
        L2_cache_size=1 << 10,
        total_memory=MEMORY,
        major=ARCHITECTURE // 10,
        minor=ARCHITECTURE % 10,
        multi_processor_count=MACHINES[ARCHITECTURE][1],
    )
    answers = {
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats")),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), 0),
        "set_sync_debug_mode": None,
        "mem_get_info": (MEMORY, MEMORY),
        "is_available": True,
        "device_count": 1,
        "get_device_name": properties.name,
        "get_device_properties": properties,
    }
    with ExitStack() as stack:
        counts = stack.enter_context(stub_gpu(ARCHITECTURE, pytest.MonkeyPatch()))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", _Event))
        yield counts


def main() -> None:
    """Run what the arguments name."""
    module = sys.argv[1] == "-m"
    sys.argv = sys.argv[2:] if module else sys.argv[1:]
    with pretended_gpu(), OnCpu():
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
