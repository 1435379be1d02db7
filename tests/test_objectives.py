"""What the two players minimise: values by hand, layouts, gradients, errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fad_loss import ragged
from fad_loss.objectives import (
    OBJECTIVES,
    Hinge,
    LeastSquares,
    NonSaturating,
    Objective,
    Relativistic,
    Wasserstein,
    get_objective,
)

NAMES = list(OBJECTIVES)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


# By hand, for one cloud with real scores (2, -1) and fake scores (0.5, -3).
EXPECTED = {
    "hinge": (-(0.5 - 3) / 2, (0 + 2) / 2 + (1.5 + 0) / 2),
    "non_saturating": (
        (softplus(-0.5) + softplus(3)) / 2,
        (softplus(-2) + softplus(1)) / 2 + (softplus(0.5) + softplus(-3)) / 2,
    ),
    "least_squares": (
        (0.25 + 16) / 4,
        (1 + 4) / 4 + (0.25 + 9) / 4,
    ),
    "wasserstein": (-(0.5 - 3) / 2, -1.25 - 0.5),
    "relativistic": (softplus(0.5 + 1.25), softplus(-1.25 - 0.5)),
}


@pytest.mark.parametrize("name", NAMES)
def test_values_by_hand(name):
    objective = get_objective(name)
    real = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    fake = torch.tensor([[0.5, -3.0]], dtype=torch.float64)
    student, discriminator = EXPECTED[name]
    assert objective.student(fake, real).item() == pytest.approx(student, rel=1e-14)
    assert objective.discriminator(real, fake).item() == pytest.approx(discriminator, rel=1e-14)
    assert objective.student(fake, real).dtype == torch.float64
    assert objective.needs_real == (name == "relativistic")


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_ragged_equals_a_loop_over_clouds(name, data):
    objective = get_objective(name)
    clouds = data.draw(st.integers(1, 4))
    sizes = st.lists(st.integers(1, 5), min_size=clouds, max_size=clouds)
    pairs = []
    for _ in range(2):
        lengths = data.draw(sizes)
        values = torch.randn(sum(lengths), dtype=torch.float64)
        pairs.append((ragged(values, lengths=lengths), values.split(lengths)))
    (real, reals), (fake, fakes) = pairs
    loop = [
        (objective.student(f[None], r[None]), objective.discriminator(r[None], f[None]))
        for r, f in zip(reals, fakes, strict=True)
    ]
    student, discriminator = (torch.stack(terms).mean() for terms in zip(*loop, strict=True))
    assert torch.allclose(objective.student(fake, real), student, rtol=1e-12)
    assert torch.allclose(objective.discriminator(real, fake), discriminator, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_scores_per_cloud_are_clouds_of_one_point(name):
    objective = get_objective(name)
    real, fake = torch.randn(2, 6)
    assert torch.equal(
        objective.discriminator(real, fake), objective.discriminator(real[:, None], fake[:, None])
    )
    assert torch.equal(objective.student(fake, real), objective.student(fake[:, None], real))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_point_the_right_way(name):
    objective = get_objective(name)
    real = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    fake = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    (student,) = torch.autograd.grad(objective.student(fake, real), fake)
    assert (student < 0).all()  # raising the student's scores lowers its loss
    to_real, to_fake = torch.autograd.grad(objective.discriminator(real, fake), [real, fake])
    assert (to_real < 0).all()
    # At 0 the least-squares discriminator is content with the fake scores.
    assert (to_fake >= 0).all()
    assert (to_fake > 0).all() or name == "least_squares"


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    objective = get_objective(name)
    real = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: objective.student(f, real.detach()), fake)
    assert torch.autograd.gradcheck(objective.discriminator, (real, fake))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_averaged_in_float32(name, dtype):
    objective = get_objective(name)
    # Squared, or summed, these leave the range of float16.
    real = torch.full((2, 300), 400.0, dtype=dtype)
    fake = torch.full((2, 300), -400.0, dtype=dtype)
    student = objective.student(fake, real)
    assert student.dtype == torch.float32
    assert torch.equal(student, objective.student(fake.float(), real.float()))
    assert student.isfinite()
    loss = objective.discriminator(real, fake)
    assert torch.equal(loss, objective.discriminator(real.float(), fake.float()))
    cloud = ragged(fake.flatten(), lengths=[300, 300])
    assert torch.allclose(objective.student(cloud, real), student)


@pytest.mark.parametrize("name", NAMES)
def test_large_scores_stay_finite(name):
    objective = get_objective(name)
    real = torch.tensor([1e6, -1e6], requires_grad=True)
    fake = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = objective.student(fake, real) + objective.discriminator(real, fake)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, [real, fake]))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_ragged_cloud_is_a_defined_value(name):
    objective = get_objective(name)
    real = ragged(torch.randn(4), lengths=[0, 4])
    fake = ragged(torch.randn(3).requires_grad_(), lengths=[3, 0])
    assert objective.student(fake, real).isfinite()
    assert objective.discriminator(real, fake).isfinite()


def test_names_and_instances():
    for name, kind in OBJECTIVES.items():
        objective = get_objective(name)
        assert type(objective) is kind
        assert repr(objective) == f"{kind.__name__}()"
        assert get_objective(objective) is objective
        assert type(pickle.loads(pickle.dumps(objective))) is kind
        assert type(copy.deepcopy(objective)) is kind
    assert {Hinge, NonSaturating, LeastSquares, Wasserstein, Relativistic} == set(
        OBJECTIVES.values()
    )


def test_an_objective_of_your_own():
    class Mine(Objective):
        def student(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
            return fake.square().mean()

        def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
            return real.mean() + fake.mean()

    mine = Mine()
    assert get_objective(mine) is mine
    assert not mine.needs_real
    with pytest.raises(TypeError, match="abstract"):
        Objective()  # type: ignore[abstract]


@pytest.mark.parametrize(
    "objective, error, message",
    [
        ("hing", ValueError, r"expected one of 'hinge'.*got 'hing'; did you mean 'hinge'\?"),
        ("x", ValueError, "'relativistic', got 'x'$"),
        (Hinge, TypeError, r"or an Objective.*pass an instance, Hinge\(\)"),
        (None, TypeError, "or an Objective, got None$"),
    ],
)
def test_bad_objectives(objective, error, message):
    with pytest.raises(error, match=message):
        get_objective(objective)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "scores, error, message",
    [
        (torch.zeros(2, 3, 1), ValueError, r"fake: expected one score per point.*\(2, 3, 1\)"),
        (torch.tensor(1.0), ValueError, r"fake: expected one score.*shape \(\)"),
        (torch.zeros(0, 3), ValueError, r"fake: expected the scores of at least one cloud"),
        (torch.zeros(2, 3).long(), TypeError, "fake: expected float32.*int64"),
        (torch.full((2, 3), torch.nan), ValueError, "fake: 6 of 6 values are NaN or infinite"),
        (ragged(torch.zeros(3, 1), lengths=[1, 2]), ValueError, "fake: expected one score"),
    ],
)
def test_bad_scores(name, scores, error, message):
    real = torch.zeros(scores.shape[0] if scores.dim() else 2, 3)
    if name == "relativistic" and not scores.dim():
        scores = torch.zeros(2, 1, 1)
        message = r"fake: expected one score"
    with pytest.raises(error, match=message):
        get_objective(name).student(scores, real)


@pytest.mark.parametrize("name", NAMES)
def test_scores_that_do_not_count_may_be_anything(name):
    scores, real = torch.tensor([[1.0, torch.nan], [2.0, -torch.inf]]), torch.randn(2, 3)
    mask = torch.tensor([[True, False]]).expand(2, -1)
    expected = get_objective(name).student(scores[:, :1], real)
    assert torch.equal(get_objective(name).student(scores, real, mask=(mask, None)), expected)


def test_relativistic_needs_pairs():
    with pytest.raises(ValueError, match=r"real: the relativistic objective.*got None"):
        Relativistic().student(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"same number of each.*\(3, 4\).*\(2, 4\)"):
        Relativistic().discriminator(torch.zeros(3, 4), torch.zeros(2, 4))
