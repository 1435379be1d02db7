"""What an operation will take, before it runs: a few constants of a machine, and arithmetic.

Times are the sum of what the parts take that do not overlap: calls, products, and what is done for
each pair. On a GPU the fused kernels overlap products with the rest, so there it is the longer of
the two. Constants are measured by ``python -m fad_loss --measure``, which keeps them in a file;
until then they are estimates from data sheets, and a prediction says so.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fad_loss._errors import expected
from fad_loss.ops._backends import select
from fad_loss.ops._inputs import Pair, check_pair
from fad_loss.ops._precision import float32_matmul_precision

OPERATIONS: Final = ("nearest", "knn", "kernel_mean", "softmin")
SEARCHES: Final = ("nearest", "knn")


@dataclass(frozen=True)
class Cost:
    """What an operation is expected to take; `cost` predicts it.

    Attributes:
        seconds: of the operation alone, once its kernels are compiled.
        bytes: of memory at the peak, beyond inputs and results.
        backend: the backend that would run.
        measured: whether the constants were measured on this machine; else they are estimates.

    Example:
        >>> x = torch.zeros(2, 1000, 64)
        >>> isinstance(cost("nearest", x, x), Cost)
        True
    """

    seconds: float
    bytes: int
    backend: str
    measured: bool


@dataclass(frozen=True)
class Machine:
    """What a device does in a second, but for `call`."""

    float64: float  # operations of products, by how they are multiplied
    float32: float
    tf32: float
    half: float
    pairs: float  # distances made of products, and reduced
    differences: float  # channels of pairs whose differences are squared and summed
    exponentials: float
    call: float  # seconds from a call to its result, where there is next to nothing to do
    measured: bool = False


# By compute capability, and one core of a CPU. From data sheets and the length of compiled loops.
ESTIMATES: Final = {
    "cpu": Machine(2e10, 4e10, 4e10, 4e10, 4e8, 1.5e9, 4e8, 2e-3),
    "8": Machine(1e13, 1.9e13, 1e14, 2e14, 7e11, 1.2e11, 2.4e12, 1e-4),
    "9": Machine(3e13, 6e13, 3e14, 6e14, 1.4e12, 2e11, 3.7e12, 1e-4),
    "10": Machine(2e13, 7e13, 7e14, 1.4e15, 1.6e12, 5e11, 4.5e12, 1e-4),
    "12": Machine(1e12, 4e13, 7e13, 1.5e14, 2e12, 1.1e11, 6e12, 1e-4),
}
# Products of bfloat16 that the kernels take for one of float32.
SPLIT: Final = 6


def cost(
    operation: str,
    x: Tensor,
    y: Tensor,
    *,
    k: int = 1,
    temperatures: int = 1,
    backward: bool = False,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> Cost:
    r"""Predict the time and the memory of an operation, without running it.

    For P pairs of points in the same cloud, C channels and E exponentials a pair, with a machine's
    r operations of products, p reduced pairs and e exponentials in a second, and c seconds a call:

    .. math::
        T = c + \frac{2 P C}{r} + \frac{P}{p} + \frac{P E}{e}

    The Triton kernels overlap products with the rest, so there it is the longer of the two. With
    `backward`, both gradients compute the pairs again, and multiply their weights with the points.
    The backend "dense" sums the differences of all pairs, channel by channel, instead.

    Args:
        operation: "nearest", "knn", "kernel_mean" or "softmin".
        x: clouds `(B, N, C)`. Only shape and dtype count: tensors on the device "meta" take no
            memory.
        y: clouds `(B, M, C)`.
        k: neighbors of `knn`.
        temperatures: of `softmin`; or bandwidths of `kernel_mean` that share no exponential.
        backward: with the gradients of x and y.
        backend: "auto", "triton", "tiled" or "dense".
        device: what it would run on; where x is, by default.

    Returns:
        Seconds, bytes beyond inputs and results, the backend that would run, and whether the
        constants behind the seconds were measured (``python -m fad_loss --measure``) or are
        estimates. Estimates can be wrong by a factor of several; measured constants by about two.

    Raises:
        ValueError: an unknown operation or backend, or shapes that do not fit.
        TypeError: not floating-point, or two different dtypes.
        RuntimeError: the backend cannot run there.

    Example:
        >>> x = torch.empty(1, 100_000, 64, device="meta")
        >>> found = cost("softmin", x, x, device="cpu", backend="tiled")
        >>> found.backend, found.bytes < 200e6, found.seconds > 1
        ('tiled', True, True)
    """
    if operation not in OPERATIONS:
        names = ", ".join(map(repr, OPERATIONS))
        raise expected("operation", f"one of {names}", repr(operation), "name one of them")
    pair = check_pair(x, y)
    where = torch.device(device) if device is not None else x.device
    if where.type == "cuda" and not torch.cuda.is_available():
        message = f"device: PyTorch finds no CUDA device here, and {where} was asked for"
        raise RuntimeError(message)
    chosen = select(backend, where, x.dtype)
    shape = _Shape.of(pair, 1 if operation == "nearest" else k, temperatures, backward=backward)
    machine = machine_of(where)
    searches = operation in SEARCHES
    return Cost(
        shape.seconds(chosen, machine, where, searches=searches),
        shape.bytes(chosen, where, searches=searches),
        chosen,
        machine.measured,
    )


@dataclass(frozen=True)
class _Shape:
    """A problem as numbers."""

    clouds: int
    rows: int  # of all clouds
    columns: int
    channels: int
    size: int  # bytes of a number
    dtype: torch.dtype
    k: int
    temperatures: int
    backward: bool

    @classmethod
    def of(cls, pair: Pair, k: int, temperatures: int, *, backward: bool) -> _Shape:
        """From clouds; ragged ones count as if all were of the mean length."""
        if pair.x_offsets is None:
            clouds, n, channels = pair.x.shape
            rows, columns = clouds * n, clouds * pair.y.shape[1]
        else:
            clouds, (rows, channels), columns = (
                len(pair.x_offsets) - 1,
                pair.x.shape,
                pair.y.shape[0],
            )
        size = pair.x.element_size()
        values = k, temperatures
        return cls(clouds, rows, columns, channels, size, pair.x.dtype, *values, backward)

    @property
    def pairs(self) -> float:
        """Of points of x and y in the same cloud."""
        return self.rows * self.columns / max(self.clouds, 1)

    def seconds(
        self, backend: str, machine: Machine, device: torch.device, *, searches: bool
    ) -> float:
        """Of all passes."""
        passes = 1 if searches or not self.backward else 3  # the gradients recompute distances
        calls = machine.call * (3 if self.backward else 1)
        if backend == "dense":
            # Once forward; backward reads the differences again, for x and for y.
            times = 3 if self.backward else 1
            return calls / 4 + times * self.pairs * self.channels / machine.differences
        rate = self._rate(machine, backend, device)
        # Both gradients multiply the weights with the points, beside the distances.
        products = 2 * self.pairs * self.channels * (5 if passes == 3 else 1) / rate
        each = passes * self.pairs / machine.pairs
        if not searches:
            each += passes * self.pairs * self.temperatures / machine.exponentials
        elif self.k > 1:
            # Lists change about k log(M / k) times for each row.
            longest = max(self.columns / max(self.clouds, 1) / self.k, math.e)
            each += self.rows * self.k * math.log(longest) * 32 / machine.pairs
        if backend == "triton":
            return calls + max(products, each)
        return calls + products + each

    def _rate(self, machine: Machine, backend: str, device: torch.device) -> float:
        if self.dtype == torch.float64:
            return machine.float64
        if backend == "tiled":
            # On a GPU it multiplies float32 in float64.
            return machine.float32 if device.type == "cpu" else machine.float64
        if self.dtype != torch.float32:
            return machine.half
        precision = float32_matmul_precision()
        formats = {"high": machine.tf32, "medium": machine.half}
        return formats.get(precision, machine.half / SPLIT)

    def bytes(self, backend: str, device: torch.device, *, searches: bool) -> int:
        """Of copies and of tiles."""
        points = self.rows + self.columns
        if backend == "dense":
            wide = max(self.size, 4)
            return int(self.pairs * wide * (self.channels * (3 if self.backward else 2) + 2))
        if backend == "triton":
            lists = self.rows * 4 * max(8, 2 * self.k) if searches else 0
            split = self.dtype == torch.float32 and float32_matmul_precision() == "highest"
            size = 6 if split and self.channels > 16 else self.size  # three parts of two bytes
            return int(points * (size * max(self.channels, 16) + 5) + lists)
        wide = 8 if device.type != "cpu" else max(self.size, 4)
        tile = 16 << 20 if searches else 4 << 20
        return int(points * wide * (self.channels + 1) * (2 if self.backward else 1) + tile)


def machine_of(device: torch.device) -> Machine:
    """Its constants: measured, or estimates."""
    name = name_of(device)
    if name in measurements():
        return measurements()[name]
    if device.type != "cuda":
        return ESTIMATES["cpu"]
    major = torch.cuda.get_device_capability(device)[0]
    return ESTIMATES.get(str(major), ESTIMATES["9" if major > 9 else "8"])


def name_of(device: torch.device) -> str:
    """What constants are valid for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def file() -> Path | None:
    """Where measured constants are kept; nowhere for a user without a home."""
    folder = os.environ.get("FAD_LOSS_CACHE")
    if folder:
        return Path(folder) / "machines.json"
    try:
        return Path.home() / ".cache" / "fad_loss" / "machines.json"
    except RuntimeError:
        return None


@cache
def measurements() -> dict[str, Machine]:
    """Measured constants by device; none if the file is missing or makes no sense."""
    path = file()
    if path is None:
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())
        return {name: Machine(**values) for name, values in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(device: torch.device, machine: Machine) -> Path | None:
    """Keep the constants of a device; where, or nowhere if the file cannot be written."""
    path = file()
    known = {**measurements(), name_of(device): machine}
    measurements.cache_clear()
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps({n: asdict(m) for n, m in known.items()}, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("measured constants are not kept: %s", error)
        return None
    return path
