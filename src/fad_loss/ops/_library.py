"""Registration with torch.library: the reductions as operators to autograd and the compiler.

Three operators per smooth reduction (forward, backward, double backward) and one search. Each has a
fake implementation for `torch.compile`, an autograd formula and a vmap rule. Tensors are batched,
(B, N, C), or packed, (T, C), with the offsets of the clouds. The last argument names the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from fad_loss.ops._dense import accumulation_dtype
from fad_loss.ops._operators import call, register
from fad_loss.ops.kernels import kernel_from

_PAIR = "Tensor x, Tensor y"
_CLOUDS = "bool exclude_self, Tensor? x_offsets, Tensor? y_offsets, str backend"
_KERNEL = f"Tensor? weights, str kernel, float[] parameters, {_CLOUDS}"
_SOFTMIN = f"float[] epsilon, {_CLOUDS}"


def _implementation(backend: str) -> Any:
    """The module of a backend; imported when first used, so that Triton is not imported before."""
    return import_module(f"fad_loss.ops._{backend}")


def _no_third_derivative(ctx: Any, *grads: Tensor) -> None:
    message = (
        "fad_loss.ops: third derivatives are not available from this backend; "
        'use backend="dense", which autograd differentiates to any order'
    )
    raise RuntimeError(message)


def _nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """Save nothing."""


def _wide_empty(t: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    return t.new_empty(t.shape if shape is None else shape, dtype=accumulation_dtype(t.dtype))


def _to(gradient: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else gradient.to(like.dtype)


# ----------------------------------------------------------------------------------------- knn


@register("knn", f"({_PAIR}, int k, {_CLOUDS}) -> (Tensor, Tensor)")
def knn(x, y, k, exclude_self, x_offsets, y_offsets, backend):  # type: ignore[no-untyped-def]
    """The k nearest neighbors: distance and index."""
    return _implementation(backend).knn(x, y, k, exclude_self, x_offsets, y_offsets)


@knn.register_fake
def _(x, y, k, exclude_self, x_offsets, y_offsets, backend):  # type: ignore[no-untyped-def]
    shape = (*x.shape[:-1], k)
    return _wide_empty(x, shape), x.new_empty(shape, dtype=torch.int64)


def absolute_index(
    index: Tensor, y: Tensor, x_offsets: Tensor | None, y_offsets: Tensor | None
) -> Tensor:
    """Number neighbors through the whole packed (or flattened) y instead of within their cloud."""
    if x_offsets is None or y_offsets is None:
        start = torch.arange(y.shape[0], device=y.device) * y.shape[1]
        start = start.reshape(-1, *[1] * (index.dim() - 1))
    else:
        start = y_offsets[:-1].repeat_interleave(x_offsets.diff(), output_size=index.shape[0])
        start = start.reshape(-1, *[1] * (index.dim() - 1))
    return index.clamp_min(0) + start


# Elements of y that the gradient of knn may gather at once: 64 MB, and 256 MB on a GPU, where every
# round sorts.
_GATHERED = 1 << 24
_GATHERED_ON_DEVICE = 1 << 26


def _knn_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, _, _, x_offsets, y_offsets, _ = inputs
    ctx.save_for_backward(x, y, output[1], x_offsets, y_offsets)


def _knn_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    """2 g_i (x_i - y_j) to x, and its negative to y_j, in a fixed order.

    These are ordinary differentiable operations, so higher derivatives come by themselves.
    """
    x, y, index, x_offsets, y_offsets = ctx.saved_tensors
    points = y.reshape(-1, y.shape[-1])
    found = index >= 0
    if points.shape[0] == 0 or x.numel() == 0:
        # Multiplied rather than created, so that this can be differentiated again like any other.
        return x * 0, y * 0, *[None] * 5
    flat = absolute_index(index, y, x_offsets, y_offsets).clamp_max(points.shape[0] - 1)
    weight = 2 * torch.where(found, grad, 0.0)
    own = x.unsqueeze(-2).to(grad.dtype)  # the gradient has the wide dtype of the distance
    to_x: Tensor | None = None
    spread = points.new_zeros(points.shape, dtype=grad.dtype)
    mapped = any(map(functorch.is_functorch_wrapped_tensor, (grad, x, y)))
    # A few neighbors at a time where all of them together, k copies of x, would be much.
    k = index.shape[-1]
    room = _GATHERED if x.device.type == "cpu" else _GATHERED_ON_DEVICE
    step = min(max(room // x.numel(), 1), k)
    for start in range(0, k, step):
        part = slice(start, start + step)
        near = flat[..., part]
        chosen = points.index_select(0, near.reshape(-1)).view(*near.shape, -1).to(grad.dtype)
        scale = weight[..., part].unsqueeze(-1)
        # One tensor of this size, changed in place, which vmap cannot do.
        push = (chosen - own) * scale if mapped else chosen.sub_(own).mul_(scale)
        to_x = push.sum(-2).neg() if to_x is None else to_x - push.sum(-2)
        if ctx.needs_input_grad[1]:
            where, push = near.reshape(-1), push.view(-1, y.shape[-1])
            # Both add in a fixed order, index_add on a CPU alone, and faster there.
            if y.device.type == "cpu":
                spread = spread.index_add(0, where, push)
            else:
                spread = spread.index_put((where,), push, accumulate=True)
    to_y = spread.view(y.shape).to(y.dtype) if ctx.needs_input_grad[1] else None
    return None if to_x is None else to_x.to(x.dtype), to_y, *[None] * 5


knn.register_autograd(_knn_backward, setup_context=_knn_setup)


def search(*args: Any) -> tuple[Tensor, Tensor]:
    """`knn`, without the dispatcher where nobody needs it: a twentieth of a small search on a CPU.

    (Smooth operations take longer, and are seldom called where nobody differentiates.)
    """
    found: tuple[Tensor, Tensor] = call(knn, *args)
    return found


# ---------------------------------------------------------------------------------- kernel_sum


@register("kernel_sum", f"({_PAIR}, {_KERNEL}) -> Tensor")
def kernel_sum(  # type: ignore[no-untyped-def]
    x, y, weights, kernel, parameters, exclude_self, x_offsets, y_offsets, backend
):
    """Sum over j of w_j k(d_ij)."""
    k = kernel_from(kernel, parameters)
    run = _implementation(backend).kernel_sum
    return run(x, y, weights, k, exclude_self, x_offsets, y_offsets)


@kernel_sum.register_fake
def _(x, y, weights, kernel, parameters, exclude_self, x_offsets, y_offsets, backend):  # type: ignore[no-untyped-def]
    return _wide_empty(x, x.shape[:-1])


@register(
    "kernel_sum_backward",
    f"(Tensor grad, {_PAIR}, {_KERNEL}, bool of_y, bool of_weights) -> (Tensor, Tensor, Tensor)",
)
def kernel_sum_backward(  # type: ignore[no-untyped-def]
    grad,
    x,
    y,
    weights,
    kernel,
    parameters,
    exclude_self,
    x_offsets,
    y_offsets,
    backend,
    of_y,
    of_weights,
):
    """Gradients by x, y and the weights."""
    k = kernel_from(kernel, parameters)
    run = _implementation(backend).kernel_sum_backward
    return run(grad, x, y, weights, k, exclude_self, x_offsets, y_offsets, of_y, of_weights)


@kernel_sum_backward.register_fake  # type: ignore[untyped-decorator]
def _(grad, x, y, *others: Any):  # type: ignore[no-untyped-def]
    of_y, of_weights = others[-2:]
    return (
        _wide_empty(x),
        _wide_empty(y, None if of_y else (0,)),
        _wide_empty(y, y.shape[:-1] if of_weights else (0,)),
    )


@register(
    "kernel_sum_double_backward",
    f"(Tensor u, Tensor? v, Tensor? t, Tensor grad, {_PAIR}, {_KERNEL})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def kernel_sum_double_backward(  # type: ignore[no-untyped-def]
    u, v, t, grad, x, y, weights, kernel, parameters, exclude_self, x_offsets, y_offsets, backend
):
    """Gradients of the backward: by its incoming gradient, x, y and the weights."""
    k = kernel_from(kernel, parameters)
    run = _implementation(backend).kernel_sum_double_backward
    return run(u, v, t, grad, x, y, weights, k, exclude_self, x_offsets, y_offsets)


@kernel_sum_double_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    u, v, t, grad, x, y, weights, kernel, parameters, exclude_self, x_offsets, y_offsets, backend
):
    return _wide_empty(grad), _wide_empty(x), _wide_empty(y), _wide_empty(y, y.shape[:-1])


def _kernel_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, weights, *ctx.settings, x_offsets, y_offsets, ctx.backend = inputs
    ctx.save_for_backward(x, y, weights, x_offsets, y_offsets)


def _kernel_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, weights, x_offsets, y_offsets = ctx.saved_tensors
    of_y, of_weights = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    dx, dy, dw = kernel_sum_backward(
        grad, x, y, weights, *ctx.settings, x_offsets, y_offsets, ctx.backend, of_y, of_weights
    )
    return (
        dx.to(x.dtype),
        dy.to(y.dtype) if of_y else None,
        _to(dw, weights) if of_weights else None,
        *[None] * 6,
    )


def _kernel_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    grad, x, y, weights, *ctx.settings, x_offsets, y_offsets, ctx.backend, of_y, of_weights = inputs
    ctx.of_y, ctx.of_weights = of_y, of_weights
    ctx.save_for_backward(grad, x, y, weights, x_offsets, y_offsets)


def _kernel_double_backward(ctx: Any, u: Tensor, v: Tensor, t: Tensor) -> tuple[Any, ...]:
    grad, x, y, weights, x_offsets, y_offsets = ctx.saved_tensors
    dgrad, dx, dy, dw = kernel_sum_double_backward(
        u,
        v if ctx.of_y else None,
        t if ctx.of_weights else None,
        grad,
        x,
        y,
        weights,
        *ctx.settings,
        x_offsets,
        y_offsets,
        ctx.backend,
    )
    return dgrad, dx.to(x.dtype), dy.to(y.dtype), _to(dw, weights), *[None] * 8


kernel_sum.register_autograd(_kernel_backward, setup_context=_kernel_setup)
kernel_sum_backward.register_autograd(_kernel_double_backward, setup_context=_kernel_backward_setup)
kernel_sum_double_backward.register_autograd(_no_third_derivative, setup_context=_nothing)


# ------------------------------------------------------------------------------------- softmin


@register("softmin", f"({_PAIR}, Tensor? bias, {_SOFTMIN}) -> (Tensor, Tensor, Tensor)")
def softmin(x, y, bias, epsilon, exclude_self, x_offsets, y_offsets, backend):  # type: ignore[no-untyped-def]
    """Minus eps log sum_j exp((h_j - d_ij) / eps) for each epsilon: least - eps log(total).

    Returned beside its two parts, the smallest d_ij - h_j and the sum relative to it, which the
    backward needs: exponentials of the result would carry its rounding, divided by eps.
    """
    run = _implementation(backend).softmin
    return run(x, y, bias, epsilon, exclude_self, x_offsets, y_offsets)


@softmin.register_fake
def _(x, y, bias, epsilon, exclude_self, x_offsets, y_offsets, backend):  # type: ignore[no-untyped-def]
    shape = (*x.shape[:-1], len(epsilon))
    return tuple(_wide_empty(x, shape) for _ in range(3))


@register(
    "softmin_backward",
    f"(Tensor grad, {_PAIR}, Tensor? bias, Tensor least, Tensor total, {_SOFTMIN}, "
    "bool of_y, bool of_bias) -> (Tensor, Tensor, Tensor)",
)
def softmin_backward(  # type: ignore[no-untyped-def]
    grad,
    x,
    y,
    bias,
    least,
    total,
    epsilon,
    exclude_self,
    x_offsets,
    y_offsets,
    backend,
    of_y,
    of_bias,
):
    """Gradients by x, y and the bias."""
    run = _implementation(backend).softmin_backward
    # A row without neighbors has no exponentials either.
    grad = grad / torch.where(total > 0, total, 1.0)
    return run(grad, x, y, bias, least, epsilon, exclude_self, x_offsets, y_offsets, of_y, of_bias)


@softmin_backward.register_fake  # type: ignore[untyped-decorator]
def _(grad, x, y, bias, least, total, epsilon, *others: Any):  # type: ignore[no-untyped-def]
    of_y, of_bias = others[-2:]
    return (
        _wide_empty(x),
        _wide_empty(y, None if of_y else (0,)),
        _wide_empty(y, (*y.shape[:-1], len(epsilon)) if of_bias else (0,)),
    )


@register(
    "softmin_double_backward",
    f"(Tensor u, Tensor? v, Tensor? t, Tensor grad, {_PAIR}, Tensor? bias, Tensor least, "
    f"Tensor total, {_SOFTMIN}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def softmin_double_backward(  # type: ignore[no-untyped-def]
    u, v, t, grad, x, y, bias, least, total, epsilon, exclude_self, x_offsets, y_offsets, backend
):
    """Gradients of the backward: by its incoming gradient, x, y and the bias."""
    run = _implementation(backend).softmin_double_backward
    found = least, total, epsilon
    return run(u, v, t, grad, x, y, bias, *found, exclude_self, x_offsets, y_offsets)


@softmin_double_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    u, v, t, grad, x, y, bias, least, total, epsilon, exclude_self, x_offsets, y_offsets, backend
):
    bias_shape = (*y.shape[:-1], len(epsilon))
    return _wide_empty(grad), _wide_empty(x), _wide_empty(y), _wide_empty(y, bias_shape)


def _softmin_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, bias, *ctx.settings, x_offsets, y_offsets, ctx.backend = inputs
    _, least, total = output
    # The double backward knows that they are functions of the others, so they are constants.
    ctx.mark_non_differentiable(least, total)
    ctx.save_for_backward(x, y, bias, least, total, x_offsets, y_offsets)


def _softmin_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, y, bias, least, total, x_offsets, y_offsets = ctx.saved_tensors
    of_y, of_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    dx, dy, dbias = softmin_backward(
        grad,
        x,
        y,
        bias,
        least,
        total,
        *ctx.settings,
        x_offsets,
        y_offsets,
        ctx.backend,
        of_y,
        of_bias,
    )
    return (
        dx.to(x.dtype),
        dy.to(y.dtype) if of_y else None,
        _to(dbias, bias) if of_bias else None,
        *[None] * 5,
    )


def _softmin_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    grad, x, y, bias, least, total, *ctx.settings, x_offsets, y_offsets, ctx.backend = inputs[:-2]
    ctx.of_y, ctx.of_bias = inputs[-2:]
    ctx.save_for_backward(grad, x, y, bias, least, total, x_offsets, y_offsets)


def _softmin_double_backward(ctx: Any, u: Tensor, v: Tensor, t: Tensor) -> tuple[Any, ...]:
    grad, x, y, bias, least, total, x_offsets, y_offsets = ctx.saved_tensors
    dgrad, dx, dy, dbias = softmin_double_backward(
        u,
        v if ctx.of_y else None,
        t if ctx.of_bias else None,
        grad,
        x,
        y,
        bias,
        least,
        total,
        *ctx.settings,
        x_offsets,
        y_offsets,
        ctx.backend,
    )
    return dgrad, dx.to(x.dtype), dy.to(y.dtype), _to(dbias, bias), *[None] * 9


softmin.register_autograd(_softmin_backward, setup_context=_softmin_setup)
softmin_backward.register_autograd(_softmin_double_backward, setup_context=_softmin_backward_setup)
softmin_double_backward.register_autograd(_no_third_derivative, setup_context=_nothing)
