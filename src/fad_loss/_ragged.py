"""Clouds of unequal size: packed values and offsets, held in a jagged nested tensor.

Everything that computes on ragged clouds works on ``(values, offsets)``: the points of all clouds
one after the other, and where each cloud begins (B + 1 numbers, the first 0, the last the total).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_ragged(x: Tensor) -> bool:
    """Whether `x` is a jagged nested tensor."""
    return x.is_nested


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split a ragged tensor into its packed values and its offsets.

    Raises:
        ValueError: the tensor is nested, but not of the contiguous jagged layout.
    """
    if x.layout != torch.jagged or x._lengths is not None or x._ragged_idx != 1:  # type: ignore[attr-defined]
        message = (
            "ragged clouds: expected a contiguous nested tensor of layout torch.jagged with the "
            "points in dimension 1; build it with fad_loss.ragged"
        )
        raise ValueError(message)
    return _Unwrap.apply(x), x.offsets()  # type: ignore[no-untyped-call,attr-defined]


def packed(x: Tensor) -> Tensor:
    """The packed values of a ragged tensor; any other as it is."""
    return pack(x)[0] if is_ragged(x) else x


def wrap(values: Tensor, offsets: Tensor, shortest: int | None, longest: int | None) -> Tensor:
    """Make a ragged tensor of packed values; known bounds of the lengths spare a look at them."""
    ragged: Tensor = _Wrap.apply(values, offsets, shortest, longest)  # type: ignore[no-untyped-call]
    return ragged


def source(x: Tensor) -> Tensor | None:
    """The packed values that a ragged tensor was made of, which other losses may see as well."""
    return getattr(x.grad_fn, "source", None)


def unpack(values: Tensor, like: Tensor) -> Tensor:
    """Give packed `values` the clouds of the ragged tensor `like`."""
    return wrap(values, like.offsets(), like._maybe_min_seqlen, like._maybe_max_seqlen)  # type: ignore[attr-defined]


class _Wrap(torch.autograd.Function):
    """Packed values to a jagged nested tensor.

    PyTorch's own constructor and accessor cannot be differentiated twice (aten::values of a nested
    tensor has no second derivative); these two are each other's derivative, to any order.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, offsets: Tensor, shortest: int | None, longest: int | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.source = values
        return torch.nested.nested_tensor_from_jagged(
            values.detach(), offsets, min_seqlen=shortest, max_seqlen=longest
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:  # noqa: ARG004
        values = None if grad is None else _Unwrap.apply(grad)  # type: ignore[no-untyped-call]
        return values, None, None, None


class _Unwrap(torch.autograd.Function):
    """A jagged nested tensor to its packed values."""

    @staticmethod
    def forward(ctx: Any, ragged: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.clouds = ragged.offsets(), ragged._maybe_min_seqlen, ragged._maybe_max_seqlen
        values: Tensor = ragged._values.detach()
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else wrap(grad, *ctx.clouds)


def pointwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of single points (over the last axis, or element-wise) to any layout."""
    if not is_ragged(x):
        return function(x)
    return unpack(function(pack(x)[0]), x)


def cloud_lengths(x: Tensor) -> Tensor:
    """How many points each cloud has, ``(B,)`` int64."""
    if is_ragged(x):
        return pack(x)[1].diff()
    return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)


def cloud_index(x: Tensor) -> Tensor:
    """For every packed point of the ragged `x`, the number of its cloud."""
    values, offsets = pack(x)
    clouds = torch.arange(len(offsets) - 1, device=values.device)
    return torch.repeat_interleave(clouds, offsets.diff(), output_size=values.shape[0])


def per_point(per_cloud: Tensor, x: Tensor) -> Tensor:
    """Repeat a value of each cloud, ``(B, ...)``, for each of its points, in the layout of `x`."""
    if is_ragged(x):
        return unpack(per_cloud[cloud_index(x)], x)
    return per_cloud.unsqueeze(1).expand(-1, x.shape[1], *per_cloud.shape[1:])


def cloud_sum(x: Tensor) -> Tensor:
    """Sum over the points of each cloud: ``(B, N, ...)`` or ragged to ``(B, ...)``."""
    if not is_ragged(x):
        return x.sum(1)
    values, offsets = pack(x)
    total = values.new_zeros((len(offsets) - 1, *values.shape[1:]))
    # Accumulating index_put adds in a fixed order on every device, and is differentiable twice;
    # index_add is not the first on a GPU, segment_reduce not the second.
    return total.index_put((cloud_index(x),), values, accumulate=True)


def cloud_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the points of each cloud; per-cloud values ``(B,)`` pass through.

    `mask`, ``(B, N)``, says which points of dense clouds count. A cloud without any has the mean 0:
    there is nothing to learn from it.
    """
    if is_ragged(x):
        lengths = cloud_lengths(x).clamp_min(1).to(x.dtype)
        total = cloud_sum(x)
        return total / lengths.reshape(-1, *[1] * (total.dim() - 1))
    if mask is not None:
        if x.dim() == 1:
            return torch.where(mask.any(1), x, 0)
        return torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp_min(1)
    if x.dim() == 1:
        return x
    return x.sum(1) / max(x.shape[1], 1)


def flat(t: Tensor) -> Tensor:
    """All points of all clouds: `(points, C)`, or `(points,)` for scores."""
    if is_ragged(t):
        return pack(t)[0]
    return t.flatten(0, 1) if t.dim() > 1 else t


def concatenate(a: Tensor, b: Tensor) -> Tensor:
    """The clouds of both, one batch after the other."""
    if not is_ragged(a):
        return torch.cat([a, b])
    (a_values, a_offsets), (b_values, b_offsets) = pack(a), pack(b)
    offsets = torch.cat([a_offsets, b_offsets[1:] + a_offsets[-1]])
    shortest = [t._maybe_min_seqlen for t in (a, b)]  # type: ignore[attr-defined]
    longest = [t._maybe_max_seqlen for t in (a, b)]  # type: ignore[attr-defined]
    return wrap(
        torch.cat([a_values, b_values]),
        offsets,
        None if None in shortest else min(shortest),
        None if None in longest else max(longest),
    )


def split(scores: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `concatenate` on scores."""
    if not is_ragged(scores):
        first, second = torch.split(scores, [a.shape[0], b.shape[0]])
        return first, second
    values, _ = pack(scores)
    first, second = torch.split(values, [pack(a)[0].shape[0], pack(b)[0].shape[0]])
    return unpack(first, a), unpack(second, b)
