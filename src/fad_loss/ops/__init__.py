r"""Reductions over the N x M matrix of pairwise distances, without ever holding it.

For clouds x `(B, N, C)` and y `(B, M, C)`, with :math:`d_{ij} = |x_i - y_j|^2`:

======================  =================================================================
`nearest(x, y)`         the nearest point of y for each of x
`knn(x, y, k)`          the k nearest
`kernel_mean(x, y, k)`  the mean of a kernel :math:`k(d_{ij})` over y
`softmin(x, y, eps)`    the smooth minimum, :math:`-\varepsilon\log\sum_j e^{-d_{ij}/\varepsilon}`
======================  =================================================================

Clouds of unequal size come as jagged nested tensors (`fad_loss.ragged`), and so do the results.
Every operation takes ``backend="auto" | "triton" | "tiled" | "dense"``: the fused kernels, tiles of
matrix products in plain PyTorch, or the N x M reference. `auto` chooses; an explicit backend that
cannot run raises and says why. `cost` predicts time and memory of each.

Half-precision inputs are accumulated, and their results returned, in float32. Results and gradients
are bitwise repeatable.

**Accuracy.** Matrix products are fast, but what they make of two points that are close, and far
from the others, is rounding. So each operation bounds its error, whatever the clouds look like, and
recomputes what a product does not resolve: `nearest` and `knn` are as exact as differences; the
bound of `kernel_mean` and `softmin`, and its price, is with `kernel_mean`. Squared distances below
1.2e-38 (float64: 2.2e-308) underflow: scale features that small.

Gradients are for reverse mode (``backward``, `torch.autograd.grad`, twice for what is smooth).
`torch.func.grad`, forward mode and third derivatives need ``backend="dense"``, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fad_loss._checks import check_finite, look
from fad_loss.ops import _dense, _library
from fad_loss.ops._backends import select
from fad_loss.ops._cost import Cost, cost
from fad_loss.ops._inputs import Pair, bias_of, check_pair, check_range, check_transforms, mass
from fad_loss.ops.kernels import (
    Energy,
    Gaussian,
    InverseMultiquadric,
    Kernel,
    Laplacian,
    _positive,
    within_range,
)

__all__ = [
    "Cost",
    "Energy",
    "Gaussian",
    "InverseMultiquadric",
    "Kernel",
    "Laplacian",
    "cost",
    "kernel_mean",
    "knn",
    "nearest",
    "softmin",
]


def nearest(x: Tensor, y: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    r"""For each point of x, the nearest point of y.

    .. math:: d_i = \min_j |x_i - y_j|^2, \qquad j_i = \operatorname{argmin}_j |x_i - y_j|^2

    Distances have the accuracy of the inputs: a matrix product screens the candidates, and what it
    cannot decide within its rounding error is recomputed from differences. Ties go to the lowest
    index. The gradient is :math:`2 g_i (x_i - y_{j_i})`, to x and, negated, to y.

    Args:
        x: clouds `(B, N, C)`, or ragged.
        y: clouds `(B, M, C)`, or ragged.
        backend: "auto", "triton", "tiled" or "dense".

    Returns:
        Squared distance `(B, N)` (float32 for half precision, otherwise the dtype of x) and index
        `(B, N)` int64 within the cloud. A point without any neighbor (an empty cloud in y) gets
        +inf and -1, and no gradient.

    Raises:
        ValueError: shapes or devices that do not fit, or NaN or infinity in a CPU tensor.
        TypeError: not floating-point, or two different dtypes.
        RuntimeError: the backend cannot run here.

    Cost:
        The screening product is 2 N M C flops a cloud, the recomputation 3 C for each candidate: 4
        a point on a GPU (8 for a bfloat16 product), 1 on a CPU, where rows that the screening does
        not settle are the exception and get all they need. (Of several neighbors, at least one in
        32 of y, none is recomputed on a CPU: the product is one of float64, and a sorting network
        selects.) The backward pass is O(N C). Up to C = 16 differences are summed instead, 3 N M C
        flops. Beyond the result, memory holds centered copies of x and y (on a CPU only of clouds
        that lie far from the origin), and on a CPU a tile of 2 MiB, or of 64 rows if those are
        more; a GPU reads x once and y once per tile of 64 or 128 rows, mostly from its L2 cache;
        where these are too few to fill it, several programs share the columns of each.
        float32 products on a GPU follow ``torch.set_float32_matmul_precision``: six products of
        bfloat16 parts for "highest", which are as exact as float32, tf32 for "high", bfloat16 for
        "medium"; half precision is multiplied as it is.
        Only the screening becomes coarser. float64 on a GPU takes the tiled path.

    Example:
        >>> x = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
        >>> y = torch.tensor([[[0.0, 1.0], [5.0, 0.0], [3.0, 0.0]]])
        >>> nearest(x, y)
        (tensor([[1., 1.]]), tensor([[0, 2]]))
    """
    pair = check_pair(x, y, ranged=False)
    distance, index = _knn(pair, 1, exclude_self=False, backend=backend)
    return pair.like_x(distance.squeeze(-1)), pair.like_x(index.squeeze(-1))


def knn(
    x: Tensor, y: Tensor, k: int, *, exclude_self: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""For each point of x, the k nearest points of y, the nearest first.

    .. math:: d_{i1} \le \dots \le d_{ik}, \qquad
        \{j_{i1}, \dots, j_{ik}\} = \operatorname{argmin}_{|J| = k} \sum_{j \in J} |x_i - y_j|^2

    Exact in the same way as `nearest`. Equal distances come in the order of their index.

    Args:
        x: clouds `(B, N, C)`, or ragged.
        y: clouds `(B, M, C)`, or ragged.
        k: how many neighbors, from 1 to M.
        exclude_self: x and y are the same points, and none is its own neighbor.
        backend: "auto", "triton", "tiled" or "dense".

    Returns:
        Squared distances `(B, N, k)`, ascending, and indices `(B, N, k)` int64. Where a ragged
        cloud has fewer than k points, the remaining entries are +inf and -1, without gradient.

    Raises:
        ValueError: k is less than 1 or exceeds the number of neighbors, shapes or devices do not
            fit, or a CPU tensor holds NaN or infinity.
        TypeError: k is not an int; not floating-point, or two different dtypes.
        RuntimeError: the backend cannot run here.

    Cost:
        That of `nearest`, with a list of 8 to 128 candidates a point, a power of two beyond k, that
        stays in registers on a GPU; a point's list changes about k log(M / k) times. From k = 65
        on, and in float64, it is the tiled path there, whose tiles are in memory and reduced by
        ``torch.topk``. The backward pass is O(N k C).

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [3.0]]])
        >>> distance, index = knn(x, x, 1, exclude_self=True)
        >>> distance.squeeze(-1), index.squeeze(-1)
        (tensor([[1., 1., 4.]]), tensor([[1, 0, 1]]))
    """
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        message = f"k: expected an int, got {type(k).__name__} {k!r}"
        raise TypeError(message)
    pair = check_pair(x, y, exclude_self=exclude_self, ranged=False)
    if k < 1:
        message = f"k: expected at least 1 neighbor, got {k}"
        raise ValueError(message)
    if pair.y_offsets is None:
        available = pair.y.shape[1] - int(exclude_self)
        if k > available:
            own = " (one of its points is the point itself)" if exclude_self else ""
            message = (
                f"k: expected at most {available} neighbors, because y has M = {pair.y.shape[1]} "
                f"points{own}, got {k}; lower k or use larger clouds"
            )
            raise ValueError(message)
    distance, index = _knn(pair, k, exclude_self=exclude_self, backend=backend)
    return pair.like_x(distance), pair.like_x(index)


