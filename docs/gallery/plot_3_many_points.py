"""
Fifty thousand points
=====================

The matrix of distances between two clouds of 50,000 points has 2.5 billion entries, 10 GB in
float32. No operation of this library holds it. Here the nearest neighbours between two such
clouds, and the gradient of the Chamfer distance, are computed on a CPU, and the process says how
much memory it took.
"""

import resource
import time

import torch

from fad_loss import distances, ops


def peak():
    """The largest resident size of this process so far, in MB (Linux counts in KB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


torch.manual_seed(0)
x = torch.randn(1, 50_000, 3, requires_grad=True)
y = torch.randn(1, 50_000, 3)
before = peak()

# %%
# The nearest point of y for each of x, with its squared distance:

began = time.perf_counter()
distance, index = ops.nearest(x, y)
print(f"{time.perf_counter() - began:.1f} s, at most {peak() - before:.0f} MB more than before")
print(f"root of the mean squared distance: {float(distance.detach().mean().sqrt()):.4f}")

# %%
# A loss that is made of both directions, and its gradient:

began = time.perf_counter()
loss = distances.chamfer(x, y)
loss.backward()
print(f"{time.perf_counter() - began:.1f} s, at most {peak() - before:.0f} MB more than before")
print(f"Chamfer distance {float(loss.detach()):.5f}, gradient {tuple(x.grad.shape)}")
