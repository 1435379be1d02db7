"""The teacher as discriminator, against its formula written out here."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fad_loss import TeacherDiscriminator, distances, ops, ragged

F64 = torch.float64


def cloud(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def squared(a, b):
    return (a[:, None, :] - b[None, :, :]).square().sum(-1)


def log_mean_exp(exponent, without_self):
    if without_self:
        own = torch.eye(len(exponent), dtype=torch.bool)
        exponent = exponent.masked_fill(own, -math.inf)
    return torch.logsumexp(exponent, 1) - math.log(exponent.shape[1] - int(without_self))


def log_ratio(z, t, s, bandwidths, own):
    """The docstring's formula for one cloud; `own` says which set z belongs to."""
    t, s = t.detach(), s.detach()
    spread = squared(t, t).mean()
    total = 0
    for m in bandwidths:
        h2 = m * spread
        total = total + log_mean_exp(-squared(z, t) / (2 * h2), own == "t")
        total = total - log_mean_exp(-squared(z, s) / (2 * h2), own == "s")
    return total / len(bandwidths)


def mean_kernel(kernel, z, points, without_self):
    values = kernel(squared(z, points))
    if without_self:
        own = torch.eye(len(values), dtype=torch.bool)
        return values.masked_fill(own, 0).sum(1) / (values.shape[1] - 1)
    return values.mean(1)


def witness(z, t, s, kernel, own):
    t, s = t.detach(), s.detach()
    return mean_kernel(kernel, z, t, own == "t") - mean_kernel(kernel, z, s, own == "s")


