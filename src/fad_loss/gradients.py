"""The student's gradient on its way back: the weight, and its share of what the task pulls."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fad_loss._ragged import is_ragged, pack

__all__ = ["GradientBalance", "weigh_gradient"]

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


class GradientBalance(nn.Module):
    r"""The factor that makes two gradients at the same features equally large.

    .. math::
        \beta = \frac{\overline{\|g_\text{task}\|}}{\overline{\|g_\text{own}\|}}

    where :math:`g_\text{own}` is the gradient that an unweighted term sends to the student's
    features, :math:`g_\text{task}` all others that arrive there, and a bar a running average. Both
    are measured in the backward passes that the loop makes, one for all or one for each loss, by
    hooks, and used from the next step on: the factor is a constant to every gradient. Of several
    passes over the same features (a probe by `torch.autograd.grad` before the real one, say) the
    last in which a gradient came counts. A loss scaler, or a division for gradient accumulation,
    multiplies both and cancels. What is not finite, or where one of the two is zero, is not
    counted. The factor stays between 1/1000 and 1000.

    The buffers are saved with a ``state_dict``. In a process group the measurements of all ranks
    are averaged, so that all use the same factor.

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

    def __init__(self) -> None:
        """See the class."""
        super().__init__()
        self.register_buffer("task", torch.zeros(()))
        self.register_buffer("own", torch.zeros(()))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))
        self._watch: _Watch | None = None

    def factor(self) -> Tensor:
        """What to multiply the term by: 1 until something was measured."""
        self._collect()
        ratio = (self.task / self.own).clamp(1 / _LARGEST, _LARGEST)
        return torch.where(self.measured > 0, ratio, 1.0)

    def tap(self, features: Tensor, weight: Tensor) -> Tensor:
        """The same features, for the term to use: what it sends back is told from all else.

        Args:
            features: the student's, which other losses see as well.
            weight: what the term's gradient is multiplied by this time, the factor included.
        """
        if torch.compiler.is_compiling():
            message = (
                "balance: the gradients cannot be measured inside torch.compile(fullgraph=True), "
                "whose backward pass has no hooks; compile the networks and leave the loss outside"
            )
            raise RuntimeError(message)
        self._collect()
        if not features.requires_grad:
            return features
        self._watch = _Watch(weight.detach().clone())
        return self._watch.tap(features)

    @torch.no_grad()
    def _collect(self) -> None:
        """Count what the backward passes since the last call have shown."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.leave()
        task, alone = watch.task.to(self.task), watch.own.to(self.own)
        usable = torch.isfinite(task + alone) & (task > 0) & (alone > 0)
        seen = torch.stack([torch.where(usable, n, 0.0) for n in (task, alone, usable.to(task))])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        ranks = seen[2].clamp_min(1)
        self.measured.add_(seen[2] > 0)
        rate = (1 / self.measured.clamp(min=1)).clamp(min=_MOMENTUM).to(self.task.dtype)
        rate = rate * (seen[2] > 0)
        for average, latest in ((self.task, seen[0]), (self.own, seen[1])):
            average.lerp_(latest / ranks, rate)

    def __getstate__(self) -> dict[str, object]:
        """A copy watches no backward pass of the original."""
        return {**self.__dict__, "_watch": None}


class _Watch:
    """The norms of the gradients that arrive at the features of one step, pass by pass."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.task = weight.new_zeros(())
        self.own = weight.new_zeros(())
        self.sent: list[Tensor] = []

    def tap(self, features: Tensor) -> Tensor:
        own = features.clone() if is_ragged(features) else features.view_as(features)
        # A copy: autograd adds the other gradients to this one in place.
        own.register_hook(lambda gradient: self.sent.append(gradient.detach().clone()))  # type: ignore[no-untyped-call]
        self.handle = features.register_hook(partial(_arrived, self))  # type: ignore[no-untyped-call]
        return own

    def leave(self) -> None:
        self.handle.remove()  # a leaf would keep it


@torch.no_grad()
def _arrived(watch: _Watch, total: Tensor) -> None:
    """A backward pass has brought `total`, of which the term sent what came before."""
    sent, watch.sent = watch.sent, []
    rest = _values(total.detach())
    if sent:
        own = _values(sum(sent[1:], sent[0]))
        rest = rest - own
        watch.own = _latest(watch.own, _norm(own) / watch.weight)
    watch.task = _latest(watch.task, _norm(rest))


def _latest(before: Tensor, now: Tensor) -> Tensor:
    return torch.where(now > 0, now.to(before.dtype), before)


def _norm(gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient.to(wide))
    return norm


def _values(t: Tensor) -> Tensor:
    return pack(t)[0] if is_ragged(t) else t
