"""FeatureAdversarialLoss: the two players' losses in one scalar and one backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fad_loss._checks import check_finite, count_non_finite
from fad_loss._errors import choose, describe
from fad_loss._points import LAYOUTS, as_points
from fad_loss._ragged import cloud_mean, concatenate, flat, is_ragged, pack, pointwise, split
from fad_loss._trained import converted, fingerprints, untrained
from fad_loss.balance import GradientBalance
from fad_loss.discriminators import (
    CloudDiscriminator,
    MatchDiscriminator,
    NeighborhoodDiscriminator,
    PointDiscriminator,
    TeacherDiscriminator,
)
from fad_loss.objectives import Objective, get_objective
from fad_loss.penalties import lecam as lecam_penalty
from fad_loss.penalties import penalized_scores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FeatureAdversarialLoss"]

_DISCRIMINATORS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "teacher": lambda channels: TeacherDiscriminator(),  # noqa: ARG005
    "paired": lambda channels: TeacherDiscriminator(condition="point"),  # noqa: ARG005
    "point": PointDiscriminator,
    "neighborhood": NeighborhoodDiscriminator,
    "cloud": CloudDiscriminator,
    "match": MatchDiscriminator,
}
_STATISTICS: Final = (
    "student_loss",
    "discriminator_loss",
    "real_score",
    "fake_score",
    "accuracy",
    "penalty",
    "weight",
    "non_finite",
)
# The teacher's statistics and LeCam's averages forget with these rates.
_MOMENTUM: Final = 0.01
_DECAY: Final = 0.99
# A channel counts as varying by at least this share of the average channel: features of a dead unit
# would otherwise be blown up without bound.
_FLOOR: Final = 0.01


class FeatureAdversarialLoss(nn.Module):
    r"""Teach a student to produce features that the teacher's features take for their own.

    .. math::
        L = w\, L_S\bigl(D_{\bar\theta}(\hat s)\bigr)
          + L_D\bigl(D_\theta(\hat t), D_\theta(\bar s)\bigr)

    where :math:`\hat s` are the student's features (adapted to the teacher's channels and
    standardised by the teacher's statistics), :math:`\hat t` the teacher's, D the discriminator,
    and a bar stops the gradient. One ``backward`` therefore gives the student and the adapter the
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
        weight: scales the student's term only. None takes the discriminator's `default_weight`,
            from the tables of ``examples/study/results/report.md``, and 1 if it has none (or with
            ``balance=True``).
        balance: make `weight` a share: the student's term pulls at the student's features `weight`
            times as strongly as all other losses do (see `fad_loss.balance.GradientBalance`), where
            otherwise that depends on the network and the number of channels. The gradients' norms
            are measured in every backward pass, for the next step. Scaling the result, as in
            ``0.1 * fad(...)``, then has no effect; and ``torch.compile`` needs graph breaks.
        adapter: "linear" (a linear layer from the student's channels to the teacher's), "identity",
            or a module that maps `(..., student_channels)` to `(..., teacher_channels)`.
        normalize: standardise both by running statistics of the teacher's features, channel by
            channel. Scale would otherwise be a trivial cue.
        warmup_steps: over so many training steps the student's weight rises linearly to `weight`,
            while the discriminator already learns.
        gradient_penalty: weight of R1 + R2 in the discriminator's loss.
        penalty_every: compute the gradient penalty only at every n-th step, n times as strong.
        lecam: weight of the LeCam regulariser in the discriminator's loss.
        max_points: in training, compare at most so many points of each cloud, drawn anew at every
            step; None compares all; "auto" takes the discriminator's `default_max_points`, from the
            same tables: 64, but 16 for "paired". Only for discriminators that compare all pairs of
            points, like the default, and have that attribute: their cost grows with the square.
            Student and teacher keep the same points if they have the same number of them. Ragged
            clouds, global features, and everything in evaluation are compared whole.
        layout: "bnc" for features `(B, N, C)`, "bcn" for `(B, C, N)`.

    Shape:
        student `(B, N, C_s)`, teacher `(B, M, C_t)`, in `layout`; or global features `(B, C)`,
        where the batch is the set; or ragged clouds (`fad_loss.ragged`). labels `(B,)`, for
        discriminators conditioned on them. Returns a scalar, float32 at least.

    Raises:
        ValueError: unknown names, numbers out of range, shapes, devices or batch sizes that do not
            fit, a discriminator whose scores have another shape or that takes features as they are
            (``normalize=False``), or NaN or infinity in a CPU tensor.
        TypeError: not floating-point tensors.

    The defaults and the study (``examples/study/results/report.md``): on test clouds "teacher"
    (``fad-sharp``) and "paired" (``fad-paired-16points``) were level, and the best of all losses on
    one layer of features, if by no more than the noise; and "teacher" needs no correspondence. For
    `objective`, `normalize`, `warmup_steps`, `gradient_penalty` and `lecam` one trial each
    (``fad-paired-*``, ``fad-point-*``) gave no reason to change them.

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
        balance: bool = False,
        adapter: str | nn.Module = "linear",
        normalize: bool = True,
        warmup_steps: int = 0,
        gradient_penalty: float = 0.0,
        penalty_every: int = 1,
        lecam: float = 0.0,
        max_points: int | str | None = "auto",
        layout: str = "bnc",
    ) -> None:
        """See the class."""
        super().__init__()
        self.student_channels = _count("student_channels", student_channels, 1)
        self.teacher_channels = _count("teacher_channels", teacher_channels, 1)
        self.warmup_steps = _count("warmup_steps", warmup_steps, 0)
        self.gradient_penalty = _amount("gradient_penalty", gradient_penalty)
        self.penalty_every = _count("penalty_every", penalty_every, 1)
        self.lecam = _amount("lecam", lecam)
        for name, switch in (("normalize", normalize), ("balance", balance)):
            if not isinstance(switch, bool):
                message = f"{name}: expected True or False, got {describe(switch)}"
                raise TypeError(message)
        self.normalize = normalize
        self.balance = GradientBalance() if balance else None
        choose("layout", layout, LAYOUTS)
        self.layout = layout
        self.objective = get_objective(objective)
        self.adapter = self._make_adapter(adapter)
        self.discriminator = self._make_discriminator(discriminator)
        if weight is None:
            weight = 1.0 if balance else getattr(self.discriminator, "default_weight", 1.0)
        self.weight = _amount("weight", weight)
        enough = getattr(self.discriminator, "default_max_points", None)
        self._draws = enough is not None
        if isinstance(max_points, str) and max_points != "auto":
            message = (
                "max_points: expected a number of at least 2, None (all) or 'auto', got "
                f"{max_points!r}"
            )
            raise ValueError(message)
        limit = enough if max_points == "auto" else max_points
        self.max_points = None if limit is None else _count("max_points", limit, 2)
        self._keywords = _accepted_keywords(self.discriminator)
        if normalize and not getattr(self.discriminator, "standardized", True):
            message = (
                f"normalize: {type(self.discriminator).__name__} takes features on the scale that "
                "the teacher's layers were trained on, not standardised; set normalize=False"
            )
            raise ValueError(message)
        for name, value in (("gradient_penalty", gradient_penalty), ("lecam", lecam)):
            if value and not self._learns:
                message = (
                    f"{name}: {type(self.discriminator).__name__} has no trainable parameters to "
                    f"regularise; set {name}=0 or take a discriminator that learns"
                )
                raise ValueError(message)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("teacher_mean", torch.zeros(teacher_channels))
        self.register_buffer("teacher_variance", torch.ones(teacher_channels))
        self.register_buffer("average_scores", torch.zeros(2))
        self.register_buffer("_logged", torch.zeros(len(_STATISTICS)), persistent=False)
        self._since_penalty = 0
        self._made_with = fingerprints(self)
        self.register_load_state_dict_post_hook(_remember_parameters)  # type: ignore[no-untyped-call]

    steps: Tensor
    batches: Tensor
    teacher_mean: Tensor
    teacher_variance: Tensor
    average_scores: Tensor
    _logged: Tensor

    # ------------------------------------------------------------------------------ the losses

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """The student's term plus the discriminator's loss; the student's alone in evaluation.

        Args:
            student: the student's features.
            teacher: the teacher's features of the same clouds; detached if they require grad.
            labels: class of each cloud, `(B,)`, for discriminators that are conditioned on it.

        Returns:
            A scalar; call `backward` on it once, with the loss of the task added or not.
        """
        fake, real, labels = self._prepare(self._tapped(student), teacher, labels)
        updating = self._updating
        # If nothing learns, the scores of the one term are those of the other.
        both = updating and not self._learns
        student_term, known = self._student_term(fake, real, labels, both=both)
        if not updating:
            return student_term
        discriminator_term = self._discriminator_term(fake.detach(), real, labels, known)
        return student_term + discriminator_term

    def student_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The student's term alone, weighted: a gradient for the student and the adapter.

        For loops with two optimizers. It advances the warm-up.
        """
        fake, real, labels = self._prepare(self._tapped(student), teacher, labels)
        return self._student_term(fake, real, labels)[0]

    def discriminator_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The discriminator's loss alone: a gradient for the discriminator.

        For loops with two optimizers. It advances the penalty's and LeCam's state.
        """
        fake, real, labels = self._prepare(student, teacher, labels)
        return self._discriminator_term(fake.detach(), real, labels, None)

    def statistics(self) -> dict[str, Tensor]:
        """What to log, as detached scalar tensors, of the latest training step.

        ``student_loss`` (unweighted), ``discriminator_loss``, ``real_score`` and ``fake_score``
        (means), ``accuracy`` (the share of scores on the right side of the midpoint between the two
        means: 0.5 means that the features cannot be told apart), ``penalty`` (the latest that was
        computed), ``weight`` (with warm-up and balance in it), ``non_finite`` (how many features
        were NaN or infinite), and
        ``untrained_parameters``: how many of the loss's trainable parameters still hold the values
        that they were made or loaded with. Once training runs it should be 0 (or 1, where an
        objective compares scores and their common bias has no gradient); if it is more, put
        ``fad.parameters()`` into the optimizer.
        """
        values = dict(zip(_STATISTICS, self._logged.clone().unbind(), strict=True))
        still = untrained(self, self._made_with).values()
        values["untrained_parameters"] = sum(still, torch.zeros_like(self.steps))
        return values

    # --------------------------------------------------------------------------- the two terms

    @property
    def _updating(self) -> bool:
        return self.training and torch.is_grad_enabled()

    @property
    def _learns(self) -> bool:
        return any(p.requires_grad for p in self.discriminator.parameters())

    def _weight_now(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of the student's term at this step: warm-up and balance included."""
        weight = torch.full((), self.weight, dtype=dtype, device=self._logged.device)
        if self.warmup_steps:
            weight = weight * ((self.steps + 1) / self.warmup_steps).clamp(max=1).to(dtype)
        return weight if self.balance is None else weight * self.balance.factor().to(dtype)

    def _tapped(self, student: Tensor) -> Tensor:
        """The student's features, watched for the gradients that arrive there."""
        if self.balance is None or not self._updating or not isinstance(student, Tensor):
            return student
        return self.balance.tap(student, self._weight_now())

    def _student_term(
        self, fake: Tensor, real: Tensor, labels: Tensor | None, *, both: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The student against a discriminator that stands still; both scores, if known."""
        scores: Tensor
        real_scores: Tensor | None = None
        if both or self.objective.needs_real:
            scores, real_scores = self._frozen_scores(fake, real, labels)
        else:
            scores = self._score(fake, real, labels, frozen=True)
        loss = self.objective.student(scores, real_scores)
        weight = self._weight_now(loss.dtype)
        if self._updating:
            # Not in place: a compiled backward may compute the weight again, from what it was here.
            self.steps = self.steps + 1
        self._log(student_loss=loss, weight=weight, fake_score=cloud_mean(scores).mean())
        return weight * loss, None if real_scores is None else (scores.detach(), real_scores)

    def _discriminator_term(
        self,
        fake: Tensor,
        real: Tensor,
        labels: Tensor | None,
        known: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The discriminator against features that stand still."""
        penalty = None
        if self._learns:
            real_scores, fake_scores, penalty = self._pair_scores(fake, real, labels)
        elif known is not None:
            fake_scores, real_scores = known
        else:
            with torch.no_grad():
                fake_scores, real_scores = self._frozen_scores(fake, real, labels)
        loss = self.objective.discriminator(real_scores, fake_scores)
        with torch.no_grad():
            means = torch.stack([cloud_mean(s).mean() for s in (real_scores, fake_scores)])
            middle = means.mean()
            right = torch.cat([flat(real_scores) > middle, flat(fake_scores) < middle])
        self._log(
            discriminator_loss=loss,
            real_score=means[0],
            fake_score=means[1],
            accuracy=right.to(means.dtype).mean(),
        )
        if penalty is not None:
            loss = loss + self.gradient_penalty * self.penalty_every * penalty
            self._log(penalty=penalty)
        if self.lecam:
            loss = loss + self.lecam * lecam_penalty(real_scores, fake_scores, *self.average_scores)
            if self._updating:
                latest = means.to(self.average_scores.dtype)
                latest = torch.where(torch.isfinite(latest).all(), latest, self.average_scores)
                self.average_scores.lerp_(latest, 1 - _DECAY)
        return loss

    def _frozen_scores(
        self, fake: Tensor, real: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores of the student and of the teacher, by a discriminator that stands still."""
        judge = self.discriminator
        if type(judge) is TeacherDiscriminator and judge.embedding is None:
            scores, real_scores = judge.both(fake, real)
            self._check_scores(scores, fake)
            self._check_scores(real_scores, real)
            return scores, real_scores
        scores = self._score(fake, real, labels, frozen=True)
        with torch.no_grad():
            return scores, self._score(real, real, labels, student=fake.detach(), frozen=True)

    def _pair_scores(
        self, fake: Tensor, real: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores of real and fake features, in one call where shapes allow, and the penalty."""
        penalise = False
        if self.gradient_penalty:
            penalise = self.penalty_every == 1 or self._since_penalty == 0
            if self._updating and self.penalty_every > 1:
                self._since_penalty = (self._since_penalty + 1) % self.penalty_every

        def scored(
            features: Tensor, reference: Tensor, labels: Tensor | None, student: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            # The penalty needs features as a leaf, and "the reference itself" must stay itself.
            def score(leaf: Tensor) -> Tensor:
                to = leaf if features is reference else reference
                return self._score(leaf, to, labels, student=student)

            return penalized_scores(score, features) if penalise else (score(features), None)

        together = is_ragged(real) or (real.shape == fake.shape)
        apart = "student" in self._keywords or getattr(self.discriminator, "compares_clouds", False)
        if together and not apart:
            both, twice = concatenate(real, fake), concatenate(real, real)
            labels = None if labels is None else concatenate(labels, labels)
            scores, penalty = scored(both, twice, labels, None)
            real_scores, fake_scores = split(scores, real, fake)
            return real_scores, fake_scores, None if penalty is None else 2 * penalty
        real_scores, r1 = scored(real, real, labels, fake)
        fake_scores, r2 = scored(fake, real, labels, None)
        penalty = None if r1 is None or r2 is None else r1 + r2
        return real_scores, fake_scores, penalty

    def _score(
        self,
        features: Tensor,
        reference: Tensor,
        labels: Tensor | None,
        *,
        student: Tensor | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """Call the discriminator with what it accepts, and check what it returns."""
        keywords: dict[str, Tensor | None] = {
            "reference": reference,
            "labels": labels,
            "student": student,
        }
        accepted = {name: keywords[name] for name in self._keywords}
        scores: Tensor
        if frozen or not torch.is_grad_enabled():
            # Copies of the buffers: a spectral norm's power iteration must not run twice a step,
            # nor where nothing learns.
            state = {n: p.detach() for n, p in self.discriminator.named_parameters()}
            state.update((n, b.clone()) for n, b in self.discriminator.named_buffers())
            scores = functional_call(self.discriminator, state, (features,), accepted)
        else:
            scores = self.discriminator(features, **accepted)
        self._check_scores(scores, features)
        return scores

    def _check_scores(self, scores: Tensor, features: Tensor) -> None:
        fits = False
        if isinstance(scores, Tensor):
            if is_ragged(features) and is_ragged(scores):
                fits = pack(scores)[0].shape == pack(features)[0].shape[:1]
            elif not is_ragged(scores):
                per_point = not is_ragged(features) and scores.shape == features.shape[:2]
                fits = per_point or scores.shape == features.shape[:1]
        if not fits:
            message = (
                f"discriminator: expected {type(self.discriminator).__name__} to return one score "
                f"per point, (B, N), or per cloud, (B,), got {describe(scores)} for features "
                f"{describe(features)}; squeeze a trailing axis of size 1, for example"
            )
            raise ValueError(message)
        check_finite("discriminator: scores", flat(scores))

    # ------------------------------------------------------------------------------- features

    def _prepare(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Validate, adapt and standardise: both `(B, N, teacher_channels)` or ragged."""
        fake = as_points(student, self.layout, "student")
        real = as_points(teacher, self.layout, "teacher").detach()
        self._check_features(fake, real, student, teacher)
        if labels is not None:
            _check_labels(labels, student)
            # The batch is the set: the labels of the clouds are those of its points.
            labels = labels.unsqueeze(0) if student.dim() == 2 and labels.dim() == 1 else labels
        if self.training and self._draws and student.dim() > 2:
            fake, real = self._draw(fake, real)
        fake = pointwise(self._adapt, fake)
        dtype = torch.promote_types(fake.dtype, real.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        fake, real = fake.to(dtype), real.to(dtype)
        with torch.no_grad():
            bad = count_non_finite(flat(fake)) + count_non_finite(flat(real))
        self._log(non_finite=bad)
        kind = self._discriminator_dtype(dtype)
        if not self.normalize:
            return fake.to(kind), real.to(kind), labels
        if self._updating:
            self._observe(real)
        variance = self.teacher_variance
        floor = _FLOOR * variance.mean()
        scale = torch.where(floor > 0, variance + floor, 1.0).rsqrt().to(dtype)
        shift = -self.teacher_mean.to(dtype) * scale

        def standardise(values: Tensor) -> Tensor:
            return torch.addcmul(shift, values, scale).to(kind)

        return pointwise(standardise, fake), pointwise(standardise, real), labels

    def _discriminator_dtype(self, default: torch.dtype) -> torch.dtype:
        """What the discriminator's layers take, if it has any."""
        for t in (*self.discriminator.parameters(), *self.discriminator.buffers()):
            if t.is_floating_point():
                return t.dtype
        return default

    def _check_features(self, fake: Tensor, real: Tensor, student: Tensor, teacher: Tensor) -> None:
        for name, t, given, channels in (
            ("student", fake, student, self.student_channels),
            ("teacher", real, teacher, self.teacher_channels),
        ):
            if t.shape[-1] != channels:
                other = "bcn" if self.layout == "bnc" else "bnc"
                hint = f"{name}_channels={t.shape[-1]}"
                if t.dim() == 3 and t.shape[1] == channels and not is_ragged(t):
                    hint = f"layout={other!r} (the channels seem to be in the other place)"
                message = (
                    f"{name}: expected {channels} channels ({name}_channels) for layout "
                    f"{self.layout!r}, got {describe(given)}; make the loss with {hint}, or pass "
                    "the features of another layer"
                )
                raise ValueError(message)
        if fake.shape[0] != real.shape[0]:
            message = (
                "student and teacher: expected the same number of clouds B, got "
                f"{describe(student)} and {describe(teacher)}; feed both the same batch"
            )
            raise ValueError(message)
        if student.dim() == teacher.dim() == 2 and len(student) != len(teacher):
            message = (
                "student and teacher: expected global features (B, C) of the same clouds, got "
                f"{describe(student)} and {describe(teacher)}; feed both the same batch, or "
                "compare them as sets of different size with student[None] and teacher[None]"
            )
            raise ValueError(message)
        if student.dim() != teacher.dim():
            message = (
                "student and teacher: expected both to be features of points or both global, got "
                f"{describe(student)} and {describe(teacher)}; take layers of the same kind"
            )
            raise ValueError(message)
        if is_ragged(fake) != is_ragged(real):
            message = (
                "student and teacher: expected both ragged or both not, got "
                f"{describe(student)} and {describe(teacher)}; wrap the other one in "
                "fad_loss.ragged"
            )
            raise ValueError(message)
        if fake.device != real.device:
            message = (
                f"student and teacher: expected one device, got {describe(student)} and "
                f"{describe(teacher)}; move one with .to(device)"
            )
            raise ValueError(message)
        if self._logged.device != fake.device:
            message = (
                f"student: expected the device of the loss, {self._logged.device}, got "
                f"{describe(student)}; move the loss with fad.to({str(fake.device)!r})"
            )
            raise ValueError(message)
        for name, t in (("student", fake), ("teacher", real)):
            check_finite(name, flat(t))

    def _draw(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """At most `max_points` points of each cloud, a new random choice at every step.

        Clouds of equal size keep the same points: where they correspond, they still do, and if the
        student's features were the teacher's, what is drawn of them would be the same set.
        """
        if self.max_points is None or is_ragged(fake):
            return fake, real
        if (
            fake.shape[1] != real.shape[1]
            and getattr(self.discriminator, "condition", "") == "point"
        ):
            return fake, real  # for the discriminator to refuse: equal numbers would hide it
        if max(fake.shape[1], real.shape[1]) <= self.max_points:
            return fake, real
        keys = torch.rand(fake.shape[:2], device=fake.device)
        other = keys if real.shape[1] == fake.shape[1] else torch.rand_like(real[..., 0])
        return _first(fake, keys, self.max_points), _first(real, other, self.max_points)

    def _adapt(self, values: Tensor) -> Tensor:
        first = next(self.adapter.parameters(), None)
        # Half-precision features meet a float32 adapter outside autocast too.
        adapted: Tensor = self.adapter(values if first is None else values.to(first.dtype))
        expected = (*values.shape[:-1], self.teacher_channels)
        if adapted.shape != expected:
            message = (
                f"adapter: expected it to map channels-last features to the teacher's "
                f"{self.teacher_channels} channels, got {describe(adapted)} from {describe(values)}"
            )
            raise ValueError(message)
        return adapted

    @torch.no_grad()
    def _observe(self, real: Tensor) -> None:
        """Follow the mean and variance of the teacher's channels; exactly the mean at first."""
        values = flat(real).to(self.teacher_mean.dtype)
        # torch.var_mean takes several times as long on a CPU.
        mean = values.mean(0)
        variance = (values - mean).square_().mean(0)
        # A batch that overflowed (which on a GPU nobody looks for) must not spoil all that follow.
        finite = torch.isfinite(mean + variance).all()
        mean = torch.where(finite, mean, self.teacher_mean)
        variance = torch.where(finite, variance, self.teacher_variance)
        self.batches.add_(finite)
        rate = (1 / self.batches.clamp(min=1)).clamp(min=_MOMENTUM).to(mean.dtype) * finite
        # The spread of the means between batches belongs to the variance.
        shift = mean - self.teacher_mean
        within = torch.lerp(self.teacher_variance, variance, rate)
        self.teacher_variance.copy_(within + rate * (1 - rate) * shift.square())
        self.teacher_mean.lerp_(mean, rate)

    # ----------------------------------------------------------------------------------- parts

    def _make_adapter(self, adapter: str | nn.Module) -> nn.Module:
        if isinstance(adapter, nn.Module):
            return adapter
        _check_name("adapter", adapter, ("linear", "identity"))
        if adapter == "identity" and self.student_channels != self.teacher_channels:
            message = (
                f'adapter: "identity" needs as many student as teacher channels, got '
                f'{self.student_channels} and {self.teacher_channels}; use "linear"'
            )
            raise ValueError(message)
        makers: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(self.student_channels, self.teacher_channels),
            "identity": nn.Identity,
        }
        return choose("adapter", adapter, makers)()

    def _make_discriminator(self, discriminator: str | nn.Module) -> nn.Module:
        if isinstance(discriminator, nn.Module):
            return discriminator
        _check_name("discriminator", discriminator, _DISCRIMINATORS)
        if discriminator == "head":
            message = (
                'discriminator: "head" needs the teacher\'s own layers; pass '
                "fad_loss.HeadDiscriminator(teacher.classifier), say"
            )
            raise ValueError(message)
        return choose("discriminator", discriminator, _DISCRIMINATORS)(self.teacher_channels)

    def _log(self, **values: Tensor) -> None:
        if not self._updating:
            return
        for name, value in values.items():
            self._logged[_STATISTICS.index(name)] = value.detach().to(self._logged.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move; what was not trained before still is not, even if it was rounded.

        Statistics stay in float32 at least: in half precision they would overflow, or stand still.
        """
        before = untrained(self, self._made_with)
        statistics = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._made_with = converted(self, self._made_with, before)
        for name, given in statistics.items():
            now = getattr(self, name)
            if now.dtype in {torch.float16, torch.bfloat16}:
                setattr(self, name, given.to(now.device, torch.float32))
        return self

    def get_extra_state(self) -> dict[str, int]:
        """Where the lazy penalty is in its cycle."""
        return {"since_penalty": self._since_penalty}

    def set_extra_state(self, state: Any) -> None:
        """Take up the lazy penalty's cycle."""
        self._since_penalty = state["since_penalty"]

    def extra_repr(self) -> str:
        """Shown by ``print(fad)``."""
        return f"objective={self.objective}, weight={self.weight}, layout={self.layout!r}"


def _remember_parameters(loss: FeatureAdversarialLoss, _: object) -> None:
    """After loading, trained means different from what was loaded."""
    loss._made_with = fingerprints(loss)


def _count(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{name}: expected an int, got {type(value).__name__} {value!r}"
        raise TypeError(message)
    if value < least:
        message = f"{name}: expected at least {least}, got {value}"
        raise ValueError(message)
    return value


def _amount(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        message = f"{name}: expected a number, got {type(value).__name__} {value!r}"
        raise TypeError(message)
    if not 0 <= value < float("inf"):
        message = f"{name}: expected a finite number of at least 0, got {value!r}"
        raise ValueError(message)
    return float(value)


def _check_name(argument: str, value: object, known: Iterable[str]) -> None:
    if isinstance(value, str):
        return
    hint = ""
    if isinstance(value, type) and issubclass(value, nn.Module):
        hint = f"; pass an instance, {value.__name__}(...)"
    message = (
        f"{argument}: expected one of {', '.join(map(repr, known))}, or a torch.nn.Module, got "
        f"{describe(value)}{hint}"
    )
    raise TypeError(message)


def _accepted_keywords(discriminator: nn.Module) -> tuple[str, ...]:
    """Which of reference, labels and student the discriminator's forward takes."""
    parameters = inspect.signature(discriminator.forward).parameters
    taken = set(parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        taken |= {"reference", "labels"}
    return tuple(name for name in ("reference", "labels", "student") if name in taken)


def _check_labels(labels: object, student: Tensor) -> None:
    if not isinstance(labels, Tensor):
        message = f"labels: expected a torch.Tensor of classes, got {describe(labels)}"
        raise TypeError(message)
    if labels.device != student.device:
        message = (
            f"labels: expected the device of the features, {student.device}, got "
            f"{describe(labels)}; move them with .to({str(student.device)!r})"
        )
        raise ValueError(message)


def _first(points: Tensor, keys: Tensor, count: int) -> Tensor:
    """The points of each cloud with the `count` largest keys; all of them if there are no more."""
    if points.shape[1] <= count:
        return points
    chosen = keys.topk(count, dim=1, sorted=False).indices.unsqueeze(-1)
    return points.gather(1, chosen.expand(-1, -1, points.shape[-1]))
