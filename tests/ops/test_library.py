"""The operators inside PyTorch: opcheck, compile, vmap, fake and meta tensors, autocast, memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from op_cases import FEW, LENGTHS, SMOOTH, device_of, points
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fad_loss import ops
from fad_loss.ops import _library, _operators

KERNELS = [("gaussian", [0.7, 2.0]), ("laplacian", [1.3]), ("energy", [])]


def operands(backend, form, *, grad=True):
    """x, y, a value per point of y, and the arguments that say which clouds they are."""
    n, m = LENGTHS
    device, dtype = device_of(backend), torch.float64 if backend == "tiled" else torch.float32
    shapes = (
        [(sum(n), 3), (sum(m), 3), (sum(m),)]
        if form == "packed"
        else [(2, 4, 3), (2, 5, 3), (2, 5)]
    )
    x, y, w = (points(*shape, dtype=dtype, device=device) for shape in shapes)
    if form == "transposed":
        x, y = (t.mT.contiguous().mT for t in (x, y))
    x, y, w = (t.requires_grad_(grad) for t in (x, y, w.abs()))
    offsets = [None, None]
    if form == "packed":
        offsets = [torch.tensor([0, *lengths], device=device).cumsum(0) for lengths in (n, m)]
    return x, y, w, (False, *offsets, backend)


FORMS = ["batched", "transposed", "packed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 2])
def test_opcheck_knn(k, form, fused):
    x, y, _, clouds = operands(fused, form)
    torch.library.opcheck(_library.knn, (x, y, k, *clouds))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_kernel_sum(form, weighted, fused):
    for name, parameters in KERNELS[: 2 if form == "batched" else 1]:
        x, y, w, clouds = operands(fused, form)
        rest = (x, y, w if weighted else None, name, parameters, *clouds)
        grad = torch.rand_like(x[..., 0]).requires_grad_()
        torch.library.opcheck(_library.kernel_sum, rest)
        for of_y in (False, True) if form == "batched" else (True,):
            torch.library.opcheck(_library.kernel_sum_backward, (grad, *rest, of_y, weighted))
        u, v, t = torch.rand_like(x), torch.rand_like(y), torch.rand_like(w)
        double = _library.kernel_sum_double_backward
        torch.library.opcheck(
            double, (u, v, t, grad, *rest), test_utils=("test_schema", "test_faketensor")
        )
        torch.library.opcheck(
            double, (u, None, None, grad, *rest), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_softmin(form, biased, fused):
    x, y, w, clouds = operands(fused, form)
    epsilon = [0.5, 2.0]
    bias = torch.stack([w, 2 * w], -1).detach().requires_grad_() if biased else None
    torch.library.opcheck(_library.softmin, (x, y, bias, epsilon, *clouds))
    out, least, total = (t.detach() for t in _library.softmin(x, y, bias, epsilon, *clouds))
    grad = torch.rand_like(out).requires_grad_()
    for of_y in (False, True) if form == "batched" else (True,):
        rest = (x, y, bias, least, total, epsilon, *clouds, of_y, biased)
        torch.library.opcheck(_library.softmin_backward, (grad, *rest))
    u, v, t = torch.rand_like(x), torch.rand_like(y), torch.rand_like(torch.stack([w, w], -1))
    for directions in ((u, v, t), (u, None, None)):
        torch.library.opcheck(
            _library.softmin_double_backward,
            (*directions, grad, x, y, bias, least, total, epsilon, *clouds),
            test_utils=("test_schema", "test_faketensor"),
        )


# ------------------------------------------------------------------------------------- compile


def everything(x, y, backend):
    """All operations in one graph, to one number."""
    distance, index = ops.knn(x, y, 3, backend=backend)
    near, _ = ops.nearest(x, y, backend=backend)
    mean = ops.kernel_mean(x, y, ops.Gaussian([1.0, 2.0]), backend=backend)
    own = ops.kernel_mean(x, x, ops.Energy(), exclude_self=True, backend=backend)
    soft = ops.softmin(
        x, y, [0.5, 1.0], potential=y[..., 0], log_weights=-y[..., 1].abs(), backend=backend
    )
    picked = (index.to(x.dtype) * distance).mean()
    return picked + near.mean() + mean.mean() + own.mean() + soft.mean()


@pytest.mark.parametrize("C", [3, 20])
def test_compiled_for_any_size(C, fused, device):
    """One graph without breaks, and at most one recompilation when N and M change."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, backend=counter)
    for N, M in ((5, 7), (6, 9), (11, 8), (30, 40)):
        x, y = points(2, N, C, device=device), points(2, M, C, device=device)
        gradients = []
        for function in (compiled, everything):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            value = function(a, b, fused)
            gradients.append([value.detach(), *torch.autograd.grad(value * 2, (a, b))])
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2


