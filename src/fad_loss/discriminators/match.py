"""Recognition: whose features are these, among all clouds of the batch?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fad_loss import ops
from fad_loss._errors import choose, describe
from fad_loss._game import Game, Side
from fad_loss._points import Points
from fad_loss._snapshot import snapshot
from fad_loss.discriminators.base import Discriminator
from fad_loss.discriminators.learned.layers import check_channels, check_width, pooled

_DISTANCES = {name: name for name in ("pooled", "energy", "chamfer")}
# The temperature's logarithm stays within these: outside, probabilities are all 0 or 1, or equal.
_COLDEST, _WARMEST = math.log(1e-3), math.log(1e2)


class MatchDiscriminator(Discriminator):
    r"""One score per cloud: how surely it is recognised as its own among the teacher's clouds.

    .. math::
        D_i = \log \frac{\exp(-d(S_i, T_i) / \tau)}{\sum_j \exp(-d(S_i, T_j) / \tau)}

    The batch of the teacher's clouds is the discriminator. Other discriminators ask whether a cloud
    looks like the teacher's, and let cloud i imitate cloud j; this one does not. With a hinge or
    Wasserstein objective the student's term is the cross entropy of being recognised.

    The distance d, in units that follow the teacher's features, is one of

    - ``"pooled"``: squared, of the mean and the maximum over the points; in units of the mean
      squared distance between the teacher's clouds;
    - ``"energy"``: the energy distance of the points as sets, in units of the mean distance between
      the points of a teacher's cloud;
    - ``"chamfer"``: the Chamfer distance, in units of their mean squared distance.

    Args:
        channels: the features' channels.
        distance: "pooled", "energy" or "chamfer".
        temperature: :math:`\tau` to begin with; its logarithm is a parameter, which the
            discriminator's loss trains.
        queue: how many of the teacher's past clouds to recognise a cloud among, besides those of
            the batch; for "pooled". It holds pooled features, fills while training, and is part of
            the state dict.

    Shape:
        - a game of ``(B, N, C)`` and ``(B, M, C)``, masked or not, or global ``(B, C)``; or ragged
          ones for "pooled"
        - scores: ``(B,)``, at most 0; ``(1, B)`` of global features

    Raises:
        ValueError: an unknown distance, a temperature that is not positive, a queue with another
            distance than "pooled", a wrong number of channels, or a single cloud without a queue.

    Cost:
        "pooled": O(B^2 C). The others compare all B^2 pairs of sets, B calls of
        `fad_loss.ops.kernel_mean` or `fad_loss.ops.nearest` on the whole batch.

    Source: the cross entropy over a batch is van den Oord et al., *Representation learning with
    contrastive predictive coding*, 2018, and for distillation Tian et al., *Contrastive
    representation distillation*, ICLR 2020; the queue He et al., *MoCo*, CVPR 2020. The teacher's
    sets as the classes are ours.

    Note:
        Under `DistributedDataParallel` every process compares within its own part of the batch.

    Example:
        >>> discriminator = MatchDiscriminator(16)
        >>> teacher = torch.randn(4, 100, 16) + 3 * torch.randn(4, 1, 16)
        >>> near = discriminator(Game.of(teacher + 0.1, teacher), "student")
        >>> wrong = discriminator(Game.of(teacher.roll(1, 0), teacher), "student")
        >>> bool((near > wrong).all())
        True
    """

    default_weight = 0.3
    """The best weight in ``examples/study/results/report.md``."""

    past: Tensor
    filled: Tensor

    def __init__(
        self,
        channels: int,
        *,
        distance: str = "pooled",
        temperature: float = 0.1,
        queue: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_width("channels", channels)
        self.channels = channels
        self.distance = choose("distance", distance, _DISTANCES)
        if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
            message = f"temperature: expected a positive number, got {temperature!r}"
            raise ValueError(message)
        if isinstance(queue, bool) or not isinstance(queue, int) or queue < 0:
            message = f"queue: expected a number of clouds, 0 or more, got {queue!r}"
            raise ValueError(message)
        if queue and distance != "pooled":
            message = (
                f'queue: past clouds are kept as pooled features, for distance="pooled", got '
                f"queue={queue} with distance={distance!r}"
            )
            raise ValueError(message)
        self.queue, self.backend = queue, backend
        # The others compare all pairs of points.
        self.default_max_points = None if distance == "pooled" else 64
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.register_buffer("past", torch.zeros(queue, 2 * channels))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Shown by ``print(discriminator)``."""
        return f"distance={self.distance!r}, queue={self.queue}"

    def score(self, game: Game, side: Side) -> Tensor:
        """Score every cloud: the log-probability of being recognised as its own."""
        self._check(game)
        points, known = _as_clouds(game.points(side)), _as_clouds(game.teacher.detach())
        compare = {"pooled": self._pooled, "energy": self._energy, "chamfer": self._chamfer}
        distance = compare[self.distance](points, known)
        temperature = self.log_temperature.clamp(_COLDEST, _WARMEST).exp()
        logits = (-distance / temperature).masked_fill(~self._candidates(known), -torch.inf)
        scores = logits.log_softmax(-1).diagonal()
        return scores.unsqueeze(0) if game.student.is_global else scores

    def _candidates(self, known: Points) -> Tensor:
        """Whom a cloud may be taken for, (B, B + queue): itself, and what is no empty cloud."""
        itself = torch.eye(known.batch, dtype=torch.bool, device=known.features.device)
        place = torch.arange(self.queue, device=known.features.device)
        # The rest of the queue is still empty.
        past = (place < snapshot(self.filled)).expand(known.batch, -1)
        return torch.cat([itself | (known.lengths() > 0), past], -1)

    @torch.no_grad()
    def observe(self, game: Game) -> None:
        """Put the teacher's clouds into the queue, once both sides were scored without them."""
        if self.queue:
            teacher = _as_clouds(game.teacher)
            counts = teacher.lengths() > 0
            latest = pooled(teacher).to(self.past.dtype)[
                counts.argsort(descending=True, stable=True)
            ]
            # Those of the batch that are no empty clouds, and then the past ones.
            place = torch.arange(self.queue, device=latest.device)
            row = torch.where(place < counts.sum(), place, place - counts.sum() + len(latest))
            self.past.copy_(torch.cat([latest, self.past])[row])
            self.filled.copy_((self.filled + counts.sum()).clamp_max(self.queue))

    def _check(self, game: Game) -> None:
        check_channels(game, self.channels)
        if _as_clouds(game.teacher).batch < 2 and not self.queue:
            message = (
                "student: MatchDiscriminator recognises a cloud among others, and needs at least "
                f"2 clouds in a batch or queue= at least 1, got {describe(game.student.tensor())}"
            )
            raise ValueError(message)
        if self.distance != "pooled" and game.student.offsets is not None:
            message = (
                f"student: distance={self.distance!r} compares all pairs of dense clouds, "
                f"(B, N, C), with a mask or without, got {describe(game.student.tensor())}; pad "
                'them and pass mask=, or take distance="pooled"'
            )
            raise ValueError(message)

    def _pooled(self, points: Points, known: Points) -> Tensor:
        """Squared distances of pooled features to those of the teacher, (B, B + queue)."""
        own, here = pooled(points).to(self.past.dtype), pooled(known).to(self.past.dtype)
        center = _mean_cloud(here, known)
        own, here = own - center, here - center
        # Twice the variance: the mean squared distance between two of the teacher's clouds.
        unit = 2 * _mean_cloud(here.square(), known).sum()
        others = torch.cat([here, snapshot(self.past) - center]) if self.queue else here
        distance = own.square().sum(-1, keepdim=True) + others.square().sum(-1)
        distance = (distance - 2 * own @ others.mT).clamp_min(0)
        return distance / torch.where(unit > 0, unit, 1.0)

    def _energy(self, points: Points, known: Points) -> Tensor:
        within = self._mean_kernel(known, known)
        across = _all_pairs(self._mean_kernel, points, known)
        distance = self._mean_kernel(points, points)[:, None] + within - 2 * across
        return distance / _unit(-within, known)

    def _mean_kernel(self, x: Points, y: Points) -> Tensor:
        """Minus the mean distance of the points of each cloud to those of its partner."""
        weights = None
        if y.mask is not None:
            mask = y.mask | ~y.mask.any(1, keepdim=True)
            weights = mask.to(torch.promote_types(y.features.dtype, torch.float32))
        kernel = ops.Energy()
        mean = ops.kernel_mean(x.features, y.features, kernel, weights, backend=self.backend)
        return x.mean(mean)

    def _chamfer(self, points: Points, known: Points) -> Tensor:
        wide = known.features.to(torch.promote_types(known.features.dtype, torch.float32))
        norms = (wide - known.spread(known.mean(wide))).square().sum(-1)

        def chamfer(x: Points, y: Points) -> Tensor:
            there, _ = ops.nearest(x.features, y.features, backend=self.backend)
            back, _ = ops.nearest(y.features, x.features, backend=self.backend)
            return x.mean(there) + y.mean(back)

        distance = _all_pairs(chamfer, _without_holes(points), _without_holes(known))
        return distance / _unit(2 * known.mean(norms), known)


