"""FeatureAdversarialLoss: the two players' losses in one scalar and one backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fad_loss import _entrance as entrance
from fad_loss._advice import Advice
from fad_loss._checks import count_non_finite
from fad_loss._errors import amount, choose, count, switch
from fad_loss._fingerprints import converted, fingerprints, untrained
from fad_loss._game import Game, Side
from fad_loss._points import LAYOUTS
from fad_loss._ragged import cloud_mean, flat
from fad_loss._snapshot import snapshot
from fad_loss._state import VERSION, Record, WideBuffers, refuse_other_versions, separability
from fad_loss.discriminators import Scores
from fad_loss.discriminators.base import held_still
from fad_loss.gradients import DEFAULT_SHARES, GradientBalance, part_of_weight, weigh_gradient
from fad_loss.objectives import Objective, get_objective
from fad_loss.penalties import lecam as lecam_penalty
from fad_loss.penalties import penalized_sides
from fad_loss.standardize import Standardize

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FeatureAdversarialLoss"]

# The rates at which the teacher's statistics, the student's, which change while it learns, and
# LeCam's averages forget.
_TEACHER_MOMENTUM: Final = 0.01
_STUDENT_MOMENTUM: Final = 0.1
_DECAY: Final = 0.99
_WARMUP_STEPS: Final = 500


class FeatureAdversarialLoss(WideBuffers):
    r"""Teach a student to produce features that the teacher's features take for their own.

    .. math::
        L = L_S\bigl(D_{\bar\theta}(A(\hat s))\bigr)
          + L_D\bigl(D_\theta(\hat t), D_\theta(\overline{A(\hat s)})\bigr)

    where :math:`\hat s` and :math:`\hat t` are the student's and the teacher's features, each
    standardised by running statistics of its own, A the adapter from the student's channels to the
    teacher's, D the discriminator, and a bar stops the gradient; the second term is there only if
    the discriminator learns. One ``backward`` therefore gives the student and the adapter the
    gradient of the student's term alone, and the discriminator the gradient of its own loss alone.
    The teacher never gets one. No second optimizer, no second backward: put ``fad.parameters()``
    into the optimizer you have.

    Features are compared as sets: point i of the student need not be point i of the teacher, and
    their numbers of points may differ. Where they do correspond, ``discriminator="paired"`` uses
    it.

    Args:
        student_channels: C of the student's features.
        teacher_channels: C of the teacher's features.
        discriminator: "teacher" (no parameters: the teacher's features are the discriminator),
            "paired" (the same where point i of the student is point i of the teacher),
            "point", "neighborhood", "cloud", "match", or any module called as
            ``discriminator(features, reference=..., labels=...)`` (those of the keywords that its
            forward has) that returns one score per point or per cloud.
        objective: "hinge", "non_saturating", "least_squares", "wasserstein", "relativistic", or an
            `fad_loss.objectives.Objective`.
        weight: multiplies the gradient on its way to the student's features, and nothing else: the
            value that is returned, and the pace at which the adapter learns, do not depend on it.
            None takes the discriminator's `default_weight`; with ``balance=True`` 0.3, or 1 if it
            falls (`total_steps`).
        balance: make `weight` a share: the student's term pulls at the student's features `weight`
            times as strongly as all other losses do (see `fad_loss.gradients.GradientBalance`),
            where otherwise that depends on the network and the task. The gradients' norms are
            measured in every backward pass, for the next step. Scaling the result, as in
            ``0.1 * fad(...)``, then has no effect; and ``torch.compile`` needs graph breaks, or a
            `Distiller`. "auto" is the same where there is something to measure, and the
            discriminator's `default_weight` where there is not: where the loss is compiled by
            itself, and without another loss.
        adapter: "linear" (a linear layer from the student's channels to the teacher's), "identity",
            or a module that maps `(..., student_channels)` to `(..., teacher_channels)`.
        normalize: standardise each side by running statistics of its own, channel by channel, so
            that the scale of neither matters. A discriminator that wants the teacher's own units
            (`HeadDiscriminator`) gets what the adapter makes in those.
        warmup_steps: over so many training steps the student's weight rises linearly to `weight`,
            while the adapter and the discriminator already learn. Without it (0), an adapter that
            is still random leads the student astray in its first steps. None takes 500, or a tenth
            of `total_steps` if those are fewer.
        total_steps: of the training, ``epochs * len(loader)``: the weight falls linearly to 0 until
            then, so that the student ends with its task alone. None keeps it.
        gradient_penalty: weight of R1 + R2 in the discriminator's loss.
        penalty_every: compute the gradient penalty only at every n-th step, n times as strong.
        lecam: weight of the LeCam regulariser in the discriminator's loss.
        max_points: in training, compare at most so many points of each cloud, drawn anew at every
            step; None compares all; "auto" takes the discriminator's `default_max_points`. Clouds
            of as many points keep the same ones on both sides. Global features, and everything in
            evaluation, are compared whole.
        layout: "bnc" for features `(B, N, C)`, "bcn" for `(B, C, N)`.

    Shape:
        student `(B, N, C_s)`, teacher `(B, M, C_t)`, in `layout`; or global features `(B, C)`,
        where the batch is the set; or ragged clouds (`fad_loss.ragged`). labels `(B,)`, for
        discriminators conditioned on them. mask `(B, N)` or ragged, or a pair of them; positions a
        pair of `(B, N, D)` and `(B, M, D)`, in `layout`. Returns a scalar, float32 at least.

    Raises:
        ValueError: unknown names, numbers out of range, shapes, devices or batch sizes that do not
            fit, a discriminator whose scores have another shape, positions for one that does not
            use them, or NaN or infinity in a CPU tensor.
        TypeError: not floating-point tensors.

    Warns:
        UserWarning: once each, in training: the student's features carry no graph; the student was
            updated ten times and no parameter of the loss has moved; the first scores are beyond
            any reason.

    Under ``DistributedDataParallel`` wrap one module whose forward returns this loss. Each rank
    then standardises by the teacher's statistics of rank 0 (whose buffers DDP hands out), updated
    with its own batch; and the set that global features are compared as is the rank's own batch.
    With `no_grad`, or after ``.eval()``, the result is the student's term alone and nothing is
    updated.

    Source: Lee and Wu, "Feature adversarial distillation for point cloud classification", ICIP 2023
    (arXiv:2306.14221). Only its abstract was available: which reading of it this is, is said in the
    documentation.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> fad = FeatureAdversarialLoss(student_channels=8, teacher_channels=16)
        >>> student = torch.randn(2, 32, 8, requires_grad=True)
        >>> loss = fad(student, torch.randn(2, 64, 16))
        >>> loss.backward()
        >>> loss.shape, student.grad.shape
        (torch.Size([]), torch.Size([2, 32, 8]))
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        discriminator: str | nn.Module = "teacher",
        objective: str | Objective = "hinge",
        weight: float | None = None,
        balance: bool | str = False,
        adapter: str | nn.Module = "linear",
        normalize: bool = True,
        warmup_steps: int | None = None,
        total_steps: int | None = None,
        gradient_penalty: float = 0.0,
        penalty_every: int = 1,
        lecam: float = 0.0,
        max_points: int | str | None = "auto",
        layout: str = "bnc",
    ) -> None:
        """See the class."""
        super().__init__()
        self.student_channels = count("student_channels", student_channels, 1)
        self.teacher_channels = count("teacher_channels", teacher_channels, 1)
        self.total_steps = None if total_steps is None else count("total_steps", total_steps, 1)
        if warmup_steps is None:
            warmup_steps = min(_WARMUP_STEPS, (total_steps or 10 * _WARMUP_STEPS) // 10)
        self.warmup_steps = count("warmup_steps", warmup_steps, 0)
        self.gradient_penalty = amount("gradient_penalty", gradient_penalty)
        self.penalty_every = count("penalty_every", penalty_every, 1)
        self.lecam = amount("lecam", lecam)
        self.normalize = switch("normalize", normalize)
        balanced = balance == "auto" or switch("balance", balance, '"auto"')
        choose("layout", layout, LAYOUTS)
        self.layout = layout
        self.objective = get_objective(objective)
        self.adapter = entrance.make_adapter(adapter, student_channels, teacher_channels)
        self.discriminator = entrance.make_discriminator(discriminator, teacher_channels)
        if weight is None:
            share = DEFAULT_SHARES[self.total_steps is not None]
            weight = share if balanced else self.discriminator.default_weight
        self.weight = amount("weight", weight)
        otherwise = None
        if balance == "auto":
            # A weight of 0 is 0 whatever it is multiplied by.
            otherwise = self.discriminator.default_weight / (self.weight or 1.0)
        self.balance = GradientBalance(otherwise) if balanced else None
        self.max_points = entrance.limit_of_points(max_points, self.discriminator)
        entrance.check_regularisers(
            self.discriminator, gradient_penalty=gradient_penalty, lecam=lecam
        )
        self.student_units = Standardize(student_channels, _STUDENT_MOMENTUM)
        self.teacher_units = Standardize(teacher_channels, _TEACHER_MOMENTUM)
        self.register_buffer("state", torch.tensor(VERSION))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("penalty_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average_scores", torch.zeros(2))
        self.record = Record()
        # The same as `penalty_step`, where no device need be waited for.
        self._since_penalty = 0
        self._advice = Advice()
        self._made_with = fingerprints(self)
        self.register_load_state_dict_post_hook(_take_up)  # type: ignore[no-untyped-call]

    state: Tensor
    steps: Tensor
    penalty_step: Tensor
    average_scores: Tensor

    # ------------------------------------------------------------------------------ the losses

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The student's term plus the discriminator's loss; the student's alone in evaluation.

        Args:
            student: the student's features.
            teacher: the teacher's features of the same clouds; detached if they require grad.
            labels: class of each cloud, `(B,)`, for discriminators that are conditioned on it.
            mask: which points count (True), for both sides, or a pair of the student's and the
                teacher's: padding and points of ignored labels do not. A cloud with too few
                points to say anything contributes 0, and `statistics` counts it.
            positions: where the student's and the teacher's points lie. Features are then compared
                where they belong; and where they should correspond but are of different points,
                the teacher's are interpolated at the student's (`fad_loss.interpolate`).

        Returns:
            A scalar; call `backward` on it once, with the loss of the task added or not. If the
            discriminator does not learn, it is the student's term alone.
        """
        game = self._game(student, teacher, labels, mask, positions, watched=True)
        loss, known = self._student_term(game)
        if not self._updating:
            return loss
        still = game.still()
        of_discriminator = self._discriminator_term(still, known)
        self.discriminator.observe(still)
        return loss + of_discriminator if self.discriminator.learns else loss

    def student_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The student's term alone: a gradient for the student and the adapter.

        For loops with two optimizers. It advances the warm-up.
        """
        return self._student_term(
            self._game(student, teacher, labels, mask, positions, watched=True)
        )[0]

    def discriminator_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The discriminator's loss alone: a gradient for the discriminator.

        For loops with two optimizers. It advances the penalty's and LeCam's state.
        """
        game = self._game(student, teacher, labels, mask, positions).still()
        loss = self._discriminator_term(game, None)
        if self._updating:
            self.discriminator.observe(game)
        return loss

    def statistics(self) -> dict[str, Tensor]:
        """What to log, as detached scalar tensors, of the latest training step.

        ``student_loss``, ``discriminator_loss``, ``real_score`` and ``fake_score`` (means),
        ``separability`` (the share of scores on the right side of the midpoint between the two
        means: 0.5 if the two cannot be told apart, which the teacher's densities, in which a point
        counts itself, only say of sets that agree), ``penalty`` (the latest that was
        computed), ``weight`` (of the student's gradient, with warm-up and balance in it),
        ``non_finite`` (how many features were NaN or infinite), ``small_clouds`` (how many had too
        few points to say anything), and ``untrained_parameters``: how many of the loss's trainable
        parameters still hold the values that they were made or loaded with. Once training runs it
        should be 0 (1 where an objective compares scores: their common bias has no gradient); else
        put ``fad.parameters()`` into the optimizer. Parameters in pieces (FSDP2) do not count.
        """
        values = self.record.read()
        still = untrained(self, self._made_with).values()
        values["untrained_parameters"] = sum(still, torch.zeros_like(self.steps))
        return values

    # --------------------------------------------------------------------------- the two terms

    @property
    def _updating(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _weight_now(self, student: object, *, watched: bool) -> Tensor:
        """The weight of the student's gradient at this step, by schedule and balance."""
        wide = isinstance(student, Tensor) and student.dtype == torch.float64
        steps = self.steps.to(torch.float64 if wide else torch.float32)
        weight = self.weight * part_of_weight(steps, self.warmup_steps, self.total_steps)
        if self.balance is not None:
            weight = weight * self.balance.factor(count=watched)
        return snapshot(weight)

    def _student_term(self, game: Game) -> tuple[Tensor, Scores | None]:
        """The student against a discriminator that stands still; both scores, if known."""
        known: Scores | None = None
        # If nothing learns, the scores of the one term are those of the other.
        if self.objective.needs_real or (self._updating and not self.discriminator.learns):
            known = self._ask(game)
            scores = known.student
        else:
            scores = self._ask(game, "student")
        real = None if known is None else known.teacher.detach()
        loss = self.objective.student(scores, real, **game.masks(scores))
        if self._updating:
            if not torch.compiler.is_compiling():
                self._advice.on_scores(flat(scores))
            self.steps.add_(1)
        self._log(student_loss=loss, fake_score=cloud_mean(scores, game.student.mask).mean())
        return loss, known

    def _discriminator_term(self, game: Game, known: Scores | None) -> Tensor:
        """The discriminator against features that stand still."""
        penalty = None
        if self.discriminator.learns:
            scores, penalty = self._learning_scores(game)
        else:
            scores = self._ask(game) if known is None else known
            scores = Scores(scores.student.detach(), scores.teacher.detach())
        fake, real = scores
        masks = game.masks(fake)
        loss = self.objective.discriminator(real, fake, **masks)
        means, separable = separability(real, fake, **masks)
        self._log(
            discriminator_loss=loss,
            real_score=means[0],
            fake_score=means[1],
            separability=separable,
        )
        if penalty is not None:
            loss = loss + self.gradient_penalty * self.penalty_every * penalty
            self._log(penalty=penalty)
        if self.lecam:
            averages = snapshot(self.average_scores)
            loss = loss + self.lecam * lecam_penalty(real, fake, averages[0], averages[1], **masks)
            if self._updating:
                latest = means.to(averages.dtype)
                latest = torch.where(torch.isfinite(latest).all(), latest, averages)
                self.average_scores.lerp_(latest, 1 - _DECAY)
        return loss

    def _ask(self, game: Game, side: Side | None = None) -> Any:
        """Scores of a discriminator that stands still, of both sides or of one."""
        scores = held_still(self.discriminator, game, side)
        entrance.check_scores(self.discriminator, game, scores if side is None else {side: scores})
        return scores

    def _learning_scores(self, game: Game) -> tuple[Scores, Tensor | None]:
        """Scores of both sides for the discriminator to learn from, and the penalty."""
        penalise = False
        if self.gradient_penalty:
            penalise = self.penalty_every == 1 or self._since_penalty == 0
            if self._updating and self.penalty_every > 1:
                self._since_penalty = (self._since_penalty + 1) % self.penalty_every
                self.penalty_step.fill_(self._since_penalty)
        if not torch.is_grad_enabled():
            return self._ask(game), None
        if not penalise:
            scores = self.discriminator(game)
            entrance.check_scores(self.discriminator, game, scores)
            return scores, None
        fake, real, penalty = penalized_sides(self.discriminator, game)
        entrance.check_scores(self.discriminator, game, {"student": fake, "teacher": real})
        return Scores(fake, real), penalty

    # ------------------------------------------------------------------------------- features

    def _game(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        mask: Any,
        positions: Any,
        *,
        watched: bool = False,
    ) -> Game:
        """The points of both sides, checked, drawn, and in one space."""
        watched = watched and self._updating and isinstance(student, Tensor)
        weight = self._weight_now(student, watched=watched)
        if watched and self.balance is not None:
            student = self.balance.tap(student, weight)
        game = entrance.enter(self, student, teacher, labels, mask, positions)
        if watched and not torch.compiler.is_compiling():
            self._advice.on_step(self.total_steps)
            self._advice.on_features(student, teacher)
            self._advice.on_parameters(self, self._made_with, student)
            if self.balance is not None and self.balance.otherwise is None:
                self._advice.on_balance(self.balance.measured)
        if self.training and self.max_points is not None and student.dim() > 2:
            game = entrance.draw(game, self.max_points, self.discriminator)
        game = entrance.correspond(game.filled(), self.discriminator)
        game, small = entrance.without_small_clouds(game, self.discriminator)
        entrance.check_points(game)
        self._log(weight=weight, small_clouds=small)
        fake, real = game.student, game.teacher
        fake = fake.map(lambda values: weigh_gradient(values, weight))
        fake, real = entrance.in_units(self, fake, real)
        with torch.no_grad():
            bad = count_non_finite(fake.features) + count_non_finite(real.features)
        self._log(non_finite=bad)
        return Game(fake, real, game.labels)

    # ----------------------------------------------------------------------------------- state

    def _log(self, **values: Tensor) -> None:
        if self._updating:
            self.record.write(**values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move; what was not trained before still is not, even if it was rounded."""
        before = untrained(self, self._made_with)
        super()._apply(fn, recurse)
        self._made_with = converted(self, self._made_with, before)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, unless another version has written it."""
        refuse_other_versions(state_dict, prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shown by ``print(fad)``."""
        return f"objective={self.objective}, weight={self.weight}, layout={self.layout!r}"


def _take_up(loss: FeatureAdversarialLoss, _: object) -> None:
    """After loading, trained means different from what was loaded."""
    loss._made_with = fingerprints(loss)
    loss._since_penalty = int(loss.penalty_step)
