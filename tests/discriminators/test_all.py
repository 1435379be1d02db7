"""What every discriminator promises that learns or is the teacher's head."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fad_loss import ragged
from fad_loss.discriminators import Discriminator, Game
from fad_loss.discriminators.base import held_still
from fad_loss.penalties import penalized_scores, r1

from .cases import CLASSES, EVERY, C, ask, build, clouds, inputs, scored_per_cloud


@pytest.mark.parametrize("name", EVERY)
def test_permuting_points_permutes_scores(name):
    discriminator = build(name).eval()
    z, reference, labels = inputs(name)
    scores = ask(discriminator, z, reference, labels)
    assert scores.shape == ((3,) if scored_per_cloud(name) else (3, 8))
    assert scores.std() > 0
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    paired = reference[:, order] if reference.shape[1] == 8 else reference.flip(1)
    permuted = ask(discriminator, z[:, order], paired, labels)
    expected = scores if scored_per_cloud(name) else scores[:, order]
    assert torch.allclose(permuted, expected, rtol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_both_sides_are_scored_as_each_is(name):
    discriminator = build(name).eval()
    z, reference, labels = inputs(name)
    z, reference = z.requires_grad_(), reference.requires_grad_()
    game = Game.of(z, reference, labels)
    together = discriminator(game)
    for mine, side in zip(together, ("student", "teacher"), strict=True):
        alone = discriminator(game, side)
        torch.testing.assert_close(mine, alone)
        leaf = game.points(side).features
        gradients = [torch.autograd.grad(s.sum(), leaf, retain_graph=True) for s in (mine, alone)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", EVERY)
def test_masked_clouds_are_ragged_ones(name):
    discriminator = build(name).eval()
    z, reference, labels = inputs(name)
    z = z.requires_grad_()
    padded, cut, masks = [], [], []
    for x in (z, reference):
        mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(4)) < 0.6
        mask[1] = torch.arange(x.shape[1]) % 5 == 2  # fewer than a neighbourhood
        padded.append(x.masked_fill(~mask[..., None], 99.0))
        cut.append(ragged(x[mask], lengths=mask.sum(1)))
        masks.append(mask)
    masked = discriminator(Game.of(*padded, labels, mask=tuple(masks)))
    if not scored_per_cloud(name):
        masked = [scores[mask] for scores, mask in zip(masked, masks, strict=True)]
    packed = [s.values() if s.is_nested else s for s in discriminator(Game.of(*cut, labels))]
    for mine, other in zip(masked, packed, strict=True):
        torch.testing.assert_close(mine, other)
    gradients = [torch.autograd.grad(scores[0].sum(), z)[0] for scores in (masked, packed)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", EVERY)
def test_clouds_do_not_see_each_other(name):
    discriminator = build(name).train()
    z, reference, labels = inputs(name)
    # The power iteration moves the weights in training mode: compare copies.
    together = ask(copy.deepcopy(discriminator), z, reference, labels)
    alone = [
        ask(copy.deepcopy(discriminator), z[b : b + 1], reference[b : b + 1], labels[b : b + 1])
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
    scores = ask(
        discriminator, ragged(z, lengths=lengths), ragged(reference, lengths=others), labels
    )
    assert scores.is_nested != scored_per_cloud(name)
    packed = scores.values() if scores.is_nested else scores
    loop = [
        ask(discriminator, part[None], other[None], labels[b : b + 1]).flatten()
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
    scores = ask(discriminator, ragged(z, lengths=holes), ragged(reference, lengths=holes), labels)
    packed = scores.values() if scores.is_nested else scores[[0, 2]]
    full = ask(
        discriminator, ragged(z, lengths=[2, 4]), ragged(reference, lengths=[2, 4]), labels[[0, 2]]
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
    assert torch.autograd.gradcheck(lambda v: ask(discriminator, v, reference, labels), z)
    names = [key for key, _ in discriminator.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in discriminator.parameters())

    def penalty(*parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        game = Game.of(z, reference, labels)
        scores = torch.func.functional_call(discriminator, state, (game, "student"))
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
    scores = held_still(discriminator, Game.of(z, reference, labels), "student")
    scores.sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    for key, value in discriminator.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(scores, ask(discriminator, z, reference, labels))


@pytest.mark.parametrize(
    "name", [name for name in EVERY if "everything" in name] + ["head", "head with levels"]
)
def test_compiles_without_a_break(name):
    torch.compiler.reset()
    discriminator = build(name, torch.float32).train()
    twin = copy.deepcopy(discriminator)
    z, reference, labels = inputs(name, dtype=torch.float32)
    z = z.requires_grad_()

    # Both terms of the loss for one of them; the others in the way that is new about them.
    def step(module: Discriminator, features: Tensor) -> tuple[Tensor, ...]:
        game = Game.of(features, reference, labels)
        if "point" not in name:
            return tuple(module(game))
        return held_still(module, game, "student"), *module(game)

    expected = step(twin, z)
    backend = "aot_eager" if "point" in name else "eager"
    compiled = torch.compile(step, backend=backend, fullgraph=True)(discriminator, z)
    for mine, other in zip(compiled, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(
            sum(s.sum() for s in scores if s.requires_grad), [z, *module.parameters()]
        )
        for scores, module in ((compiled, discriminator), (expected, twin))
    ]
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


# Dynamo instantiates autograd functions, and warns itself that one should not.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.skipif(torch.__version__ < "2.7", reason="PyTorch 2.6 fails at nested tensors")
def test_ragged_clouds_compile_without_a_break():
    torch.compiler.reset()
    discriminator = build("neighborhood, everything").eval()
    values, reference = clouds(12, C), clouds(15, C, seed=1)
    labels = torch.tensor([3, 0])

    def score(z: Tensor, offset: Tensor) -> Tensor:
        cloud = ragged(z, offset=offset)
        return ask(discriminator, cloud, ragged(reference, lengths=[7, 8]), labels).values()

    offset = torch.tensor([5, 12])
    compiled = torch.compile(score, backend="eager", fullgraph=True)(values, offset)
    assert torch.allclose(compiled, score(values, offset), rtol=1e-10)
    torch.compiler.reset()


@pytest.mark.parametrize("name", EVERY)
def test_autocast(name):
    discriminator = build(name, torch.float32).eval()
    z, reference, labels = inputs(name, dtype=torch.float32)
    z = z.requires_grad_()
    expected = ask(discriminator, z, reference, labels)
    with torch.autocast("cpu", torch.bfloat16):
        scores = ask(discriminator, z, reference, labels)
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
    expected = r1(ask(discriminator, leaf, reference, labels), leaf)
    _, penalty = penalized_scores(lambda v: ask(discriminator, v, reference, labels), z)
    assert torch.allclose(penalty, expected, rtol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_state_copies_and_pickles(name):
    discriminator = build(name).eval()
    arguments = inputs(name)
    expected = ask(discriminator, *arguments)
    file = io.BytesIO()
    torch.save(discriminator.state_dict(), file)
    file.seek(0)
    other = EVERY[name]().double().eval()
    other.load_state_dict(torch.load(file))
    for twin in (
        other,
        copy.deepcopy(discriminator),
    ):
        assert torch.equal(ask(twin, *arguments), expected)
    assert discriminator.__class__.__name__ in repr(discriminator)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype):
    discriminator = build(name, dtype).eval()
    scores = ask(discriminator, *inputs(name, dtype=dtype))
    expected = ask(build(name).eval(), *inputs(name))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert torch.allclose(scores.double(), expected, rtol=tolerance, atol=tolerance)


def test_non_contiguous_features():
    for name in EVERY:
        discriminator = build(name).eval()
        z, reference, labels = inputs(name)
        strided = z.mT.contiguous().mT
        assert not strided.is_contiguous()
        expected = ask(discriminator, z, reference, labels)
        assert torch.allclose(ask(discriminator, strided, reference, labels), expected)
