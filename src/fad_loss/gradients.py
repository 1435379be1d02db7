"""The student's gradient on its way back: the weight, and its share of what the task pulls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fad_loss._ragged import is_ragged, pack, source

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GradientBalance", "weigh_gradient"]

# The share of the task's pull where none is named: one that stays, and one that falls to 0.
DEFAULT_SHARES = (0.3, 1.0)
# What was seen long ago is forgotten at this rate.
_MOMENTUM = 0.05
# The factor stays within this and its inverse, whatever is measured.
_LARGEST = 1e3


def weigh_gradient(features: Tensor, weight: Tensor) -> Tensor:
    """The same features, whose gradient is multiplied by `weight` on its way back.

    Example:
        >>> features = torch.ones(2, requires_grad=True)
        >>> weigh_gradient(features, torch.tensor(3.0)).sum().backward()
        >>> features.grad
        tensor([3., 3.])
    """
    if not features.requires_grad:
        return features
    still = features.detach()
    # The difference is exactly 0.
    return still + weight.to(features.dtype) * (features - still)


def part_of_weight(steps: Tensor, warmup_steps: int, total_steps: int | None) -> Tensor:
    """How much of the weight counts after so many steps: it rises first, and may fall to the end.

    Example:
        >>> part_of_weight(torch.tensor([0.0, 4, 8, 16]), warmup_steps=2, total_steps=16)
        tensor([0.5000, 0.7500, 0.5000, 0.0000])
    """
    part = torch.ones_like(steps)
    if warmup_steps:
        part = ((steps + 1) / warmup_steps).clamp(max=1)
    if total_steps is not None:
        part = part * (1 - steps / total_steps).clamp(min=0)
    return part


class _Measured(torch.autograd.Function):
    """A copy, which adds the norm of its gradient, over `weight`, to an element of that of `norms`.

    What a hook does elsewhere, for compiled graphs, whose backward pass has none, and for copies.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, norms: Tensor, place: int, weight: Tensor) -> Tensor:
        ctx.place, ctx.dtype = place, norms.dtype
        ctx.save_for_backward(weight)
        return features.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        norm = (_norm(gradient) / ctx.saved_tensors[0]).to(ctx.dtype).reshape(1)
        return gradient, F.pad(norm, (ctx.place, 1 - ctx.place)), None, None


