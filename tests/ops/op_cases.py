"""What the tests of the operations share: which backends can run, problems, and their solutions.

The solutions are computed here, in the obvious way and without fad_loss, so that they can also be
read as the definition of each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from fad_loss import ops, ragged

# Backends that are operators to PyTorch (tiles, fused kernels), and with them the reference.
FUSED = ["tiled"]
if find_spec("fad_loss.ops._triton") is not None:
    FUSED.append(pytest.param("triton", marks=pytest.mark.gpu))
BACKENDS = ["dense", *FUSED]

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" else "cpu"


def widest(backend: str) -> torch.dtype:
    """The widest dtype that a backend takes."""
    return torch.float32 if backend == "triton" else torch.float64


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which half precision is accumulated and returned."""
    return torch.float32 if dtype in {torch.bfloat16, torch.float16} else dtype


# ---------------------------------------------------------------------------------- definitions


def pairwise(x: Tensor, y: Tensor) -> Tensor:
    """All squared distances (B, N, M), a few rows at a time where the differences are many."""
    rows = max(1, 4_000_000 // max(y.numel(), 1))
    parts = [((part[:, :, None, :] - y[:, None, :, :]) ** 2).sum(3) for part in x.split(rows, 1)]
    return torch.cat(parts, 1)


def true_knn(x: Tensor, y: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """Squared distances and indices, equal distances by ascending index, in float64."""
    d = pairwise(x.detach().double(), y.detach().double()).numpy()
    if exclude_self:
        d[:, range(d.shape[1]), range(d.shape[1])] = np.inf
    index = np.argsort(d, axis=2, kind="stable")[:, :, :k]
    distance = np.take_along_axis(d, index, axis=2)
    return torch.from_numpy(distance), torch.from_numpy(index)


def selected(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The squared distances to given neighbors: what the gradient of a search is a gradient of."""
    batch = torch.arange(len(x))[:, None, None]
    return ((x[:, :, None, :] - y[batch, index]) ** 2).sum(3)


def true_kernel_mean(
    x: Tensor,
    y: Tensor,
    profile: Callable[[Tensor], Tensor],
    weights: Tensor | None = None,
    *,
    exclude_self: bool = False,
) -> Tensor:
    d = pairwise(x, y)
    w = torch.ones_like(d) if weights is None else weights[:, None, :].expand_as(d)
    if exclude_self:
        own = torch.eye(d.shape[1], dtype=d.dtype)
        d, w = d + own, w * (1 - own)
    return (w * profile(d)).sum(2) / w.sum(2)


def true_softmin(
    x: Tensor,
    y: Tensor,
    epsilon: Sequence[float],
    potential: Tensor | None = None,
    log_weights: Tensor | None = None,
    *,
    exclude_self: bool = False,
) -> Tensor:
    d = pairwise(x, y)
    if exclude_self:
        d = d + torch.diag(torch.full((d.shape[1],), torch.inf, dtype=d.dtype))
    results = []
    for eps in epsilon:
        exponent = -d / eps
        if potential is not None:
            exponent = exponent + potential[:, None, :] / eps
        if log_weights is not None:
            exponent = exponent + log_weights[:, None, :]
        results.append(-eps * torch.logsumexp(exponent, dim=2))
    return torch.stack(results, dim=2)


def _gaussians(d: Tensor) -> Tensor:
    return (torch.exp(-d / (2 * 0.8**2)) + torch.exp(-d / (2 * 3.0**2))) / 2


KERNELS = {
    "gaussian": (ops.Gaussian(1.3), lambda d: torch.exp(-d / (2 * 1.3**2))),
    "gaussians": (ops.Gaussian([0.8, 3.0]), _gaussians),
    "laplacian": (ops.Laplacian(1.7), lambda d: torch.exp(-torch.sqrt(d) / 1.7)),
    "energy": (ops.Energy(), lambda d: -torch.sqrt(d)),
    "imq": (ops.InverseMultiquadric(1.1), lambda d: 1 / torch.sqrt(1 + d / 1.1**2)),
}
"""Each kernel, and its profile: a function of the squared distance."""


# --------------------------------------------------------------------------------------- smooth


@dataclass(frozen=True)
class Smooth:
    """A smooth operation of (x, y) or (x, y, values along y ...), and its definition."""

    name: str
    operation: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    along_y: int = 0

    def inputs(
        self, B: int, N: int, M: int, C: int, dtype: torch.dtype, device: str
    ) -> list[Tensor]:
        """Random points, scaled so that squared distances are about 2 for any C, and values."""
        x = torch.randn(B, N, C) / C**0.5
        y = torch.randn(B, M, C) / C**0.5
        values = [torch.rand(B, M) + 0.5 for _ in range(self.along_y)]
        return [t.to(dtype).to(device).requires_grad_() for t in (x, y, *values)]

    def __repr__(self) -> str:
        return self.name


def _kernel_case(name: str, *, weighted: bool) -> Smooth:
    kernel, profile = KERNELS[name]

    def operation(x, y, weights=None, **options):
        return ops.kernel_mean(x, y, kernel, weights, **options)

    def definition(x, y, weights=None, **options):
        return true_kernel_mean(x, y, profile, weights, **options)

    return Smooth(name + ("-weighted" if weighted else ""), operation, definition, int(weighted))


def _softmin_case(name: str, epsilon: float | list[float], along_y: Iterable[str]) -> Smooth:
    names = list(along_y)

    def operation(x, y, *values, **options):
        return ops.softmin(x, y, epsilon, **dict(zip(names, values, strict=True)), **options)

    def definition(x, y, *values, **options):
        several = epsilon if isinstance(epsilon, list) else [epsilon]
        result = true_softmin(x, y, several, **dict(zip(names, values, strict=True)), **options)
        return result if isinstance(epsilon, list) else result.squeeze(2)

    return Smooth(name, operation, definition, len(names))


SMOOTH = [
    *[_kernel_case(name, weighted=False) for name in KERNELS],
    *[_kernel_case(name, weighted=True) for name in ("gaussians", "energy", "imq")],
    _softmin_case("softmin", 0.3, []),
    _softmin_case("softmins", [0.2, 2.0], []),
    _softmin_case("softmin-potential", 0.5, ["potential"]),
    _softmin_case("softmin-weights", 0.5, ["log_weights"]),
    _softmin_case("softmins-both", [0.3, 1.0], ["potential", "log_weights"]),
]

# One of each operator and argument, where all of the above would take too long.
FEW = [case for case in SMOOTH if case.name in {"gaussians", "energy-weighted", "softmins-both"}]


# --------------------------------------------------------------------------------------- ragged

LENGTHS = ([3, 0, 1, 4, 0], [2, 3, 0, 5, 0])
"""Lengths of the clouds of x and y: shorter, longer, empty on either side, empty on both."""


def split(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The clouds of packed values, each a batch of one."""
    return [part.unsqueeze(0) for part in values.split(list(lengths))]


def make_ragged(values: Tensor, lengths: Sequence[int]) -> Tensor:
    return ragged(values, lengths=lengths)


def packed(result: Tensor) -> Tensor:
    """All values of a result, ragged or not, in one row per point."""
    return torch.cat(list(result.unbind())) if result.is_nested else result.flatten(0, 1)


def points(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape).to(dtype).to(device)
