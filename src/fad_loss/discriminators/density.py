"""The teacher's features as the discriminator: nothing to train, nothing that trails behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fad_loss import ops
from fad_loss._errors import choose, describe
from fad_loss._game import Game, Side
from fad_loss._points import Points
from fad_loss._ragged import packed
from fad_loss.discriminators.base import Discriminator, Scores, same_points
from fad_loss.discriminators.learned.layers import check_width, linear
from fad_loss.ops.kernels import Energy, Kernel, _positive

_MODES = {"log_ratio": False, "witness": True}
_NARROW, _NARROW_AND_WIDE = (0.1,), (0.3, 1.0, 3.0)
# A cloud counts as spread by at least this share of the batch's median.
_LEAST_SPREAD = 0.1


class TeacherDiscriminator(Discriminator):
    r"""Score points by how much likelier they are under the teacher's features than the student's.

    For densities p (teacher) and q (student) the optimal discriminator is :math:`\log p - \log q`.
    Both are estimated from the features of the cloud itself, with kernel densities over its teacher
    points :math:`t_j` and its student points :math:`s_i`:

    .. math::
        D(z) = \frac1{|m|} \sum_m \left[
            \log \frac1M \sum_j e^{-|z - t_j|^2 / 2 h_m^2}
          - \log \frac1N \sum_i e^{-|z - s_i|^2 / 2 h_m^2} \right],
        \qquad h_m^2 = m \cdot \frac1{M^2} \sum_{jk} |t_j - t_k|^2

    The densities *are* the discriminator: the sets they are built from are detached, and only z
    carries a gradient, towards where the teacher has more points than the student. Every point
    counts in its own set's density. So where the student's set is the teacher's, all scores and
    gradients are 0, and a point far from both is pulled towards the teacher's. There are no
    parameters, so it never trails behind the student.

    A network may put all points of some clouds at nearly one place. The mean squared distance of a
    cloud therefore counts as at least a tenth of the median of the batch's clouds: scores and
    gradients grow with its inverse, and a few such clouds would outweigh all others.

    If the game knows where the points lie, the densities are joint ones of feature and position,
    both bandwidths being m times the cloud's own mean squared distance, of features and of
    positions: features are compared where they belong, though no two points correspond.

    ``condition="point"`` is for networks whose point i is the teacher's point i (no sampling layer
    lies between, or the same one). The teacher's density is then multiplied by a kernel around the
    point that belongs to z: the score gains the mean over m of :math:`-|z_i - t_i|^2 / 2 h_m^2`.
    Where the student's features are the teacher's, the gradients of both parts vanish.

    ``mode="witness"`` is the linear version, the witness function of the maximum mean discrepancy:
    :math:`D(z) = \frac1M \sum_j k(z, t_j) - \frac1N \sum_i k(z, s_i)`.

    Args:
        mode: "log_ratio" or "witness".
        bandwidths: the factors m, in units of the cloud's mean squared distance between teacher
            points; for "log_ratio". Wide ones see the whole set, narrow ones the nearest points.
            None, the default, takes one of 0.1; with ``condition="point"`` three, 0.3, 1 and 3.
        condition: None, or "point" if the points of student and teacher correspond; for
            "log_ratio".
        kernel: of `fad_loss.ops`, on features as they come; for "witness", where the default is
            `fad_loss.ops.Energy`, which pulls from any distance. Gaussian kernels push the points
            of a student that is far away apart more than they pull them near.
        embedding: a module that maps features before they are compared, trained by the
            discriminator's loss (as in MMD-GAN); or a width, for one linear layer of `channels`
            inputs with spectral norm.
        channels: of the features; only needed with ``embedding=`` a width.
        backend: see `fad_loss.ops`.

    Shape:
        a game of `(B, N, C)` and `(B, M, C)`, or ragged clouds; scores `(B, N)`, or ragged.

    Raises:
        ValueError: an unknown mode or condition, bandwidths that are not positive, options of
            another mode, or clouds of different sizes where their points should correspond.

    Source: Lee and Wu, "Feature adversarial distillation for point cloud classification", ICIP 2023
    (arXiv:2306.14221), whose abstract names the teacher's features as the discriminator; reading
    them as a density ratio is ours. Witness: Gretton et al., JMLR 2012. Embedding: Li et al.,
    "MMD GAN", NeurIPS 2017.

    Example:
        >>> discriminator = TeacherDiscriminator()
        >>> teacher = torch.tensor([[[0.0], [1.0], [2.0]]])
        >>> student = torch.tensor([[[0.5], [1.5], [9.0], [9.5]]])
        >>> discriminator(Game.of(student, teacher), "student") > 0
        tensor([[ True,  True, False, False]])
    """

    positional = True
    least_points = 2

    def __init__(
        self,
        *,
        mode: str = "log_ratio",
        bandwidths: Sequence[float] | None = None,
        condition: str | None = None,
        kernel: Kernel | None = None,
        embedding: nn.Module | int | None = None,
        channels: int | None = None,
        backend: str = "auto",
    ) -> None:
        """See the class."""
        super().__init__()
        self.witness = choose("mode", mode, _MODES)
        if kernel is not None and not self.witness:
            message = 'kernel: only mode="witness" takes a kernel; "log_ratio" takes bandwidths'
            raise ValueError(message)
        if kernel is not None and not isinstance(kernel, Kernel):
            message = (
                "kernel: expected Gaussian, Laplacian, Energy or InverseMultiquadric from "
                f"fad_loss.ops, got {describe(kernel)}"
            )
            raise TypeError(message)
        if condition not in {None, "point"}:
            message = f"condition: expected None or 'point', got {condition!r}"
            raise ValueError(message)
        if condition and self.witness:
            message = 'condition: only mode="log_ratio" takes one; set condition=None'
            raise ValueError(message)
        if bandwidths is None:
            bandwidths = _NARROW_AND_WIDE if condition else _NARROW
        if not isinstance(bandwidths, (tuple, list)):
            message = (
                f"bandwidths: expected several numbers, {_NARROW_AND_WIDE} say, got "
                f"{describe(bandwidths)}"
            )
            raise TypeError(message)
        self.mode, self.condition, self.backend = mode, condition, backend
        self.corresponding = condition is not None
        self.default_weight = 1.0 if self.witness else 30.0 if condition else 20.0
        self.default_max_points = 16 if condition else 64
        self.bandwidths = tuple(_positive("bandwidths", m) for m in bandwidths)
        if not self.bandwidths:
            message = "bandwidths: expected at least one number, got an empty sequence"
            raise ValueError(message)
        self.kernel = Energy() if kernel is None else kernel
        self.embedding = _embedding(embedding, channels)

    def extra_repr(self) -> str:
        """Shown by ``print(discriminator)``."""
        if self.witness:
            return repr(self.kernel)
        condition = f", condition={self.condition!r}" if self.condition else ""
        return f"bandwidths={self.bandwidths}{condition}"

    def score(self, game: Game, side: Side) -> Tensor:
        """The scores of one side; see `Discriminator.score`."""
        asked, sets = self._compared(game)
        points = asked.points(side)
        return points.like(self._score(points, sets))

    def scores(self, game: Game) -> Scores:
        """The scores of both sides, whose sets are made comparable once."""
        asked, sets = self._compared(game)
        of_student, of_teacher = (
            points.like(self._score(points, sets)) for points in (asked.student, asked.teacher)
        )
        return Scores(of_student, of_teacher)

    def _compared(self, game: Game) -> tuple[Game, Game]:
        """The points to score, and the sets that they are scored by, which stand still."""
        if self.condition and not same_points(game):
            message = (
                'condition: "point" compares point i of the student with point i of the teacher, '
                f"got {describe(game.student.tensor())} and {describe(game.teacher.tensor())}; "
                "take layers before any sampling, pass positions= of both, or condition=None"
            )
            raise ValueError(message)
        asked = self._in_units(game)
        if self.embedding is None:
            return asked, Game(asked.student.detach(), asked.teacher.detach(), asked.labels)
        # The embedding learns from the sets too; what they are embedded from stands still.
        still = Game(game.student.detach(), game.teacher.detach(), game.labels)
        leaf = game.student.features.requires_grad or game.teacher.features.requires_grad
        return asked, self._in_units(still) if leaf else asked

    def _in_units(self, game: Game) -> Game:
        """Both sides' points, embedded, in units of the teacher's spread, positions as channels."""
        both: tuple[Points, ...] = (game.student, game.teacher)
        if self.embedding is not None:
            both = tuple(points.map(self.embedding) for points in both)
        if not self.witness:
            to_units = _units(both[1], both[1].features)
            both = tuple(points.with_features(to_units(points, points.features)) for points in both)
        place, there = game.student.positions, game.teacher.positions
        if place is not None and there is not None:
            to_units = _units(game.teacher, there)
            both = tuple(
                points.with_features(
                    torch.cat(
                        [points.features, to_units(points, place).to(points.features.dtype)], -1
                    )
                )
                for points, place in zip(both, (place, there), strict=True)
            )
        return Game(both[0], both[1], game.labels)

    def _score(self, z: Points, sets: Game) -> Tensor:
        """Of the points z, between the sets of the teacher and the student."""
        t, s = sets.teacher, sets.student
        if self.witness:
            return self._kernel_mean(z, t) - self._kernel_mean(z, s)
        ratio = self._log_density(z, t) - self._log_density(z, s)
        return ratio + self._log_likeness(z, t) if self.condition else ratio

    def _kernel_mean(self, z: Points, points: Points) -> Tensor:
        weights = None
        if points.mask is not None:
            # Of an empty cloud, whose scores count nowhere, the mean is over all.
            mask = points.mask | ~points.mask.any(1, keepdim=True)
            weights = mask.to(torch.promote_types(points.features.dtype, torch.float32))
        mean = ops.kernel_mean(
            z.tensor(), points.tensor(), self.kernel, weights, backend=self.backend
        )
        return packed(mean)

    def _log_density(self, z: Points, points: Points) -> Tensor:
        """Log of the kernel density at z, averaged over the bandwidths, without its constant."""
        epsilon = [2 * m for m in self.bandwidths]
        log_weights = None
        if points.mask is not None:
            mask = points.mask | ~points.mask.any(1, keepdim=True)
            wide = torch.promote_types(points.features.dtype, torch.float32)
            log_weights = torch.zeros_like(mask, dtype=wide).masked_fill(~mask, -torch.inf)
        minimum = packed(
            ops.softmin(
                z.tensor(), points.tensor(), epsilon, None, log_weights, backend=self.backend
            )
        )
        # By numbers, one by one: a tensor made of a list would stop a GPU.
        ratios = [part / eps for part, eps in zip(minimum.unbind(-1), epsilon, strict=True)]
        scores = -torch.stack(ratios).mean(0)
        count = points.lengths().clamp_min(1).to(scores.dtype)
        return scores - z.spread(count.log())

    def _log_likeness(self, z: Points, t: Points) -> Tensor:
        """Log of the kernel between each point of z and the teacher's point that belongs to it."""
        wide = torch.promote_types(z.features.dtype, torch.float32)
        factor = sum(0.5 / m for m in self.bandwidths) / len(self.bandwidths)
        return -factor * (z.features.to(wide) - t.features.to(wide)).square().sum(-1)


