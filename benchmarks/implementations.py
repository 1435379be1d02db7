"""What is compared: the operations of fad_loss on each backend, and the same by its peers.

Every implementation of an operation takes x (B, N, C) and y (B, M, C) and returns the same numbers,
which `tests/test_benchmarks.py` verifies for those that are installed. A peer that is not installed
or does not offer the operation is left out, and one that cannot do the case, with the reason.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The process that measures memory imports this module without the script.
sys.path.insert(0, os.getenv("FAD_LOSS_SOURCE", str(Path(__file__).resolve().parents[1] / "src")))

from fad_loss import ops
from fad_loss.ops import _backends

Function = Callable[[Tensor, Tensor], Tensor]

K = 20
GEMM = "torch.bmm"


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype."""

    op: str
    B: int
    N: int
    M: int
    C: int
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.B, self.N, self.M, self.C

    @property
    def pairs(self) -> int:
        return self.B * self.N * self.M

    @property
    def matrix_bytes(self) -> int:
        """What one matrix of all pairs takes, accumulated in float32 at least."""
        return self.pairs * (8 if self.dtype == "float64" else 4)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features as distillation meets them: scattered, with an offset that both share."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.B, self.N, self.C, generator=generator) + 1
        y = torch.randn(self.B, self.M, self.C, generator=generator) + 1
        dtype = getattr(torch, self.dtype)
        return x.to(device, dtype), y.to(device, dtype)

    @property
    def scale(self) -> float:
        """The mean squared distance between two points."""
        return 2.0 * self.C


# Bandwidths and temperatures follow the scale of the distances, so that nothing underflows.
def _kernel(op: str, scale: float) -> ops.Kernel:
    kernels: dict[str, ops.Kernel] = {
        "gaussian": ops.Gaussian(scale**0.5),
        "gaussian5": ops.Gaussian([scale**0.5 * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]),
        "laplacian": ops.Laplacian(scale**0.5),
        "energy": ops.Energy(),
        "inverse_multiquadric": ops.InverseMultiquadric(scale**0.5),
    }
    return kernels[op]


KERNELS = ("gaussian", "gaussian5", "laplacian", "energy", "inverse_multiquadric")
OPERATIONS = ("nearest", "knn", *KERNELS, "softmin", "softmin3")
_SEVERAL = (0.5, 1.0, 2.0)


def ours(case: Case, backend: str) -> Function:
    """The operation by fad_loss."""
    scale = case.scale
    if case.op == "nearest":
        return lambda x, y: ops.nearest(x, y, backend=backend)[0]
    if case.op == "knn":
        return lambda x, y: ops.knn(x, y, min(K, case.M), backend=backend)[0]
    if case.op == "softmin":
        return lambda x, y: ops.softmin(x, y, scale, backend=backend)
    if case.op == "softmin3":
        several = [scale * factor for factor in _SEVERAL]
        return lambda x, y: ops.softmin(x, y, several, backend=backend)
    kernel = _kernel(case.op, scale)
    return lambda x, y: ops.kernel_mean(x, y, kernel, backend=backend)


# ------------------------------------------------------------------------------- plain PyTorch


def _cdist(case: Case) -> Function | str:  # noqa: PLR0911 - one return for each operation
    """torch.cdist and a reduction: what users write today."""
    if case.dtype not in {"float32", "float64"}:
        return "torch.cdist has no half precision"
    scale, op = case.scale, case.op
    if op == "nearest":
        return lambda x, y: torch.cdist(x, y).min(-1).values.square()
    if op == "knn":
        return lambda x, y: torch.cdist(x, y).topk(min(K, case.M), largest=False).values.square()
    if op == "softmin":
        return lambda x, y: -scale * (torch.cdist(x, y).square() / -scale).logsumexp(-1)
    if op == "softmin3":

        def several(x: Tensor, y: Tensor) -> Tensor:
            d = torch.cdist(x, y).square()
            epsilons = [scale * factor for factor in _SEVERAL]
            return torch.stack([-e * (d / -e).logsumexp(-1) for e in epsilons], -1)

        return several
    if op == "energy":
        return lambda x, y: -torch.cdist(x, y).mean(-1)
    kernel = _kernel(op, scale)
    return lambda x, y: kernel(torch.cdist(x, y).square()).mean(-1)


