"""A small run of every kernel, for compute-sanitizer: ``compute-sanitizer python sanitized.py``."""

from __future__ import annotations

from itertools import product

import torch

from fad_loss import ops


def main() -> None:
    """Run each operation, with its derivatives, on awkward sizes."""
    forms = ((3, torch.float32), (100, torch.float32), (64, torch.bfloat16))
    for (C, dtype), (N, M) in product(forms, ((77, 50), (177, 150))):
        x = torch.randn(2, N, C, device="cuda").to(dtype).requires_grad_()
        y = torch.randn(2, M, C, device="cuda").to(dtype).requires_grad_()
        for value in (
            ops.softmin(x, y, [0.3, 1.0], backend="triton"),
            ops.kernel_mean(x, y, ops.Gaussian([0.5, 1.0]), backend="triton"),
            ops.nearest(x, y, backend="triton")[0],
            ops.knn(x, y, 20, backend="triton")[0],
        ):
            gradients = torch.autograd.grad(value.sum(), (x, y), create_graph=True)
            sum(g.float().square().sum() for g in gradients).backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