def _knn(pair: Pair, k: int, *, exclude_self: bool, backend: str) -> tuple[Tensor, Tensor]:
    chosen = select(backend, pair.x.device, pair.x.dtype)
    if chosen != "tiled" or pair.x.device.type != "cpu":  # which looks for itself
        check_range(pair.x, pair.y)
    if chosen != "dense":
        check_transforms(pair.x, pair.y)
        return _library.search(
            pair.x, pair.y, k, exclude_self, pair.x_offsets, pair.y_offsets, chosen
        )

    def reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _dense.knn(x, y, k, exclude_self=exclude_self)

    if pair.x_offsets is None or pair.y_offsets is None:
        return reference(pair.x, pair.y)
    distance, index = _dense.per_cloud(reference, pair.x, pair.x_offsets, pair.y_offsets, pair.y)
    return distance, index


def kernel_mean(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    weights: Tensor | None = None,
    *,
    exclude_self: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""For each point of x, the weighted mean of a kernel over the points of y.

    .. math:: m_i = \frac{\sum_j w_j\, k(|x_i - y_j|^2)}{\sum_j w_j}

    Smooth in x, y and the weights, with first and second derivatives that never hold N x M.

    Args:
        x: clouds `(B, N, C)`, or ragged.
        y: clouds `(B, M, C)`, or ragged.
        kernel: `Gaussian`, `Laplacian`, `Energy` or `InverseMultiquadric`.
        weights: `(B, M)`, or ragged like y; non-negative, with a positive sum; of y's dtype, or
            float32 where that is half precision. 1 by default.
        exclude_self: x and y are the same points, and the sums leave out j = i.
        backend: "auto", "triton", "tiled" or "dense".

    Returns:
        `(B, N)`, or ragged like x; float32 for half precision. A mean over no points is 0.

    Raises:
        ValueError: shapes or devices that do not fit, weights that are negative or sum to 0, a
            bandwidth out of the range of the dtype, or NaN or infinity in a CPU tensor.
        TypeError: not floating-point, two different dtypes, or `kernel` is not a kernel.
        RuntimeError: the backend cannot run here.

    Cost:
        2 N M C flops a cloud forward, and one exponential or root per pair; Gaussian bandwidths
        whose ratios are powers of 2 or of its root share one exponential. The backward pass
        recomputes each pair's weight: 4 N M C flops for the gradient of x and as much for that of
        y; on a GPU wider points (from 128 channels on in float32, 256 in half precision)
        recompute it once for each so many channels. Second derivatives take 10 N M C.
        Beyond results and gradients, memory holds centered copies of the points, and on a CPU tiles
        of 1 MiB; nothing of size N x M. On a GPU each side's gradient is summed by rows, without
        atomics. float32 products follow ``torch.set_float32_matmul_precision`` as in `nearest` on a
        GPU, and here the result does too; up to C = 16 differences are summed. float64 takes the
        tiled path.

    Accuracy:
        With t = 2^-14 in float32 (and half precision) and 2^-43 in float64, and with s the scale of
        the kernel (2h^2 for the smallest bandwidth of a Gaussian, h^2 for the inverse multiquadric,
        0 for kernels with a kink at 0), every squared distance is off by at most t max(d, s), and
        every row of a gradient, given its weights, by t (sum_j of \|W_ij\| (\|x_i - y_j\| +
        sqrt(s))). These are bounds; typical errors are a hundredth of that. Points that coincide
        are at distance 0.

        This holds for ``backend="dense"`` and for "tiled" on a CPU, on which a tile is looked at: a
        few pairs closer than a few per cent of the points' norms are recomputed from their
        differences, many of them in float64, which takes up to about three times as long for such
        clouds (``benchmarks/against.py --data clusters``), and only what float64 does not resolve
        channel by channel, which takes many times as long. Where s is not small beside the norms
        nothing is looked at. On other devices "tiled" multiplies float32 in float64, and sums
        differences of float64. The Triton kernels compute rows with such pairs anew from
        differences, which takes some ten times as long for these rows; under tf32 or bfloat16
        products ("high", "medium") other distances are those of points rounded so.

    Example:
        >>> x = torch.tensor([[[0.0]]])
        >>> y = torch.tensor([[[3.0], [5.0]]])
        >>> kernel_mean(x, y, Energy())
        tensor([[-4.]])
    """
    if not isinstance(kernel, Kernel):
        message = (
            "kernel: expected Gaussian, Laplacian, Energy or InverseMultiquadric from "
            f"fad_loss.ops, got {type(kernel).__name__} {kernel!r}"
        )
        raise TypeError(message)
    pair = check_pair(x, y, exclude_self=exclude_self)
    within_range("bandwidth", kernel.parameters, pair.x.dtype)
    w = None if weights is None else pair.along_y("weights", weights)
    if w is not None:
        check_finite("weights", w)
        if look(w) and w.numel() and bool((w < 0).any()):
            message = f"weights: expected non-negative values, got a minimum of {float(w.min()):g}"
            raise ValueError(message)
        # Once, for the sum and the mass: their gradients nearly cancel, and must not be rounded to
        # half precision before they meet.
        w = w.to(_dense.accumulation_dtype(w.dtype))
    chosen = select(backend, pair.x.device, pair.x.dtype)
    offsets = pair.x_offsets, pair.y_offsets
    if chosen != "dense":
        check_transforms(pair.x, pair.y, w)
        parameters = list(kernel.parameters)
        total = _library.kernel_sum(
            pair.x, pair.y, w, kernel.name, parameters, exclude_self, *offsets, chosen
        )
    else:

        def reference(x: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor]:
            return (_dense.kernel_sum(x, y, w, kernel, exclude_self=exclude_self),)

        total = _reference(reference, pair, w)
    # Where nothing is left to average the sum is 0 as well, and so is the mean.
    weight = mass(pair, w, exclude_self=exclude_self)
    return pair.like_x(total / torch.where(weight == 0, 1.0, weight))


def _reference(
    function: Callable[..., tuple[Tensor, ...]], pair: Pair, along: Tensor | None
) -> Tensor:
    if pair.x_offsets is None or pair.y_offsets is None:
        return function(pair.x, pair.y, along)[0]
    return _dense.per_cloud(
        function,
        pair.x,
        pair.x_offsets,
        pair.y_offsets,
        pair.y,
        along,
    )[0]


def softmin(
    x: Tensor,
    y: Tensor,
    epsilon: float | Sequence[float],
    potential: Tensor | None = None,
    log_weights: Tensor | None = None,
    *,
    exclude_self: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""For each point of x, the smooth minimum of the squared distances to y.

    .. math::
        s_i = -\varepsilon \log
            \sum_j b_j \exp\left(\frac{f_j - |x_i - y_j|^2}{\varepsilon}\right)

    It is the C-transform of entropic optimal transport, and with :math:`\varepsilon = 2h^2` a
    kernel density in the log domain. Smooth in x, y, the potential and the log-weights, with first
    and second derivatives that never hold N x M.

    Args:
        x: clouds `(B, N, C)`, or ragged.
        y: clouds `(B, M, C)`, or ragged.
        epsilon: the temperature, > 0; or several, which share one pass over the distances.
        potential: f, `(B, M)`, or ragged like y; of y's dtype, or float32 where that is half
            precision. 0 by default.
        log_weights: log b, like `potential`; -inf leaves a point out. 0 by default.
        exclude_self: x and y are the same points, and the sums leave out j = i.
        backend: "auto", "triton", "tiled" or "dense".

    Returns:
        `(B, N)`, or `(B, N, E)` for a sequence of E temperatures; ragged like x; float32 for half
        precision. A minimum over no points is +inf, without gradient.

    Raises:
        ValueError: a temperature that is not from 1e-18 to 1e34 (float64: 1e-150 to 1e150), shapes
            or devices that do not fit, NaN or infinity in a CPU tensor (-inf is allowed in
            `log_weights`).
        TypeError: not floating-point, two different dtypes, or `epsilon` not a number.
        RuntimeError: the backend cannot run here.

    Cost:
        2 N M C flops a cloud forward, with a running maximum and sum per row, and one exponential
        per pair and temperature; up to 4 temperatures share one pass on a GPU (2 backward,
        and 1 beyond 128 channels), all of them on a CPU. The backward pass recomputes the
        probabilities, second derivatives too, at the flops, the memory and the precision of
        `kernel_mean`.

    Accuracy:
        That of `kernel_mean`, with s the smallest epsilon. The weights of a row sum to 1, however
        large its distances are beside epsilon.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn
    divergences", AISTATS 2019.

    Example:
        >>> x, y = torch.zeros(1, 1, 1), torch.tensor([[[1.0], [2.0]]])
        >>> softmin(x, y, 1e-3)
        tensor([[1.]])
        >>> softmin(x, y, [1e-3, 1.0])
        tensor([[[1.0000, 0.9514]]])
    """
    several = isinstance(epsilon, (tuple, list))
    values = [_positive("epsilon", e) for e in (epsilon if several else (epsilon,))]  # type: ignore[union-attr]
    if not values:
        message = "epsilon: expected at least one temperature, got an empty sequence"
        raise ValueError(message)
    pair = check_pair(x, y, exclude_self=exclude_self)
    within_range("epsilon", values, pair.x.dtype, power=2)
    bias = bias_of(pair, values, potential, log_weights)
    chosen = select(backend, pair.x.device, pair.x.dtype)
    if chosen != "dense":
        check_transforms(pair.x, pair.y, bias)
        offsets = pair.x_offsets, pair.y_offsets
        result = _library.softmin(pair.x, pair.y, bias, values, exclude_self, *offsets, chosen)[0]
    else:

        def reference(x: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor]:
            return (_dense.softmin(x, y, bias, values, exclude_self=exclude_self),)

        result = _reference(reference, pair, bias)
    return pair.like_x(result if several else result.squeeze(-1))
