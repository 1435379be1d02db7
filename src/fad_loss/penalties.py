r"""Regularisers of the discriminator: gradient penalties (R1, R2) and LeCam.

What a gradient penalty is the expectation *over* depends on what is scored. With one score per
cloud, the sample is the cloud, and its gradient is that of its score with respect to all its
points. With one score per point, the sample is the point: the cloud's scores are added up, and each
point has the gradient of that sum with respect to its own feature. For a discriminator that looks
at every point by itself this is the plain R1 of the points' distribution; either way the strength
of the penalty does not depend on how many points a cloud has been sampled with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fad_loss._checks import check_tensor
from fad_loss._errors import describe
from fad_loss._game import Game, Side
from fad_loss._ragged import cloud_mean, cloud_sum, is_ragged, pack, packed, pointwise, unpack
from fad_loss.objectives import Masks, as_scores

__all__ = ["lecam", "penalized_scores", "r1", "r2"]


def r1(scores: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Half the expected squared norm of the gradient of the score, at the teacher's features.

    .. math::
        R_1 = \frac{1}{2B} \sum_b \left\| \frac{\partial D_b}{\partial z_b} \right\|^2
        \quad \text{for scores } (B,), \qquad
        R_1 = \frac{1}{2B} \sum_b \frac{1}{N_b} \sum_i
        \left\| \frac{\partial \sum_l D_{bl}}{\partial z_{bi}} \right\|^2
        \quad \text{for scores } (B, N) \text{ or ragged.}

    The result can be differentiated (the graph is kept). Squares are summed in float32 at least.
    Under `torch.compile` this breaks the graph, because it differentiates a graph that is already
    there; `penalized_scores` does not.

    Args:
        scores: ``(B,)``, ``(B, N)`` or ragged ``(B, j)``, computed from `features`.
        features: ``(B, N, C)`` or ragged ``(B, j, C)``; it required grad when it was scored.
        mask: which points of dense features count, ``(B, N)``.

    Returns:
        A scalar, to be multiplied by the weight of your choice (:math:`\gamma`).

    Raises:
        ValueError: `features` does not require grad, `scores` does not depend on it, or their
            shapes do not belong together.

    Source: Mescheder, Geiger & Nowozin, *Which training methods for GANs do actually converge?*,
    ICML 2018.

    Example:
        >>> features = torch.ones(2, 5, 3, requires_grad=True)
        >>> r1(features.square().sum(-1), features)  # the gradient is (2, 2, 2) everywhere
        tensor(6., grad_fn=<MulBackward0>)
    """
    _check_pair(scores, features)
    if not features.requires_grad:
        message = (
            "features: expected a tensor that requires grad, because the penalty differentiates "
            "with respect to it; call features.requires_grad_() before scoring it"
        )
        raise ValueError(message)
    gradient = None
    if scores.requires_grad:
        outputs = pack(scores)[0] if is_ragged(scores) else scores
        (gradient,) = torch.autograd.grad(
            outputs, features, torch.ones_like(outputs), create_graph=True, allow_unused=True
        )
    if gradient is None:
        message = (
            "scores: expected scores that depend on features, got scores without a graph to it; "
            "score this very tensor (not a copy or a view made later), and not under torch.no_grad"
        )
        raise ValueError(message)
    return half_squared_norm(gradient, scores, mask)


