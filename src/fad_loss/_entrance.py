"""What comes in at the loss's door: parts by name, and features checked, drawn and matched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fad_loss._checks import check_finite
from fad_loss._errors import choose, count, describe, expected
from fad_loss._game import Game, Side, both_sides
from fad_loss._points import Points
from fad_loss._ragged import flat, is_ragged, pack
from fad_loss.correspondence import interpolate
from fad_loss.discriminators import (
    CloudDiscriminator,
    Discriminator,
    MatchDiscriminator,
    NeighborhoodDiscriminator,
    PointDiscriminator,
    Scores,
    TeacherDiscriminator,
    as_discriminator,
)
from fad_loss.discriminators.base import at_least_float32

if TYPE_CHECKING:
    from fad_loss.loss import FeatureAdversarialLoss

DISCRIMINATORS: Final[dict[str, Callable[[int], Discriminator]]] = {
    "teacher": lambda channels: TeacherDiscriminator(),  # noqa: ARG005
    "paired": lambda channels: TeacherDiscriminator(condition="point"),  # noqa: ARG005
    "point": PointDiscriminator,
    "neighborhood": NeighborhoodDiscriminator,
    "cloud": CloudDiscriminator,
    "match": MatchDiscriminator,
}
"""The discriminators by name, of so many channels."""


# ---------------------------------------------------------------------------------- parts by name


def make_adapter(
    adapter: str | nn.Module, student_channels: int, teacher_channels: int
) -> nn.Module:
    """The adapter of that name, or the module itself."""
    if isinstance(adapter, nn.Module):
        return adapter
    _check_name("adapter", adapter, ("linear", "identity"))
    if adapter == "identity" and student_channels != teacher_channels:
        message = (
            f'adapter: "identity" needs as many student as teacher channels, got '
            f'{student_channels} and {teacher_channels}; use "linear"'
        )
        raise ValueError(message)
    makers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(student_channels, teacher_channels),
        "identity": nn.Identity,
    }
    return choose("adapter", adapter, makers)()


def make_discriminator(discriminator: str | nn.Module, channels: int) -> Discriminator:
    """The discriminator of that name, or the module itself, wrapped if it has to be."""
    if isinstance(discriminator, nn.Module):
        made = as_discriminator(discriminator)
        made.prepare(channels)
        return made
    _check_name("discriminator", discriminator, DISCRIMINATORS)
    if discriminator == "head":
        message = (
            'discriminator: "head" needs the teacher\'s own layers; pass '
            "fad_loss.HeadDiscriminator(teacher.classifier), say"
        )
        raise ValueError(message)
    return choose("discriminator", discriminator, DISCRIMINATORS)(channels)


def limit_of_points(max_points: int | str | None, discriminator: Discriminator) -> int | None:
    """How many points of each cloud to compare; None for all."""
    if isinstance(max_points, str) and max_points != "auto":
        wanted = "a number of at least 2, None (all) or 'auto'"
        raise expected("max_points", wanted, repr(max_points))
    limit = discriminator.default_max_points if max_points == "auto" else max_points
    return None if limit is None else count("max_points", limit, 2)


def check_regularisers(discriminator: Discriminator, **weights: float) -> None:
    """Refuse to regularise what does not learn."""
    for name, weight in weights.items():
        if weight and not discriminator.learns:
            message = (
                f"{name}: {name_of(discriminator)} has no trainable parameters to regularise; "
                f"set {name}=0 or take a discriminator that learns"
            )
            raise ValueError(message)


def _check_name(argument: str, value: object, known: Iterable[str]) -> None:
    if isinstance(value, str):
        return
    remedy = ""
    if isinstance(value, type) and issubclass(value, nn.Module):
        remedy = f"pass an instance, {value.__name__}(...)"
    wanted = f"one of {', '.join(map(repr, known))}, or a torch.nn.Module"
    raise expected(argument, wanted, value, remedy, error=TypeError)


def name_of(discriminator: Discriminator) -> str:
    """The class that its user knows it by."""
    return type(getattr(discriminator, "module", discriminator)).__name__


def floating_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """What the module's layers take, if it has any."""
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            return t.dtype
    return default


# --------------------------------------------------------------------------------------- features