def _expanded(case: Case) -> Function:
    """|x|^2 + |y|^2 - 2 xy in eager PyTorch: any dtype, and what a compiler can fuse."""
    scale, op = case.scale, case.op

    def distances(x: Tensor, y: Tensor) -> Tensor:
        wide = torch.float32 if x.dtype in {torch.float16, torch.bfloat16} else x.dtype
        product = torch.bmm(x, y.mT).to(wide)
        norms = [t.to(wide).square().sum(-1) for t in (x, y)]
        return (norms[0].unsqueeze(-1) + norms[1].unsqueeze(-2) - 2 * product).clamp_min(0)

    if op == "nearest":
        return lambda x, y: distances(x, y).min(-1).values
    if op == "knn":
        return lambda x, y: distances(x, y).topk(min(K, case.M), largest=False).values
    if op == "softmin":
        return lambda x, y: -scale * (distances(x, y) / -scale).logsumexp(-1)
    if op == "softmin3":

        def several(x: Tensor, y: Tensor) -> Tensor:
            d = distances(x, y)
            epsilons = [scale * factor for factor in _SEVERAL]
            return torch.stack([-e * (d / -e).logsumexp(-1) for e in epsilons], -1)

        return several
    kernel = _kernel(op, scale)
    return lambda x, y: kernel(distances(x, y)).mean(-1)


# --------------------------------------------------------------------------------------- peers


@cache
def _missing(module: str) -> str | None:
    return None if find_spec(module) is not None else _NOT_INSTALLED


_NOT_INSTALLED = "not installed"
_NOT_OFFERED = "not offered"


def _keops(case: Case) -> Function | str:  # noqa: PLR0911 - one return for each operation
    if case.dtype not in {"float32", "float64"}:
        return "on this device KeOps has no half precision"
    # It compiles for every formula and every C, for up to a minute, and without matrix units it
    # takes 13 times the matrix product at C = 64, and 79 times at C = 256.
    if not torch.cuda.is_available() and (case.C not in {3, 64} or case.pairs > 1e8):
        return "on a CPU measured at C = 3 and 64 only"
    import pykeops  # noqa: PLC0415
    from pykeops.torch import LazyTensor  # noqa: PLC0415

    pykeops.set_verbose(False)
    scale, op = case.scale, case.op

    def distances(x: Tensor, y: Tensor) -> Any:
        return ((LazyTensor(x.unsqueeze(-2)) - LazyTensor(y.unsqueeze(-3))) ** 2).sum(-1)

    def squeeze(t: Tensor) -> Tensor:
        return t.squeeze(-1)

    if op in {"nearest", "knn"}:
        count = 1 if op == "nearest" else min(K, case.M)

        def search(x: Tensor, y: Tensor) -> Tensor:
            # It differentiates values only by recomputing them from the indices.
            index = distances(x, y).argKmin(count, dim=2)
            batch = torch.arange(len(x), device=x.device)[:, None, None]
            d = (x.unsqueeze(2) - y[batch, index]).square().sum(-1)
            return squeeze(d) if op == "nearest" else d

        return search
    if op == "softmin":
        return lambda x, y: -scale * squeeze((distances(x, y) / -scale).logsumexp(dim=2))
    if op == "gaussian":
        return lambda x, y: squeeze((distances(x, y) / (-2 * scale)).exp().sum(dim=2)) / case.M
    if op == "laplacian":
        rate = -1 / scale**0.5
        return lambda x, y: squeeze((distances(x, y).sqrt() * rate).exp().sum(dim=2)) / case.M
    if op == "energy":
        return lambda x, y: -squeeze(distances(x, y).sqrt().sum(dim=2)) / case.M
    if op == "inverse_multiquadric":
        return lambda x, y: squeeze((distances(x, y) / scale + 1).rsqrt().sum(dim=2)) / case.M
    return _NOT_OFFERED


