"""How strongly the adversarial term pulls at the student, held at a share of what the task does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fad_loss._ragged import is_ragged, pack

__all__ = ["GradientBalance"]

# What was seen long ago is forgotten at this rate.
_MOMENTUM = 0.05
# The factor stays within this and its inverse, whatever is measured.
_LARGEST = 1e3


class GradientBalance(nn.Module):
    r"""The factor that makes two gradients at the same features equally large.

    .. math::
        \beta = \frac{\overline{\|g_\text{task}\|}}{\overline{\|g_\text{own}\|}}

    where :math:`g_\text{own}` is the gradient that an unweighted term sends to the student's
    features, :math:`g_\text{task}` all others that arrive there, and a bar a running average. Both
    are measured during the user's own backward pass, by hooks, and used from the next step on: the
    factor is a constant to every gradient. A loss scaler, or a division for gradient accumulation,
    multiplies both and cancels. What is not finite, or where one of the two is zero, is not
    counted. The factor stays between 1/1000 and 1000.

    The buffers are saved with a ``state_dict``; ``DistributedDataParallel`` hands out those of rank
    0, so all ranks use the same factor.

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

    def factor(self) -> Tensor:
        """What to multiply the term by: 1 until something was measured."""
        ratio = (self.task / self.own).clamp(1 / _LARGEST, _LARGEST)
        return torch.where(self.measured > 0, ratio, 1.0)

    def tap(self, features: Tensor, weight: Tensor) -> Tensor:
        """The same features, for the term to use: what it sends back is told from all else.

        Args:
            features: the student's, which other losses see as well.
            weight: what the term is multiplied by this time, the factor included.
        """
        if not features.requires_grad:
            return features
        if torch.compiler.is_compiling():
            message = (
                "balance: the gradients cannot be measured inside torch.compile(fullgraph=True), "
                "whose backward pass has no hooks; compile the networks and leave the loss outside"
            )
            raise RuntimeError(message)
        sent: list[Tensor] = []
        own = features.clone() if is_ragged(features) else features.view_as(features)
        # A copy: autograd adds the other gradients to this one in place.
        own.register_hook(lambda gradient: sent.append(gradient.detach().clone()))  # type: ignore[no-untyped-call]

        def arrived(total: Tensor) -> None:
            handle.remove()  # a leaf would keep it
            if sent:
                self._measure(_values(total.detach()), _values(sum(sent[1:], sent[0])), weight)

        handle = features.register_hook(arrived)  # type: ignore[no-untyped-call]
        return own

    @torch.no_grad()
    def _measure(self, total: Tensor, own: Tensor, weight: Tensor) -> None:
        wide = torch.promote_types(total.dtype, torch.float32)
        total, own = total.to(wide), own.to(wide)
        task = torch.linalg.vector_norm(total - own).to(self.task.dtype)
        alone = (torch.linalg.vector_norm(own) / weight).to(self.task.dtype)
        usable = torch.isfinite(task + alone) & (task > 0) & (alone > 0)
        self.measured.add_(usable)
        rate = (1 / self.measured.clamp(min=1)).clamp(min=_MOMENTUM).to(self.task.dtype)
        for average, latest in ((self.task, task), (self.own, alone)):
            average.copy_(torch.where(usable, torch.lerp(average, latest, rate), average))


def _values(t: Tensor) -> Tensor:
    return pack(t)[0] if is_ragged(t) else t
