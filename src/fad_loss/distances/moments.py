"""Distances that are means over pairs: Chamfer, energy, MMD."""

from __future__ import annotations

import torch
from torch import Tensor

from fad_loss import ops
from fad_loss._checks import look
from fad_loss._errors import choose, describe, switch
from fad_loss._ragged import cloud_lengths, cloud_mean
from fad_loss.distances.sets import REDUCTIONS, check_sets, reduce
from fad_loss.ops.kernels import Energy, Kernel

__all__ = ["chamfer", "energy", "mmd"]


def chamfer(x: Tensor, y: Tensor, *, reduction: str = "mean", backend: str = "auto") -> Tensor:
    r"""Chamfer distance: every point to its nearest on the other side, in both directions.

    .. math::
        \mathrm{CD}(x, y) = \frac1N \sum_i \min_j |x_i - y_j|^2
                          + \frac1M \sum_j \min_i |x_i - y_j|^2

    Args:
        x: clouds `(B, N, C)`, or ragged.
        y: clouds `(B, M, C)`, or ragged.
        reduction: over clouds: "mean", "sum" or "none".
        backend: see `fad_loss.ops`.

    Returns:
        A scalar, or `(B,)` for ``reduction="none"``; float32 for half precision.

    Raises:
        ValueError: an empty cloud, an unknown reduction, or what `fad_loss.ops.nearest` raises.
        TypeError: see `fad_loss.ops.nearest`.

    Source: Fan, Su and Guibas, "A point set generation network for 3D object reconstruction from a
    single image", CVPR 2017.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> y = torch.tensor([[[0.0], [3.0]]])
        >>> chamfer(x, y)
        tensor(2.5000)
    """
    choose("reduction", reduction, REDUCTIONS)
    check_sets(x, y)
    forth, _ = ops.nearest(x, y, backend=backend)
    back, _ = ops.nearest(y, x, backend=backend)
    return reduce(cloud_mean(forth) + cloud_mean(back), reduction)


def energy(
    x: Tensor, y: Tensor, *, unbiased: bool = False, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    r"""Energy distance: how much further apart the sets are than their own points.

    .. math:: \mathrm{ED}(x, y) = 2\,E|x_i - y_j| - E|x_i - x_j| - E|y_i - y_j|

    It is zero only for equal distributions, needs no bandwidth, and pulls from any distance. It is
    `mmd` with the `fad_loss.ops.Energy` kernel; like that it is a difference of means, and keeps
    fewer digits where it is small beside them.

    Args:
        x: clouds `(B, N, C)`, or ragged.
        y: clouds `(B, M, C)`, or ragged.
        unbiased: leave i = j out of the means within a set (which then can be negative).
        reduction: over clouds: "mean", "sum" or "none".
        backend: see `fad_loss.ops`.

    Returns:
        A scalar, or `(B,)` for ``reduction="none"``; float32 for half precision.

    Raises:
        ValueError: an empty cloud (or, if unbiased, one with a single point), an unknown reduction,
            or what `fad_loss.ops.kernel_mean` raises.
        TypeError: see `fad_loss.ops.kernel_mean`.

    Source: Szekely and Rizzo, "Energy statistics", Journal of Statistical Planning and Inference,
    2013.

    Example:
        >>> x = torch.tensor([[[0.0], [2.0]]])
        >>> y = torch.tensor([[[1.0], [1.0]]])
        >>> energy(x, y)
        tensor(1.)
    """
    return mmd(x, y, Energy(), unbiased=unbiased, reduction=reduction, backend=backend)


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    *,
    unbiased: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Squared maximum mean discrepancy under a kernel.

    .. math:: \mathrm{MMD}^2(x, y) = E\,k(x_i, x_j) + E\,k(y_i, y_j) - 2\,E\,k(x_i, y_j)

    Args:
        x: clouds `(B, N, C)`, or ragged.
        y: clouds `(B, M, C)`, or ragged.
        kernel: a kernel of `fad_loss.ops`, for example ``Gaussian([0.5, 1.0, 2.0])``.
        unbiased: leave i = j out of the means within a set (the U-statistic).
        reduction: over clouds: "mean", "sum" or "none".
        backend: see `fad_loss.ops`.

    Returns:
        A scalar, or `(B,)` for ``reduction="none"``; float32 for half precision.

    Raises:
        ValueError: an empty cloud (or, if unbiased, one with a single point), an unknown reduction,
            or what `fad_loss.ops.kernel_mean` raises.
        TypeError: see `fad_loss.ops.kernel_mean`.

    Accuracy:
        Each of the three means has that of `fad_loss.ops.kernel_mean`, so the value is off by that
        much of their sum, not of their difference; gradients are sums, and lose nothing.

    Source: Gretton et al., "A kernel two-sample test", JMLR 2012.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> mmd(x, x, ops.Gaussian(1.0))
        tensor(0.)
    """
    switch("unbiased", unbiased)
    choose("reduction", reduction, REDUCTIONS)
    check_sets(x, y)
    across = cloud_mean(ops.kernel_mean(x, y, kernel, backend=backend))
    within = _within("x", x, kernel, unbiased, backend) + _within("y", y, kernel, unbiased, backend)
    return reduce(within - 2 * across, reduction)


def _within(name: str, x: Tensor, kernel: Kernel, unbiased: bool, backend: str) -> Tensor:
    """The mean of the kernel over all pairs of a set, (B,).

    A point and itself are at distance 0 exactly, which only leaving them out of the sum guarantees.
    """
    lengths = cloud_lengths(x)
    if unbiased and (bool((lengths < 2).any()) if look(lengths) else x.shape[1] == 1):
        message = (
            f"{name}: unbiased=True needs at least 2 points in every cloud, got {describe(x)}; "
            "use unbiased=False"
        )
        raise ValueError(message)
    others = cloud_mean(ops.kernel_mean(x, x, kernel, exclude_self=True, backend=backend))
    if unbiased:
        return others
    itself = kernel(torch.zeros((), dtype=others.dtype, device=others.device))
    return others + (itself - others) / lengths.to(others.dtype)
