"""A GPU that is not there: kernels are bound, compiled for it, and launched into nothing.

It takes the place of Triton's driver, so that everything up to the launch is as on the machine that
it stands for: arguments are specialized, kernels compiled and assembled, shared memory checked
against what the device has, and grids computed. What was
compiled and launched is counted. Results are 0.
"""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fad_loss.ops import _backends
from fad_loss.ops._triton import configurations

# Bytes of shared memory that a block may have, and multiprocessors: A100, H100, B200, RTX 5090.
MACHINES = {80: (163, 108), 90: (227, 132), 100: (227, 148), 120: (99, 170)}

# Parameters that kernels write to.
RESULTS = {
    *("candidates", "center", "distance", "extra", "gradient", "index", "least", "norms", "out"),
    *("total", "values"),
}


@dataclass
class Counts:
    """The names of what was compiled (loaded for the first time) and launched, in order."""

    compiled: list[str] = field(default_factory=list)
    launched: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)

    def clear(self) -> None:
        self.compiled.clear()
        self.launched.clear()


class _Utils:
    def __init__(self, architecture, counts):
        self.architecture, self.counts = architecture, counts

    def load_binary(self, name, kernel, shared, device):
        """A module, a function, registers, spills, and the threads that a block may have."""
        assert kernel
        self.counts.compiled.append(name)
        # Triton 3.3 does not ask for the last one.
        return (1, 1, 0, 0, 1024)[: 4 if triton.__version__.startswith("3.3.") else 5]

    def unload_module(self, module):
        """Nothing was loaded."""

    def get_device_properties(self, device):
        shared, processors = MACHINES[self.architecture]
        return {
            "max_shared_mem": shared * 1024,
            "multiprocessor_count": processors,
            "max_num_regs": 65536,
            "warpSize": 32,
        }


class StubDriver:
    """What Triton asks of a driver. The device's number is its architecture: nothing is shared."""

    def __init__(self, architecture, counts):
        self.architecture = architecture
        self.utils = _Utils(architecture, counts)

        class Launcher:
            def __init__(self, source, metadata):
                self.name, self.parameters = metadata.name, source.fn.arg_names

            def __call__(self, x, y, z, *arguments):
                assert 0 < x < 2**31
                assert 0 < y < 65536
                assert 0 < z < 65536
                counts.launched.append((self.name, (x, y, z)))
                values = arguments[-len(self.parameters) :]
                for name, value in zip(self.parameters, values, strict=True):
                    if name in RESULTS and value is not None:
                        value.zero_()

        self.launcher_cls = Launcher

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return divmod(self.architecture, 10)


def forget_kernels():
    """Let every kernel be loaded anew, from Triton's cache of files if it is there."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fad_loss.ops._triton."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
    gc.collect()


@contextmanager
def stub_gpu(architecture, monkeypatch):
    """CPU tensors are on a GPU of this architecture, as far as the kernels can tell."""
    counts = Counts()
    cuda = torch.device("cuda", architecture)
    why_not = _backends.why_not

    def as_on_gpu(backend, device, dtype=None):
        return why_not(backend, cuda if device.type == "cpu" else device, dtype)

    _backends._look_for.cache_clear()
    forget_kernels()
    # A plain attribute up to Triton 3.3; behind a property, which would look for a GPU, since.
    active = "_active" if hasattr(driver, "_active") else "active"
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", None)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(architecture, 10))
        patch.setattr(_backends, "why_not", as_on_gpu)
        patch.setattr(configurations, "capability", lambda _: architecture // 10)
        patch.setattr(configurations, "processors", lambda _: MACHINES[architecture][1])
        patch.setattr(driver, active, StubDriver(architecture, counts))
        try:
            yield counts
        finally:
            # Kernels are unloaded by the driver that loaded them.
            forget_kernels()
            _backends._look_for.cache_clear()
