"""Compile for sm_90, without a GPU, what the report leaves out; the exit status counts errors.

The report compiles each kernel as softmin uses it. Here are the other kernels of the distance, the
preparation, the search's last step, and float16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernels_report
from fad_loss.ops import Energy, Gaussian, InverseMultiquadric, Laplacian, _triton


def launches(function, *arguments):
    """What a function of the backend would launch, on meta tensors."""
    return kernels_report.recorded(lambda: function(*arguments), "highest")


def tiled(function, *arguments):
    """The last of them that goes over tiles of rows and columns, but for what is computed anew."""
    found = [launch for launch in launches(function, *arguments) if "BLOCK_COLUMNS" in launch[1]]
    return [launch for launch in found if not launch[1].get("EXACT")][-1]


def cases():
    """Kernels with their arguments."""
    x = torch.empty(1000, 64, device="meta")
    w = torch.empty(1000, device="meta")
    b = torch.empty(1000, 2, device="meta")
    offsets = torch.empty(9, dtype=torch.int64, device="meta")
    clouds = True, offsets, offsets
    yield from launches(_triton.knn, x, x, 20, *clouds)
    half = x.half()
    epsilon = [0.1, 0.2]
    gradients = b, half, half, b, b, epsilon, *clouds, True, True
    yield tiled(_triton.softmin_backward, *gradients)
    few, some = x[:512].view(4, 128, 64), w[:512].view(4, 128)
    for kernel in (Laplacian(1.0), Energy(), InverseMultiquadric(1.0), Gaussian([1.0, 2.0, 4.0])):
        arguments = x, x, w, kernel, *clouds
        yield tiled(_triton.kernel_sum, *arguments)
        yield tiled(_triton.kernel_sum_backward, w, *arguments, True, True)
        yield tiled(_triton.kernel_sum_double_backward, x, x, w, w, *arguments)
        arguments = few, few, some, kernel, True, None, None
        yield tiled(_triton.kernel_sum, *arguments)
        yield tiled(_triton.kernel_sum_backward, some, *arguments, True, True)


def main():
    wrong, single = 0, {}
    for function, arguments in cases():
        found = kernels_report.describe(function, arguments, 90)
        bad = found["stack"] or found["local"] or found["narrow_offsets"]
        # Ladders of bandwidths share an exponential: no more of them than one bandwidth has.
        exponentials = found["instructions"]["ex2"]
        if arguments.get("FAMILY") == "laplacian":
            single[function] = exponentials
        several = arguments.get("LADDER") and exponentials > single[function]
        wrong += bool(bad or several)
        sys.stdout.write(f"{function.fn.__name__} {arguments.get('FAMILY')} {found}\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
