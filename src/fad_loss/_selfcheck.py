"""What runs on this machine, and whether it is right: what ``python -m fad_loss`` prints.

`environment` finds versions, devices, and the backend of each operation on each device with the
reason against the others. `self_check` runs every operation in every dtype on every backend that
can, values and gradients, against the float64 reference, and gives each error beside its bound.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import fad_loss
from fad_loss import ops
from fad_loss._checks import FLOATS
from fad_loss._ragged import is_ragged
from fad_loss.ops import _backends
from fad_loss.ops._precision import float32_matmul_precision

# Errors are relative to the largest reference value, except for distances, which are relative each
# on its own. Values are accumulated in float32 at least, whatever the inputs; gradients are rounded
# to the inputs' dtype, and sum terms that cancel.
_VALUE_BOUND = {torch.float64: 1e-12, torch.float32: 2e-5}
_DISTANCE_BOUND = {torch.float64: 1e-14, torch.float32: 1e-6}
_GRADIENT_BOUND = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
# Of smooth operations, where the user allows float32 products less than float32's own precision, or
# where a GPU multiplies half-precision inputs in half precision.
_COARSE_BOUND = {"highest": 0.0, "high": 2e-3, "medium": 1e-2}
# Of smooth operations in float32 as three tf32 products: 2^-21 of the norms, float32 has 2^-24.
_SPLIT_BOUND = 1e-4


@dataclass(frozen=True)
class Outcome:
    """One operation in one dtype on one backend and device: its errors beside their bounds."""

    operation: str
    device: str
    backend: str
    dtype: str
    error: float
    bound: float
    gradient_error: float
    gradient_bound: float
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran and both errors are within their bounds (which NaN is not)."""
        within = self.error <= self.bound and self.gradient_error <= self.gradient_bound
        return self.failure is None and within


@dataclass(frozen=True)
class _Case:
    """A problem on the CPU, in float64, whose values the checked dtype represents exactly."""

    x: Tensor
    y: Tensor
    weights: Tensor
    exclude_self: bool

    def to(self, device: torch.device, dtype: torch.dtype) -> _Case:
        x, y, weights = (
            t.to(device, dtype).detach().requires_grad_() for t in (self.x, self.y, self.weights)
        )
        return _Case(x, y, weights, self.exclude_self)


def _cases(dtype: torch.dtype) -> Iterator[_Case]:
    """Few and many channels, tiles that do not come out even, ragged clouds, one of them empty."""
    generator = torch.Generator().manual_seed(0)

    def points(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).double()

    for channels in (3, 40):
        x, y = points(2, 33, channels), points(2, 70, channels)
        # An offset that both share, as features have, and nearly matching points.
        y[:, :33] = x + 0.05 * y[:, :33]
        yield _Case(rounded(x + 2), rounded(y + 2), rounded(0.5 + points(2, 70).sigmoid()), False)
    offsets = torch.tensor([0, 25, 25, 60])
    x = rounded(points(60, 24))
    clouds, weights = (
        torch.nested.nested_tensor_from_jagged(t, offsets)
        for t in (x, rounded(0.5 + points(60).sigmoid()))
    )
    yield _Case(clouds, clouds, weights, exclude_self=True)


_Run = Callable[[_Case, str], Tensor]


def _operations() -> dict[str, _Run]:
    """The differentiable result of every operation that is checked, given a case and a backend."""

    def mean(kernel: ops.Kernel) -> _Run:
        def run(case: _Case, backend: str) -> Tensor:
            return ops.kernel_mean(
                case.x,
                case.y,
                kernel,
                case.weights,
                exclude_self=case.exclude_self,
                backend=backend,
            )

        return run

    def softmin(epsilon: float | tuple[float, ...]) -> _Run:
        def run(case: _Case, backend: str) -> Tensor:
            return ops.softmin(
                case.x,
                case.y,
                epsilon,
                potential=case.weights,
                log_weights=case.weights,
                exclude_self=case.exclude_self,
                backend=backend,
            )

        return run

    def knn(case: _Case, backend: str) -> Tensor:
        return ops.knn(case.x, case.y, 7, exclude_self=case.exclude_self, backend=backend)[0]

    return {
        "nearest": lambda case, backend: ops.nearest(case.x, case.y, backend=backend)[0],
        "knn, k = 7": knn,
        "kernel_mean, Gaussian": mean(ops.Gaussian([1.0, 2.0, 4.0])),
        "kernel_mean, Laplacian": mean(ops.Laplacian(2.0)),
        "kernel_mean, Energy": mean(ops.Energy()),
        "kernel_mean, InverseMultiquadric": mean(ops.InverseMultiquadric(2.0)),
        "softmin": softmin(2.0),
        "softmin, two epsilons": softmin((2.0, 8.0)),
    }


