"""The teacher's own frozen layers score what the student produced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fad_loss._checks import check_tensor
from fad_loss._errors import choose, describe
from fad_loss._ragged import cloud_mean, is_ragged, pack
from fad_loss.discriminators._layers import class_index, cloud_max, packed, repacked

_POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {"max": cloud_max, "mean": cloud_mean}
_TARGETS = {"teacher": True, "labels": False}
_LAYOUTS = {"bnc": False, "bcn": True}


class HeadDiscriminator(nn.Module):
    r"""The teacher's own layers, frozen, say what they make of the features.

    The part of the teacher that follows the distilled layer, its classifier say, turns features
    into class logits, and the score is the log-probability of the right answer. With
    :math:`p(z) = \mathrm{softmax}(\mathrm{head}(z) / T)`:

    .. math::
        D(z) = -\mathrm{KL}\big(p(r) \,\|\, p(z)\big) \quad (\texttt{target="teacher"}), \qquad
        D(z) = \log p_y(z) \quad (\texttt{target="labels"})

    where r is the teacher's feature of the same cloud, and y the true class. With
    ``target="teacher"`` real features score exactly 0, and others less, the more the teacher's own
    head would notice the difference; no labels are needed. There is nothing to learn: like the
    teacher that it comes from, this discriminator is fixed, and its loss is a number to look at.

    **What happens to your head.** It is *copied* at construction, with the weights it has then
    (load the checkpoint first). The copy is in evaluation mode and stays there, whatever
    ``train()`` says, so BatchNorm uses its running statistics and Dropout is off. Its parameters
    become buffers that are not saved: no optimizer gets them from ``parameters()``, no
    ``state_dict`` repeats the teacher, and ``to(device)`` moves them. The original is neither
    changed nor watched.

    **The features' scale.** The head was trained on the teacher's features as they are, not on
    standardised ones: use ``FeatureAdversarialLoss(..., normalize=False)``.

    Args:
        head: a module from features to logits over classes.
        pool: how the points of a cloud become the one feature that the head takes: ``"max"``
            (PointNet, DGCNN), ``"mean"``, or None for a head that works on every point by itself:
            segmentation, and global features ``(B, C)``, which arrive as one set ``(1, B, C)``.
        target: ``"teacher"`` compares with the head's opinion of the teacher's feature,
            ``"labels"`` with the true class. Without pooling, ``"teacher"`` compares point i with
            point i.
        layout: the layout that a head without pooling takes: ``"bnc"`` for linear layers, which
            get rows ``(..., C)``; ``"bcn"`` for one-dimensional convolutions of kernel size 1.
        temperature: divides the logits.

    Shape:
        - features: ``(B, N, C)`` or ragged ``(B, j, C)``
        - reference: the teacher's features of the same clouds, for ``target="teacher"``
        - labels: for ``target="labels"``, ``(B,)``; without pooling also per point, ``(B, N)`` or
          ragged; of unknown (negative) ones the score is 0
        - output: ``(B,)`` with pooling; ``(B, N)`` or ragged ``(B, j)`` without

    Raises:
        TypeError: `head` is no module, or TorchScript.
        ValueError: unknown options, a head that returns something other than one row of logits per
            feature, a reference or labels that are missing or do not fit.

    Source: ours. Chen et al., "Knowledge distillation with the reused teacher classifier", CVPR
    2022, give the student the teacher's classifier for good; here it judges in training only.

    Example:
        >>> classifier = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> discriminator = HeadDiscriminator(classifier)
        >>> student, teacher = torch.randn(2, 100, 16), torch.randn(2, 128, 16)
        >>> discriminator(student, reference=teacher).shape
        torch.Size([2])
        >>> discriminator(teacher, reference=teacher)
        tensor([0., 0.])
        >>> list(discriminator.parameters())
        []
    """

    standardized: ClassVar[bool] = False
    """Whether features should be standardised before they come here."""

    default_weight: ClassVar[float] = 3.0
    """The best one beside ``"paired"``, of 0.3, 3 and 30, in
    ``examples/study/results/report.md``."""

    def __init__(
        self,
        head: nn.Module,
        *,
        pool: str | None = "max",
        target: str = "teacher",
        layout: str = "bnc",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self._pool = None if pool is None else choose("pool", pool, _POOLS)
        self._to_teacher = choose("target", target, _TARGETS)
        self._points_last = choose("layout", layout, _LAYOUTS)
        if not 0 < temperature < float("inf"):
            message = f"temperature: expected a positive number, got {temperature!r}"
            raise ValueError(message)
        if pool is not None and self._points_last:
            message = (
                "layout: 'bcn' is for a head that takes points, pool=None; the pooled feature is "
                f"(B, C), got pool={pool!r}"
            )
            raise ValueError(message)
        self.pool = pool
        self.target = target
        self.temperature = float(temperature)
        _check_head(head)
        self.head = _frozen_copy(head)
        self.head.eval()

    def extra_repr(self) -> str:
        """What the options are."""
        return f"pool={self.pool!r}, target={self.target!r}, temperature={self.temperature}"

    def train(self, mode: bool = True) -> HeadDiscriminator:
        """Set the mode of this module; the head stays in evaluation mode."""
        super().train(mode)
        self.head.eval()
        return self

    def forward(
        self, features: Tensor, reference: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Score every cloud (or point): high if the teacher's head takes it for the right one."""
        _check_points("features", features)
        opinion = self._opinion("features", features)
        if self._to_teacher:
            wanted = self._wanted(features, reference)
            # A class that the head rules out (a logit of -inf) weighs nothing, and is no 0 * inf.
            difference = (opinion - wanted).masked_fill(wanted == -torch.inf, 0)
            scores = (wanted.exp() * difference).sum(-1)
        else:
            scores = self._log_probability(opinion, features, labels)
        return scores if self._pool is not None else repacked(scores, features)

    def _opinion(self, name: str, features: Tensor) -> Tensor:
        """The head's log-probabilities, ``(B, K)`` or those of the packed points."""
        inputs = packed(features) if self._pool is None else self._pool(features)
        rows = inputs.flatten(0, -2)
        if self._points_last:
            logits = self.head(rows.T.unsqueeze(0))
            fits = logits.dim() == 3 and logits.shape[::2] == (1, rows.shape[0])
            logits = logits.squeeze(0).mT if fits else logits
        else:
            logits = self.head(rows)
            fits = logits.dim() == 2 and logits.shape[0] == rows.shape[0]
        if not fits:
            message = (
                f"head: expected one row of logits for each of the {rows.shape[0]} rows of {name}, "
                f"got {describe(logits)}"
            )
            raise ValueError(message)
        # Log-probabilities of half-precision logits lose what the score is about.
        half = logits.dtype in {torch.float16, torch.bfloat16}
        logits = logits.float() if half else logits
        opinion: Tensor = (logits / self.temperature).log_softmax(-1)
        return opinion.reshape(*inputs.shape[:-1], opinion.shape[-1])

    def _wanted(self, features: Tensor, reference: Tensor | None) -> Tensor:
        """The head's log-probabilities for the teacher's features."""
        if reference is None:
            message = (
                "reference: with target='teacher' the teacher's features of the same clouds are "
                "needed, got None; pass reference=teacher_features, or use target='labels'"
            )
            raise ValueError(message)
        _check_points("reference", reference)
        fits = reference.shape[0] == features.shape[0]
        if self._pool is None:
            fits = fits and (
                is_ragged(reference) == is_ragged(features)
                and packed(reference).shape[:-1] == packed(features).shape[:-1]
            )
        if not fits:
            what = "clouds" if self._pool is not None else "clouds and points (pool=None)"
            message = (
                f"reference: expected the teacher's features of the same {what} as features, got "
                f"{describe(reference)} for {describe(features)}"
            )
            raise ValueError(message)
        return self._opinion("reference", reference.detach()).detach()

    def _log_probability(self, opinion: Tensor, features: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            message = (
                "labels: with target='labels' the class of every cloud is needed, (B,) integers, "
                "got None"
            )
            raise ValueError(message)
        index = class_index(
            labels, features, opinion.shape[-1], per_cloud=self._pool is not None
        ).expand(opinion.shape[:-1])
        chosen = opinion.gather(-1, index.clamp_min(0).long().unsqueeze(-1)).squeeze(-1)
        return torch.where(index >= 0, chosen, 0.0)


def _check_points(name: str, features: Tensor) -> None:
    check_tensor(name, features)
    rank = pack(features)[0].dim() + 1 if is_ragged(features) else features.dim()
    if rank != 3:
        message = f"{name}: expected (B, N, C) or a ragged cloud, got {describe(features)}"
        raise ValueError(message)


def _check_head(head: object) -> None:
    if not isinstance(head, nn.Module) or isinstance(head, torch.jit.ScriptModule):
        message = (
            f"head: expected a torch.nn.Module (not TorchScript), got {type(head).__name__}; "
            "layers in sequence go into torch.nn.Sequential"
        )
        raise TypeError(message)


def _frozen_copy(head: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are buffers that no state_dict has."""
    plain = getattr(head, "_orig_mod", head)
    frozen: nn.Module = copy.deepcopy(plain)
    shared: dict[int, Tensor] = {}
    for module in frozen.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            del module._parameters[name]
            tensor = shared.setdefault(id(parameter), parameter.detach())
            module.register_buffer(name, tensor, persistent=False)
        module._non_persistent_buffers_set.update(module._buffers)
    return frozen
