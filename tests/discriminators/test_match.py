"""MatchDiscriminator: a cloud is recognised by its features, among all clouds of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from fad_loss import FeatureAdversarialLoss, MatchDiscriminator, distances, ragged
from fad_loss.discriminators import Game

B, N, M, C = 4, 7, 9, 5
DISTANCES = ("pooled", "energy", "chamfer")


def clouds(seed=0, count=B, points=N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(count, 1, C, generator=generator, dtype=torch.float64)
    spread = torch.randn(count, points, C, generator=generator, dtype=torch.float64)
    return (places + 0.5 * spread).to(dtype)


def of_student(discriminator, x, y, **options):
    return discriminator(Game.of(x, y, **options), "student")


def pooled(x):
    return torch.cat([x.mean(1), x.amax(1)], -1)


def by_hand(distance, x, y):
    """All distances, pair by pair, in their unit."""
    result = torch.zeros(len(x), len(y), dtype=x[0].dtype)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            if distance == "pooled":
                result[i, j] = (pooled(a[None]) - pooled(b[None])).square().sum()
            elif distance == "energy":
                across, own, other = (torch.cdist(*p).mean() for p in ((a, b), (a, a), (b, b)))
                result[i, j] = 2 * across - own - other
            else:
                d = torch.cdist(a, b).square()
                result[i, j] = d.amin(0).mean() + d.amin(1).mean()
    if distance == "pooled":
        every = torch.cat([pooled(b[None]) for b in y])
        return result / torch.cdist(every, every).square().mean()
    power = 1 if distance == "energy" else 2
    return result / torch.stack([torch.cdist(b, b).pow(power).mean() for b in y]).mean()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_probability_of_the_own_cloud(distance, temperature):
    x, y = clouds(), clouds(1, points=M)
    discriminator = MatchDiscriminator(C, distance=distance, temperature=temperature).double()
    expected = (-by_hand(distance, x, y) / temperature).log_softmax(1).diagonal()
    torch.testing.assert_close(of_student(discriminator, x, y), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_order_of_points_and_of_clouds(distance):
    discriminator = MatchDiscriminator(C, distance=distance).double()
    x, y = clouds(), clouds(1, points=M)
    scores = of_student(discriminator, x, y)
    assert scores.shape == (B,)
    assert (scores < 0).all()
    torch.testing.assert_close(of_student(discriminator, x.flip(1), y.flip(1)), scores)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(of_student(discriminator, x[order], y[order]), scores[order])


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_own_cloud_is_recognised_and_anothers_is_not(distance):
    discriminator = MatchDiscriminator(C, distance=distance).double()
    y = clouds(1)
    own = of_student(discriminator, y, y)
    assert (own > of_student(discriminator, y.roll(1, 0), y)).all()
    assert (own > math.log(1 / B)).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_in_units_of_the_teacher(distance):
    """Scaling and shifting all features alike changes nothing."""
    discriminator = MatchDiscriminator(C, distance=distance).double()
    x, y = clouds(), clouds(1)
    scores = of_student(discriminator, x, y)
    torch.testing.assert_close(of_student(discriminator, 30 * x + 5, 30 * y + 5), scores)


def test_teacher_clouds_that_all_coincide():
    y = torch.ones(B, N, C)
    for distance in DISTANCES:
        x = torch.randn(B, N, C, requires_grad=True)
        scores = of_student(MatchDiscriminator(C, distance=distance), x, y)
        torch.testing.assert_close(scores, torch.full((B,), -math.log(B)))
        scores.sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_global_features_are_clouds_of_one_point(distance):
    discriminator = MatchDiscriminator(C, distance=distance).double()
    x, y = clouds()[:, 0], clouds(1)[:, 0]
    scores = of_student(discriminator, x, y)
    assert torch.equal(scores, of_student(discriminator, x[:, None], y[:, None])[None])
    fad = FeatureAdversarialLoss(C, C, discriminator="match").double()
    x.requires_grad_()
    fad(x, y).backward()
    assert (x.grad != 0).any(1).all()


def test_masked_clouds_are_ragged_ones():
    x, y = clouds().requires_grad_(), clouds(1)
    mask = torch.arange(N) < torch.tensor([[3], [7], [1], [5]])
    discriminator = MatchDiscriminator(C).double()
    scores = of_student(discriminator, x, y, mask=mask)
    lengths = mask.sum(1)
    other = of_student(
        discriminator, ragged(x[mask], lengths=lengths), ragged(y[mask], lengths=lengths)
    )
    torch.testing.assert_close(scores, other)
    gradients = [torch.autograd.grad(s.sum(), x)[0] for s in (scores, other)]
    torch.testing.assert_close(*gradients)


def test_ragged_clouds_are_pooled():
    lengths = [3, 6, 2]
    parts = [torch.randn(n, C) for n in lengths]
    others = [torch.randn(n + 1, C) for n in lengths]
    discriminator = MatchDiscriminator(C)
    x = ragged(torch.cat(parts), lengths=torch.tensor(lengths))
    y = ragged(torch.cat(others), lengths=torch.tensor(lengths) + 1)
    own = torch.cat([pooled(p[None]) for p in parts])
    known = torch.cat([pooled(p[None]) for p in others])
    d = torch.cdist(own, known).square() / torch.cdist(known, known).square().mean()
    expected = (-d / 0.1).log_softmax(1).diagonal()
    torch.testing.assert_close(of_student(discriminator, x, y), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------- queue


def test_the_queue_fills_and_forgets():
    discriminator = MatchDiscriminator(C, queue=6).double()
    first, second = clouds(1), clouds(2)
    x = clouds(3)
    empty = of_student(MatchDiscriminator(C).double(), x, first)
    torch.testing.assert_close(of_student(discriminator, x, first), empty)
    discriminator.observe(Game.of(x, first))
    assert int(discriminator.filled) == B
    torch.testing.assert_close(discriminator.past[:B], pooled(first))
    expected = torch.cat([pooled(second), pooled(first)])
    got = of_student(discriminator, x, second)
    d = torch.cdist(pooled(x), expected).square()
    unit = torch.cdist(pooled(second), pooled(second)).square().mean()
    torch.testing.assert_close(got, (-d / unit / 0.1).log_softmax(1).diagonal())
    discriminator.observe(Game.of(x, second))
    assert int(discriminator.filled) == 6
    torch.testing.assert_close(discriminator.past, expected[:6])


def test_scoring_does_not_fill_the_queue():
    discriminator = MatchDiscriminator(C, queue=6).double()
    game = Game.of(clouds(), clouds(1))
    for side in ("student", "teacher", None):
        discriminator(game, side)
    assert int(discriminator.filled) == 0
    assert not discriminator.past.any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_points_that_do_not_count_are_left_out(distance):
    """By hand, pair by pair; and what lies there is never seen."""
    x, y = clouds().requires_grad_(), clouds(1)
    here, there = (torch.rand(B, N) < 0.6 for _ in range(2))
    here[:, 0] = there[:, 1] = True
    discriminator = MatchDiscriminator(C, distance=distance).double()
    scores = of_student(
        discriminator,
        x.masked_fill(~here[..., None], 50.0),
        y.masked_fill(~there[..., None], -50.0),
        mask=(here, there),
    )
    own, known = (
        [c[m] for c, m in zip(z, mask, strict=True)] for z, mask in ((x, here), (y, there))
    )
    torch.testing.assert_close(
        scores, (-by_hand(distance, own, known) / 0.1).log_softmax(1).diagonal()
    )
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[~here].any()


@pytest.mark.parametrize("distance", ["energy", "chamfer"])
def test_sets_of_empty_clouds(distance):
    x, y, mask = clouds().requires_grad_(), clouds(1), torch.ones(B, N, dtype=torch.bool)
    mask[2] = False
    keep = [0, 1, 3]
    discriminator = MatchDiscriminator(C, distance=distance).double()
    scores = of_student(discriminator, x, y, mask=mask)
    torch.testing.assert_close(scores[keep], of_student(discriminator, x[keep], y[keep]))
    (gradient,) = torch.autograd.grad(scores[keep].sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("queue", [0, 3, 9])
def test_an_empty_cloud_is_nobody(queue):
    """Clouds are recognised among those that have points, and none else goes into the queue."""
    x, y = clouds(), clouds(1)
    with_holes, without = (MatchDiscriminator(C, queue=queue).double() for _ in range(2))
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[2] = False
    keep = [0, 1, 3]
    for _ in range(3):
        masked, left = Game.of(x, y, mask=mask), Game.of(x[keep], y[keep])
        scores = with_holes(masked)
        for mine, other in zip(scores, without(left), strict=True):
            torch.testing.assert_close(mine[keep], other)
        assert scores.student.isfinite().all()
        with_holes.observe(masked)
        without.observe(left)
        assert torch.equal(with_holes.past, without.past)
        assert torch.equal(with_holes.filled, without.filled)
        x, y = x.roll(1, 0), y.flip(1) + 1


def test_the_queue_is_filled_once_a_step_by_the_loss_and_is_saved():
    fad = FeatureAdversarialLoss(C, C, discriminator=MatchDiscriminator(C, queue=10))
    for step in range(1, 4):
        fad(torch.randn(B, N, C, requires_grad=True), torch.randn(B, N, C)).backward()
        assert int(fad.discriminator.filled) == min(10, step * B)
    other = FeatureAdversarialLoss(C, C, discriminator=MatchDiscriminator(C, queue=10))
    other.load_state_dict(fad.state_dict())
    torch.testing.assert_close(other.discriminator.past, fad.discriminator.past)


def test_one_cloud_is_recognised_among_past_ones():
    discriminator = MatchDiscriminator(C, queue=3)
    x, y = clouds(count=1, dtype=torch.float32), clouds(1, count=1, dtype=torch.float32)
    assert of_student(discriminator, x, y) == 0
    discriminator.observe(Game.of(x, y))
    assert of_student(discriminator, x, y + 1) < 0


# ------------------------------------------------------------------------------------ learning


def test_with_hinge_the_student_minimises_cross_entropy():
    options = {"normalize": False, "adapter": "identity", "weight": 1.0}
    fad = FeatureAdversarialLoss(C, C, discriminator="match", **options)
    x, y = clouds(dtype=torch.float32), clouds(1, dtype=torch.float32)
    logits = -by_hand("pooled", x, y) / 0.1
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(B))
    torch.testing.assert_close(
        fad.student_loss(x.requires_grad_(), y), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_it_pulls_every_cloud_to_its_own(distance):
    """Student clouds that start as another's end nearest to their own."""
    torch.manual_seed(0)
    teacher = clouds(1, count=3, dtype=torch.float32)
    student = teacher.roll(1, 0).clone().requires_grad_()
    discriminator = MatchDiscriminator(C, distance=distance, temperature=0.5)
    fad = FeatureAdversarialLoss(C, C, discriminator=discriminator, adapter="identity")
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        fad(student, teacher).backward()
        optimizer.step()
    with torch.no_grad():
        d = torch.stack([distances.energy(student, teacher.roll(-s, 0), reduction="none")
                         for s in range(3)])  # fmt: skip
    assert (d.argmin(0) == 0).all()


