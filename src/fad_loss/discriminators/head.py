"""The teacher's own frozen layers score what the student produced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from fad_loss._errors import choose, describe, expected
from fad_loss._game import Game, Side
from fad_loss._points import Points
from fad_loss._snapshot import snapshot
from fad_loss.discriminators.base import (
    Discriminator,
    Scores,
    at_least_float32,
    same_points,
)
from fad_loss.discriminators.learned.layers import class_index
from fad_loss.standardize import Standardize, moments, unit_of

_POOLS: Mapping[str, Callable[[Points, Tensor], Tensor]] = {"max": Points.max, "mean": Points.mean}
_TARGETS = {"teacher": True, "labels": False}
_LAYOUTS = {"bnc": False, "bcn": True}
# Variances of levels forget with this rate.
_MOMENTUM = 0.01
_Opinion = tuple[Tensor, list[Tensor]]


class HeadDiscriminator(Discriminator):
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
    standardised ones: the loss hands them to it in the teacher's own units.

    **Levels.** The score can also compare what named layers of the head put out on the way,

    .. math::
        D(z) \mathrel{-}= \sum_l \operatorname{mean}_c
        \frac{\big(h_l(z) - h_l(r)\big)_c^2}{\sigma_{lc}^2}

    in units of the running variance :math:`\sigma^2` of what they put out for the teacher (plus
    0.01 of its mean over the channels, for units that are dead or hardly vary).

    Args:
        head: a module from features to logits over classes.
        pool: how the points of a cloud become the one feature that the head takes: ``"max"``
            (PointNet, DGCNN), ``"mean"``, or None for a head that works on every point by itself,
            as in segmentation. Global features ``(B, C)`` are pooled already: each is the one
            feature of its cloud, whatever `pool` says.
        target: ``"teacher"`` compares with the head's opinion of the teacher's feature,
            ``"labels"`` with the true class. Without pooling, ``"teacher"`` compares point i with
            point i.
        layout: the layout that a head without pooling takes: ``"bnc"`` for linear layers, which
            get rows ``(..., C)``; ``"bcn"`` for one-dimensional convolutions of kernel size 1.
        temperature: divides the logits.
        levels: paths of layers of the head whose outputs are compared too, "0" or "1.norm", say;
            for ``target="teacher"``. The empty path is what comes into the head.

    Shape:
        - a game of ``(B, N, C)`` and ``(B, M, C)``, or ragged ``(B, j, C)``, or global ``(B, C)``
        - its labels: for ``target="labels"``, ``(B,)``; without pooling also per point, ``(B, N)``
          or ragged; of unknown (negative) ones the score is 0
        - scores: ``(B,)`` with pooling; ``(B, N)`` or ragged ``(B, j)`` without; ``(1, B)`` of
          global features

    Raises:
        TypeError: `head` is no module, or TorchScript.
        ValueError: unknown options, a head that returns something other than one row of logits per
            feature, levels that it does not have, or labels that are missing or do not fit.

    Source: ours. Chen et al., "Knowledge distillation with the reused teacher classifier", CVPR
    2022, give the student the teacher's classifier for good; here it judges in training only.

    Example:
        >>> classifier = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> discriminator = HeadDiscriminator(classifier)
        >>> student, teacher = torch.randn(2, 100, 16), torch.randn(2, 128, 16)
        >>> scores = discriminator(Game.of(student, teacher))
        >>> scores.student.shape, scores.teacher
        (torch.Size([2]), tensor([0., 0.]))
        >>> list(discriminator.parameters())
        []
    """

    standardized = False

    default_weight = 0.3

    def __init__(
        self,
        head: nn.Module,
        *,
        pool: str | None = "max",
        target: str = "teacher",
        layout: str = "bnc",
        temperature: float = 1.0,
        levels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._pool = None if pool is None else choose("pool", pool, _POOLS)
        self._to_teacher = choose("target", target, _TARGETS)
        self._points_last = choose("layout", layout, _LAYOUTS)
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if not number or not 0 < temperature < float("inf"):
            raise expected("temperature", "a positive number", repr(temperature))
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
        self.corresponding = pool is None and target == "teacher"
        self.levels = _checked_levels(levels, self.head, self._to_teacher)
        for path in self.levels:
            if path:
                _replace(self.head, path, _Level(self.head.get_submodule(path)))
        units = nn.ModuleList(_LevelUnits() for _ in self.levels)
        self.level_units = units  # type: ignore[assignment]

    level_units: Sequence[_LevelUnits]

    def extra_repr(self) -> str:
        """What the options are."""
        return f"pool={self.pool!r}, target={self.target!r}, temperature={self.temperature}"

    def train(self, mode: bool = True) -> HeadDiscriminator:
        """Set the mode of this module; the head stays in evaluation mode."""
        super().train(mode)
        self.head.eval()
        return self

    def score(self, game: Game, side: Side) -> Tensor:
        """Score every cloud (or point): high if the teacher's head takes it for the right one."""
        return self._score(game, side, self._opinion(game.points(side), side))

    def scores(self, game: Game) -> Scores:
        """The scores of both sides; the teacher's features go through the head once."""
        opinions = self._opinion(game.student, "student"), self._opinion(game.teacher, "teacher")
        known = _still(opinions[1])
        return Scores(
            self._score(game, "student", opinions[0], known),
            self._score(game, "teacher", opinions[1], known),
        )

    def _score(
        self, game: Game, side: Side, opinion: _Opinion, known: _Opinion | None = None
    ) -> Tensor:
        points = game.points(side)
        if not self._to_teacher:
            scores = self._log_probability(opinion[0], points, game.labels)
        else:
            self._check_pairs(game)
            if known is None:
                known = _still(opinion) if side == "teacher" else self._of_teacher(game)
            scores = self._likeness(opinion, known, game.teacher)
        return scores if self._pools(points) else points.like(scores)

    def _likeness(self, opinion: _Opinion, known: _Opinion, teacher: Points) -> Tensor:
        (mine, levels), (wanted, known_levels) = opinion, known
        # A class that the head rules out (a logit of -inf) weighs nothing, and is no 0 * inf.
        difference = (mine - wanted).masked_fill(wanted == -torch.inf, 0)
        scores = (wanted.exp() * difference).sum(-1)
        for own, its, units in zip(levels, known_levels, self.level_units, strict=True):
            unit = units.of(self._level_points(its, teacher)).to(its.dtype)
            scores = scores - ((own - its) / unit).square().mean(-1)
        return scores

    @torch.no_grad()
    def prepare(self, channels: int) -> None:
        """See how wide the levels are for features of so many channels."""
        if self.levels:
            like = next((t for t in self.head.buffers() if t.is_floating_point()), torch.zeros(()))
            _, levels = self._opinion(Points(like.new_zeros(1, 1, channels)), "zeros")
            for level, units in zip(levels, self.level_units, strict=True):
                units.resize(level.shape[-1])

    def observe(self, game: Game) -> None:
        """Follow the variance of what the levels put out for the teacher."""
        if self.levels:
            _, known = self._of_teacher(game)
            for level, units in zip(known, self.level_units, strict=True):
                units.observe(self._level_points(level, game.teacher))

    def _pools(self, points: Points) -> bool:
        """Whether the points of a cloud become one feature; global features are such already."""
        return self._pool is not None and not points.is_global

    def _level_points(self, level: Tensor, teacher: Points) -> Points:
        """What a level put out, and which of it counts: of points, or of clouds that have any."""
        mask = teacher.mask
        if self._pools(teacher) and teacher.uneven:
            mask = teacher.lengths() > 0
        return Points(level) if mask is None else Points(level).only(mask)

    @torch.no_grad()
    def _of_teacher(self, game: Game) -> _Opinion:
        return self._opinion(game.teacher, "teacher")

    def _opinion(self, points: Points, name: str) -> _Opinion:
        """The head's log-probabilities, ``(B, K)`` or per point, and what the levels put out."""
        inputs = points.features
        if self._pool is not None and self._pools(points):
            inputs = self._pool(points, inputs)
        rows = inputs.flatten(0, -2)
        logits = self.head(rows.T.unsqueeze(0) if self._points_last else rows)
        logits = self._as_rows(f"of {name}", logits, rows)
        levels = []
        for path in self.levels:
            if path:
                level = self.head.get_submodule(path)
                seen = self._as_rows(f"of level {path!r}", level.seen, rows)
                level.seen = None  # type: ignore[assignment]
            else:
                seen = rows
            levels.append(at_least_float32(seen).reshape(*inputs.shape[:-1], seen.shape[-1]))
        # Log-probabilities of half-precision logits lose what the score is about.
        opinion = (at_least_float32(logits) / self.temperature).log_softmax(-1)
        return opinion.reshape(*inputs.shape[:-1], opinion.shape[-1]), levels

    def _as_rows(self, what: str, outputs: object, rows: Tensor) -> Tensor:
        """One row for each of the `rows` that went in."""
        if isinstance(outputs, Tensor):
            if self._points_last and outputs.dim() == 3 and outputs.shape[::2] == (1, len(rows)):
                return outputs.squeeze(0).mT
            if not self._points_last and outputs.dim() == 2 and len(outputs) == len(rows):
                return outputs
        raise expected(
            "head", f"one row of logits for each of the {len(rows)} rows {what}", outputs
        )

    def _check_pairs(self, game: Game) -> None:
        if not self._pools(game.student) and not same_points(game):
            message = (
                "teacher: expected features of the same clouds and points (pool=None) as the "
                f"student's, got {describe(game.teacher.tensor())} for "
                f"{describe(game.student.tensor())}"
            )
            raise ValueError(message)

    def _log_probability(self, opinion: Tensor, points: Points, labels: Tensor | None) -> Tensor:
        if labels is None:
            message = (
                "labels: with target='labels' the class of every cloud is needed, (B,) integers, "
                "got None"
            )
            raise ValueError(message)
        index = class_index(
            labels, points, opinion.shape[-1], per_cloud=self._pools(points)
        ).expand(opinion.shape[:-1])
        chosen = opinion.gather(-1, index.clamp_min(0).long().unsqueeze(-1)).squeeze(-1)
        return torch.where(index >= 0, chosen, 0.0)


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
        if getattr(module, "inplace", False):
            # It would overwrite the features that are scored, or what a level has put out.
            module.inplace = False  # type: ignore[assignment]
    return frozen


def _still(opinion: _Opinion) -> _Opinion:
    return opinion[0].detach(), [level.detach() for level in opinion[1]]


class _LevelUnits(Standardize):
    """What one unit of a level is, channel by channel; how many there are, the first batch says."""

    def __init__(self) -> None:
        super().__init__(0, _MOMENTUM)

    def of(self, points: Points) -> Tensor:
        """The running ones; before there are any, those of this batch."""
        latest = unit_of(*moments(points))
        if not self.mean.numel():
            return latest
        known, unit = snapshot(self.batches) > 0, snapshot(self.unit())
        return torch.where(known, unit.to(latest.dtype), latest)

    def observe(self, points: Points) -> None:
        """Follow the variance of the channels."""
        self.resize(points.channels)
        super().observe(points)

    def resize(self, channels: int) -> None:
        """Make room for so many channels, if there is other or none."""
        if channels != len(self.mean):
            self.mean, self.variance = self.mean.new_zeros(channels), self.mean.new_ones(channels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, whether more or less was seen before."""
        mean = state_dict.get(f"{prefix}mean")
        if isinstance(mean, Tensor) and mean.dim() == 1:
            self.resize(len(mean))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Level(nn.Module):
    """A layer that remembers what it put out last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: object = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.layer(*args, **kwargs)
        # What follows may work in place.
        self.seen = outputs.clone() if isinstance(outputs, Tensor) else outputs
        return outputs


def _replace(module: nn.Module, path: str, by: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, by)


def _checked_levels(levels: object, head: nn.Module, to_teacher: bool) -> tuple[str, ...]:
    if not isinstance(levels, (tuple, list)) or not all(isinstance(p, str) for p in levels):
        wanted = "a sequence of paths of layers of the head"
        raise expected("levels", wanted, describe(levels), error=TypeError)
    if levels and not to_teacher:
        raise expected("levels", "none with target='labels', which knows no teacher", repr(levels))
    known = [name for name, _ in head.named_modules()]
    for path in levels:
        if path not in known:
            near = get_close_matches(path, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else ""
            raise expected(
                "levels", f"layers of the head, {', '.join(map(repr, known))}", repr(path), remedy
            )
    return tuple(levels)