def _geomloss(case: Case) -> Function | str:
    if case.op != "softmin":
        return _NOT_OFFERED
    if case.dtype not in {"float32", "float64"}:
        return "no half precision"
    try:
        from geomloss._legacy.sinkhorn_samples import (  # noqa: PLC0415
            cost_routines,
            softmin_tensorized,
        )
    except ImportError:
        from geomloss.sinkhorn_samples import cost_routines, softmin_tensorized  # noqa: PLC0415

    def softmin(x: Tensor, y: Tensor) -> Tensor:
        # Its cost is half the squared distance.
        zero = torch.zeros(y.shape[:2], dtype=y.dtype, device=y.device)
        result: Tensor = 2 * softmin_tensorized(case.scale / 2, cost_routines[2](x, y), zero)
        return result

    return softmin


def _knn_points(module: str) -> Callable[[Case], Function | str]:
    """PyTorch3D's function, from there or from the package that carries a copy of it."""

    def make(case: Case) -> Function | str:
        if case.op not in {"nearest", "knn"}:
            return _NOT_OFFERED
        if case.dtype != "float32":
            return "float32 only"
        knn_points = importlib.import_module(module).knn_points
        if case.op == "nearest":
            return lambda x, y: knn_points(x, y, K=1).dists.squeeze(-1)
        return lambda x, y: knn_points(x, y, K=min(K, case.M)).dists

    return make


