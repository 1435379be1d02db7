# %% [markdown]
# # 5. The pairwise operations
#
# `nearest`, `knn`, `kernel_mean` and `softmin` reduce over the N x M matrix of squared distances without ever holding it.
# How exact are they, what do they need, and what do they cost, up to 50,000 points?

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("fad_loss") is None:  # on Colab, say
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "fad-loss"], check=True)

# %%
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import torch

from fad_loss import ops

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## What they return

# %%
x, y = torch.randn(2, 1000, 16), torch.randn(2, 1200, 16)
distance, index = ops.nearest(x, y)
print("nearest      ", tuple(distance.shape), tuple(index.shape), index.dtype)
print("knn          ", tuple(ops.knn(x, y, 5)[0].shape))
print("kernel_mean  ", tuple(ops.kernel_mean(x, y, ops.Gaussian(1.0)).shape))
print("softmin      ", tuple(ops.softmin(x, y, 0.1).shape))

# %% [markdown]
# ## Exactness
# Against the obvious computation in float64. The error of the operation should be no larger than that of plain PyTorch in
# float32.


# %%
def plain(x, y):
    d = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    return {
        "nearest": d.amin(-1),
        "kernel_mean": (-d / 2 / 16).exp().mean(-1),
        "softmin": -10 * (-d / 10).logsumexp(-1),
    }


def fused(x, y):
    return {
        "nearest": ops.nearest(x, y)[0],
        "kernel_mean": ops.kernel_mean(x, y, ops.Gaussian(4.0)),
        "softmin": ops.softmin(x, y, 10.0),
    }


truth = plain(x.double(), y.double())
for name, wanted in truth.items():
    errors = [(found[name] - wanted).abs().max().item() for found in (plain(x, y), fused(x, y))]
    print(f"{name:12} largest error: plain {errors[0]:.1e}, fused {errors[1]:.1e}")

# %% [markdown]
# ## Where plain PyTorch goes wrong
# Distances by `cdist` have no finite gradient at 0; those of points that coincide come up in every set that is compared with
# itself.

# %%
points = torch.randn(1, 50, 3, requires_grad=True)
ops.nearest(points, points)[0].sum().backward()
print("nearest to itself: gradient", points.grad.abs().max().item())
points = points.detach().requires_grad_()
torch.sqrt((points.unsqueeze(2) - points.unsqueeze(1)).square().sum(-1)).sum().backward()
print("square roots of 0: gradient", points.grad.abs().max().item())

# %% [markdown]
# ## Cost, up to 50,000 points
# Time of one call, three channels, forward only, on this machine's CPU with one thread. The matrix of
# 50,000 x 50,000 float32 numbers would take 10 GB.

# %%
sizes = [1000, 2000, 5000, 10_000, 20_000, 50_000]
seconds = {"nearest": [], "kernel_mean": []}
for size in sizes:
    x, y = torch.randn(1, size, 3), torch.randn(1, size, 3)
    for name, measured in seconds.items():
        start = time.perf_counter()
        _ = ops.nearest(x, y) if name == "nearest" else ops.kernel_mean(x, y, ops.Gaussian(1.0))
        measured.append(time.perf_counter() - start)
        print(f"{size:6,} points  {name:12} {measured[-1]:7.3f} s")

# %% [markdown]
# ## Memory
# Peak memory of a fresh process that computes the Chamfer distance of two clouds and its gradient, above that for 100
# points (read from `/proc`, so on Linux).

# %%
program = """
import re, sys, torch
from pathlib import Path
from fad_loss import distances
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
x, y = torch.randn(2, 1, 100, 3)
distances.chamfer(x.requires_grad_(), y).sum().backward()
before = peak()
x, y = torch.randn(2, 1, int(sys.argv[1]), 3)
distances.chamfer(x.requires_grad_(), y).sum().backward()
print(peak() - before)
"""
memory, measured_at = [], [1000, 5000, 20_000, 50_000]
for size in measured_at:
    done = subprocess.run(
        [sys.executable, "-c", program, str(size)], capture_output=True, text=True, check=True
    )
    memory.append(float(done.stdout))
    matrix = 4 * size**2 / 2**20
    print(f"{size:6,} points  {memory[-1]:7.1f} MB   (the matrix: {matrix:8.1f} MB)")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for name, values in seconds.items():
    left.loglog(sizes, values, "o-", label=name)
left.set(xlabel="points", ylabel="seconds")
left.legend()
right.loglog(measured_at, [max(m, 0.1) for m in memory], "o-", label="Chamfer, gradient")
right.loglog(sizes, [4 * size**2 / 2**20 for size in sizes], "--", label="the matrix")
right.set(xlabel="points", ylabel="MB")
_ = right.legend()

# %% [markdown]
# The time grows with the number of pairs; the memory does not. On a GPU the same calls run as fused Triton
# kernels: `python -m fad_loss` says what runs on yours.
