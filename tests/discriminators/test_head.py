"""The discriminator that is the teacher's head."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fad_loss import FeatureAdversarialLoss, ragged
from fad_loss.discriminators import Game, HeadDiscriminator

from .cases import CLASSES, C, L, R, ask, build, classifier, clouds, inputs


def test_head_scores_by_hand():
    head = classifier().double().eval()
    z, reference, labels = inputs("head")
    logits = head(z.amax(1)).log_softmax(-1)
    wanted = head(reference.amax(1)).log_softmax(-1)
    expected = -F.kl_div(logits, wanted, reduction="none", log_target=True).sum(-1)
    discriminator = HeadDiscriminator(head)
    assert torch.allclose(ask(discriminator, z, reference), expected, rtol=1e-10)
    real = discriminator(Game.of(z, reference), "teacher")
    assert torch.equal(real, torch.zeros(3, dtype=torch.float64))
    by_label = HeadDiscriminator(head, target="labels")
    cross_entropy = F.cross_entropy(head(z.amax(1)), labels, reduction="none")
    assert torch.allclose(ask(by_label, z, labels=labels), -cross_entropy, rtol=1e-10)
    points = HeadDiscriminator(head, pool=None, target="labels", temperature=2.0)
    rows = (head(z.flatten(0, 1)) / 2).log_softmax(-1).reshape(3, 8, CLASSES)
    chosen = rows.gather(-1, labels[:, None, None].expand(-1, 8, 1)).squeeze(-1)
    assert torch.allclose(ask(points, z, labels=labels), chosen, rtol=1e-10)
    ignored = labels.clone()
    ignored[1] = -1
    assert ask(points, z, labels=ignored)[1].abs().sum() == 0


def test_the_head_is_not_touched():
    head = classifier().train()
    head[0].weight.requires_grad_(False)
    before = (
        [module.training for module in head.modules()],
        [parameter.requires_grad for parameter in head.parameters()],
        copy.deepcopy(head.state_dict()),
    )
    discriminator = HeadDiscriminator(head).train()
    z, reference, _ = inputs("head", dtype=torch.float32)
    z, reference = z.requires_grad_(), reference.requires_grad_()
    scores = ask(discriminator, z, reference)
    # Dropout is off and BatchNorm fixed, whatever train() is called.
    assert torch.equal(scores, ask(discriminator, z, reference))
    scores.sum().backward()
    assert z.grad.abs().sum() > 0
    assert reference.grad is None
    assert all(parameter.grad is None for parameter in head.parameters())
    assert before[0] == [module.training for module in head.modules()]
    assert before[1] == [parameter.requires_grad for parameter in head.parameters()]
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[2][key])


def test_nobody_trains_or_saves_the_copy():
    head = classifier()
    discriminator = HeadDiscriminator(head)
    assert list(discriminator.parameters()) == []
    assert discriminator.state_dict() == {}
    assert not discriminator.head.training
    discriminator.double()
    assert discriminator.head[0].weight.dtype == torch.float64
    z, reference, _ = inputs("head")
    scores = ask(discriminator, z, reference)
    with torch.no_grad():
        head[0].weight.zero_()
    assert torch.equal(scores, ask(discriminator, z, reference))


def test_convolutional_heads_and_tied_weights():
    torch.manual_seed(0)
    linear = nn.Linear(C, C, bias=False)
    tied = nn.Sequential(linear, nn.Tanh(), linear)
    discriminator = HeadDiscriminator(tied, pool=None)
    assert discriminator.head[0].weight is discriminator.head[2].weight
    conv = nn.Sequential(nn.Conv1d(C, C, 1, bias=False), nn.Tanh(), nn.Conv1d(C, C, 1, bias=False))
    for layer in (conv[0], conv[2]):
        layer.weight.data = linear.weight.data[..., None].clone()
    other = HeadDiscriminator(conv, pool=None, layout="bcn")
    z, reference = clouds(2, 8, C).float(), clouds(2, 8, C, seed=1).float()
    assert torch.allclose(ask(discriminator, z, reference), ask(other, z, reference), atol=1e-6)
    compiled = HeadDiscriminator(torch.compile(tied, backend="eager"), pool=None)
    assert torch.equal(ask(compiled, z, reference), ask(discriminator, z, reference))


def test_the_score_is_an_upper_bound_at_the_teacher():
    discriminator = HeadDiscriminator(classifier().double())
    z, reference, _ = inputs("head", B=50)
    assert (ask(discriminator, z, reference) < 0).all()
    assert ask(discriminator, reference, reference).abs().max() == 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"pool": "sum"}, ValueError, "pool: expected one of 'max', 'mean', got 'sum'"),
        ({"target": "label"}, ValueError, "target: .*did you mean 'labels'"),
        ({"layout": "nbc", "pool": None}, ValueError, "layout: expected one of 'bnc', 'bcn'"),
        ({"layout": "bcn"}, ValueError, "layout: 'bcn' is for a head that takes points"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a positive number, got nan"),
        ({"levels": "0"}, TypeError, "levels: expected a sequence of paths.*got str '0'"),
        ({"levels": [0]}, TypeError, "levels: expected a sequence of paths.*got list"),
        ({"levels": ["0.norm"]}, ValueError, "levels: expected layers of the head, '', '0', .*got"),
        ({"levels": ["0"], "target": "labels"}, ValueError, "levels: expected none with target="),
    ],
)
def test_bad_head_options(options, error, message):
    with pytest.raises(error, match=message):
        HeadDiscriminator(classifier(), **options)


def test_bad_heads():
    with pytest.raises(TypeError, match=r"head: expected a torch.nn.Module.*got function"):
        HeadDiscriminator(lambda z: z)  # type: ignore[arg-type]
    for head, pool, layout in (
        (nn.Flatten(0), "max", "bnc"),
        (nn.Flatten(0), None, "bcn"),
        (nn.Unflatten(0, (1, -1)), "max", "bnc"),
    ):
        discriminator = HeadDiscriminator(head, pool=pool, layout=layout)
        with pytest.raises(ValueError, match=r"head: expected one row of logits for each of the"):
            ask(discriminator, R, R)


@pytest.mark.parametrize(
    "name, student, teacher, labels, message",
    [
        ("head of points", R, R[:, :2], None, r"same clouds and points \(pool=None\).*\(2, 2, 5\)"),
        ("head of labels", R, None, None, "labels: with target='labels'.*got None"),
        ("head of labels", R, None, L + 6, "labels: expected classes below 7, .*got 7"),
        ("head of labels", R, None, L[:1], "labels: expected one class per cloud"),
    ],
)
def test_bad_head_input(name, student, teacher, labels, message):
    with pytest.raises(ValueError, match=message):
        ask(build(name, torch.float32), student, teacher, labels)


def test_points_of_uneven_clouds_that_cannot_be_paired():
    discriminator = build("head of points")
    z = clouds(6, C)
    with pytest.raises(ValueError, match=r"same clouds and points \(pool=None\)"):
        ask(discriminator, ragged(z, lengths=[2, 4]), ragged(z, lengths=[3, 3]))
    with pytest.raises(ValueError, match=r"same clouds and points \(pool=None\)"):
        ask(discriminator, z[None], z[None], mask=(None, torch.ones(1, 6) > 0))


def test_a_class_that_the_head_rules_out_weighs_nothing():
    class Masked(nn.Module):
        """Knows a class that no cloud of this category can have, as part segmentation does."""

        def forward(self, x):
            return torch.cat([x, torch.full_like(x[..., :1], -torch.inf)], -1)

    torch.manual_seed(0)
    z, reference = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    discriminator = HeadDiscriminator(Masked())
    assert torch.equal(ask(discriminator, reference, reference), torch.zeros(2))
    scores = ask(discriminator, z, reference)
    torch.testing.assert_close(scores, ask(HeadDiscriminator(nn.Identity()), z, reference))
    scores.sum().backward()
    assert z.grad.isfinite().all()


# --------------------------------------------------------------------------------- global features


@pytest.mark.parametrize("name", ["head", "head of labels", "head with levels"])
def test_global_features_are_each_the_pooled_feature_of_a_cloud(name):
    """The batch is no cloud to pool over: each row is scored as a cloud of one point is."""
    discriminator = build(name)
    z, reference, labels = clouds(4, C).requires_grad_(), clouds(4, C, seed=1), torch.arange(4)
    scores = ask(discriminator, z, reference, labels)
    assert scores.shape == (1, 4)
    of_one_point = ask(discriminator, z[:, None], reference[:, None], labels)
    assert torch.equal(scores[0], of_one_point)
    assert scores.std() > 0
    (gradient,) = torch.autograd.grad(scores.sum(), z)
    assert (gradient != 0).any(1).all()


def test_global_features_through_the_loss():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    student, teacher = torch.randn(6, C, requires_grad=True), torch.randn(6, C)
    options = {"adapter": "identity", "normalize": False, "weight": 1.0, "warmup_steps": 0}
    fad = FeatureAdversarialLoss(C, C, discriminator=HeadDiscriminator(head), **options)
    opinion, wanted = head(student).log_softmax(-1), head(teacher).log_softmax(-1)
    divergence = F.kl_div(opinion, wanted, reduction="batchmean", log_target=True)
    torch.testing.assert_close(fad(student, teacher), divergence)


# ------------------------------------------------------------------------------------------ levels


def by_hand(head, z, reference, known, levels):
    """The score, for rows; `known` gives the variances."""
    score = 0.0
    for level in range(levels):
        outputs = [head[: level + 1](x) for x in (z, reference, known)]
        unit = outputs[2].var(0, correction=0)
        unit = unit + 0.01 * unit.mean()
        score = score - ((outputs[0] - outputs[1]).square() / unit).mean(-1)
    opinion, wanted = head(z).log_softmax(-1), head(reference).log_softmax(-1)
    return score + (wanted.exp() * (opinion - wanted)).sum(-1)


@pytest.mark.parametrize("pool", ["max", None])
def test_levels_by_hand(pool):
    head = classifier().double().eval()
    discriminator = HeadDiscriminator(head, pool=pool, levels=("0", "1", "2")).double()
    z, reference = clouds(6, 4, C).requires_grad_(), clouds(6, 4, C, seed=1)
    game = Game.of(z, reference)
    rows = [x.amax(1) if pool else x.flatten(0, 1) for x in (z, reference)]
    # The first batch is in units of its own.
    fake, real = discriminator(game)
    expected = by_hand(head, *rows, rows[1], 3)
    torch.testing.assert_close(fake.flatten(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(real, torch.zeros_like(real))
    (got,) = torch.autograd.grad(fake.sum(), z, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    # Those that follow, in running ones.
    discriminator.observe(game)
    torch.testing.assert_close(discriminator(game).student, fake)
    later = Game.of(z, 3 * reference)
    rows.append(3 * rows[1])
    expected = by_hand(head, rows[0], rows[2], rows[1], 3)
    torch.testing.assert_close(discriminator(later, "student").flatten(), expected)


def test_the_empty_level_is_what_comes_into_the_head():
    discriminator = HeadDiscriminator(nn.Linear(C, 1, bias=False), pool=None, levels=("",))
    z, reference = clouds(2, 7, C).float(), clouds(2, 7, C, seed=1).float()
    variance = reference.flatten(0, 1).var(0, correction=0)
    # One class is certain: the divergence is 0, and the level is all there is.
    expected = -((z - reference).square() / (variance + 0.01 * variance.mean())).mean(-1)
    torch.testing.assert_close(ask(discriminator, z, reference), expected)


def test_levels_of_convolutions_are_those_of_linear_layers():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(C, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    conv = nn.Sequential(nn.Conv1d(C, 6, 1), nn.ReLU(), nn.Conv1d(6, CLASSES, 1))
    for mine, its in zip(conv, linear, strict=True):
        if isinstance(its, nn.Linear):
            mine.load_state_dict({"weight": its.weight[..., None], "bias": its.bias})
    z, reference = clouds(2, 8, C).float(), clouds(2, 8, C, seed=1).float()
    options = {"pool": None, "levels": ("", "0", "1")}
    scores = ask(HeadDiscriminator(linear, **options), z, reference)
    torch.testing.assert_close(
        ask(HeadDiscriminator(conv, layout="bcn", **options), z, reference), scores
    )


def test_layers_that_work_in_place_spoil_nothing():
    torch.manual_seed(0)
    layers = [nn.ReLU(), nn.Linear(C, 6), nn.ReLU(), nn.Linear(6, CLASSES)]

    class Writes(nn.Module):
        def forward(self, x):
            return x.tanh_()

    class Squashes(nn.Module):
        def forward(self, x):
            return x.tanh()

    def head(relu, squash):
        copies = [copy.deepcopy(layer) for layer in layers]
        return nn.Sequential(relu(), copies[1], relu(), squash(), copies[3])

    options = {"pool": None, "levels": ("", "1", "2")}
    expected = HeadDiscriminator(head(nn.ReLU, Squashes), **options)
    hasty = HeadDiscriminator(head(lambda: nn.ReLU(inplace=True), Writes), **options)
    z, reference = clouds(1, 8, C).float(), clouds(1, 8, C, seed=1).float()
    before = z.clone(), reference.clone()
    torch.testing.assert_close(ask(hasty, z, reference), ask(expected, z, reference))
    assert torch.equal(z, before[0])
    assert torch.equal(reference, before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_levels_are_followed_and_saved(dtype):
    def made():
        return HeadDiscriminator(classifier(), levels=["0", "2"]).to(dtype)

    discriminator = made()
    games = [
        Game.of(*(clouds(5, 4, C, seed=s, dtype=dtype) for s in (seed, seed + 1)))
        for seed in (0, 2, 4)
    ]
    for game in games:
        discriminator(game)
        discriminator.observe(game)
    state = discriminator.state_dict()
    assert sorted(state) == [
        f"level_units.{n}.{name}" for n in (0, 1) for name in ("batches", "mean", "variance")
    ]
    wide = dtype if dtype == torch.float64 else torch.float32
    assert all(t.dtype in {wide, torch.int64} for t in state.values())
    fresh, later = made(), made()
    later.observe(games[0])
    for twin in (fresh, later, copy.deepcopy(discriminator)):
        twin.load_state_dict(state)
        for game in games:
            assert torch.equal(twin(game, "student"), discriminator(game, "student"))
    # And one that has seen nothing yet into one that has.
    later.load_state_dict(made().state_dict())
    assert torch.equal(later(games[2]).student, made()(games[2]).student)


def test_levels_through_the_loss():
    torch.manual_seed(0)

    def made():
        head = HeadDiscriminator(classifier(), levels=["0", "2"])
        return FeatureAdversarialLoss(3, C, discriminator=head)

    fad, twin = made(), made()
    for step in range(3):
        fad(torch.randn(4, 6, 3, requires_grad=True), torch.randn(4, 6, C)).backward()
        assert int(fad.discriminator.level_units[0].batches) == step + 1
    twin.load_state_dict(fad.state_dict())
    student, teacher = torch.randn(4, 6, 3), torch.randn(4, 6, C)
    assert torch.equal(twin.eval()(student, teacher), fad.eval()(student, teacher))
    assert int(fad.discriminator.level_units[0].batches) == 3


def test_an_average_of_the_loss_that_began_before_training():
    """As loops that are written by hand keep one: every buffer has its size from the start."""

    def average(mine, theirs):
        for average, latest in zip(
            mine.state_dict().values(), theirs.state_dict().values(), strict=True
        ):
            average.copy_(latest)

    for pool, layout in (("max", "bnc"), (None, "bnc"), (None, "bcn")):
        layers = [nn.Linear(C, 8), nn.Linear(8, CLASSES)]
        if layout == "bcn":
            layers = [nn.Conv1d(C, 8, 1), nn.Conv1d(8, CLASSES, 1)]
        head = nn.Sequential(*layers).double()
        discriminator = HeadDiscriminator(head, pool=pool, layout=layout, levels=["", "0"])
        fad = FeatureAdversarialLoss(3, C, discriminator=discriminator).double()
        twin = copy.deepcopy(fad)
        assert [len(units.mean) for units in discriminator.level_units] == [C, 8]
        # What was made room for is no statistic yet.
        bare = HeadDiscriminator(head, pool=pool, layout=layout, levels=["", "0"])
        z, reference = clouds(4, 6, C), clouds(4, 6, C, seed=1)
        assert torch.equal(ask(discriminator, z, reference), ask(bare, z, reference))
        student, teacher = clouds(4, 6, 3).requires_grad_(), reference
        fad(student, teacher)
        average(twin, fad)
        assert torch.equal(twin.eval()(student, teacher), fad.eval()(student, teacher))


def test_levels_do_not_follow_what_does_not_count():
    discriminator = HeadDiscriminator(classifier().double(), pool=None, levels=["2"]).double()
    z, mask = clouds(2, 6, C), torch.arange(12).reshape(2, 6) % 4 != 1
    packed = z[mask]
    with_holes = copy.deepcopy(discriminator)
    with_holes.observe(Game.of(z, z.masked_fill(~mask[..., None], 9.0), mask=mask))
    discriminator.observe(Game.of(packed[None], packed[None]))
    for mine, other in zip(with_holes.buffers(), discriminator.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    # Nor an empty cloud, whose pooled feature is none.
    pooled = HeadDiscriminator(classifier().double(), levels=["2"]).double()
    other = copy.deepcopy(pooled)
    mask = torch.tensor([[True] * 6, [False] * 6, [True] * 6])
    z = clouds(3, 6, C)
    pooled.observe(Game.of(z, z, mask=mask))
    other.observe(Game.of(z[::2], z[::2]))
    for mine, its in zip(pooled.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, its)


def test_a_level_that_is_not_reached_or_has_no_rows():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(C, 3), nn.Linear(C, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"head: expected one row .* of level 'unused', got None"):
        ask(HeadDiscriminator(Skips(), levels=["unused"]), R)
    head = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, -1)), nn.Linear(C, 3))
    with pytest.raises(ValueError, match=r"head: .* rows of level '0', got float32 of shape \(10"):
        ask(HeadDiscriminator(head, levels=["0"]), R)
