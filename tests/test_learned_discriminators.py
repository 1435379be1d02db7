"""The discriminators that learn, and the one that is the teacher's head."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fad_loss.discriminators._layers import cloud_max
from fad_loss.discriminators.cloud import CloudDiscriminator
from fad_loss.discriminators.head import HeadDiscriminator
from fad_loss.discriminators.neighborhood import NeighborhoodDiscriminator
from fad_loss.discriminators.point import PointDiscriminator
from fad_loss.features import ragged
from fad_loss.penalties import penalized_scores, r1

C = 5
CLASSES = 7
LEARNED = {
    "point": lambda **options: PointDiscriminator(C, 12, 2, **options),
    "neighborhood": lambda **options: NeighborhoodDiscriminator(C, 12, 2, k=3, **options),
    "cloud": lambda **options: CloudDiscriminator(C, 12, 2, heads=3, **options),
}
OPTIONS = {
    "plain": {},
    "unnormalised": {"spectral_norm": False},
    "everything": {"condition": "cloud", "num_classes": CLASSES, "layer_norm": True},
}


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(C, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    )


FROZEN = {
    "head": lambda: HeadDiscriminator(classifier()),
    "head of labels": lambda: HeadDiscriminator(classifier(), pool="mean", target="labels"),
    "head of points": lambda: HeadDiscriminator(classifier(), pool=None, temperature=2.0),
    "head of points and labels": lambda: HeadDiscriminator(
        classifier(), pool=None, target="labels"
    ),
}
EVERY = {
    **{
        f"{name}, {option}": (lambda name=name, option=option: LEARNED[name](**OPTIONS[option]))
        for name in LEARNED
        for option in OPTIONS
    },
    **FROZEN,
}
CONDITIONED = [name for name in EVERY if "everything" in name or "head" in name]


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return EVERY[name]().to(dtype)


def clouds(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(name: str, B: int = 3, N: int = 8, dtype: torch.dtype = torch.float64):
    # A head without pooling compares point by point.
    M = N if "points" in name else 10
    labels = torch.arange(B) % CLASSES
    return (
        clouds(B, N, C, dtype=dtype),
        clouds(B, M, C, seed=1, dtype=dtype),
        labels,
    )


def scored_per_cloud(name: str) -> bool:
    return name.startswith("cloud") or name in {"head", "head of labels"}


# -- What all of them promise --------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_permuting_points_permutes_scores(name):
    discriminator = build(name).eval()
    z, reference, labels = inputs(name)
    scores = discriminator(z, reference=reference, labels=labels)
    assert scores.shape == ((3,) if scored_per_cloud(name) else (3, 8))
    assert scores.std() > 0
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    paired = reference[:, order] if reference.shape[1] == 8 else reference.flip(1)
    permuted = discriminator(z[:, order], reference=paired, labels=labels)
    expected = scores if scored_per_cloud(name) else scores[:, order]
    assert torch.allclose(permuted, expected, rtol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_clouds_do_not_see_each_other(name):
    discriminator = build(name).train()
    z, reference, labels = inputs(name)
    # The power iteration moves the weights in training mode: compare copies.
    together = copy.deepcopy(discriminator)(z, reference, labels)
    alone = [
        copy.deepcopy(discriminator)(z[b : b + 1], reference[b : b + 1], labels[b : b + 1])
        for b in range(3)
    ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-10)


@pytest.mark.parametrize("name", EVERY)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=6, deadline=None)
def test_ragged_equals_a_loop_over_clouds(name, lengths):
    discriminator = build(name).eval()
    z = clouds(sum(lengths), C).requires_grad_()
    others = lengths if "points" in name else [length + 2 for length in lengths]
    reference = clouds(sum(others), C, seed=1)
    labels = torch.arange(len(lengths)) % CLASSES
    scores = discriminator(ragged(z, lengths=lengths), ragged(reference, lengths=others), labels)
    assert scores.is_nested != scored_per_cloud(name)
    packed = scores.values() if scores.is_nested else scores
    loop = [
        discriminator(part[None], other[None], labels[b : b + 1]).flatten()
        for b, (part, other) in enumerate(
            zip(z.split(lengths), reference.split(others), strict=True)
        )
    ]
    expected = torch.cat(loop)
    assert torch.allclose(packed, expected, rtol=1e-10, atol=1e-12)
    (mine,) = torch.autograd.grad(packed.square().sum(), z)
    (other,) = torch.autograd.grad(expected.square().sum(), z)
    assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_ragged_cloud_changes_nothing_for_the_others(name):
    discriminator = build(name).eval()
    z, reference = clouds(6, C).requires_grad_(), clouds(6, C, seed=1)
    labels = torch.tensor([2, 0, 5])
    holes = [2, 0, 4]
    scores = discriminator(ragged(z, lengths=holes), ragged(reference, lengths=holes), labels)
    packed = scores.values() if scores.is_nested else scores[[0, 2]]
    full = discriminator(
        ragged(z, lengths=[2, 4]), ragged(reference, lengths=[2, 4]), labels[[0, 2]]
    )
    assert torch.allclose(packed, full.values() if full.is_nested else full, rtol=1e-10)
    if not scores.is_nested:
        assert scores.isfinite().all()
    (gradient,) = torch.autograd.grad(packed.sum(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_gradients_match_finite_differences_twice(name):
    # LeakyReLU and max have kinks; at a random point they are a measure-zero risk.
    discriminator = build(name).eval()
    z, reference, labels = inputs(name, B=1, N=4)
    z = z.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: discriminator(v, reference, labels), z)
    names = [key for key, _ in discriminator.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in discriminator.parameters())

    def penalty(*parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        scores = torch.func.functional_call(discriminator, state, (z, reference, labels))
        return r1(scores, z)

    if values and "everything" not in name:
        assert torch.autograd.gradcheck(penalty, values, nondet_tol=1e-12, fast_mode=True)
    elif not values:
        assert penalty() > 0


@pytest.mark.parametrize("name", EVERY)
def test_detached_parameters_and_cloned_buffers(name):
    # How the student's term is computed: nothing trains, nothing moves, the score is the same.
    discriminator = build(name).train()
    z, reference, labels = inputs(name)
    z = z.requires_grad_()
    before = copy.deepcopy(discriminator.state_dict())
    state = {key: value.detach() for key, value in discriminator.named_parameters()}
    state.update({key: value.clone() for key, value in discriminator.named_buffers()})
    scores = torch.func.functional_call(
        discriminator, state, (z,), {"reference": reference, "labels": labels}
    )
    scores.sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    for key, value in discriminator.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(scores, discriminator(z, reference, labels))


@pytest.mark.parametrize("name", [name for name in EVERY if "everything" in name] + ["head"])
def test_compiles_without_a_break(name):
    torch.compiler.reset()
    discriminator = build(name, torch.float32).train()
    twin = copy.deepcopy(discriminator)
    z, reference, labels = inputs(name, dtype=torch.float32)
    z = z.requires_grad_()

    # Both terms of the loss for one of them; the others in the way that is new about them.
    def step(module: nn.Module, features: Tensor) -> tuple[Tensor, ...]:
        if "point" not in name:
            return (module(features, reference, labels),)
        state = {key: value.detach() for key, value in module.named_parameters()}
        state.update({key: value.clone() for key, value in module.named_buffers()})
        fixed = torch.func.functional_call(module, state, (features, reference, labels))
        return fixed, module(features, reference, labels)

    expected = step(twin, z)
    backend = "aot_eager" if "point" in name else "eager"
    compiled = torch.compile(step, backend=backend, fullgraph=True)(discriminator, z)
    for mine, other in zip(compiled, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(sum(map(torch.sum, scores)), [z, *module.parameters()])
        for scores, module in ((compiled, discriminator), (expected, twin))
    ]
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


# Dynamo instantiates autograd functions, and warns itself that one should not.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_ragged_clouds_compile_without_a_break():
    torch.compiler.reset()
    discriminator = build("neighborhood, everything").eval()
    values, reference = clouds(12, C), clouds(15, C, seed=1)
    labels = torch.tensor([3, 0])

    def score(z: Tensor, offset: Tensor) -> Tensor:
        cloud = ragged(z, offset=offset)
        return discriminator(cloud, ragged(reference, lengths=[7, 8]), labels).values()

    offset = torch.tensor([5, 12])
    compiled = torch.compile(score, backend="eager", fullgraph=True)(values, offset)
    assert torch.allclose(compiled, score(values, offset), rtol=1e-10)
    torch.compiler.reset()


@pytest.mark.parametrize("name", EVERY)
def test_autocast(name):
    discriminator = build(name, torch.float32).eval()
    z, reference, labels = inputs(name, dtype=torch.float32)
    z = z.requires_grad_()
    expected = discriminator(z, reference, labels)
    with torch.autocast("cpu", torch.bfloat16):
        scores = discriminator(z, reference, labels)
        penalty = r1(scores, z)
    assert torch.allclose(scores.float(), expected, rtol=0.05, atol=0.1)
    assert penalty.dtype == torch.float32
    assert penalty.isfinite()
    penalty.backward() if penalty.requires_grad else None
    assert all(p.grad is None or p.grad.isfinite().all() for p in discriminator.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_the_compilable_penalty_agrees(name):
    discriminator = build(name).eval()
    z, reference, labels = inputs(name)
    leaf = z.clone().requires_grad_()
    expected = r1(discriminator(leaf, reference, labels), leaf)
    _, penalty = penalized_scores(lambda v: discriminator(v, reference, labels), z)
    assert torch.allclose(penalty, expected, rtol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_state_copies_and_pickles(name):
    discriminator = build(name).eval()
    arguments = inputs(name)
    expected = discriminator(*arguments)
    file = io.BytesIO()
    torch.save(discriminator.state_dict(), file)
    file.seek(0)
    other = EVERY[name]().double().eval()
    other.load_state_dict(torch.load(file))
    for twin in (
        other,
        copy.deepcopy(discriminator),
    ):
        assert torch.equal(twin(*arguments), expected)
    assert discriminator.__class__.__name__ in repr(discriminator)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype):
    discriminator = build(name, dtype).eval()
    scores = discriminator(*inputs(name, dtype=dtype))
    expected = build(name).eval()(*inputs(name))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert torch.allclose(scores.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LEARNED)
def test_there_is_no_batch_norm(name):
    modules = LEARNED[name](**OPTIONS["everything"]).modules()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)


def test_non_contiguous_features():
    for name in EVERY:
        discriminator = build(name).eval()
        z, reference, labels = inputs(name)
        strided = z.mT.contiguous().mT
        assert not strided.is_contiguous()
        expected = discriminator(z, reference, labels)
        assert torch.allclose(discriminator(strided, reference, labels), expected)


# -- Those that learn ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED)
def test_spectral_norm_bounds_every_layer(name):
    discriminator = build(f"{name}, plain").train()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(10)
        for _ in range(200):
            discriminator(*inputs(name))
    discriminator.eval()
    layers = [module for module in discriminator.modules() if isinstance(module, nn.Linear)]
    assert layers
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight, 2)
        assert torch.allclose(norm, torch.ones_like(norm), rtol=1e-3)


def test_the_point_score_is_lipschitz():
    discriminator = build("point, plain").train()
    for _ in range(100):
        discriminator(clouds(1, 2, C))
    discriminator.eval()
    a, b = clouds(1, 500, C), 3 * clouds(1, 500, C, seed=2)
    slope = (discriminator(a) - discriminator(b)).abs() / (a - b).norm(dim=-1)
    assert slope.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", LEARNED)
def test_it_learns_to_tell_them_apart(name):
    torch.manual_seed(0)
    discriminator = LEARNED[name]()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        real = torch.randn(4, 16, C, generator=generator) + 1
        fake = torch.randn(4, 16, C, generator=generator) - 1
        loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8


@pytest.mark.parametrize("name", LEARNED)
def test_the_condition_matters(name):
    discriminator = build(f"{name}, everything").eval()
    z, reference, labels = inputs(name)
    scores = discriminator(z, reference, labels)
    assert not torch.allclose(scores, discriminator(z, reference.roll(1, 0), labels))
    assert not torch.allclose(scores, discriminator(z, reference, labels + 1))
    # Its own reference, however it is ordered.
    assert torch.allclose(scores, discriminator(z, reference.flip(1), labels))
    # Without the option, neither matters, and neither is looked at.
    plain = build(f"{name}, plain").eval()
    assert torch.equal(plain(z), plain(z, reference=torch.zeros(1), labels=torch.zeros(0)))


@pytest.mark.parametrize("name", ["point", "neighborhood"])
def test_labels_of_points(name):
    discriminator = build(f"{name}, everything").eval()
    z, reference, labels = inputs(name)
    per_point = labels[:, None].expand(-1, 8)
    expected = discriminator(z, reference, labels)
    assert torch.equal(discriminator(z, reference, per_point), expected)
    mixed = per_point.clone()
    mixed[:, :4] = 6
    scores = discriminator(z, reference, mixed)
    assert torch.equal(scores[:, 4:], expected[:, 4:])
    assert not torch.equal(scores[:, :4], expected[:, :4])
    # Global features are one set, with a label for each.
    one = discriminator(z[:1], reference[:1], per_point[0])
    assert torch.allclose(one, expected[:1], rtol=1e-12)
    lengths = [3, 5]
    cloud, other = (ragged(t[0], lengths=[3, t.shape[1] - 3]) for t in (z, reference))
    by_cloud = discriminator(cloud, other, torch.tensor([1, 4]))
    by_point = discriminator(cloud, other, ragged(torch.tensor([1] * 3 + [4] * 5), lengths=lengths))
    assert torch.equal(by_cloud.values(), by_point.values())


@pytest.mark.parametrize("name", LEARNED)
def test_unknown_labels_add_nothing(name):
    discriminator = build(f"{name}, everything").eval()
    z, reference, _ = inputs(name)
    unknown = discriminator(z, reference, torch.tensor([-1, -100, 3]))
    known = discriminator(z, reference, torch.tensor([0, 1, 3]))
    assert torch.equal(unknown[2], known[2])
    discriminator.projection = None
    assert torch.equal(unknown[:2], discriminator(z, reference)[:2])


def test_edge_convolution_is_what_the_paper_says():
    discriminator = build("neighborhood, unnormalised").eval()
    z = clouds(2, 6, C)
    hidden = z
    distance = torch.cdist(z, z)
    neighbors = distance.argsort(-1)[..., : 3 + 1]  # the point itself comes first
    for convolution in discriminator.convolutions:
        U, V = convolution.center, convolution.edge
        gathered = torch.stack([hidden[b][neighbors[b]] for b in range(2)])
        edges = U(hidden).unsqueeze(2) + V(gathered - hidden.unsqueeze(2))
        hidden = F.leaky_relu(edges, 0.2).max(2).values
    expected = discriminator.score(hidden).squeeze(-1)
    assert torch.allclose(discriminator(z), expected, rtol=1e-10)


@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_small_clouds_have_fewer_neighbors(N):
    discriminator = build("neighborhood, plain").eval()
    z = clouds(2, N, C)
    scores = discriminator(z)
    padded = ragged(z.flatten(0, 1), lengths=[N, N])
    assert torch.allclose(scores.flatten(), discriminator(padded).values(), rtol=1e-12)


def test_attention_pooling_by_hand():
    discriminator = build("cloud, unnormalised").eval()
    z = clouds(2, 6, C)
    hidden = F.leaky_relu(discriminator.first(z), 0.2)
    hidden = F.leaky_relu(discriminator.rest[0](hidden), 0.2)
    weights = discriminator.attention(hidden).softmax(1)  # (B, N, heads), 4 channels each
    attended = torch.cat(
        [(weights[..., [h]] * hidden[..., 4 * h : 4 * h + 4]).sum(1) for h in range(3)], -1
    )
    summary = torch.cat([hidden.mean(1), hidden.amax(1), attended], -1)
    expected = discriminator.score(F.leaky_relu(discriminator.joined(summary), 0.2)).squeeze(-1)
    assert torch.allclose(discriminator(z), expected, rtol=1e-10)


def test_cloud_max_sends_its_gradient_to_one_point():
    values = torch.tensor([[1.0, 5.0], [1.0, 2.0], [0.0, 7.0], [4.0, 7.0]], requires_grad=True)
    expected = torch.tensor([[1.0, 5.0], [4.0, 7.0]])
    dense = cloud_max(values.reshape(2, 2, 2))
    cloud = cloud_max(ragged(values, lengths=[2, 2]))
    wanted = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for result in (dense, cloud):
        assert torch.equal(result, expected)
        (gradient,) = torch.autograd.grad(result.sum(), values)
        assert torch.equal(gradient, wanted)
    holes = cloud_max(ragged(values, lengths=[0, 4, 0]))
    assert torch.equal(holes, torch.tensor([[0.0, 0.0], [4.0, 7.0], [0.0, 0.0]]))


def everything(name: str) -> nn.Module:
    return LEARNED[name](**OPTIONS["everything"])


R, L = torch.zeros(2, 4, C), torch.tensor([0, 1])


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    "features, reference, labels, error, message",
    [
        (torch.zeros(2, 4, C + 1), R, L, ValueError, r"features: expected \(B, N, 5\).*\(2, 4, 6"),
        (torch.zeros(2, C), R, L, ValueError, r"features: expected \(B, N, 5\).*\(2, 5\)"),
        (torch.zeros(2, 4, C).long(), R, L, TypeError, "features: expected float32.*int64"),
        (ragged(torch.zeros(4), lengths=[1, 3]), R, L, ValueError, "features: expected"),
        (R, None, L, ValueError, "reference: .*condition='cloud'.*got None; pass reference="),
        (R, R[..., 1:], L, ValueError, r"reference: expected \(B, N, 5\).*\(2, 4, 4\)"),
        (R, R[:1], L, ValueError, r"reference: .*same clouds.*\(1, 4, 5\).* for .*\(2, 4, 5\)"),
        (R, R, None, ValueError, "labels: .*num_classes=7.*got None"),
        (R, R, L.float(), TypeError, "labels: expected an integer tensor.*float32"),
        (R, R, [0, 1], TypeError, "labels: expected an integer tensor.*list"),
        (R, R, L[:1], ValueError, r"labels: expected one class per cloud, \(2,\).*shape \(1\)"),
        (R, R, L[None, None], ValueError, r"labels: expected one class.*shape \(1, 1, 2\)"),
        (R, R, L + 6, ValueError, r"labels: expected classes below 7, .*got 7"),
        (R, R, ragged(L, lengths=[1, 1]), ValueError, "labels: expected one class per cloud"),
    ],
)
def test_bad_input(name, features, reference, labels, error, message):
    with pytest.raises(error, match=message):
        everything(name)(features, reference, labels)


def test_labels_of_points_are_not_labels_of_clouds():
    with pytest.raises(ValueError, match=r"one class per cloud, \(2,\), got int64 of shape \(2, 4"):
        everything("cloud")(R, R, torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"condition": "class"}, "condition: expected None or 'cloud', got 'class'"),
        ({"num_classes": 0}, "num_classes: expected a positive integer, got 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        LEARNED[name](**options)


def test_bad_sizes():
    for kind in (PointDiscriminator, NeighborhoodDiscriminator, CloudDiscriminator):
        with pytest.raises(ValueError, match="channels: expected a positive integer, got 0"):
            kind(0)
        with pytest.raises(ValueError, match=r"hidden: expected a positive integer, got 1\.5"):
            kind(4, 1.5)
        with pytest.raises(ValueError, match="layers: expected a positive integer, got False"):
            kind(4, 4, False)
    with pytest.raises(ValueError, match="k: expected a positive integer, got -1"):
        NeighborhoodDiscriminator(4, k=-1)
    with pytest.raises(ValueError, match="hidden: expected a multiple of heads=4, got 10"):
        CloudDiscriminator(4, 10)


# -- The teacher's head --------------------------------------------------------------------------


def test_head_scores_by_hand():
    head = classifier().double().eval()
    z, reference, labels = inputs("head")
    logits = head(z.amax(1)).log_softmax(-1)
    wanted = head(reference.amax(1)).log_softmax(-1)
    expected = -F.kl_div(logits, wanted, reduction="none", log_target=True).sum(-1)
    discriminator = HeadDiscriminator(head)
    assert torch.allclose(discriminator(z, reference), expected, rtol=1e-10)
    assert torch.equal(discriminator(reference, reference), torch.zeros(3, dtype=torch.float64))
    by_label = HeadDiscriminator(head, target="labels")
    cross_entropy = F.cross_entropy(head(z.amax(1)), labels, reduction="none")
    assert torch.allclose(by_label(z, labels=labels), -cross_entropy, rtol=1e-10)
    points = HeadDiscriminator(head, pool=None, target="labels", temperature=2.0)
    rows = (head(z.flatten(0, 1)) / 2).log_softmax(-1).reshape(3, 8, CLASSES)
    chosen = rows.gather(-1, labels[:, None, None].expand(-1, 8, 1)).squeeze(-1)
    assert torch.allclose(points(z, labels=labels), chosen, rtol=1e-10)
    ignored = labels.clone()
    ignored[1] = -1
    assert points(z, labels=ignored)[1].abs().sum() == 0


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
    scores = discriminator(z, reference)
    # Dropout is off and BatchNorm fixed, whatever train() is called.
    assert torch.equal(scores, discriminator(z, reference))
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
    scores = discriminator(z, reference)
    with torch.no_grad():
        head[0].weight.zero_()
    assert torch.equal(scores, discriminator(z, reference))


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
    assert torch.allclose(discriminator(z, reference), other(z, reference), atol=1e-6)
    compiled = HeadDiscriminator(torch.compile(tied, backend="eager"), pool=None)
    assert torch.equal(compiled(z, reference), discriminator(z, reference))


def test_the_score_is_an_upper_bound_at_the_teacher():
    discriminator = HeadDiscriminator(classifier().double())
    z, reference, _ = inputs("head", B=50)
    assert (discriminator(z, reference) < 0).all()
    assert discriminator(reference, reference).abs().max() == 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"pool": "sum"}, ValueError, "pool: expected one of 'max', 'mean', got 'sum'"),
        ({"target": "label"}, ValueError, "target: .*did you mean 'labels'"),
        ({"layout": "nbc", "pool": None}, ValueError, "layout: expected one of 'bnc', 'bcn'"),
        ({"layout": "bcn"}, ValueError, "layout: 'bcn' is for a head that takes points"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a positive number, got nan"),
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
            discriminator(R, R)


@pytest.mark.parametrize(
    "name, features, reference, labels, message",
    [
        ("head", R[0], R, None, r"features: expected \(B, N, C\).*\(4, 5\)"),
        ("head", R, None, None, "reference: with target='teacher'.*got None; pass reference="),
        ("head", R, R[:1], None, r"reference: .*same clouds as features.*\(1, 4, 5\)"),
        ("head", R, R[0], None, r"reference: expected \(B, N, C\)"),
        ("head of points", R, R[:, :2], None, r"same clouds and points \(pool=None\).*\(2, 2, 5\)"),
        ("head of labels", R, None, None, "labels: with target='labels'.*got None"),
        ("head of labels", R, None, L + 6, "labels: expected classes below 7, .*got 7"),
        ("head of labels", R, None, L[:1], "labels: expected one class per cloud"),
    ],
)
def test_bad_head_input(name, features, reference, labels, message):
    with pytest.raises(ValueError, match=message):
        build(name, torch.float32)(features, reference, labels)
