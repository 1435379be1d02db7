"""What every discriminator promises that learns or is the teacher's head."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fad_loss import ragged
from fad_loss.penalties import penalized_scores, r1

from .cases import CLASSES, EVERY, C, build, clouds, inputs, scored_per_cloud


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


def test_non_contiguous_features():
    for name in EVERY:
        discriminator = build(name).eval()
        z, reference, labels = inputs(name)
        strided = z.mT.contiguous().mT
        assert not strided.is_contiguous()
        expected = discriminator(z, reference, labels)
        assert torch.allclose(discriminator(strided, reference, labels), expected)
