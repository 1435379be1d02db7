"""Gradient penalties against closed forms, LeCam by hand, second derivatives, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fad_loss import ragged
from fad_loss._ragged import cloud_sum, pointwise
from fad_loss.penalties import lecam, penalized_scores, r1, r2


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def quadratic(matrix: Tensor):
    """Per-point scores z A z / 2, whose gradient is A z."""
    return lambda z: pointwise(lambda v: 0.5 * (v @ matrix * v).sum(-1), z)


@pytest.fixture
def matrix() -> Tensor:
    a = points(3, 3, seed=5)
    return a + a.T


@pytest.mark.parametrize("penalty", [r1, r2])
def test_per_point_scores(matrix, penalty):
    z = points(2, 7, 3).requires_grad_()
    expected = 0.5 * (z @ matrix).square().sum(-1).mean()
    assert torch.allclose(penalty(quadratic(matrix)(z), z), expected, rtol=1e-12)


@pytest.mark.parametrize("penalty", [r1, r2])
def test_per_cloud_scores(matrix, penalty):
    z = points(2, 7, 3).requires_grad_()
    scores = quadratic(matrix)(z).sum(1)
    expected = 0.5 * (z @ matrix).square().sum((1, 2)).mean()
    assert torch.allclose(penalty(scores, z), expected, rtol=1e-12)


def test_global_features_are_samples_by_themselves(matrix):
    z = points(6, 3).requires_grad_()
    scores = 0.5 * (z @ matrix * z).sum(-1)
    expected = 0.5 * (z @ matrix).square().sum(-1).mean()
    assert torch.allclose(r1(scores, z), expected, rtol=1e-12)


def test_points_that_see_each_other():
    # D_i = (sum_j z_j)^2 / 2: the gradient of the sum of N scores is N times the sum of the points.
    z = points(2, 4, 1).requires_grad_()
    total = z.sum(1)
    scores = (0.5 * total.square()).expand(2, 4)
    expected = 0.5 * (4 * total).square().mean()
    assert torch.allclose(r1(scores, z), expected, rtol=1e-12)


def test_the_strength_does_not_depend_on_how_many_points_there_are(matrix):
    z = points(2, 7, 3)
    twice = torch.cat([z, z], 1).requires_grad_()
    z.requires_grad_()
    score = quadratic(matrix)
    assert torch.allclose(r1(score(twice), twice), r1(score(z), z), rtol=1e-12)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), per_cloud=st.booleans())
@settings(max_examples=20, deadline=None)
def test_ragged_equals_a_loop_over_clouds(lengths, per_cloud):
    a = points(3, 3, seed=5)
    quadratic_score = quadratic(a + a.T)

    def score(z: Tensor) -> Tensor:
        return cloud_sum(quadratic_score(z)) if per_cloud else quadratic_score(z)

    values = points(sum(lengths), 3)
    cloud = ragged(values.clone().requires_grad_(), lengths=lengths)
    loop = []
    for part in values.split(lengths):
        single = part[None].clone().requires_grad_()
        loop.append(r1(score(single), single))
    expected = torch.stack(loop).mean()
    assert torch.allclose(r1(score(cloud), cloud), expected, rtol=1e-12)
    scores, penalty = penalized_scores(score, ragged(values, lengths=lengths))
    assert torch.allclose(penalty, expected, rtol=1e-12)
    assert scores.is_nested is not per_cloud


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 1)).double()


@pytest.mark.parametrize("layout", ["points", "clouds", "ragged"])
def test_the_penalty_can_be_differentiated(layout):
    weight = points(3, 4).requires_grad_()

    def penalty(values: Tensor, w: Tensor) -> Tensor:
        def score(z: Tensor) -> Tensor:
            scores = pointwise(lambda v: (v @ w).tanh().sum(-1), z)
            return scores.mean(1) if layout == "clouds" else scores

        z = ragged(values, lengths=[2, 3]) if layout == "ragged" else values.reshape(1, 5, 3)
        return r1(score(z), z)

    values = points(5, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(penalty, (values, weight))


@pytest.mark.parametrize("per_cloud", [False, True])
def test_from_a_function_the_numbers_are_the_same(per_cloud):
    network = mlp()

    def score(z: Tensor) -> Tensor:
        scores = network(z).squeeze(-1)
        return scores.square().mean(1) if per_cloud else scores

    z = points(2, 6, 3)
    leaf = z.clone().requires_grad_()
    expected = r1(score(leaf), leaf)
    scores, penalty = penalized_scores(score, z)
    assert torch.equal(scores, score(z))
    assert torch.allclose(penalty, expected, rtol=1e-12)
    parameters = [p for name, p in network.named_parameters() if name != "2.bias"]
    for mine, other in zip(
        torch.autograd.grad(penalty, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert torch.allclose(mine, other, rtol=1e-10)


def test_from_a_function_nothing_reaches_what_the_features_came_from():
    source = points(2, 6, 3).requires_grad_()
    network = mlp()
    scores, penalty = penalized_scores(lambda z: network(z).squeeze(-1), 2 * source)
    (scores.sum() + penalty).backward()
    assert source.grad is None
    assert network[0].weight.grad.abs().sum() > 0


def test_from_a_function_it_compiles_without_a_break():
    network = mlp()

    def train(z: Tensor) -> Tensor:
        scores, penalty = penalized_scores(lambda v: network(v).squeeze(-1), z)
        return scores.mean() + penalty

    z = points(2, 6, 3)
    expected = train(z)
    gradients = torch.autograd.grad(expected, list(network.parameters()))
    loss = torch.compile(train, backend="aot_eager", fullgraph=True)(z)
    assert torch.allclose(loss, expected, rtol=1e-12)
    compiled = torch.autograd.grad(loss, list(network.parameters()))
    for mine, other in zip(compiled, gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10)


def test_half_precision_squares_in_float32():
    z = torch.full((1, 4, 2), 1.0, dtype=torch.float16, requires_grad=True)
    penalty = r1((300 * z).sum(-1), z)
    assert penalty.dtype == torch.float32
    assert penalty.item() == 0.5 * 2 * 300**2


def test_no_numbers_are_looked_at_where_that_would_wait(monkeypatch):
    def refuse(self: Tensor) -> float:
        raise AssertionError

    monkeypatch.setattr("fad_loss._checks.look", lambda _: False)  # as on a GPU
    monkeypatch.setattr(Tensor, "item", refuse)
    monkeypatch.setattr(Tensor, "__bool__", refuse)
    z = points(2, 3, 4).requires_grad_()
    scores = z.square().sum(-1)
    r1(scores, z)
    lecam(scores, scores, torch.tensor(1.0), torch.tensor([0.0]))


Z = torch.ones(2, 3, 4, requires_grad=True)


@pytest.mark.parametrize(
    "scores, features, error, message",
    [
        (torch.ones(2, 3), Z.detach(), ValueError, r"features: .*call features.requires_grad_\(\)"),
        (torch.ones(2, 3), Z, ValueError, "scores: expected scores that depend on features"),
        (
            torch.ones(2, 3, requires_grad=True) * 2,
            Z,
            ValueError,
            "scores: expected scores that depend on features",
        ),
        (Z.sum(-1)[:1], Z, ValueError, r"scores: .*got float32 of shape \(1, 3\).*\(2, 3, 4\)"),
        (Z.sum(), Z, ValueError, r"scores: expected one score per point.*shape \(\)"),
        (Z, Z, ValueError, r"scores: expected one score per point.*\(2, 3, 4\)"),
        (Z.sum(-1).long(), Z, TypeError, "scores: expected float32.*int64"),
        (
            ragged(torch.ones(6), lengths=[2, 4]),
            Z,
            ValueError,
            "one score per point or per cloud of features",
        ),
        (
            torch.ones(6),
            ragged(torch.ones(6, 2), lengths=[2, 4]),
            ValueError,
            "one score per point or per cloud of features",
        ),
        (
            ragged(torch.ones(5), lengths=[2, 3]),
            ragged(torch.ones(6, 2), lengths=[2, 4]),
            ValueError,
            "one score per point or per cloud of features",
        ),
    ],
)
def test_bad_input(scores, features, error, message):
    with pytest.raises(error, match=message):
        r1(scores, features)


def test_bad_functions():
    with pytest.raises(ValueError, match=r"scores: .*got float32 of shape \(2\).*\(3, 5, 4\)"):
        penalized_scores(lambda z: z.sum((1, 2))[:2], torch.ones(3, 5, 4))
    with pytest.raises(TypeError, match=r"features: expected a torch.Tensor, got list"):
        penalized_scores(lambda z: z, [1.0])  # type: ignore[arg-type,return-value]


def test_lecam_by_hand():
    real = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    fake = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    # real against 0.5: (0.25 + 6.25 + 2.25 + 2.25) / 4; fake against 2: (9 + 1) / 2.
    expected = 11 / 4 + 5
    assert lecam(real, fake, 2.0, 0.5).item() == pytest.approx(expected, rel=1e-14)
    averages = torch.tensor([2.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    result = lecam(real, fake, *averages)
    assert result.item() == pytest.approx(expected, rel=1e-14)
    assert not result.requires_grad


def test_lecam_of_ragged_clouds_weighs_them_alike():
    real = ragged(torch.tensor([1.0, 3.0, 2.0]), lengths=[2, 1])
    result = lecam(real, torch.zeros(2), ema_real=0.0, ema_fake=0.0)
    assert result.item() == pytest.approx((5 + 4) / 2)


def test_lecam_gradcheck():
    real = points(2, 3).requires_grad_()
    fake = points(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, f: lecam(r, f, 0.3, -0.2), (real, fake))


@pytest.mark.parametrize(
    "real, ema, error, message",
    [
        (torch.zeros(2, 3, 1), 0.0, ValueError, "real: expected one score per point"),
        (torch.zeros(2, 3), torch.zeros(2), ValueError, r"ema_real: expected a single number.*\(2"),
        (torch.zeros(2, 3).int(), 0.0, TypeError, "real: expected float32.*int32"),
    ],
)
def test_bad_lecam(real, ema, error, message):
    with pytest.raises(error, match=message):
        lecam(real, torch.zeros(2), ema, 0.0)