FORMULAS = {
    "default": (TeacherDiscriminator, lambda *a: log_ratio(*a[:3], (0.1,), a[3])),
    "one bandwidth": (
        lambda: TeacherDiscriminator(bandwidths=[0.7]),
        lambda *a: log_ratio(*a[:3], (0.7,), a[3]),
    ),
    "dense": (
        lambda: TeacherDiscriminator(bandwidths=(0.5, 2), backend="dense"),
        lambda *a: log_ratio(*a[:3], (0.5, 2), a[3]),
    ),
    "witness": (
        lambda: TeacherDiscriminator(mode="witness"),
        lambda *a: witness(*a[:3], lambda d: -(d + (d == 0)).sqrt() * (d > 0), a[3]),
    ),
    "gaussian witness": (
        lambda: TeacherDiscriminator(mode="witness", kernel=ops.Gaussian([0.5, 2.0])),
        lambda *a: witness(*a[:3], lambda d: (torch.exp(-2 * d) + torch.exp(-d / 8)) / 2, a[3]),
    ),
    "laplacian witness": (
        lambda: TeacherDiscriminator(mode="witness", kernel=ops.Laplacian(1.5)),
        lambda *a: witness(*a[:3], lambda d: torch.exp(-(d + 1e-300).sqrt() / 1.5), a[3]),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("points", [(5, 8), (8, 8), (2, 2), (130, 3)])
def test_scores_are_those_of_the_formula(name, points):
    make, formula = FORMULAS[name]
    discriminator = make()
    N, M = points
    t, s = cloud(2, M, 3) + 2, cloud(2, N, 3, seed=1)
    z = s.clone().requires_grad_()
    fake = discriminator(z, reference=t)
    expected = torch.stack([formula(z[b], t[b], z[b], "s") for b in range(2)])
    torch.testing.assert_close(fake, expected)
    (got,) = torch.autograd.grad(fake.square().sum(), z)
    (wanted,) = torch.autograd.grad(expected.square().sum(), z)
    torch.testing.assert_close(got, wanted)

    real = discriminator(t, reference=t, student=s)
    torch.testing.assert_close(
        real, torch.stack([formula(t[b], t[b], s[b], "t") for b in range(2)])
    )
    # Points that belong to neither set are left out of nothing.
    other = cloud(2, 4, 3, seed=2)
    torch.testing.assert_close(
        discriminator(other, reference=t, student=s),
        torch.stack([formula(other[b], t[b], s[b], None) for b in range(2)]),
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_ragged_clouds_are_a_loop(name):
    make, _ = FORMULAS[name]
    discriminator = make()
    lengths, others = [4, 2, 7], [3, 9, 2]
    values = cloud(13, 3).requires_grad_()
    teacher = cloud(14, 3, seed=1) + 1
    scores = discriminator(
        ragged(values, lengths=lengths), reference=ragged(teacher, lengths=others)
    )
    pairs = zip(values.split(lengths), teacher.split(others), strict=True)
    alone = torch.cat([discriminator(s[None], reference=t[None])[0] for s, t in pairs])
    torch.testing.assert_close(scores.values(), alone)
    (got,) = torch.autograd.grad(scores.values().square().sum(), values, retain_graph=True)
    (wanted,) = torch.autograd.grad(alone.square().sum(), values)
    torch.testing.assert_close(got, wanted)

    reference = ragged(teacher, lengths=others)
    real = discriminator(
        reference, reference=reference, student=ragged(values, lengths=lengths)
    ).values()
    expected = []
    for s, t in zip(values.split(lengths), teacher.split(others), strict=True):
        one = t[None]
        expected.append(discriminator(one, reference=one, student=s[None])[0])
    torch.testing.assert_close(real, torch.cat(expected))


def paired_log_ratio(z, t, s, bandwidths, own):
    exponents = [-(z - t).square().sum(-1) / (2 * m * squared(t, t).mean()) for m in bandwidths]
    return log_ratio(z, t, s, bandwidths, own) + sum(exponents) / len(bandwidths)


@pytest.mark.parametrize("size", [2, 8])
def test_points_that_correspond_are_compared_with_their_own(size):
    discriminator = TeacherDiscriminator(condition="point", bandwidths=(0.5, 2.0))
    t, z = cloud(2, size, 3) + 2, cloud(2, size, 3, seed=1).requires_grad_()
    fake = discriminator(z, reference=t)
    pairs = list(zip(z, t, strict=True))
    s = z.detach()
    expected = torch.stack(
        [paired_log_ratio(a, b, c, (0.5, 2.0), "s") for (a, b), c in zip(pairs, s, strict=True)]
    )
    torch.testing.assert_close(fake, expected)
    (got,) = torch.autograd.grad(fake.square().sum(), z)
    (wanted,) = torch.autograd.grad(expected.square().sum(), z)
    torch.testing.assert_close(got, wanted)
    real = discriminator(t, reference=t, student=s)
    wanted = [paired_log_ratio(b, b, c, (0.5, 2.0), "t") for b, c in zip(t, s, strict=True)]
    torch.testing.assert_close(real, torch.stack(wanted))


def test_ragged_points_that_correspond_are_a_loop():
    discriminator = TeacherDiscriminator(condition="point")
    lengths = [4, 2, 7]
    values, teacher = cloud(13, 3).requires_grad_(), cloud(13, 3, seed=1) + 1
    scores = discriminator(
        ragged(values, lengths=lengths), reference=ragged(teacher, lengths=lengths)
    )
    pairs = zip(values.split(lengths), teacher.split(lengths), strict=True)
    alone = torch.cat([discriminator(s[None], reference=t[None])[0] for s, t in pairs])
    torch.testing.assert_close(scores.values(), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_points_that_correspond_in_narrow_dtypes(dtype):
    discriminator = TeacherDiscriminator(condition="point")
    z, t = cloud(2, 9, 5, dtype=dtype), cloud(2, 9, 5, seed=1, dtype=dtype)
    scores = discriminator(z, reference=t)
    assert scores.dtype == torch.float32
    exact = discriminator(z.double(), reference=t.double())
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=0.1)


def test_two_identical_clouds_have_a_closed_form():
    # Two points at distance a: h^2 = m a^2 / 2, so all depends on m alone.
    for a, m in ((1.0, 0.5), (7.0, 2.0)):
        x = torch.tensor([[[0.0], [a]]], dtype=F64)
        score = TeacherDiscriminator(bandwidths=[m])(x.clone(), reference=x)
        expected = math.log((1 + math.exp(-1 / m)) / 2) + 1 / m
        torch.testing.assert_close(score, torch.full((1, 2), expected, dtype=F64))
        # Real points, judged against a student with the same: its mirror image.
        real = TeacherDiscriminator(bandwidths=[m])(x, reference=x, student=x.clone())
        torch.testing.assert_close(real, -score)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bandwidths": (0.3, 1.0), "condition": "point"},
        {"mode": "witness"},
        {"embedding": 2, "channels": 3},
    ],
)
@pytest.mark.parametrize("unequal", [False, True])
def test_both_scores_are_those_of_two_calls(options, unequal):
    torch.manual_seed(0)
    discriminator = TeacherDiscriminator(**options).double().eval()
    t, s = cloud(2, 12, 3), cloud(2, 12, 3, seed=1)
    if unequal:
        lengths = torch.tensor([5, 7, 12])
        t, s = (ragged(x.flatten(0, 1), lengths=lengths) for x in (t, s))
    results = []
    for together in (True, False):
        values = s.clone().requires_grad_()
        if together:
            fake, real = discriminator.both(values, t)
        else:
            fake = discriminator(values, reference=t)
            real = discriminator(t, reference=t, student=values)
        assert not (together and real.requires_grad)
        flat = [x.values() if unequal else x for x in (fake, real)]
        (gradient,) = torch.autograd.grad(flat[0].sum(), values)
        results.append([*flat, gradient.values() if unequal else gradient])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="reference: expected the same clouds as features"):
        discriminator.both(cloud(3, 12, 3), cloud(2, 12, 3))


