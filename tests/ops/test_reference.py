"""Every smooth operation, backend and dtype against float64, values and first derivatives.

The rule: the error against the truth is no larger than that of the same formula in eager PyTorch in
the same precision, plus a tolerance.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from op_cases import FEW, FLOATS, SMOOTH, Smooth, device_of, wide

# Relative to the largest value. With C > 16 the tiles' distances come from a matrix product, and
# always their gradients, for which it is twice as much.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
}

SHAPES = [
    (1, 1, 1, 1),
    (2, 17, 5, 3),
    (1, 3, 2100, 3),  # more columns than one tile has
    (3, 1, 17, 16),  # the last number of channels that is summed directly,
    (2, 17, 1, 17),  # and the first that is multiplied
    (1, 37, 70, 64),
]


def values_and_gradients(function, inputs, cotangent_seed=1):
    """The result and its gradients by every input that wants one, for a random later layer."""
    out = function(*inputs)
    generator = torch.Generator().manual_seed(cotangent_seed)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    loss = (out * cotangent.to(out)).sum() * 2
    wanted = [t for t in inputs if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(loss, wanted)]


@cache
def problem(case: Smooth, shape: tuple[int, ...], dtype: torch.dtype):
    """Inputs, the truth, and the error that eager PyTorch makes."""
    torch.manual_seed(2)
    inputs = case.inputs(*shape, dtype, "cpu")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = values_and_gradients(case.definition, exact)
    eager = values_and_gradients(
        lambda *t: case.definition(*[v.to(wide(dtype)) for v in t]), inputs
    )
    return inputs, truth, [error(a, b, 1 / shape[2]) for a, b in zip(eager, truth, strict=True)]


def error(a, b, floor=0.0):
    """The largest deviation from the truth b, relative to its largest value, or to a floor."""
    return float((a.double().cpu() - b).abs().max() / b.abs().max().clamp_min(floor))


def check(case, shape, dtype, backend):
    inputs, truth, errors = problem(case, shape, dtype)
    inputs = [t.detach().to(device_of(backend)).requires_grad_() for t in inputs]
    results = values_and_gradients(lambda *t: case.operation(*t, backend=backend), inputs)
    assert results[0].dtype == wide(dtype)
    for t, gradient in zip(inputs, results[1:], strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == t.shape
    for name, result, true, eager in zip(
        ["value", "x", "y", "third", "fourth"], results, truth, errors, strict=False
    ):
        e = error(result, true, 1 / shape[2])  # M = 1: weights have no gradient
        allowed = eager + TOLERANCE[dtype] * (1 if name == "value" else 2)
        assert e <= allowed, f"{name}: {e:.1e}, eager's is {eager:.1e}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_error_is_no_larger_than_eager(case, shape, dtype, backend):
    check(case, shape, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_error_on_awkward_sizes(case, dtype, fused):
    check(case, (1, 252, 507, 123), dtype, fused)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_error_far_from_the_origin(case, backend):
    """A common offset costs what it costs in the numbers themselves, and nothing more."""
    torch.manual_seed(2)
    inputs = [t.detach() for t in case.inputs(2, 20, 30, 64, torch.float32, "cpu")]
    inputs[0] += 16
    inputs[1] += 16
    truth = case.definition(*[t.double() for t in inputs])
    result = case.operation(*[t.to(device_of(backend)) for t in inputs], backend=backend)
    assert error(result, truth) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_values_beside_half_precision_may_be_float32(case, dtype, backend, device):
    """Weights, potentials: rounding those to half precision would lose what the result holds."""
    torch.manual_seed(2)
    x, y, *values = [t.detach() for t in case.inputs(2, 6, 7, 20, dtype, device)]
    inputs = [x, y, *[v.float() * 1.001 for v in values]]
    inputs = [t.requires_grad_() for t in inputs]
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    truth = values_and_gradients(case.definition, exact)
    results = values_and_gradients(lambda *t: case.operation(*t, backend=backend), inputs)
    assert error(results[0], truth[0]) < 2e-6
    for t, gradient, true in zip(inputs, results[1:], truth[1:], strict=True):
        assert gradient.dtype == t.dtype
        # By points it is rounded to their precision.
        assert error(gradient, true) < (
            2e-5 if t.dtype == torch.float32 else torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_any_strides(case, layout, backend, device):
    x, y, *values = case.inputs(2, 6, 7, 20, torch.float64, device)

    def view(t):
        if layout == "transposed":
            return t.mT.contiguous().mT if t.dim() == 3 else t.t().contiguous().t()
        if layout == "expanded":
            return t[:1].expand_as(t)
        return t.repeat_interleave(2, dim=1)[:, ::2]

    def dense(*inputs):
        return case.definition(*[view(t).contiguous().cpu() for t in inputs])

    results = values_and_gradients(
        lambda *inputs: case.operation(*[view(t) for t in inputs], backend=backend), [x, y, *values]
    )
    expected = values_and_gradients(dense, [x, y, *values])
    for result, true in zip(results, expected, strict=True):
        torch.testing.assert_close(result, true)


@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("C", [2, 20])
def test_only_some_inputs_require_grad(wanted, C, backend, device):
    case = next(case for case in SMOOTH if case.name == "softmins-both")
    inputs = [t.detach() for t in case.inputs(2, 3, 4, C, torch.float64, device)]
    inputs[wanted].requires_grad_()
    _, gradient = values_and_gradients(lambda *t: case.operation(*t, backend=backend), inputs)
    _, expected = values_and_gradients(lambda *t: case.definition(*[v.cpu() for v in t]), inputs)
    torch.testing.assert_close(gradient, expected)
    if wanted < 3:
        case = next(case for case in SMOOTH if case.name == "imq-weighted")
        inputs = inputs[:3]
        _, gradient = values_and_gradients(lambda *t: case.operation(*t, backend=backend), inputs)
        _, expected = values_and_gradients(
            lambda *t: case.definition(*[v.cpu() for v in t]), inputs
        )
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("C", [3, 20])
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_a_cloud_with_itself(case, C, exclude_self, backend, device):
    x, _, *values = case.inputs(2, 9, 9, C, torch.float64, device)

    def run(function, t):
        return function(t[0], t[0], *t[1:], exclude_self=exclude_self)

    if not exclude_self and case.name.startswith(("energy", "laplacian")):
        # The formula's own gradient is NaN at d = 0; ours is that of the other points.
        out = case.operation(x, x, *values, backend=backend)
        own = torch.eye(9, dtype=torch.bool)
        d = pairwise_without_kink(x.cpu())
        kernel = case.name.split("-")[0]
        k = -d if kernel == "energy" else torch.exp(-d / 1.7)
        w = values[0].cpu()[:, None, :].expand_as(k) if values else torch.ones_like(k)
        k = k.masked_fill(own, 0.0 if kernel == "energy" else 1.0)
        truth = (w * k).sum(2) / w.sum(2)
        torch.testing.assert_close(out.cpu(), truth)
        gradient = torch.autograd.grad(out.sum(), [x, *values])
        expected = torch.autograd.grad(truth.sum(), [x, *values])
        torch.testing.assert_close(gradient, expected)
        return
    results = values_and_gradients(
        lambda *t: run(lambda *a, **o: case.operation(*a, **o, backend=backend), t), [x, *values]
    )
    truth = values_and_gradients(
        lambda *t: run(case.definition, [v.cpu() for v in t]), [x, *values]
    )
    for result, true in zip(results, truth, strict=True):
        torch.testing.assert_close(result, true)


def pairwise_without_kink(x):
    own = torch.eye(x.shape[1], dtype=x.dtype)
    return (((x[:, :, None] - x[:, None]) ** 2).sum(3) + own).sqrt()


@pytest.mark.parametrize("C", [3, 64])
@pytest.mark.parametrize("name", ["energy", "laplacian"])
def test_points_that_coincide_are_at_distance_zero(name, C, backend, device):
    """A square root turns a rounding error of 1e-6 into 1e-3; here there is none."""
    case = next(case for case in SMOOTH if case.name == name)
    x, _ = case.inputs(1, 50, 50, C, torch.float32, device)
    alone = x.detach().reshape(-1, 1, C)
    value = case.operation(alone, alone.clone(), backend=backend)
    assert torch.equal(value, torch.full_like(value, 0.0 if name == "energy" else 1.0))
    out = case.operation(x, x.detach()[:, torch.randperm(50)], backend=backend)
    exact = pairwise_without_kink(x.detach().double().cpu())
    exact = exact.masked_fill(torch.eye(50, dtype=torch.bool), 0.0)
    expected = (-exact if name == "energy" else torch.exp(-exact / 1.7)).mean(2)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-6, atol=1e-6)