def _flash_kmeans(case: Case) -> Function | str:
    if case.op != "nearest":
        return _NOT_OFFERED
    if not torch.cuda.is_available():
        return "CUDA only"
    if case.dtype == "float64":
        return "no float64"
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton  # noqa: PLC0415

    def assign(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            index = euclid_assign_triton(x, y, x.float().square().sum(-1)).long()
        chosen = y.gather(1, index.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
        return (x.float() - chosen.float()).square().sum(-1)

    return assign


def _flash_sinkhorn(case: Case) -> Function | str:
    if case.op not in {"nearest", "softmin"}:
        return _NOT_OFFERED
    if not torch.cuda.is_available():
        return "CUDA only"
    if case.dtype == "float64":
        return "no float64"
    tf32 = torch.get_float32_matmul_precision() != "highest"
    if case.op == "nearest":
        from flash_sinkhorn.c_transform import c_transform_fwd  # noqa: PLC0415

        def nearest(x: Tensor, y: Tensor) -> Tensor:
            none = torch.zeros(y.shape[1], device=y.device)
            pairs = zip(x, y, strict=True)
            found = [c_transform_fwd(a, b, none, allow_tf32=tf32)[0] for a, b in pairs]
            return torch.stack(found)

        return nearest
    from flash_sinkhorn.kernels.sinkhorn_flashstyle_sqeuclid import (  # noqa: PLC0415
        flashsinkhorn_lse,
    )

    def softmin(x: Tensor, y: Tensor) -> Tensor:
        # Shifted potentials: the norms of y go into the bias, those of x are added afterwards.
        bias = y.float().square().sum(-1) / -case.scale
        parts = zip(x, y, bias, strict=True)
        found = [flashsinkhorn_lse(a, b, h, case.scale, allow_tf32=tf32) for a, b, h in parts]
        return torch.stack(found) + x.float().square().sum(-1)

    return softmin


@dataclass(frozen=True)
class Peer:
    """Another way to compute an operation."""

    name: str
    module: str
    build: Callable[[Case], Function | str]
    # Whether it allocates the matrix of all pairs; it then runs only where that fits.
    dense: bool = False
    # Whether its result has a gradient.
    differentiable: bool = True


def _compiled(case: Case) -> Function:
    torch._dynamo.reset()
    # The backward is timed on its own, several times on one graph, whose tensors must live on.
    torch._functorch.config.donated_buffer = False
    return torch.compile(_expanded(case))


PEERS = (
    Peer("torch.cdist + reduce", "torch", _cdist, dense=True),
    Peer("torch eager", "torch", _expanded, dense=True),
    Peer("torch.compile", "torch", _compiled, dense=True),
    Peer("KeOps", "pykeops", _keops),
    Peer("geomloss", "geomloss", _geomloss, dense=True),
    Peer("flash-sinkhorn", "flash_sinkhorn", _flash_sinkhorn, differentiable=False),
    Peer("pytorch3d", "pytorch3d", _knn_points("pytorch3d.ops")),
    Peer("chamferdist", "chamferdist", _knn_points("chamferdist.chamfer")),
    Peer("flash-kmeans", "flash_kmeans", _flash_kmeans, differentiable=False),
)
PEER_GROUPS = {
    "none": (),
    "torch": ("torch.cdist + reduce",),
    "all": tuple(peer.name for peer in PEERS),
}


@dataclass(frozen=True)
class Implementation:
    """A function to measure, or the reason why there is none."""

    name: str
    function: Function | None
    reason: str | None = None
    differentiable: bool = True


def implementations(
    case: Case, device: torch.device, backends: tuple[str, ...], peers: tuple[str, ...], free: int
) -> Iterator[Implementation]:
    """Everything that computes a case on a device, given so many bytes of free memory."""
    for backend in backends:
        name = f"fad_loss {backend}"
        reason = _backends.why_not(backend, device)
        if backend == "dense" and case.matrix_bytes * (case.C + 4) > free:
            reason = "its matrix of all differences does not fit into memory"
        yield Implementation(name, None if reason else ours(case, backend), reason)
    for peer in PEERS:
        if peer.name not in peers:
            continue
        reason = _missing(peer.module)
        if reason is None and peer.dense and 4 * case.matrix_bytes > free:
            reason = "its matrix of all pairs does not fit into memory"
        if reason is None and peer.name == "torch.compile" and device.type == "cpu":
            reason = "measured on CUDA only"
        built: Function | str = reason or ""
        if reason is None:
            try:
                built = peer.build(case)
            except Exception as problem:  # noqa: BLE001 - a broken peer is left out, not fatal
                built = f"{type(problem).__name__}: {problem}".splitlines()[0]
        if built in {_NOT_INSTALLED, _NOT_OFFERED}:
            continue
        if isinstance(built, str):
            yield Implementation(peer.name, None, built, peer.differentiable)
        else:
            yield Implementation(peer.name, built, None, peer.differentiable)


def gemm(x: Tensor, y: Tensor, free: int) -> Callable[[], object]:
    """The matrix product of the same shape, the floor of all of them.

    Where the product does not fit into memory it goes through one buffer, some rows at a time.
    """
    B, N, M = x.shape[0], x.shape[1], y.shape[1]
    if 2 * B * N * M * x.element_size() <= free // 2:
        return partial(torch.bmm, x, y.mT)
    rows = max(1, min(N, (256 << 20) // (B * M * x.element_size())))
    buffer = x.new_empty(B, rows, M)

    def by_rows() -> None:
        for start in range(0, N, rows):
            part = x[:, start : start + rows]
            torch.bmm(part, y.mT, out=buffer[:, : part.shape[1]])

    return by_rows


# ---------------------------------------------------------------------------------- the passes


def passes(function: Function, x: Tensor, y: Tensor, direction: str) -> Callable[[], object]:
    """The forward pass of a function, or its backward to both inputs, as something to time."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x, y)

        return forward
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    result = function(x, y)
    incoming = torch.rand_like(result)
    return partial(torch.autograd.grad, result, (x, y), incoming, retain_graph=True)


def step(function: Function, x: Tensor, y: Tensor, direction: str) -> Callable[[], object]:
    """The forward pass, or forward and backward with everything kept in between, for its memory."""
    if direction == "forward":
        return passes(function, x, y, direction)
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()

    def forward_and_backward() -> object:
        result = function(x, y)
        return result, *torch.autograd.grad(result, (x, y), torch.rand_like(result))

    return forward_and_backward


def memory_step(case: Case, name: str, direction: str, free: int) -> Callable[[], object]:
    """What the memory worker runs, after the same call on a few points, which loads the code."""
    device = torch.device("cpu")
    backends = tuple(backend for backend in _backends.BACKENDS if backend in name.split())
    found = list(implementations(case, device, backends, (name,), free))
    function = found[0].function
    if function is None:
        raise ValueError(found[0].reason)
    x, y = case.inputs(device)
    step(function, x[:1, :64], y[:1, : max(64, K)], direction)()
    return step(function, x, y, direction)