def test_points_that_all_coincide_score_zero():
    x = torch.full((2, 5, 3), 4.0).requires_grad_()
    for discriminator in (TeacherDiscriminator(), TeacherDiscriminator(mode="witness")):
        scores = discriminator(x, reference=x.detach().clone())
        assert torch.equal(scores, torch.zeros(2, 5))
        (gradient,) = torch.autograd.grad(scores.sum(), x)
        assert torch.equal(gradient, torch.zeros_like(x))
    # And at the origin, where there is no scale at all.
    zero = torch.zeros(1, 3, 2)
    assert torch.equal(TeacherDiscriminator()(zero.clone(), reference=zero), torch.zeros(1, 3))


@pytest.mark.parametrize("place", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("condition", [None, "point"])
def test_a_dead_teacher_cloud_does_not_outweigh_the_others(place, condition):
    discriminator = TeacherDiscriminator(condition=condition)
    teacher, student = (cloud(3, 6, 3, seed=seed, dtype=torch.float32) for seed in (0, 1))
    alive = discriminator(student, reference=teacher)
    teacher[1] = place
    student.requires_grad_()
    scores = discriminator(student, reference=teacher)
    torch.testing.assert_close(scores[[0, 2]], alive[[0, 2]])
    (gradient,) = torch.autograd.grad(scores.sum(), student)
    assert scores.abs().max() < 1000
    assert gradient.abs().max() < 1000


@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
)
@settings(max_examples=15)
def test_log_ratio_knows_no_scale_and_no_origin(seed, scale, shift):
    t, s = cloud(1, 6, 3, seed=seed) + 1, cloud(1, 5, 3, seed=seed + 1)
    discriminator = TeacherDiscriminator()
    shift = shift * scale
    moved = discriminator(s * scale + shift, reference=t * scale + shift)
    torch.testing.assert_close(moved, discriminator(s, reference=t), rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_permuting_permutes_the_scores(seed):
    t, s = cloud(2, 6, 3, seed=seed), cloud(2, 7, 3, seed=seed + 1)
    order, other = torch.randperm(7), torch.randperm(6)
    for discriminator in (TeacherDiscriminator(), TeacherDiscriminator(mode="witness")):
        scores = discriminator(s[:, order], reference=t[:, other])
        torch.testing.assert_close(scores, discriminator(s, reference=t)[:, order])


@pytest.mark.parametrize("mode", ["log_ratio", "witness"])
def test_gradient_points_to_the_teacher(mode):
    t, s = cloud(3, 64, 5) + 3, cloud(3, 50, 5, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(TeacherDiscriminator(mode=mode)(s, reference=t).sum(), s)
    towards = t.mean(1, keepdim=True) - s.detach()
    assert (torch.nn.functional.cosine_similarity(gradient, towards, -1) > 0.5).float().mean() > 0.9


def test_far_from_the_teacher_a_gaussian_witness_scatters_the_points():
    # Why it is not the default, nor the default kernel of witnesses: what the documentation says.
    t, s = cloud(3, 64, 64) + 5, cloud(3, 64, 64, seed=1).requires_grad_()
    gaussians = ops.Gaussian([4.0, 8.0, 16.0])
    towards = t.mean(1, keepdim=True) - s.detach()

    def pulled(discriminator):
        (gradient,) = torch.autograd.grad(discriminator(s, reference=t).sum(), s)
        return float(((gradient * towards).sum(-1) > 0).float().mean())

    assert pulled(TeacherDiscriminator()) == 1
    assert pulled(TeacherDiscriminator(mode="witness")) == 1
    assert pulled(TeacherDiscriminator(mode="witness", kernel=gaussians)) < 0.3


@pytest.mark.parametrize("mode", ["log_ratio", "witness"])
def test_only_what_is_scored_gets_a_gradient(mode):
    z, t, s = (cloud(1, 5, 3, seed=i).requires_grad_() for i in range(3))
    TeacherDiscriminator(mode=mode)(z, reference=t, student=s).sum().backward()
    assert z.grad.abs().sum() > 0
    assert t.grad is None
    assert s.grad is None


def test_scores_separate_what_is_separate_and_not_what_is_not():
    discriminator = TeacherDiscriminator()
    t, near, far = cloud(4, 256, 3), cloud(4, 256, 3, seed=1), cloud(4, 256, 3, seed=2) + 6
    same = (
        discriminator(t, reference=t, student=near).mean() - discriminator(near, reference=t).mean()
    )
    different = (
        discriminator(t, reference=t, student=far).mean() - discriminator(far, reference=t).mean()
    )
    assert same.abs() < 0.1
    assert different > 3


@pytest.mark.parametrize("mode", ["log_ratio", "witness"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_as_good_as_their_inputs(mode, dtype):
    t, s = cloud(2, 30, 8, dtype=dtype) + 1, cloud(2, 20, 8, seed=1, dtype=dtype)
    discriminator = TeacherDiscriminator(mode=mode)
    scores = discriminator(s, reference=t)
    assert scores.dtype == torch.float32
    exact = discriminator(s.double(), reference=t.double())
    error = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(scores.double(), exact, rtol=error, atol=error)


def test_features_towards_the_teacher_by_gradient_descent():
    # 64 points, unpaired, in 16 dimensions: the trial of the design. Energy distance as the judge.
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():
        teacher = network(torch.randn(4, 64, 3))
        student = 0.5 * torch.randn(4, 64, 16) + 1
    student.requires_grad_()
    discriminator = TeacherDiscriminator()
    start = distances.energy(student.detach(), teacher)
    optimizer = torch.optim.Adam([student], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (-discriminator(student, reference=teacher).mean()).backward()
        optimizer.step()
    assert distances.energy(student.detach(), teacher) < 0.1 * start


@pytest.mark.parametrize("mode", ["log_ratio", "witness"])
def test_embedding_learns_where_the_difference_is(mode):
    # Student and teacher differ in one of 8 channels, which the embedding does not see at first.
    discriminator = TeacherDiscriminator(mode=mode, embedding=1, channels=8)
    with torch.no_grad():
        weight = discriminator.embedding.parametrizations.weight.original
        weight.copy_(torch.tensor([[0.1, 1, 1, 1, 1, 1, 1, 1]]))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.05)
    shift = torch.zeros(8)
    shift[0] = 3

    def gap(seed):
        t, s = cloud(2, 48, 8, seed=seed, dtype=torch.float32), None
        s = cloud(2, 48, 8, seed=seed + 1, dtype=torch.float32) + shift
        real = discriminator(t, reference=t, student=s).mean()
        return real - discriminator(s, reference=t).mean()

    start = gap(1000).item()
    for step in range(60):
        optimizer.zero_grad()
        (-gap(2 * step)).backward()
        optimizer.step()
    learned = discriminator.embedding.weight.detach()[0]
    assert gap(1000).item() > 2 * start
    assert learned[0].abs() > 0.9 * learned.norm()


def test_embedding_is_a_module_of_ones_own_or_a_width():
    own = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    for embedding, channels in ((own, None), (5, 8)):
        discriminator = TeacherDiscriminator(embedding=embedding, channels=channels)
        values = cloud(9, 8, dtype=torch.float32)
        scores = discriminator(
            ragged(values, lengths=[4, 5]), reference=ragged(values + 1, lengths=[4, 5])
        )
        scores.values().sum().backward()
        assert all(p.grad.abs().sum() > 0 for n, p in discriminator.named_parameters() if "0" in n)


def test_copies_and_pickles():
    embedding = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    discriminator = TeacherDiscriminator(
        mode="witness", kernel=ops.Gaussian(2.0), embedding=embedding
    )
    t, s = cloud(1, 6, 3, dtype=torch.float32), cloud(1, 5, 3, seed=1, dtype=torch.float32)
    expected = discriminator(s, reference=t)
    for twin in (copy.deepcopy(discriminator), pickle.loads(pickle.dumps(discriminator))):
        assert torch.equal(twin(s, reference=t), expected)
    assert "Gaussian" in repr(discriminator)
    assert "0.1" in repr(TeacherDiscriminator())
    assert "0.3, 1.0, 3.0" in repr(TeacherDiscriminator(condition="point"))


def test_has_no_parameters_and_no_state_by_default():
    discriminator = TeacherDiscriminator()
    assert list(discriminator.parameters()) == []
    assert discriminator.state_dict() == {}


T, S = cloud(2, 6, 3), cloud(2, 5, 3, seed=1)
ERRORS = {
    "mode": (
        lambda: TeacherDiscriminator(mode="witnes"),
        ValueError,
        "mode: .* did you mean 'witness'",
    ),
    "kernel for the wrong mode": (
        lambda: TeacherDiscriminator(kernel=ops.Energy()),
        ValueError,
        'kernel: only mode="witness"',
    ),
    "no bandwidth": (
        lambda: TeacherDiscriminator(bandwidths=[]),
        ValueError,
        "bandwidths: expected at least one",
    ),
    "zero bandwidth": (
        lambda: TeacherDiscriminator(bandwidths=[1.0, 0.0]),
        ValueError,
        "bandwidths: expected a positive finite number, got 0.0",
    ),
    "bandwidth that is none": (
        lambda: TeacherDiscriminator(bandwidths=["1"]),
        TypeError,
        "bandwidths: expected a positive number, got str '1'",
    ),
    "single bandwidth without a list": (
        lambda: TeacherDiscriminator(bandwidths=1.0),
        TypeError,
        "bandwidths: expected several numbers, .* got float 1.0",
    ),
    "kernel that is none": (
        lambda: TeacherDiscriminator(mode="witness", kernel="gaussian"),
        TypeError,
        "kernel: expected .*Gaussian.* got str 'gaussian'",
    ),
    "embedding": (
        lambda: TeacherDiscriminator(embedding=0, channels=3),
        ValueError,
        "embedding: expected a module or a width of at least 1, got 0",
    ),
    "embedding that is a class": (
        lambda: TeacherDiscriminator(embedding=nn.Tanh, channels=3),
        ValueError,
        "embedding: expected a module or a width",
    ),
    "embedding without channels": (
        lambda: TeacherDiscriminator(embedding=4),
        ValueError,
        "channels: embedding=4 .* needs channels=",
    ),
    "no reference": (lambda: TeacherDiscriminator()(S), ValueError, "reference: .*reference="),
    "a single point": (
        lambda: TeacherDiscriminator()(S[:, :1], reference=T),
        ValueError,
        r"features: .* at least 2, got float64 of shape \(2, 1, 3\)",
    ),
    "a single teacher point": (
        lambda: TeacherDiscriminator()(S, reference=T[:, :1]),
        ValueError,
        r"reference: .* at least 2",
    ),
    "a ragged cloud with one point": (
        lambda: TeacherDiscriminator()(
            ragged(S.flatten(0, 1), lengths=[9, 1]),
            reference=ragged(T.flatten(0, 1), lengths=[6, 6]),
        ),
        ValueError,
        "features: .* at least 2",
    ),
    "an unknown condition": (
        lambda: TeacherDiscriminator(condition="cloud"),
        ValueError,
        "condition: expected None or 'point', got 'cloud'",
    ),
    "a condition of another mode": (
        lambda: TeacherDiscriminator(mode="witness", condition="point"),
        ValueError,
        'condition: only mode="log_ratio"',
    ),
    "points that cannot correspond": (
        lambda: TeacherDiscriminator(condition="point")(S, reference=T),
        ValueError,
        r'condition: "point" .* got .*\(2, 5, 3\).*\(2, 6, 3\).*condition=None',
    ),
    "ragged points that cannot correspond": (
        lambda: TeacherDiscriminator(condition="point")(
            ragged(S.flatten(0, 1), lengths=[4, 6]),
            reference=ragged(S.flatten(0, 1), lengths=[5, 5]),
        ),
        ValueError,
        'condition: "point" ',
    ),
    "other channels": (
        lambda: TeacherDiscriminator()(S[..., :2], reference=T),
        ValueError,
        "same number of channels",
    ),
    "other clouds": (
        lambda: TeacherDiscriminator()(S[:1], reference=T),
        ValueError,
        r"reference: expected the same clouds as features, got .*\(2, 6, 3\).*\(1, 5, 3\)",
    ),
    "backend": (
        lambda: TeacherDiscriminator(backend="cuda")(S, reference=T),
        ValueError,
        "backend: expected one of",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
