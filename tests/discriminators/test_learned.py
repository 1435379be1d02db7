"""The discriminators that learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fad_loss import ragged
from fad_loss.discriminators import (
    CloudDiscriminator,
    Game,
    NeighborhoodDiscriminator,
    PointDiscriminator,
    Points,
)

from .cases import LEARNED, OPTIONS, C, L, R, ask, build, clouds, everything, inputs


@pytest.mark.parametrize("name", LEARNED)
def test_spectral_norm_bounds_every_layer(name):
    discriminator = build(f"{name}, plain").train()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(10)
        for _ in range(100):
            ask(discriminator, *inputs(name))
    discriminator.eval()
    layers = [module for module in discriminator.modules() if isinstance(module, nn.Linear)]
    assert layers
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight, 2)
        assert torch.allclose(norm, torch.ones_like(norm), rtol=1e-3)


def test_the_point_score_is_lipschitz():
    discriminator = build("point, plain").train()
    for _ in range(100):
        ask(discriminator, clouds(1, 2, C))
    discriminator.eval()
    a, b = clouds(1, 500, C), 3 * clouds(1, 500, C, seed=2)
    slope = (ask(discriminator, a) - ask(discriminator, b)).abs() / (a - b).norm(dim=-1)
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
        scores = discriminator(Game.of(fake, real))
        loss = F.relu(1 - scores.teacher).mean() + F.relu(1 + scores.student).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8


@pytest.mark.parametrize("name", LEARNED)
def test_the_condition_matters(name):
    discriminator = build(f"{name}, everything").eval()
    z, reference, labels = inputs(name)
    scores = ask(discriminator, z, reference, labels)
    assert not torch.allclose(scores, ask(discriminator, z, reference.roll(1, 0), labels))
    assert not torch.allclose(scores, ask(discriminator, z, reference, labels + 1))
    # Its own reference, however it is ordered.
    assert torch.allclose(scores, ask(discriminator, z, reference.flip(1), labels))
    # Without the option, neither matters, and neither is looked at.
    plain = build(f"{name}, plain").eval()
    assert torch.equal(ask(plain, z), ask(plain, z, reference[:, :1], torch.zeros(0)))


@pytest.mark.parametrize("name", ["point", "neighborhood"])
def test_labels_of_points(name):
    discriminator = build(f"{name}, everything").eval()
    z, reference, labels = inputs(name)
    per_point = labels[:, None].expand(-1, 8)
    expected = ask(discriminator, z, reference, labels)
    assert torch.equal(ask(discriminator, z, reference, per_point), expected)
    mixed = per_point.clone()
    mixed[:, :4] = 6
    scores = ask(discriminator, z, reference, mixed)
    assert torch.equal(scores[:, 4:], expected[:, 4:])
    assert not torch.equal(scores[:, :4], expected[:, :4])
    # Global features are one set, with a label for each.
    one = ask(discriminator, z[:1], reference[:1], per_point[0])
    assert torch.allclose(one, expected[:1], rtol=1e-12)
    lengths = [3, 5]
    cloud, other = (ragged(t[0], lengths=[3, t.shape[1] - 3]) for t in (z, reference))
    by_cloud = ask(discriminator, cloud, other, torch.tensor([1, 4]))
    by_point = ask(
        discriminator, cloud, other, ragged(torch.tensor([1] * 3 + [4] * 5), lengths=lengths)
    )
    assert torch.equal(by_cloud.values(), by_point.values())


@pytest.mark.parametrize("name", LEARNED)
def test_unknown_labels_add_nothing(name):
    discriminator = build(f"{name}, everything").eval()
    z, reference, _ = inputs(name)
    unknown = ask(discriminator, z, reference, torch.tensor([-1, -100, 3]))
    known = ask(discriminator, z, reference, torch.tensor([0, 1, 3]))
    assert torch.equal(unknown[2], known[2])
    discriminator.projection = None
    assert torch.equal(unknown[:2], ask(discriminator, z, reference)[:2])


@pytest.mark.parametrize("name", LEARNED)
def test_there_is_no_batch_norm(name):
    modules = LEARNED[name](**OPTIONS["everything"]).modules()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)


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
    expected = discriminator.score_layer(hidden).squeeze(-1)
    assert torch.allclose(ask(discriminator, z), expected, rtol=1e-10)


@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_small_clouds_have_fewer_neighbors(N):
    discriminator = build("neighborhood, plain").eval()
    z = clouds(2, N, C)
    scores = ask(discriminator, z)
    padded = ragged(z.flatten(0, 1), lengths=[N, N])
    assert torch.allclose(scores.flatten(), ask(discriminator, padded).values(), rtol=1e-12)


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
    expected = discriminator.score_layer(F.leaky_relu(discriminator.joined(summary), 0.2)).squeeze(
        -1
    )
    assert torch.allclose(ask(discriminator, z), expected, rtol=1e-10)


def test_the_maximum_sends_its_gradient_to_one_point():
    values = torch.tensor([[1.0, 5.0], [1.0, 2.0], [0.0, 7.0], [4.0, 7.0]], requires_grad=True)
    expected = torch.tensor([[1.0, 5.0], [4.0, 7.0]])
    every = torch.ones(2, 3, dtype=torch.bool)
    every[:, 2] = False
    padded = torch.cat([values.reshape(2, 2, 2), torch.full((2, 1, 2), 9.0)], 1)
    wanted = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for points in (
        Points.of(values.reshape(2, 2, 2)),
        Points.of(ragged(values, lengths=[2, 2])),
        Points.of(padded, every),
    ):
        result = points.max(points.features)
        assert torch.equal(result, expected)
        (gradient,) = torch.autograd.grad(result.sum(), values)
        assert torch.equal(gradient, wanted)
    holes = Points.of(ragged(values, lengths=[0, 4, 0]))
    empty = torch.zeros(2)
    assert torch.equal(
        holes.max(holes.features), torch.stack([empty, torch.tensor([4.0, 7.0]), empty])
    )


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    "student, teacher, labels, error, message",
    [
        (
            R.new_zeros(2, 4, C + 1),
            None,
            L,
            ValueError,
            r"student: expected \(B, N, 5\).*\(2, 4, 6",
        ),
        (R.new_zeros(2, C + 1), None, L, ValueError, r"student: expected \(B, N, 5\).*\(1, 2, 6\)"),
        (R, R, None, ValueError, "labels: .*num_classes=7.*got None"),
        (R, R, L.float(), TypeError, "labels: expected an integer tensor.*float32"),
        (R, R, [0, 1], TypeError, "labels: expected an integer tensor.*list"),
        (R, R, L[:1], ValueError, r"labels: expected one class per cloud, \(2,\).*shape \(1\)"),
        (R, R, L[None, None], ValueError, r"labels: expected one class.*shape \(1, 1, 2\)"),
        (R, R, L + 6, ValueError, r"labels: expected classes below 7, .*got 7"),
        (R, R, ragged(L, lengths=[1, 1]), ValueError, "labels: expected one class per cloud"),
    ],
)
def test_bad_input(name, student, teacher, labels, error, message):
    with pytest.raises(error, match=message):
        ask(everything(name), student, teacher, labels)


def test_labels_of_points_are_not_labels_of_clouds():
    with pytest.raises(ValueError, match=r"one class per cloud, \(2,\), got int64 of shape \(2, 4"):
        ask(everything("cloud"), R, R, torch.zeros(2, 4, dtype=torch.int64))


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