def _as_clouds(points: Points) -> Points:
    """Global features as what they are: clouds of one point."""
    if not points.is_global:
        return points
    mask = None if points.mask is None else points.mask.mT
    return Points(points.features.transpose(0, 1), None, mask)


def _without_holes(points: Points) -> Points:
    """With the first point that counts in place of those that do not: as near, to all others."""
    if points.mask is None:
        return points
    first = points.mask.to(torch.uint8).argmax(1).reshape(-1, 1, 1)
    filling = points.features.gather(1, first.expand(-1, 1, points.channels))
    return points.map(lambda values: points.fill(values, filling))


def _all_pairs(compare: Callable[[Points, Points], Tensor], x: Points, y: Points) -> Tensor:
    """compare(x_i, y_j) for all i and j, (B, B): each call takes y turned round by one more."""
    columns = [compare(x, _rolled(y, shift)) for shift in range(x.batch)]
    place = torch.arange(x.batch, device=x.features.device)
    # Entry (i, s) belongs to j = (i + s) mod B.
    return torch.stack(columns, -1).gather(1, (place - place.unsqueeze(1)) % x.batch)


def _rolled(points: Points, shift: int) -> Points:
    mask = None if points.mask is None else points.mask.roll(-shift, 0)
    return Points(points.features.roll(-shift, 0), None, mask)


def _mean_cloud(values: Tensor, known: Points) -> Tensor:
    """The mean over the clouds that have points."""
    counts = (known.lengths() > 0).to(values.dtype)
    weighted = values * counts.reshape(-1, *[1] * (values.dim() - 1))
    return weighted.sum(0) / counts.sum().clamp_min(1)


def _unit(values: Tensor, known: Points) -> Tensor:
    """The mean over the clouds of what a distance is measured in; 1 if there is no spread."""
    unit = _mean_cloud(values.detach(), known)
    return torch.where(unit > 0, unit, 1.0)