def _embedding(embedding: nn.Module | int | None, channels: int | None) -> nn.Module | None:
    if embedding is None or isinstance(embedding, nn.Module):
        return embedding
    width: object = embedding
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        message = f"embedding: expected a module or a width of at least 1, got {embedding!r}"
        raise ValueError(message)
    if channels is None:
        message = (
            f"channels: embedding={embedding} makes a layer, and needs channels=, the width of the "
            "features, got None"
        )
        raise ValueError(message)
    check_width("channels", channels)
    return linear(channels, width, spectral_norm=True)


def _units(teacher: Points, values: Tensor) -> Callable[[Points, Tensor], Tensor]:
    """What puts values per point into units of the teacher's cloud: its mean and its spread's root.

    The spread is the mean squared distance between its points, twice the variance summed over C,
    but at least a tenth of the median of the batch's clouds. Points that coincide but for rounding
    have none; their squared distance from the origin stands in, or 1. A cloud of little or no
    spread must not outweigh all others.
    """
    wide = values.detach()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    center = teacher.mean(wide)
    norms = (wide - teacher.spread(center)).square().sum(-1)
    spread, offset = 2 * teacher.mean(norms), center.square().sum(-1)
    stand_in = torch.where(offset > 0, offset, 1.0)
    known = spread > 1e-10 * offset
    # Their median; torch.nanmedian would stop a GPU.
    ordered = torch.where(known, spread, torch.inf).sort().values
    median = ordered.gather(0, (known.sum(0, keepdim=True) - 1).clamp_min(0) // 2)
    least = _LEAST_SPREAD * median
    scale = torch.where(known, spread.clamp_min(least), stand_in).rsqrt().unsqueeze(-1)

    def to_units(points: Points, values: Tensor) -> Tensor:
        here, factor = points.spread(center), points.spread(scale)
        return (values - here.to(values.dtype)) * factor.to(values.dtype)

    return to_units
