"""The teacher's densities as discriminator, against their formula written out here."""

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
from fad_loss.discriminators import Game

F64 = torch.float64


def cloud(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def of_student(discriminator, student, teacher, **options):
    return discriminator(Game.of(student, teacher, **options), "student")


def of_teacher(discriminator, student, teacher, **options):
    return discriminator(Game.of(student, teacher, **options), "teacher")


def squared(a, b):
    return (a[:, None, :] - b[None, :, :]).square().sum(-1)


def log_mean_exp(exponent):
    return torch.logsumexp(exponent, 1) - math.log(exponent.shape[1])


def log_ratio(z, t, s, bandwidths):
    """The docstring's formula for one cloud; a point of z counts in its own set."""
    t, s = t.detach(), s.detach()
    spread = squared(t, t).mean()
    total = 0
    for m in bandwidths:
        h2 = m * spread
        total = total + log_mean_exp(-squared(z, t) / (2 * h2))
        total = total - log_mean_exp(-squared(z, s) / (2 * h2))
    return total / len(bandwidths)


def witness(z, t, s, kernel):
    t, s = t.detach(), s.detach()
    return kernel(squared(z, t)).mean(1) - kernel(squared(z, s)).mean(1)


def root(d):
    """The square root, with the gradient 0 at 0."""
    return (d + (d == 0)).sqrt() * (d > 0)


FORMULAS = {
    "default": (TeacherDiscriminator, lambda *a: log_ratio(*a, (0.1,))),
    "one bandwidth": (
        lambda: TeacherDiscriminator(bandwidths=[0.7]),
        lambda *a: log_ratio(*a, (0.7,)),
    ),
    "dense": (
        lambda: TeacherDiscriminator(bandwidths=(0.5, 2), backend="dense"),
        lambda *a: log_ratio(*a, (0.5, 2)),
    ),
    "witness": (
        lambda: TeacherDiscriminator(mode="witness"),
        lambda *a: witness(*a, lambda d: -root(d)),
    ),
    "gaussian witness": (
        lambda: TeacherDiscriminator(mode="witness", kernel=ops.Gaussian([0.5, 2.0])),
        lambda *a: witness(*a, lambda d: (torch.exp(-2 * d) + torch.exp(-d / 8)) / 2),
    ),
    "laplacian witness": (
        lambda: TeacherDiscriminator(mode="witness", kernel=ops.Laplacian(1.5)),
        lambda *a: witness(*a, lambda d: torch.exp(-root(d) / 1.5)),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("points", [(5, 8), (8, 8), (2, 2), (1, 3), (130, 3)])
def test_scores_are_those_of_the_formula(name, points):
    make, formula = FORMULAS[name]
    discriminator = make()
    N, M = points
    t, s = cloud(2, M, 3) + 2, cloud(2, N, 3, seed=1)
    for side in ("student", "teacher"):
        pair = {"student": s.clone(), "teacher": t.clone()}
        z = pair[side].requires_grad_()
        scores = discriminator(Game.of(pair["student"], pair["teacher"]), side)
        expected = torch.stack([formula(z[b], t[b], s[b]) for b in range(2)])
        torch.testing.assert_close(scores, expected)
        (got,) = torch.autograd.grad(scores.square().sum(), z)
        (wanted,) = torch.autograd.grad(expected.square().sum(), z)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_ragged_and_masked_clouds_are_a_loop(name, positions, padded):
    make, _ = FORMULAS[name]
    discriminator = make()
    lengths, others = [4, 2, 7], [3, 9, 2]
    values, teacher = cloud(13, 3).requires_grad_(), (cloud(14, 3, seed=1) + 1).requires_grad_()
    places, there = cloud(13, 2, seed=2), 3 * cloud(14, 2, seed=3)
    if padded:
        (s, mask), (t, known) = pad(values, lengths), pad(teacher, others)
        options = {"mask": (mask, known)}
        if positions:
            options["positions"] = pad(places, lengths)[0], pad(there, others)[0]
    else:
        mask = known = None
        s, t = ragged(values, lengths=lengths), ragged(teacher, lengths=others)
        options = {}
        if positions:
            options["positions"] = ragged(places, lengths=lengths), ragged(there, lengths=others)
    together = discriminator(Game.of(s, t, **options))
    fake, real = (
        scores.values() if counts is None else scores[counts]
        for scores, counts in zip(together, (mask, known), strict=True)
    )
    alone = []
    split = (x.split(n) for x, n in ((values, lengths), (teacher, others)))
    at = (x.split(n) for x, n in ((places, lengths), (there, others)))
    for s, t, p, q in zip(*split, *at, strict=True):
        options = {"positions": (p[None], q[None])} if positions else {}
        alone.append(discriminator(Game.of(s[None], t[None], **options)))
    torch.testing.assert_close(fake, torch.cat([x.student[0] for x in alone]))
    torch.testing.assert_close(real, torch.cat([x.teacher[0] for x in alone]))
    for together, loop, leaf in (
        (fake, [x.student[0] for x in alone], values),
        (real, [x.teacher[0] for x in alone], teacher),
    ):
        (got,) = torch.autograd.grad(together.square().sum(), leaf)
        (wanted,) = torch.autograd.grad(torch.cat(loop).square().sum(), leaf)
        torch.testing.assert_close(got, wanted)


def pad(values, lengths):
    """Clouds filled up to the longest with large numbers, and which points count."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    dense = torch.full((*mask.shape, values.shape[1]), 1e3, dtype=values.dtype)
    return dense.masked_scatter(mask.unsqueeze(-1), values), mask


@pytest.mark.parametrize("mode", ["log_ratio", "witness"])
def test_an_empty_cloud_harms_no_other(mode):
    discriminator = TeacherDiscriminator(mode=mode)
    s, t = cloud(2, 5, 3).requires_grad_(), cloud(2, 6, 3, seed=1)
    mask, known = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    mask[1] = known[1] = False
    scores = discriminator(Game.of(s, t, mask=(mask, known)))
    torch.testing.assert_close(scores.student[:1], of_student(discriminator, s[:1], t[:1]))
    assert scores.student.isfinite().all()
    assert scores.teacher.isfinite().all()
    (gradient,) = torch.autograd.grad(scores.student[mask].sum(), s)
    assert gradient.isfinite().all()
    assert torch.equal(gradient[1], torch.zeros(5, 3))


@pytest.mark.parametrize("points", [(5, 8), (8, 8)])
def test_positions_make_the_densities_joint(points):
    N, M = points
    z, t, bandwidths = cloud(N, 3).requires_grad_(), cloud(M, 3, seed=1) + 1, (0.3, 1.0)
    p, q = cloud(N, 2, seed=2), 100 * cloud(M, 2, seed=3) + 1000
    discriminator = TeacherDiscriminator(bandwidths=bandwidths)
    scores = of_student(discriminator, z[None], t[None], positions=(p[None], q[None]))[0]

    def exponent(a, b, m):
        features, places = squared(a[0], b[0]), squared(a[1], b[1])
        units = 2 * m * squared(t, t).mean(), 2 * m * squared(q, q).mean()
        return -features / units[0] - places / units[1]

    own, teacher, s = (z, p), (t, q), (z.detach(), p)
    expected = sum(
        log_mean_exp(exponent(own, teacher, m)) - log_mean_exp(exponent(own, s, m))
        for m in bandwidths
    ) / len(bandwidths)
    torch.testing.assert_close(scores, expected)
    (got,) = torch.autograd.grad(scores.sum(), z)
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(got, wanted)


def paired_log_ratio(z, t, s, own, bandwidths):
    """With the kernel around the teacher's point that belongs to each point of z."""
    spread = squared(t, t).mean().detach()
    likeness = sum(-(z - own).square().sum(-1) / (2 * m * spread) for m in bandwidths)
    return log_ratio(z, t, s, bandwidths) + likeness / len(bandwidths)


@pytest.mark.parametrize("size", [2, 8])
def test_points_that_correspond_are_compared_with_their_own(size):
    discriminator = TeacherDiscriminator(condition="point", bandwidths=(0.5, 2.0))
    t, z = cloud(2, size, 3) + 2, cloud(2, size, 3, seed=1).requires_grad_()
    scores = discriminator(Game.of(z, t))
    s = z.detach()
    expected = torch.stack([paired_log_ratio(z[b], t[b], s[b], t[b], (0.5, 2.0)) for b in range(2)])
    torch.testing.assert_close(scores.student, expected)
    (got,) = torch.autograd.grad(scores.student.square().sum(), z)
    (wanted,) = torch.autograd.grad(expected.square().sum(), z)
    torch.testing.assert_close(got, wanted)
    real = [paired_log_ratio(t[b], t[b], s[b], t[b], (0.5, 2.0)) for b in range(2)]
    torch.testing.assert_close(scores.teacher, torch.stack(real))


@pytest.mark.parametrize("padded", [False, True])
def test_uneven_points_that_correspond_are_a_loop(padded):
    discriminator = TeacherDiscriminator(condition="point")
    lengths = [4, 2, 7]
    values, teacher = cloud(13, 3).requires_grad_(), cloud(13, 3, seed=1) + 1
    if padded:
        (s, mask), (t, _) = pad(values, lengths), pad(teacher, lengths)
        scores = of_student(discriminator, s, t, mask=mask)[mask]
    else:
        s, t = ragged(values, lengths=lengths), ragged(teacher, lengths=lengths)
        scores = of_student(discriminator, s, t).values()
    pairs = zip(values.split(lengths), teacher.split(lengths), strict=True)
    alone = torch.cat([of_student(discriminator, s[None], t[None])[0] for s, t in pairs])
    torch.testing.assert_close(scores, alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_points_that_correspond_in_narrow_dtypes(dtype):
    discriminator = TeacherDiscriminator(condition="point")
    z, t = cloud(2, 9, 5, dtype=dtype), cloud(2, 9, 5, seed=1, dtype=dtype)
    scores = of_student(discriminator, z, t)
    assert scores.dtype == torch.float32
    exact = of_student(discriminator, z.double(), t.double())
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=0.1)


def test_two_teacher_points_have_a_closed_form():
    # Two points at distance a: h^2 = m a^2 / 2, so all depends on m alone.
    for a, m in ((1.0, 0.5), (7.0, 2.0)):
        t = torch.tensor([[[0.0], [a]]], dtype=F64)
        s = torch.zeros(1, 2, 1, dtype=F64)
        fake, real = TeacherDiscriminator(bandwidths=[m])(Game.of(s, t))
        half = math.log((1 + math.exp(-1 / m)) / 2)
        torch.testing.assert_close(fake, torch.full((1, 2), half, dtype=F64))
        torch.testing.assert_close(real, torch.tensor([[half, half + 1 / m]], dtype=F64))


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
        game = Game.of(values, t)
        if together:
            fake, real = discriminator(game)
        else:
            fake, real = discriminator(game, "student"), discriminator(game, "teacher")
        # The sets stand still: the teacher's scores know nothing of the student's graph.
        assert real.requires_grad == ("embedding" in options)
        flat = [x.values() if unequal else x for x in (fake, real)]
        (gradient,) = torch.autograd.grad(flat[0].sum(), values)
        results.append([*flat, gradient.values() if unequal else gradient])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_points_that_all_coincide_score_zero():
    x = torch.full((2, 5, 3), 4.0).requires_grad_()
    for discriminator in (TeacherDiscriminator(), TeacherDiscriminator(mode="witness")):
        scores = of_student(discriminator, x, x.detach().clone())
        assert torch.equal(scores, torch.zeros(2, 5))
        (gradient,) = torch.autograd.grad(scores.sum(), x)
        assert torch.equal(gradient, torch.zeros_like(x))
    # And at the origin, where there is no scale at all.
    zero = torch.zeros(1, 3, 2)
    assert torch.equal(of_student(TeacherDiscriminator(), zero, zero), torch.zeros(1, 3))


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("condition", [None, "point"])
def test_a_teacher_cloud_nearly_at_one_place_does_not_outweigh_the_others(spread, condition):
    """Residual networks make such clouds: one of 16 scored thousands of times the others."""
    discriminator = TeacherDiscriminator(condition=condition)
    teacher, student = (cloud(5, 6, 3, seed=seed, dtype=torch.float32) for seed in (0, 1))
    alive = of_student(discriminator, student, teacher)
    teacher[1] = 0.5 + spread * teacher[1]
    student.requires_grad_()
    scores = of_student(discriminator, student, teacher)
    others = [0, 2, 3, 4]
    torch.testing.assert_close(scores[others], alive[others])
    (gradient,) = torch.autograd.grad(scores.sum(), student)
    pull = gradient.flatten(1).norm(dim=1)
    assert pull[1] < 40 * pull[others].mean()
    assert scores[1].abs().mean() < 40 * alive.abs().mean()
    # Where the sets agree, all scores are still 0.
    same = of_student(discriminator, teacher.clone(), teacher)
    torch.testing.assert_close(same, torch.zeros_like(same))


def test_the_least_spread_is_that_of_clouds_that_have_one():
    """Clouds of which only one point counts have no say in the median."""
    discriminator = TeacherDiscriminator()
    teacher, student = (cloud(5, 6, 3, seed=seed, dtype=torch.float32) for seed in (0, 1))
    teacher[:2] *= 0.2
    wanted = of_student(discriminator, student, teacher)
    mask = torch.ones(9, 6, dtype=torch.bool)
    mask[5:, 1:] = False
    more = [torch.cat([x, cloud(4, 6, 3, dtype=torch.float32)]) for x in (student, teacher)]
    scores = of_student(discriminator, *more, mask=mask)
    torch.testing.assert_close(scores[:5], wanted)


@pytest.mark.parametrize("place", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("condition", [None, "point"])
def test_a_dead_teacher_cloud_does_not_outweigh_the_others(place, condition):
    discriminator = TeacherDiscriminator(condition=condition)
    teacher, student = (cloud(3, 6, 3, seed=seed, dtype=torch.float32) for seed in (0, 1))
    alive = of_student(discriminator, student, teacher)
    teacher[1] = place
    student.requires_grad_()
    scores = of_student(discriminator, student, teacher)
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
    moved = of_student(discriminator, s * scale + shift, t * scale + shift)
    torch.testing.assert_close(moved, of_student(discriminator, s, t), rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_permuting_permutes_the_scores(seed):
    t, s = cloud(2, 6, 3, seed=seed), cloud(2, 7, 3, seed=seed + 1)
    order, other = torch.randperm(7), torch.randperm(6)
    for discriminator in (TeacherDiscriminator(), TeacherDiscriminator(mode="witness")):
        scores = of_student(discriminator, s[:, order], t[:, other])
        torch.testing.assert_close(scores, of_student(discriminator, s, t)[:, order])


@pytest.mark.parametrize("mode", ["log_ratio", "witness"])
def test_gradient_points_to_the_teacher(mode):
    t, s = cloud(3, 64, 5) + 3, cloud(3, 50, 5, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(of_student(TeacherDiscriminator(mode=mode), s, t).sum(), s)
    towards = t.mean(1, keepdim=True) - s.detach()
    assert (torch.nn.functional.cosine_similarity(gradient, towards, -1) > 0.5).float().mean() > 0.9


def test_far_from_the_teacher_a_gaussian_witness_scatters_the_points():
    # Why it is not the default, nor the default kernel of witnesses: what the documentation says.
    t, s = cloud(3, 64, 64) + 5, cloud(3, 64, 64, seed=1).requires_grad_()
    gaussians = ops.Gaussian([4.0, 8.0, 16.0])
    towards = t.mean(1, keepdim=True) - s.detach()

    def pulled(discriminator):
        (gradient,) = torch.autograd.grad(of_student(discriminator, s, t).sum(), s)
        return float(((gradient * towards).sum(-1) > 0).float().mean())

    assert pulled(TeacherDiscriminator()) == 1
    assert pulled(TeacherDiscriminator(mode="witness")) == 1
    assert pulled(TeacherDiscriminator(mode="witness", kernel=gaussians)) < 0.3


@pytest.mark.parametrize("mode", ["log_ratio", "witness"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_only_what_is_scored_gets_a_gradient(mode, side):
    s, t = (cloud(1, 5, 3, seed=i).requires_grad_() for i in range(2))
    TeacherDiscriminator(mode=mode)(Game.of(s, t), side).sum().backward()
    scored, other = (s, t) if side == "student" else (t, s)
    assert scored.grad.abs().sum() > 0
    assert other.grad is None


def test_scores_separate_what_is_separate_and_not_what_is_not():
    discriminator = TeacherDiscriminator()
    t, far = cloud(4, 256, 3), cloud(4, 256, 3, seed=2) + 6

    def gap(student):
        fake, real = discriminator(Game.of(student, t))
        return real.mean() - fake.mean()

    same, near, different = gap(t[:, torch.randperm(256)]), gap(cloud(4, 256, 3, seed=1)), gap(far)
    assert same.abs() < 1e-12
    # Two samples of one density differ by what each point adds to its own set's.
    assert 0 < near < 0.2
    assert different > 3


@pytest.mark.parametrize("mode", ["log_ratio", "witness"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_as_good_as_their_inputs(mode, dtype):
    t, s = cloud(2, 30, 8, dtype=dtype) + 1, cloud(2, 20, 8, seed=1, dtype=dtype)
    discriminator = TeacherDiscriminator(mode=mode)
    scores = of_student(discriminator, s, t)
    assert scores.dtype == torch.float32
    exact = of_student(discriminator, s.double(), t.double())
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
        (-of_student(discriminator, student, teacher).mean()).backward()
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
        real = of_teacher(discriminator, s, t).mean()
        return real - of_student(discriminator, s, t).mean()

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
        student, teacher = (ragged(x, lengths=[4, 5]) for x in (values, values + 1))
        scores = of_student(discriminator, student, teacher)
        scores.values().sum().backward()
        assert all(p.grad.abs().sum() > 0 for n, p in discriminator.named_parameters() if "0" in n)


def test_copies_and_pickles():
    embedding = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    discriminator = TeacherDiscriminator(
        mode="witness", kernel=ops.Gaussian(2.0), embedding=embedding
    )
    t, s = cloud(1, 6, 3, dtype=torch.float32), cloud(1, 5, 3, seed=1, dtype=torch.float32)
    expected = of_student(discriminator, s, t)
    for twin in (copy.deepcopy(discriminator), pickle.loads(pickle.dumps(discriminator))):
        assert torch.equal(of_student(twin, s, t), expected)
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
        lambda: of_student(TeacherDiscriminator(condition="point"), S, T),
        ValueError,
        r'condition: "point" .* got .*\(2, 5, 3\).*\(2, 6, 3\).*condition=None',
    ),
    "masked points that cannot correspond": (
        lambda: of_student(
            TeacherDiscriminator(condition="point"), S, S, mask=(torch.ones(2, 5) > 0, None)
        ),
        ValueError,
        'condition: "point" ',
    ),
    "points with other masks that cannot correspond": (
        lambda: of_student(
            TeacherDiscriminator(condition="point"),
            S,
            S,
            mask=tuple(torch.arange(5).repeat(2, 1) != i for i in (0, 1)),
        ),
        ValueError,
        'condition: "point" ',
    ),
    "dense and ragged points that cannot correspond": (
        lambda: of_student(
            TeacherDiscriminator(condition="point"), S, ragged(S.flatten(0, 1), lengths=[5, 5])
        ),
        ValueError,
        'condition: "point" ',
    ),
    "ragged points that cannot correspond": (
        lambda: of_student(
            TeacherDiscriminator(condition="point"),
            *(ragged(S.flatten(0, 1), lengths=n) for n in ([4, 6], [5, 5])),
        ),
        ValueError,
        'condition: "point" ',
    ),
    "backend": (
        lambda: of_student(TeacherDiscriminator(backend="cuda"), S, T),
        ValueError,
        "backend: expected one of",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