def test_the_temperature_learns_and_stays_in_bounds():
    discriminator = MatchDiscriminator(C, temperature=0.5)
    fad = FeatureAdversarialLoss(C, C, discriminator=discriminator)
    optimizer = torch.optim.SGD(fad.discriminator.parameters(), lr=0.1)
    before = discriminator.log_temperature.item()
    for seed in range(5):
        optimizer.zero_grad()
        x, y = clouds(seed, dtype=torch.float32), clouds(9, dtype=torch.float32)
        fad(x.requires_grad_(), y).backward()
        optimizer.step()
    assert discriminator.log_temperature.item() != before
    with torch.no_grad():
        discriminator.log_temperature.fill_(-100.0)
    assert of_student(discriminator, clouds(dtype=torch.float32), y).isfinite().all()


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distance": "pool"}, "distance: expected one of .*; did you mean 'pooled'"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected a positive number"),
        ({"queue": -1}, "queue: expected a number of clouds, 0 or more, got -1"),
        ({"queue": True}, "queue: expected a number of clouds"),
        ({"queue": 3, "distance": "energy"}, "queue: .*queue=3 with distance='energy'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MatchDiscriminator(C, **options)


@pytest.mark.parametrize(
    "shape, channels, message",
    [
        ((2, N, C + 1), C, r"student: expected \(B, N, 5\).*\(2, 7, 6\)"),
        ((1, N, C), C, r"student: .*needs at least 2 clouds in a batch or queue=.*\(1, 7, 5\)"),
        ((1, C), C, r"student: .*needs at least 2 clouds"),
    ],
)
def test_bad_input(shape, channels, message):
    with pytest.raises(ValueError, match=message):
        of_student(MatchDiscriminator(channels), torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("distance", ["energy", "chamfer"])
def test_ragged_sets_are_refused(distance):
    x = ragged(torch.randn(5, C), lengths=torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="compares all pairs of dense clouds"):
        of_student(MatchDiscriminator(C, distance=distance), x, x)