def r2(scores: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The same as `r1`, at the student's features.

    .. math::
        R_2 = \frac{1}{2B} \sum_b \left\| \frac{\partial D_b}{\partial s_b} \right\|^2

    R3GAN penalises both, which makes the game converge where R1 alone does not.

    Args:
        scores: ``(B,)``, ``(B, N)`` or ragged, computed from `features`.
        features: ``(B, N, C)`` or ragged ``(B, j, C)``; a detached copy of the student's features
            that requires grad, for the penalty is the discriminator's.
        mask: which points of dense features count, ``(B, N)``.

    Returns:
        A scalar.

    Raises:
        ValueError: as `r1`.

    Source: Mescheder et al., ICML 2018; Huang et al. (R3GAN), NeurIPS 2024.

    Example:
        >>> features = torch.ones(1, 4, 2, requires_grad=True)
        >>> r2(features.square().sum((1, 2)), features)  # one score per cloud: 1/2 * 8 * 2^2
        tensor(16., grad_fn=<MulBackward0>)
    """
    return r1(scores, features, mask)


def penalized_scores(
    score: Callable[[Tensor], Tensor], features: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Score features and compute the gradient penalty `r1` of the scores in one go.

    .. math:: D, \quad \frac{1}{2B} \sum_b \left\| \frac{\partial D_b}{\partial z_b} \right\|^2

    The same numbers as `r1`, from a function instead of from a finished graph. For dense features
    that can be compiled without breaking the graph. `features` need not require grad.

    Args:
        score: maps features to scores, ``(B,)`` or ``(B, N)``; ragged features to ragged scores.
        features: ``(B, N, C)`` or ragged ``(B, j, C)``.
        mask: which points of dense features count, ``(B, N)``.

    Returns:
        The scores and the penalty, both with a graph to the parameters of `score`, not to what
        `features` was computed from.

    Raises:
        ValueError: the scores' shape does not belong to that of `features`, or the scores do not
            depend on it.

    Example:
        >>> scores, penalty = penalized_scores(lambda z: z.square().sum(-1), torch.ones(2, 5, 3))
        >>> penalty.detach()
        tensor(6.)
    """
    check_tensor("features", features)
    if is_ragged(features) or not torch.compiler.is_compiling():
        # torch.func takes neither nested tensors nor operators with an autograd formula; inside a
        # compiled function, which sees through the latter, it is the only way.
        leaf = pointwise(lambda values: values.detach().requires_grad_(), features)
        with torch.enable_grad():
            scores = score(leaf)
            return scores, r1(scores, leaf, mask)
    scores, pull = torch.func.vjp(score, features.detach())  # type: ignore[misc]
    _check_pair(scores, features)
    (gradient,) = pull(torch.ones_like(scores))
    return scores, half_squared_norm(gradient, scores, mask)


def half_squared_norm(gradient: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """The penalty, from the gradient of the summed scores with respect to the features."""
    per_point = is_ragged(scores) or scores.dim() == 2
    if is_ragged(gradient):
        squared = unpack(_squared(pack(gradient)[0]), gradient)
    else:
        squared = _squared(gradient)
        if squared.dim() == 1:
            return 0.5 * squared.mean()
    return 0.5 * (cloud_mean(squared, mask) if per_point else cloud_sum(squared)).mean()


def _squared(gradient: Tensor) -> Tensor:
    if gradient.dtype in {torch.float16, torch.bfloat16}:
        gradient = gradient.float()
    return gradient.square().sum(-1)


def _check_pair(scores: Tensor, features: Tensor) -> None:
    """Raise unless these can be the scores of these features."""
    as_scores("scores", scores)
    check_tensor("features", features)
    if is_ragged(features):
        rows = features.shape[0]
        fits = (
            pack(scores)[0].shape[0] == pack(features)[0].shape[0]
            if is_ragged(scores)
            else scores.shape == (rows,)
        )
    else:
        fits = not is_ragged(scores) and (
            scores.shape in {features.shape[:1], features.shape[:-1]} and features.dim() in {2, 3}
        )
    if not fits:
        message = (
            "scores: expected one score per point or per cloud of features, got "
            f"{describe(scores)} for {describe(features)}"
        )
        raise ValueError(message)


def penalized_sides(
    discriminator: Callable[[Game, Side], Tensor], game: Game
) -> tuple[Tensor, Tensor, Tensor]:
    """Score both sides of a game, and penalise: the student's scores, the teacher's, R1 + R2."""

    def of_side(side: Side) -> tuple[Tensor, Tensor]:
        def score(leaf: Tensor) -> Tensor:
            return discriminator(game.with_features(side, packed(leaf)), side)

        points = game.points(side)
        return penalized_scores(score, points.tensor(), points.mask)

    (fake, r2_of_fake), (real, r1_of_real) = of_side("student"), of_side("teacher")
    return fake, real, r2_of_fake + r1_of_real


def lecam(
    real: Tensor,
    fake: Tensor,
    ema_real: Tensor | float,
    ema_fake: Tensor | float,
    mask: Masks = (None, None),
) -> Tensor:
    r"""LeCam regularisation: keep the scores of each side near the past scores of the other.

    .. math::
        R_{LC} = E[(D(t) - \alpha_F)^2] + E[(D(s) - \alpha_R)^2]

    with :math:`\alpha_R`, :math:`\alpha_F` moving averages of the mean scores of real and fake
    features. It keeps a discriminator from memorising when there is little data.

    Args:
        real: scores of the teacher's features, ``(B, N)``, ``(B,)`` or ragged ``(B, j)``.
        fake: scores of the student's features.
        ema_real: the moving average of the real scores; detached here.
        ema_fake: the moving average of the fake scores; detached here.
        mask: which scores of the fake and of the real points count, ``(B, N)`` each, or None.

    Returns:
        A scalar.

    Raises:
        ValueError: scores of a wrong shape, or an average that is not a single number.

    Source: Tseng et al., *Regularizing Generative Adversarial Networks under Limited Data*,
    CVPR 2021, equation 5.

    Example:
        >>> lecam(torch.tensor([1.0]), torch.tensor([-1.0]), ema_real=1.0, ema_fake=-1.0)
        tensor(8.)
    """
    averages = []
    for name, average in (("ema_real", ema_real), ("ema_fake", ema_fake)):
        if isinstance(average, Tensor):
            if average.numel() != 1:
                message = f"{name}: expected a single number, got {describe(average)}"
                raise ValueError(message)
            average = average.detach().reshape(())  # noqa: PLW2901
        averages.append(average)
    alpha_real, alpha_fake = averages
    return _distance("real", real, alpha_fake, mask[1]) + _distance(
        "fake", fake, alpha_real, mask[0]
    )


def _distance(name: str, scores: Tensor, other: Tensor | float, mask: Tensor | None) -> Tensor:
    """Mean squared distance of the scores from the other side's average."""
    scores = as_scores(name, scores, mask)
    return cloud_mean(pointwise(lambda s: (s - other).square(), scores), mask).mean()