class GradientBalance(nn.Module):
    r"""The factor that makes two gradients at the same features equally large.

    .. math::
        \beta = \frac{\overline{\|g_\text{task}\|}}{\overline{\|g_\text{own}\|}}

    where :math:`g_\text{own}` is the gradient that an unweighted term sends to the student's
    features, :math:`g_\text{task}` all others that arrive there, and a bar a running average. Both
    are measured in the backward passes that the loop makes, one for all or one for each loss, by
    hooks, and used from the next step on: the factor is a constant to every gradient. Of several
    passes over the same features (a probe by `torch.autograd.grad` before the real one, say) the
    last in which a gradient came counts. Where the features are a view of another tensor
    (transposed, say, or some of its points), or `ragged` of one, what arrives there counts. A loss
    scaler, or a division for gradient accumulation, multiplies both and cancels. What is not
    finite, or where one of the two is zero, is not counted. The factor stays between 1/1000 and
    1000.

    The buffers are saved with a ``state_dict``. In a process group the measurements of all ranks
    are averaged, so that all use the same factor: once in every training step, and never by the
    loss in evaluation or under `no_grad`, where one rank may be alone.

    In compiled graphs, whose backward pass has no hooks, and where the term sees a copy of what a
    layer returns, the layer's output has to go through `beside` on its way to the other losses; a
    `Distiller` sees to that. What else the layer itself makes of it does not count there, and norms
    of several passes, and of several calls of the layer in one, are added.

    Args:
        otherwise: the factor as long as nothing was measured, and in compiled graphs in which
            nobody calls `beside`. None: 1, and such graphs are refused.

    Raises:
        RuntimeError: in a compiled graph, if nobody calls `beside`, without `otherwise`.

    Source: balancing by gradient norms is from Chen et al., "GradNorm", ICML 2018, and by the last
    layer's gradients, as here, from Esser et al., "Taming transformers", CVPR 2021.

    Example:
        >>> balance = GradientBalance()
        >>> features = torch.ones(2, 3, requires_grad=True)
        >>> own = balance.tap(features, torch.tensor(1.0))
        >>> (10 * features.sum() + own.sum()).backward()
        >>> balance.factor()
        tensor(10.)
    """

    task: Tensor
    own: Tensor
    measured: Tensor
    pending: Tensor

    def __init__(self, otherwise: float | None = None) -> None:
        """See the class."""
        super().__init__()
        self.otherwise = otherwise
        self.register_buffer("task", torch.zeros(()))
        self.register_buffer("own", torch.zeros(()))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))
        # What the backward passes of the latest step have shown, until the next one counts it: the
        # norms of the task's gradient and of the term's own. Saved, so that a checkpoint between
        # the two loses nothing.
        self.register_buffer("pending", torch.zeros(2))
        self._handles: list[Any] = []
        self._counted = False
        self._attached = False
        self._tie()

    def _tie(self) -> None:
        """Let `pending` be where autograd adds what compiled backward passes measure."""
        self._norms = torch.zeros_like(self.pending).requires_grad_()
        self._norms.grad = self.pending

    def factor(self, *, count: bool = True) -> Tensor:
        """What to multiply the term by; `count` what the latest backward passes have shown."""
        before = torch.full_like(self.task, 1.0 if self.otherwise is None else self.otherwise)
        if self.otherwise is not None and torch.compiler.is_compiling() and not self._attached:
            return before
        if count:
            self._count()
        ratio = (self.task / self.own).clamp(1 / _LARGEST, _LARGEST)
        return torch.where(self.measured > 0, ratio, before)

    def tap(self, features: Tensor, weight: Tensor) -> Tensor:
        """The same features, for the term to use: what it sends back is told from all else.

        Args:
            features: the student's, which other losses see as well; or a view of them (transposed,
                say), or `ragged` of them, while the others see what it was made of.
            weight: what the term's gradient is multiplied by this time, the factor included.
        """
        if torch.compiler.is_compiling():
            if self._attached and features.requires_grad and not is_ragged(features):
                return self._with_norm(features, 1, weight.detach())
            if self._attached or self.otherwise is not None:
                return features
            message = (
                "balance: the gradients cannot be measured inside torch.compile(fullgraph=True), "
                "whose backward pass has no hooks; compile the networks, leave the loss outside, "
                'or set balance="auto"'
            )
            raise RuntimeError(message)
        self._count()
        if not features.requires_grad:
            return features
        weight, sent, self._counted = weight.detach().clone(), [], False
        own = features.clone() if is_ragged(features) else features.view_as(features)
        # A copy: autograd adds the other gradients to this one in place.
        own.register_hook(lambda gradient: sent.append(gradient.detach().clone()))  # type: ignore[no-untyped-call]
        latest: dict[int, Tensor] = {}  # what the term sent in that backward pass

        @torch.no_grad()
        def arrived(total: Tensor) -> None:
            """A backward pass has brought `total`, of which the term sent what came before."""
            rest = _values(total.detach())
            latest.clear()
            if not sent:
                self._see(rest)
                return
            mine = latest[_backward_pass()] = _values(sum(sent[1:], sent[0]))
            sent.clear()
            self._see(rest - mine, mine / weight)

        @torch.no_grad()
        def arrived_before(total: Tensor, view: Tensor | None = None) -> None:
            """The same where other losses see what the features are a view, or ragged, of."""
            mine = latest.get(_backward_pass())
            total = total.detach() if view is None else _through(view, total.detach())
            self._see(total if mine is None else total - mine)

        watched = [(features, arrived)]
        values: Tensor | None = features
        if is_ragged(features):
            values = source(features)
            if values is not None:
                watched.append((values, arrived_before))
        base = None if values is None else values._base
        if base is not None and base.numel() >= features.numel():
            watched.append((base, partial(arrived_before, view=values)))
        self._handles = [
            one.register_hook(call)  # type: ignore[no-untyped-call]
            for one, call in watched
            if one.requires_grad
        ]
        return own

    def attach(self) -> Callable[[Tensor], Tensor]:
        """`beside`, for somebody who calls it wherever the layer is compiled, or copied."""
        self._attached = True
        return self.beside

    def beside(self, output: Tensor) -> Tensor:
        """A layer's output as all but the term are to see it, if the term sees a copy."""
        if not (self.training and output.requires_grad) or is_ragged(output):
            return output
        return self._with_norm(output, 0, torch.ones((), device=output.device))

    def _with_norm(self, values: Tensor, place: int, weight: Tensor) -> Tensor:
        """A copy of the values, whose gradient's norm comes to that place in `pending`."""
        copy: Tensor = _Measured.apply(values, self._norms, place, weight)  # type: ignore[no-untyped-call]
        return copy

    def _see(self, task: Tensor, own: Tensor | None = None) -> None:
        """Keep the norms of what a backward pass has brought, unless they are 0."""
        norms = [_norm(task), task.new_zeros(()) if own is None else _norm(own)]
        seen = torch.stack([n.to(self.pending.dtype) for n in norms])
        self.pending.copy_(torch.where(seen == 0, self.pending, seen))

    @torch.no_grad()
    def _count(self) -> None:
        """Count what the backward passes since the last call have shown."""
        if not torch.compiler.is_compiling():
            if self._counted:
                return
            self._counted = True
            for handle in self._handles:
                handle.remove()  # a leaf would keep it
            self._handles = []
            added = self._norms.grad
            if added is not self.pending or added.device != self._norms.device:
                # With create_graph=True it was added to a copy of what was there.
                if added is not None:
                    self.pending.copy_(torch.maximum(self.pending, added.to(self.pending)))
                self._tie()
        usable = (torch.isfinite(self.pending) & (self.pending > 0)).all()
        seen = torch.cat([self.pending, usable.to(self.pending).reshape(1)])
        seen = torch.where(usable, seen, 0.0)
        self.pending.zero_()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        known = seen[2] > 0
        self.measured.add_(known)
        rate = (1 / self.measured.clamp(min=1)).clamp(min=_MOMENTUM).to(seen.dtype) * known
        self.task.lerp_(seen[0] / seen[2].clamp_min(1), rate)
        self.own.lerp_(seen[1] / seen[2].clamp_min(1), rate)

    def _load_from_state_dict(self, *args: Any) -> None:
        """What was pending when it was saved is to be counted."""
        super()._load_from_state_dict(*args)
        self._counted = False
        self._tie()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def __getstate__(self) -> dict[str, object]:
        """A copy watches no backward pass of the original."""
        return {k: v for k, v in self.__dict__.items() if k != "_norms"} | {"_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tie()


def _backward_pass() -> int:
    """Which of the running process's backward passes this is."""
    return torch._C._current_graph_task_id()


def _through(view: Tensor, of_base: Tensor) -> Tensor:
    """What the gradient of its base is at the elements of a view."""
    base = view._base
    if base is None:
        raise RuntimeError("not a view")
    placed = torch.empty_strided(
        base.shape, base.stride(), dtype=of_base.dtype, device=of_base.device
    ).copy_(of_base)
    offset = view.storage_offset() - base.storage_offset()
    return placed.as_strided(view.shape, view.stride(), offset)


def _norm(gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient.to(wide))
    return norm


def _values(t: Tensor) -> Tensor:
    return pack(t)[0] if is_ragged(t) else t