def enter(
    loss: FeatureAdversarialLoss,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Any,
    positions: Any,
) -> Game:
    """Both sides' points as they came, if they belong together; not yet filled."""
    masks, places = both_sides("mask", mask), both_sides("positions", positions)
    layout = loss.layout
    fake = Points.unfilled(student, masks[0], places[0], layout=layout, name="student")
    real = Points.unfilled(teacher, masks[1], places[1], layout=layout, name="teacher").detach()
    for name, points, given, channels in (
        ("student", fake, student, loss.student_channels),
        ("teacher", real, teacher, loss.teacher_channels),
    ):
        if points.channels != channels:
            other = "bcn" if loss.layout == "bnc" else "bnc"
            remedy = f"{name}_channels={points.channels}"
            if given.dim() == 3 and points.features.shape[1] == channels and not is_ragged(given):
                remedy = f"layout={other!r} (the channels seem to be in the other place)"
            message = (
                f"{name}: expected {channels} channels ({name}_channels) for layout "
                f"{loss.layout!r}, got {describe(given)}; make the loss with {remedy}, or pass "
                "the features of another layer"
            )
            raise ValueError(message)
    _check_sides(fake, real, student, teacher)
    if loss.steps.device != student.device:
        remedy = f"move the loss with fad.to({str(student.device)!r})"
        raise expected("student", f"the device of the loss, {loss.steps.device}", student, remedy)
    if labels is not None:
        labels = _checked_labels(labels, student)
    if positions is not None and not loss.discriminator.positional:
        message = (
            f"positions: {name_of(loss.discriminator)} does not use where points lie; leave them "
            'out, or take discriminator="teacher" or "paired"'
        )
        raise ValueError(message)
    return Game(fake, real, labels)


def _check_sides(fake: Points, real: Points, student: Tensor, teacher: Tensor) -> None:
    wanted, remedy = "", ""
    if student.dim() == teacher.dim() == 2 and len(student) != len(teacher):
        wanted = "global features (B, C) of the same clouds"
        remedy = (
            "feed both the same batch, or compare them as sets of different size with "
            "student[None] and teacher[None]"
        )
    elif student.dim() != teacher.dim():
        wanted = "both to be features of points or both global"
        remedy = "take layers of the same kind"
    elif fake.batch != real.batch:
        wanted, remedy = "the same number of clouds B", "feed both the same batch"
    elif is_ragged(student) != is_ragged(teacher):
        wanted = "both ragged or both not"
        remedy = "wrap the other one in fad_loss.ragged"
    elif student.device != teacher.device:
        wanted, remedy = "one device", "move one with .to(device)"
    if wanted:
        both = f"{describe(student)} and {describe(teacher)}"
        raise expected("student and teacher", wanted, both, remedy)