# ---------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 1)], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_vmap(case, in_dims, backend, device):
    x, y = points(3, 2, 4, 5, device=device), points(3, 2, 6, 5, device=device)
    if in_dims[1] is None:
        y = y[0]
    elif in_dims[1] == 1:
        x, y = x[0], y.movedim(0, 1)
    values = [points(2, 6, device=device).abs() for _ in range(case.along_y)]
    result = torch.vmap(
        lambda x, y: case.operation(x, y, *values, backend=backend), in_dims=in_dims
    )(x, y)
    found = torch.vmap(lambda x, y: ops.knn(x, y, 2, backend=backend), in_dims=in_dims)(x, y)
    for i in range(3):
        a = x if in_dims[0] is None else x[i]
        b = y if in_dims[1] is None else y.select(in_dims[1], i)
        torch.testing.assert_close(result[i], case.operation(a, b, *values, backend=backend))
        for got, want in zip(found, ops.knn(a, b, 2, backend=backend), strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradient_through_vmap(case, fused, device):
    x, y, *values = case.inputs(2, 3, 4, 5, torch.float64, device)
    several = torch.stack([x, 2 * x]).detach().requires_grad_()
    out = torch.vmap(lambda x: case.operation(x, y, *values, backend=fused))(several)
    results = torch.autograd.grad(out.square().sum(), [several, y, *values])
    loop = torch.stack([case.operation(t, y, *values, backend=fused) for t in several])
    expected = torch.autograd.grad(loop.square().sum(), [several, y, *values])
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("operation", ["nearest", "knn", "softmin", "kernel_mean"])
def test_vmap_over_incoming_gradients(operation, fused, device):
    """As for the rows of a Jacobian."""
    torch.manual_seed(0)
    x, y = (torch.randn(2, n, 20, device=device, requires_grad=True) for n in (6, 9))
    more = {"knn": (3,), "softmin": (0.5,), "kernel_mean": (ops.Gaussian(1.0),)}.get(operation, ())
    out = getattr(ops, operation)(x, y, *more, backend=fused)
    out = out[0] if isinstance(out, tuple) else out
    rows = torch.randn(4, *out.shape, device=device)

    def gradient(row):
        return torch.autograd.grad(out, (x, y), row, retain_graph=True)

    for at_once, *one_by_one in zip(torch.vmap(gradient)(rows), *map(gradient, rows), strict=True):
        torch.testing.assert_close(at_once, torch.stack(one_by_one))


def test_vmap_over_ragged_clouds_says_what_to_do(fused):
    x, y, _, clouds = operands(fused, "packed", grad=False)
    with pytest.raises(NotImplementedError, match="ragged batch"):
        torch.vmap(lambda x: _library.knn(x, y, 1, *clouds))(torch.stack([x, x]))


# ---------------------------------------------------------------------------- fake, meta, autocast


def shapes(x, y, backend):
    """Shapes and dtypes of all results and gradients."""
    values = ops.nearest(x, y, backend=backend), ops.knn(x, y, 2, backend=backend)
    flat = [t for pair in values for t in pair]
    for case in FEW:
        along = [y[..., 0] for _ in range(case.along_y)]
        flat.append(case.operation(x, y, *along, backend=backend))
    for t in list(flat):
        if t.requires_grad:
            flat.extend(torch.autograd.grad(t.sum(), [x, y]))
    return [(tuple(t.shape), t.dtype) for t in flat]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N, M", [(2, 4, 5), (1, 1, 2)])
def test_fake_and_meta_tensors_know_all_shapes(B, N, M, dtype, backend, device):
    def inputs(device):
        x, y = torch.rand(B, N, 3, device=device), torch.rand(B, M, 3, device=device)
        return [t.to(dtype).requires_grad_() for t in (x, y)]

    expected = shapes(*inputs(device), backend)
    with FakeTensorMode():
        assert shapes(*inputs(device), backend) == expected
    if device == "cpu":
        assert shapes(*inputs("meta"), backend) == expected


@pytest.mark.parametrize("C", [3, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(C, dtype, backend, device):
    """Autocast would round the products inside to half precision: other neighbors, other values."""
    x, y = points(2, 40, C, device=device), points(2, 60, C, device=device)

    def results():
        found = [*ops.nearest(x, y, backend=backend), *ops.knn(x, y, 4, backend=backend)]
        for case in SMOOTH:
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            along = [y[..., 0].abs() for _ in range(case.along_y)]
            out = case.operation(a, b, *along, backend=backend)
            gradient = torch.autograd.grad(out.sum(), (a, b), create_graph=True)
            found.extend([out, *gradient, *torch.autograd.grad(gradient[0].square().sum(), (a, b))])
        return found

    expected = results()
    with torch.autocast(device, dtype):
        result = results()
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("C", [3, 40])
def test_bitwise_repeatable(C, backend, device):
    x, y = points(2, 100, C, device=device), points(2, 150, C, device=device)

    def run():
        found = []
        for case in SMOOTH:
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            along = [b[..., 0].abs() for _ in range(case.along_y)]
            out = case.operation(a, b, *along, backend=backend)
            found.extend([out, *torch.autograd.grad(out.square().sum(), (a, b))])
        a, b = x.clone().requires_grad_(), y[:, :20].clone().requires_grad_()
        distance, index = ops.knn(a, b, 5, backend=backend)
        return [*found, distance, index, *torch.autograd.grad(distance.square().sum(), (a, b))]

    for got, want in zip(run(), run(), strict=True):
        assert torch.equal(got, want)


PRECISION = """
import torch
from fad_loss import ops
torch.manual_seed(0)
x, y = torch.randn(2, 70, 64), torch.randn(2, 90, 64)

def results():
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    found = [*ops.nearest(a, b), *ops.knn(a, b, 5)]
    found += [ops.softmin(a, b, 20.0), ops.kernel_mean(a, b, ops.Laplacian(3.0))]
    return [*found, *torch.autograd.grad(sum(t.sum() for t in found), (a, b))]

expected = results()
for setting, look in SETTINGS:
    exec(setting)
    before = eval(look)
    for got, want in zip(results(), expected, strict=True):
        assert torch.equal(got, want), setting
    assert eval(look) == before
"""
OLDER = [
    (f'torch.set_float32_matmul_precision("{name}")', "torch.get_float32_matmul_precision()")
    for name in ("medium", "high", "highest")
]
NEWER = [
    ('torch.backends.cuda.matmul.fp32_precision = "tf32"', "torch.backends.fp32_precision"),
    (
        'torch.backends.mkldnn.matmul.fp32_precision = "bf16"',
        "torch.backends.mkldnn.matmul.fp32_precision",
    ),
    ('torch.backends.fp32_precision = "tf32"', "torch.backends.fp32_precision"),
]


@pytest.mark.parametrize("settings", [OLDER, NEWER], ids=["older", "newer"])
def test_either_api_of_the_matmul_precision(settings):
    """The newer one (torch 2.9) makes the older one raise; on a CPU neither changes a result."""
    if settings is NEWER and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        settings = OLDER
    script = f"SETTINGS = {settings!r}\n{PRECISION}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------- memory

MEASURE = """
import json, resource, sys, torch
from fad_loss import ops

torch.set_num_threads(1)
size, C = int(sys.argv[1]), int(sys.argv[2])
x = torch.rand(1, size, C, requires_grad=True)
y = torch.rand(1, size, C, requires_grad=True)
small = [t[:, :100].detach().requires_grad_() for t in (x, y)]

def run(x, y):
    for out in (
        ops.nearest(x, y, backend="tiled")[0],
        ops.softmin(x, y, 0.5, backend="tiled"),
        ops.kernel_mean(x, y, ops.InverseMultiquadric(1.0), backend="tiled"),
    ):
        gradients = torch.autograd.grad(out.sum(), (x, y))
        assert all(g.isfinite().all() for g in gradients)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

run(*small)  # loads libraries and code
before = peak()
run(x, y)
sys.stdout.write(json.dumps(peak() - before))
"""


class Names(TorchDispatchMode):
    """Keeps the names of the operators that pass by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_search_is_an_operator_to_whoever_looks(monkeypatch):
    """To autograd, modes, the profiler, vmap, subclasses and the compiler; else it is called."""
    x, y = torch.randn(1, 4, 3), torch.randn(1, 5, 3)
    found = ops.nearest(x, y)
    with Names() as mode:
        ops.nearest(x, y)
    assert mode.seen[0] == "fad_loss::knn"
    with torch.profiler.profile() as profile:
        ops.nearest(x, y)
    assert "fad_loss::knn" in {event.key for event in profile.key_averages()}
    dispatched, operator = [], _library.knn

    def spy(*args):
        dispatched.append(args)
        return operator(*args)

    monkeypatch.setitem(_operators._FUNCTIONS, spy, _operators._FUNCTIONS[operator])
    monkeypatch.setattr(_library, "knn", spy)

    class Subclass(torch.Tensor):
        pass

    watched = [
        lambda: ops.nearest(x.clone().requires_grad_(), y),
        lambda: ops.nearest(x, y.clone().requires_grad_()),
        lambda: ops.nearest(x.as_subclass(Subclass), y),
        lambda: torch.vmap(ops.nearest)(x[None], y[None]),
    ]
    for number, run in enumerate(watched, 1):
        run()
        assert len(dispatched) == number
    with torch.no_grad():
        again = ops.nearest(x.clone().requires_grad_(), y)
    assert len(dispatched) == len(watched)
    assert all(map(torch.equal, again, found))


def test_values_out_of_range_are_found_where_the_search_runs():
    """Also in a compiled graph and under vmap, where nobody can look before."""
    x, y = torch.randn(2, 1, 4, 20), torch.randn(2, 1, 5, 20)
    y[1, 0, 3, 7] = torch.nan
    for search in (torch.vmap(ops.nearest), torch.vmap(lambda x, y: ops.knn(x, y, 2))):
        with pytest.raises(ValueError, match="y: 1 of 200 values are NaN"):
            search(x, y)
    compiled = torch.compile(ops.nearest, backend="aot_eager", fullgraph=True)
    infinite, large = "x: 80 of 80 values are NaN", "x: expected magnitudes"
    for bad, message in ((torch.inf, infinite), (1e20, large)):
        with pytest.raises(ValueError, match=message):
            compiled(torch.full((1, 4, 20), bad), y[0])


def test_memory_does_not_grow_with_the_number_of_pairs():
    """Forward and backward over 10,000 x 10,000 pairs, of which one float32 matrix has 400 MB."""
    size, C = 10_000, 16
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(size), str(C)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    grown = json.loads(done.stdout)
    assert grown < size * size * 4 / 8, f"{grown / 1e6:.0f} MB"