def _flat(t: Tensor | None, like: Tensor) -> Tensor:
    """The plain values of a tensor, in float64 on the CPU; zeros for a gradient that is None."""
    if t is None:
        t = torch.zeros_like(like)
    values: Tensor = t.detach()
    if is_ragged(values):
        values = values.values()
    return values.cpu().double()


def _evaluate(run: _Run, case: _Case, backend: str) -> tuple[Tensor, list[Tensor]]:
    """Values, and gradients by x, y and the weights, for a fixed incoming gradient."""
    result = run(case, backend)
    inputs = [case.x, case.y, case.weights]
    generator = torch.Generator().manual_seed(1)
    values = result.values() if is_ragged(result) else result
    incoming = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
    finite = values.isfinite()
    # An infinite distance (no neighbor) has no gradient, and must not turn the others into NaN.
    total = torch.where(finite, values, 0.0).mul(incoming).sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    pairs = zip(gradients, inputs, strict=True)
    return _flat(result, result), [_flat(g, t) for g, t in pairs]


def _relative(value: Tensor, reference: Tensor, *, each: bool) -> float:
    """The largest error relative to the largest, or to each, reference value; NaN stays NaN."""
    if value.shape != reference.shape or reference.numel() == 0:
        return 0.0 if value.shape == reference.shape else float("inf")
    same = value == reference
    scale = reference.abs() if each else reference.abs().amax()
    floor = torch.finfo(torch.float64).tiny
    # Values that are infinite in both are equal, not NaN apart.
    error = torch.where(same, 0.0, (value - reference).abs() / scale.clamp_min(floor))
    return float(error.amax())


def _check(
    operation: str, run: _Run, device: torch.device, dtype: torch.dtype, backend: str
) -> Outcome:
    distance = operation.startswith(("nearest", "knn"))
    bounds = _DISTANCE_BOUND if distance else _VALUE_BOUND
    bound = bounds.get(dtype, bounds[torch.float32])
    gradient_bound = _GRADIENT_BOUND[dtype]
    if not distance and dtype != torch.float64:
        half = backend == "triton" and dtype != torch.float32
        coarse = _COARSE_BOUND["high" if half else float32_matmul_precision()]
        if backend == "triton":
            coarse = max(coarse, _SPLIT_BOUND)
        bound = max(bound, coarse)
        gradient_bound = max(gradient_bound, 5 * coarse)
    error = gradient_error = 0.0
    failure = None
    try:
        for case in _cases(dtype):
            reference, reference_gradients = _evaluate(
                run, case.to(torch.device("cpu"), torch.float64), "dense"
            )
            value, gradients = _evaluate(run, case.to(device, dtype), backend)
            errors = [_relative(value, reference, each=distance)]
            errors += [
                _relative(a, b, each=False)
                for a, b in zip(gradients, reference_gradients, strict=True)
            ]
            # max() would lose a NaN; the sum keeps it.
            nan = sum(e for e in errors if math.isnan(e))
            error = max(error, errors[0]) + nan
            gradient_error = max(gradient_error, *errors[1:]) + nan
    except Exception as reason:  # noqa: BLE001 - whatever breaks an operation is the finding
        failure = f"{type(reason).__name__}: {reason}".splitlines()[0]
        error = gradient_error = float("nan")
    name = str(dtype).removeprefix("torch.")
    return Outcome(
        operation, str(device), backend, name, error, bound, gradient_error, gradient_bound, failure
    )


def devices() -> list[torch.device]:
    """The CPU, and every CUDA device."""
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *cuda]


def self_check(device: torch.device) -> Iterator[Outcome]:
    """Check every operation, dtype and backend that can run on a device against float64."""
    for operation, run in _operations().items():
        for backend in _backends.BACKENDS[1:]:
            for dtype in FLOATS:
                if _backends.why_not(backend, device, dtype) is None:
                    yield _check(operation, run, device, dtype, backend)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    processor = platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor}, {capability}, {torch.get_num_threads()} threads"


def environment() -> dict[str, Any]:
    """Versions, devices, and the backend of every operation on every device."""
    backends = {}
    for device in devices():
        reasons = {name: _backends.why_not(name, device) for name in _backends.BACKENDS[1:]}
        chosen = _backends.select("auto", device)
        for name, reason in reasons.items():
            if reason is None and name != chosen:
                reasons[name] = f'only when asked for, with backend="{name}"'
        against = {name: reason for name, reason in reasons.items() if name != chosen}
        operations = ("nearest", "knn", "kernel_mean", "softmin")
        backends[str(device)] = {name: {"uses": chosen, "not": against} for name in operations}
    return {
        "versions": {
            "fad_loss": getattr(fad_loss, "__version__", "unknown"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "platform": platform.platform(),
        },
        "devices": {str(device): _describe(device) for device in devices()},
        "backends": backends,
    }