def _checked_labels(labels: object, student: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise expected("labels", "a torch.Tensor of classes", labels, error=TypeError)
    if labels.device != student.device:
        remedy = f"move them with .to({str(student.device)!r})"
        raise expected("labels", f"the device of the features, {student.device}", labels, remedy)
    # The batch is the set: the labels of the clouds are those of its points.
    return labels.unsqueeze(0) if student.dim() == 2 and labels.dim() == 1 else labels


def without_small_clouds(game: Game, discriminator: Discriminator) -> tuple[Game, Tensor]:
    """The game without the points of clouds that are too small on either side, and their number.

    Where all clouds have as many points, too few are an error: nothing could ever be learnt.
    """
    student, teacher, least = game.student, game.teacher, discriminator.least_points
    zero = torch.zeros((), dtype=torch.int64, device=student.features.device)
    for name, points in (("student", student), ("teacher", teacher)):
        if not points.uneven and points.features.shape[1] < least:
            message = (
                f"{name}: {name_of(discriminator)} estimates densities from the points of a cloud "
                f"and needs at least {least}, got {describe(points.tensor())}; compare per-point "
                "features, or global features (B, C) of at least 2 clouds"
            )
            raise ValueError(message)
    if not (student.uneven or teacher.uneven):
        return game, zero
    enough = (student.lengths() >= least) & (teacher.lengths() >= least)
    if student.offsets is None or least > 1:
        student, teacher = (
            points.only(points.spread(enough).expand(points.features.shape[:-1]))
            for points in (student, teacher)
        )
    return Game(student, teacher, game.labels), (~enough).sum()


def draw(game: Game, most: int, discriminator: Discriminator) -> Game:
    """At most `most` points of each cloud; clouds of as many on both sides keep the same ones."""
    student, teacher = game.student, game.teacher
    dense = not (student.uneven or teacher.uneven)
    sizes = student.features.shape[1], teacher.features.shape[1]
    if dense and all(size <= most for size in sizes):
        return game
    chance = torch.rand(
        (student.batch, most + 1), dtype=torch.float64, device=student.features.device
    )
    if discriminator.corresponding and teacher.positions is not None:
        # The teacher's points are for the interpolation to choose from.
        drawn = student.draw(most, chance), teacher.padded()
        return Game(*drawn, _whole_labels(game))
    if discriminator.corresponding and dense and sizes[0] != sizes[1]:
        return game  # for the discriminator to refuse: equal numbers would hide it
    labels = game.labels
    if labels is not None and labels.dim() > 1:
        # A class of each point goes where the point goes, as one more feature would.
        values = pack(labels)[0] if is_ragged(labels) else labels
        numbers = student.with_features(values.unsqueeze(-1).double())
        labels = numbers.draw(most, chance).features.squeeze(-1).to(labels.dtype)
    return Game(student.draw(most, chance), teacher.draw(most, chance), labels)


def _whole_labels(game: Game) -> Tensor | None:
    return game.labels if game.labels is None or game.labels.dim() == 1 else None


def correspond(game: Game, discriminator: Discriminator) -> Game:
    """Where points should correspond and their places are known: the teacher's at the student's."""
    student, teacher = game.student, game.teacher
    if not discriminator.corresponding or student.positions is None or teacher.positions is None:
        return game
    if student.offsets is not None or teacher.offsets is not None:
        message = (
            "positions: points of ragged clouds are matched in training, where max_points= are "
            "drawn of each; in evaluation, pass one cloud at a time, as (1, N, C)"
        )
        raise ValueError(message)
    features = interpolate(
        teacher.features, teacher.positions, student.positions, mask=teacher.mask
    )
    # From here on the points are the same, and so are their positions.
    matched = Points(features, None, student.mask)
    return Game(student.without_positions(), matched, game.labels)


def check_points(game: Game) -> None:
    """Refuse features that are not finite, where they may be looked at."""
    for name, points in (("student", game.student), ("teacher", game.teacher)):
        points.check_finite(name)


def in_units(loss: FeatureAdversarialLoss, fake: Points, real: Points) -> tuple[Points, Points]:
    """Standardised, the student's adapted, both in the dtype that the discriminator takes."""
    if loss.normalize:
        if loss.training and torch.is_grad_enabled():
            loss.student_units.observe(fake)
            loss.teacher_units.observe(real)
        fake = loss.student_units(fake.map(at_least_float32))
    fake = fake.map(lambda v: adapt(loss.adapter, v, loss.teacher_channels)).filled()
    dtype = torch.promote_types(fake.features.dtype, real.features.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    fake, real = (points.map(lambda values: values.to(dtype)) for points in (fake, real))
    if loss.normalize and loss.discriminator.standardized:
        real = loss.teacher_units(real)
    elif loss.normalize:
        fake = fake.map(loss.teacher_units.restore)
    kind = floating_dtype(loss.discriminator, dtype)
    return fake.map(lambda values: values.to(kind)), real.map(lambda values: values.to(kind))


def adapt(adapter: nn.Module, values: Tensor, channels: int) -> Tensor:
    """The student's features in the teacher's channels."""
    parameters = list(adapter.parameters())
    # Half-precision features meet a float32 adapter outside autocast too.
    adapted: Tensor = adapter(values.to(parameters[0].dtype) if parameters else values)
    if adapted.shape != (*values.shape[:-1], channels):
        message = (
            f"adapter: expected it to map channels-last features to the teacher's {channels} "
            f"channels, got {describe(adapted)} from {describe(values)}"
        )
        raise ValueError(message)
    return adapted


# ----------------------------------------------------------------------------------------- scores


def check_scores(
    discriminator: Discriminator, game: Game, scores: Scores | dict[Side, Tensor]
) -> None:
    """Refuse what is not one finite score per point or per cloud."""
    if isinstance(scores, Scores):
        scores = {"student": scores.student, "teacher": scores.teacher}
    for side, one in scores.items():
        points, fits = game.points(side), False
        if isinstance(one, Tensor):
            rows = points.features.shape[:-1]
            if is_ragged(one):
                fits = points.offsets is not None and pack(one)[0].shape == rows
            else:
                fits = one.shape == (points.batch,)
                fits = fits or (points.offsets is None and one.shape == rows)
        if not fits:
            message = (
                f"discriminator: expected {name_of(discriminator)} to return one score per point, "
                f"(B, N), or per cloud, (B,), got {describe(one)} for features "
                f"{describe(points.tensor())}; squeeze a trailing axis of size 1, for example"
            )
            raise ValueError(message)
        check_finite("discriminator: scores", flat(one))
