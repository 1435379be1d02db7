"""What the operations are given: checked, packed, and the sums and biases that go with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from fad_loss._checks import check_finite, check_tensor, look
from fad_loss._errors import describe, switch
from fad_loss._ragged import is_ragged, pack, unpack
from fad_loss.ops._dense import accumulation_dtype


def check_transforms(*tensors: Tensor | None) -> None:
    """Raise if an operator without formulas for them would differentiate forward, or in torch.func.

    PyTorch would take a tangent for 0 in silence, and refuse `torch.func.grad` with a message about
    its own inside.
    """
    if torch.compiler.is_compiling():
        return
    for given in tensors:
        tensor = given
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_gradtrackingtensor(tensor):
                message = (
                    "fad_loss.ops: torch.func.grad, vjp, jvp and what is built on them (jacrev, "
                    'jacfwd, hessian) need backend="dense"; loss.backward() and '
                    "torch.autograd.grad work with any backend"
                )
                raise RuntimeError(message)
            tensor = functorch.get_unwrapped(tensor)
        if tensor is not None and _has_tangent(tensor):
            message = (
                'fad_loss.ops: forward-mode differentiation needs backend="dense"; the others have '
                "derivatives in reverse mode only"
            )
            raise RuntimeError(message)


def _has_tangent(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Pair:
    """Two validated sets of clouds: batched (B, N, C), or packed (T, C) with offsets."""

    x: Tensor
    y: Tensor
    x_offsets: Tensor | None
    y_offsets: Tensor | None
    ragged_x: Tensor | None

    def like_x(self, result: Tensor) -> Tensor:
        """Give a result the layout of x."""
        return result if self.ragged_x is None else unpack(result, self.ragged_x)

    def along_y(self, name: str, t: Tensor) -> Tensor:
        """Validate a value for each point of y, (B, M) or ragged, and pack it."""
        check_tensor(name, t)
        packed, offsets = pack(t) if is_ragged(t) else (t, None)
        if (offsets is None) != (self.y_offsets is None) or packed.shape != self.y.shape[:-1]:
            expected = "ragged, with the lengths of y" if self.y_offsets is not None else "(B, M)"
            message = (
                f"{name}: expected one value for each point of y, {expected}; got {describe(t)}"
            )
            if self.y_offsets is None:
                message += f" for y of shape {tuple(self.y.shape)}"
            raise ValueError(message)
        # What belongs to points in half precision may itself be wider, as results are.
        wide = accumulation_dtype(self.y.dtype)
        for what, fits, error in (
            ("dtype", packed.dtype in {self.y.dtype, wide}, TypeError),
            ("device", packed.device == self.y.device, ValueError),
        ):
            if not fits:
                message = (
                    f"{name}: expected the {what} of y ({describe(self.y)}), got {describe(t)}; "
                    f"convert it with {name}.to(y.{what})"
                )
                raise error(message)
        if offsets is not None and self.y_offsets is not None:
            _check_same_clouds(name, offsets, "y", self.y_offsets)
        return packed


def _check_same_clouds(name: str, a: Tensor, other: str, b: Tensor) -> None:
    if a is not b and look(a) and look(b) and not torch.equal(a, b):
        message = (
            f"{name} and {other}: expected clouds of the same lengths, got "
            f"{a.diff().tolist()} and {b.diff().tolist()}"
        )
        raise ValueError(message)


def check_pair(x: Tensor, y: Tensor, *, exclude_self: bool = False, ranged: bool = True) -> Pair:
    """Two clouds that fit each other, packed; or an error that says what does not.

    Without `ranged`, whoever reads the values calls `check_range`.
    """
    switch("exclude_self", exclude_self)
    for name, t in (("x", x), ("y", y)):
        check_tensor(name, t)
        if t.dim() != 3:
            hint = f"; add the batch with {name}.unsqueeze(0)" if t.dim() == 2 else ""
            message = f"{name}: expected clouds of shape (B, points, C), got {describe(t)}{hint}"
            raise ValueError(message)
    if is_ragged(x) != is_ragged(y):
        message = (
            "x and y: expected both ragged or both not, got "
            f"{describe(x)} and {describe(y)}; make the other one ragged with fad_loss.ragged"
        )
        raise ValueError(message)
    ragged_x = x if is_ragged(x) else None
    x_offsets = y_offsets = None
    given = x, y
    if ragged_x is not None:
        (x, x_offsets), (y, y_offsets) = pack(x), pack(y)
    _check_match(*given)
    if x_offsets is not None and y_offsets is not None:
        same_batch = len(x_offsets) == len(y_offsets)
    else:
        same_batch = x.shape[0] == y.shape[0]
    if not same_batch:
        message = (
            "x and y: expected the same number of clouds B (first axis), but "
            f"{_came(*given)}; feed both the same batch"
        )
        raise ValueError(message)
    if exclude_self:
        if x_offsets is not None and y_offsets is not None:
            _check_same_clouds("exclude_self: x", x_offsets, "y", y_offsets)
        if x.shape != y.shape:
            message = f"exclude_self: expected x and y to be the same points, but {_came(*given)}"
            raise ValueError(message)
    if ranged:
        check_range(x, y)
    return Pair(x, y, x_offsets, y_offsets, ragged_x)


def _came(x: Tensor, y: Tensor) -> str:
    # Described only when needed: formatting sizes is not possible while compiling.
    return f"x is {describe(x)}, y is {describe(y)}"


def _check_match(x: Tensor, y: Tensor) -> None:
    if x.dtype != y.dtype:
        message = f"x and y: expected one dtype, but {_came(x, y)}; convert one with .to(dtype)"
        raise TypeError(message)
    if x.device != y.device:
        message = f"x and y: expected one device, but {_came(x, y)}; move one with .to(device)"
        raise ValueError(message)
    if x.shape[-1] != y.shape[-1]:
        message = f"x and y: expected the same number of channels C (last axis), but {_came(x, y)}"
        raise ValueError(message)
    if x.shape[-1] == 0:
        message = f"x and y: expected at least one channel, but {_came(x, y)}"
        raise ValueError(message)


def largest_square(t: Tensor) -> float:
    """How large the square of a value may be.

    |x - y|^2 is at most 4 C times as much; another 4 is room for sums of products.
    """
    return torch.finfo(accumulation_dtype(t.dtype)).max / (16 * t.shape[-1])


def check_range(x: Tensor, y: Tensor) -> None:
    """Raise if values that may be looked at are not finite, or so large that distances overflow."""
    _check_range("x", x)
    _check_range("y", y)


def _check_range(name: str, t: Tensor) -> None:
    if not look(t) or t.numel() == 0:
        return
    limit = largest_square(t) ** 0.5
    values = t.detach()
    if values.is_contiguous() and values.dtype in {torch.float32, torch.float64}:
        # One pass: no square exceeds the sum of all, which is no number where one of them is not.
        flat = values.view(-1)
        if float(flat.dot(flat)) < limit**2 / 2:
            return
    low, high = values.amin(), values.amax()  # several times as fast as aminmax
    if -limit <= float(low) and float(high) <= limit:
        return
    check_finite(name, t)
    message = (
        f"{name}: expected magnitudes of at most {limit:.1e}, so that squared distances do not "
        f"overflow, got {max(-float(low), float(high)):.1e} ({describe(t)}); normalize the features"
    )
    raise ValueError(message)


def mass(pair: Pair, weights: Tensor | None, *, exclude_self: bool) -> Tensor:
    """The sum of the weights that each point of x averages over, broadcastable to (B, N)."""
    if pair.x_offsets is not None and pair.y_offsets is not None:
        return _ragged_mass(pair, weights, pair.x_offsets, pair.y_offsets, exclude_self)
    size = pair.y.shape[1]
    if weights is None:
        dtype = accumulation_dtype(pair.x.dtype)
        return pair.x.new_full((1, 1), max(size - int(exclude_self), 0), dtype=dtype)
    _check_positive(weights.sum(1), weights.new_full((), size == 0, dtype=torch.bool))
    if not exclude_self or size == 0:
        return weights.sum(1, keepdim=True)
    largest = weights.detach() == weights.detach().amax(1, keepdim=True)
    return _others(weights, largest, lambda w: w.sum(1, keepdim=True).expand_as(weights))


def _ragged_mass(
    pair: Pair, weights: Tensor | None, x_offsets: Tensor, y_offsets: Tensor, exclude_self: bool
) -> Tensor:
    dtype, lengths = accumulation_dtype(pair.x.dtype), y_offsets.diff()

    def for_x(per_cloud: Tensor) -> Tensor:
        return per_cloud.repeat_interleave(x_offsets.diff(), output_size=pair.x.shape[0])

    if weights is None:
        return for_x((lengths - int(exclude_self)).clamp_min(0).to(dtype))
    clouds = torch.arange(len(lengths), device=weights.device)
    of = clouds.repeat_interleave(lengths, output_size=weights.shape[0])
    zeros = torch.zeros(len(lengths), dtype=dtype, device=weights.device)

    def total(w: Tensor) -> Tensor:
        return zeros.index_put((of,), w, accumulate=True)

    _check_positive(total(weights), lengths == 0)
    if not exclude_self:
        return for_x(total(weights))
    greatest = zeros.scatter_reduce(0, of, weights.detach(), "amax")
    return _others(weights, weights.detach() == greatest[of], lambda w: total(w)[of])


def _check_positive(total: Tensor, empty: Tensor) -> None:
    if look(total) and bool(((total.detach() == 0) & ~empty).any()):
        message = "weights: expected a positive sum in every cloud, got a sum of 0"
        raise ValueError(message)


def _others(w: Tensor, largest: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """For each weight the sum of the others in its cloud; `total` is a cloud's, for each of them.

    The difference to the sum of all is as good, but for a weight that outweighs the others.
    """
    alone = largest & (total(largest.to(w.dtype)) == 1)
    return torch.where(alone, total(torch.where(alone, 0.0, w)), total(w) - w)


def bias_of(
    pair: Pair, epsilon: list[float], potential: Tensor | None, log_weights: Tensor | None
) -> Tensor | None:
    """h_j = f_j + eps log b_j for each epsilon, (..., E): all the operator needs to know."""
    if potential is None and log_weights is None:
        return None
    dtype = accumulation_dtype(pair.y.dtype)
    bias = torch.zeros((), dtype=dtype, device=pair.y.device)
    if potential is not None:
        f = pair.along_y("potential", potential)
        check_finite("potential", f)
        bias = bias + f.to(dtype).unsqueeze(-1)
    if log_weights is not None:
        b = pair.along_y("log_weights", log_weights)
        if look(b) and bool((b.isnan() | (b == torch.inf)).any()):
            message = "log_weights: expected finite values or -inf, got NaN or +inf"
            raise ValueError(message)
        b = b.to(dtype)  # once, so that gradients are not rounded before they are added up
        # By numbers, one by one: a tensor made of a list would stop a GPU.
        bias = bias + torch.stack([b * eps for eps in epsilon], -1)
    return bias.expand(*pair.y.shape[:-1], len(epsilon)).contiguous()
