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
        - a game of ``(B, N, C)`` and ``(B, M, C)``, or ragged or masked ones for "pooled"
        - scores: ``(B,)``, at most 0

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
        points, known = game.points(side), game.teacher.detach()
        if self.distance == "pooled":
            distance = self._pooled(points, known)
        else:
            compare = self._energy if self.distance == "energy" else self._chamfer
            distance = compare(points.features, known.features)
        temperature = self.log_temperature.clamp(_COLDEST, _WARMEST).exp()
        logits = -distance / temperature
        if self.queue:
            # The part of the queue that is still empty.
            place = torch.arange(distance.shape[-1], device=distance.device)
            logits = logits.masked_fill(place >= known.batch + self.filled, -torch.inf)
        return logits.log_softmax(-1).diagonal()

    @torch.no_grad()
    def observe(self, game: Game) -> None:
        """Put the teacher's clouds into the queue, once both sides were scored without them."""
        if self.queue:
            known = pooled(game.teacher).to(self.past.dtype)
            self.past.copy_(torch.cat([known, self.past])[: self.queue])
            self.filled.copy_((self.filled + len(known)).clamp_max(self.queue))

    def _check(self, game: Game) -> None:
        check_channels(game, self.channels)
        if game.teacher.batch < 2 and not self.queue:
            message = (
                "features: MatchDiscriminator recognises a cloud among others, and needs at least "
                f"2 clouds in a batch or queue= at least 1, got {describe(game.student.tensor())}; "
                "pass global features as (B, 1, C)"
            )
            raise ValueError(message)
        if self.distance != "pooled" and (game.student.uneven or game.teacher.uneven):
            message = (
                f"features: distance={self.distance!r} expects clouds of equal size, (B, N, C), "
                f"got {describe(game.student.tensor())}; ragged and masked ones can use "
                'distance="pooled"'
            )
            raise ValueError(message)

    def _pooled(self, features: Points, reference: Points) -> Tensor:
        """Squared distances of pooled features to those of the teacher, (B, B + queue)."""
        own, known = pooled(features), pooled(reference)
        own, known = own.to(self.past.dtype), known.to(self.past.dtype)
        center = known.mean(0)
        own, here = own - center, known - center
        # Twice the variance: the mean squared distance between two of the teacher's clouds.
        unit = 2 * here.square().sum(-1).mean()
        others = torch.cat([here, self.past - center]) if self.queue else here
        distance = own.square().sum(-1, keepdim=True) + others.square().sum(-1)
        distance = (distance - 2 * own @ others.mT).clamp_min(0)
        return distance / torch.where(unit > 0, unit, 1.0)

    def _energy(self, features: Tensor, reference: Tensor) -> Tensor:
        within = self._mean_kernel(reference, reference)
        across = _all_pairs(self._mean_kernel, features, reference)
        distance = self._mean_kernel(features, features)[:, None] + within - 2 * across
        return distance / _unit(-within)

    def _mean_kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus the mean distance of the points of each cloud to those of its partner."""
        return ops.kernel_mean(x, y, ops.Energy(), backend=self.backend).mean(-1)

    def _chamfer(self, features: Tensor, reference: Tensor) -> Tensor:
        wide = reference.to(torch.promote_types(reference.dtype, torch.float32))
        spread = 2 * (wide - wide.mean(1, keepdim=True)).square().sum(-1).mean(-1)

        def chamfer(x: Tensor, y: Tensor) -> Tensor:
            there, _ = ops.nearest(x, y, backend=self.backend)
            back, _ = ops.nearest(y, x, backend=self.backend)
            return there.mean(-1) + back.mean(-1)

        return _all_pairs(chamfer, features, reference) / _unit(spread)


def _all_pairs(compare: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """compare(x_i, y_j) for all i and j, (B, B): each call takes y turned round by one more."""
    count = len(x)
    columns = [compare(x, y.roll(-shift, 0)) for shift in range(count)]
    place = torch.arange(count, device=x.device)
    # Entry (i, s) belongs to j = (i + s) mod B.
    return torch.stack(columns, -1).gather(1, (place - place.unsqueeze(1)) % count)


def _unit(values: Tensor) -> Tensor:
    """The mean over the clouds of what a distance is measured in; 1 if there is no spread."""
    unit = values.detach().mean()
    return torch.where(unit > 0, unit, 1.0)
