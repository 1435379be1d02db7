"""Every mistake is an error that names the argument, what came, and what to do."""
# ruff: noqa: E501 (one mistake a line)

from __future__ import annotations

import math

import pytest
import torch
from op_cases import BACKENDS, make_ragged, widest

from fad_loss import ops

X, Y = torch.zeros(2, 4, 3), torch.zeros(2, 5, 3)
GAUSSIAN = ops.Gaussian(1.0)


def ragged(lengths, C=3):
    return make_ragged(torch.zeros(sum(lengths), C), lengths)


def filled(shape, value, at=-1):
    t = torch.zeros(shape)
    t.view(-1)[at] = value
    return t


OPERATIONS = {
    "nearest": ops.nearest,
    "knn": lambda x, y, **options: ops.knn(x, y, 2, **options),
    "kernel_mean": lambda x, y, **options: ops.kernel_mean(x, y, GAUSSIAN, **options),
    "softmin": lambda x, y, **options: ops.softmin(x, y, 1.0, **options),
}

# What is wrong with x and y: the same for every operation.
PAIRS = [
    ("list", [[1.0]], Y, TypeError, "x: expected a torch.Tensor, got list"),
    ("none", X, None, TypeError, "y: expected a torch.Tensor, got NoneType"),
    ("two axes", X[0], Y, ValueError, r"x: .*\(B, points, C\).*shape \(4, 3\).*x.unsqueeze\(0\)"),
    ("one axis", X, Y[0, 0], ValueError, r"y: .*\(B, points, C\), got float32 of shape \(3\) on cpu"),
    ("four axes", X, Y[None], ValueError, r"y: .*\(B, points, C\).*shape \(1, 2, 5, 3\)"),
    ("integers", X.long(), Y, TypeError, r"x: expected float32.*got int64 of shape.*x.float\(\)"),
    ("booleans", X, Y.bool(), TypeError, r"y: expected float32.*got bool.*y.float\(\)"),
    ("sparse", X, Y.to_sparse(), TypeError, r"y: expected a dense tensor, got one of layout sparse_coo.*y.to_dense\(\)"),
    ("complex", X.to(torch.complex64), Y, TypeError, "x: expected float32.*got complex64"),
    ("dtypes", X, Y.double(), TypeError, r"one dtype.*float32 of.*float64 of.*\.to\(dtype\)"),
    ("halves", X.half(), Y.bfloat16(), TypeError, r"one dtype.*float16.*bfloat16.*\.to\(dtype\)"),
    ("batches", X, Y[:1], ValueError, r"number of clouds B.*\(2, 4, 3\).*\(1, 5, 3\)"),
    ("channels", X, Y[..., :2], ValueError, r"channels C.*\(2, 4, 3\).*\(2, 5, 2\)"),
    ("no channels", X[..., :0], Y[..., :0], ValueError, r"at least one channel.*\(2, 4, 0\)"),
    ("devices", X, Y.to("meta"), ValueError, r"one device.*on cpu.*on meta.*\.to\(device\)"),
    ("ragged x", ragged([2, 3]), Y, ValueError, "both ragged or both not.*fad_loss.ragged"),
    ("ragged y", X, ragged([2, 3]), ValueError, "both ragged or both not.*fad_loss.ragged"),
    ("ragged B", ragged([2]), ragged([2, 3]), ValueError, r"number of clouds B"),
    ("ragged C", ragged([2], 2), ragged([2]), ValueError, r"channels C"),
    ("ragged in C", ragged([2, 3]).transpose(1, 2), ragged([2, 3]), ValueError, "dimension 1.*fad_loss.ragged"),
    ("nan in x", filled((2, 4, 3), math.nan), Y, ValueError, "x: 1 of 24 values are NaN or inf.*float32 of"),
    ("inf in y", X, filled((2, 5, 3), math.inf), ValueError, "y: 1 of 30 values are NaN or inf"),
    ("-inf in y", X, filled((2, 5, 3), -math.inf), ValueError, "y: 1 of 30 values are NaN or inf"),
    ("nan in half", X.half(), filled((2, 5, 3), math.nan).half(), ValueError, "y: 1 of 30.*float16"),
    ("overflow", filled((2, 4, 3), 1e19), Y, ValueError, r"x: .*at most 2\.7e\+18.*overflow, got 1\.0e\+19.*normalize"),
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("x, y, error, message", [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])
def test_points_that_do_not_fit(operation, x, y, error, message):
    for backend in ("auto", "dense"):
        with pytest.raises(error, match=message):
            operation(x, y, backend=backend)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_backends(operation):
    with pytest.raises(
        ValueError, match="backend: expected one of 'auto', 'triton', 'tiled', 'dense', got 'cuda'"
    ):
        operation(X, Y, backend="cuda")
    with pytest.raises(
        RuntimeError, match=r"'triton' cannot run: .*CUDA tensors.*on cpu.*backend=\"auto\""
    ):
        operation(X, Y, backend="triton")
    assert "triton" not in BACKENDS or torch.cuda.is_available()


W = torch.ones(2, 5)

MISTAKES = [
    # knn
    ("k 0", lambda: ops.knn(X, Y, 0), ValueError, "k: expected at least 1 neighbor, got 0"),
    ("k -1", lambda: ops.knn(X, Y, -1), ValueError, "k: expected at least 1 neighbor, got -1"),
    ("k > M", lambda: ops.knn(X, Y, 6), ValueError, "k: .*at most 5.*M = 5.*got 6; lower k"),
    ("k = M", lambda: ops.knn(Y, Y, 5, exclude_self=True), ValueError,
     "k: .*at most 4.*M = 5 points .*the point itself.*got 5"),
    ("k of M = 0", lambda: ops.knn(X, Y[:, :0], 1), ValueError, "k: .*at most 0"),
    ("k float", lambda: ops.knn(X, Y, 2.0), TypeError, "k: expected an int, got float 2.0"),
    ("k bool", lambda: ops.knn(X, Y, True), TypeError, "k: expected an int, got bool True"),
    ("k string", lambda: ops.knn(X, Y, "3"), TypeError, "k: expected an int, got str '3'"),
    ("k tensor", lambda: ops.knn(X, Y, torch.tensor(3)), TypeError, "k: expected an int, got Tensor"),
    ("ragged k 0", lambda: ops.knn(ragged([2]), ragged([2]), 0), ValueError, "k: .*at least 1"),
    # parameters at the ends
    *[
        (f"{kind.__name__} {value!r}", lambda kind=kind, value=value: kind(value), ValueError,
         rf"bandwidth: expected 1e-75 to 1e\+75 for float64, got {value!r}".replace("1e+200", r"1e\+200"))
        for kind in (ops.Gaussian, ops.Laplacian, ops.InverseMultiquadric)
        for value in (1e-200, 1e200)
    ],
    *[
        (f"{kind.__name__} {value!r} in float32", lambda kind=kind, value=value: ops.kernel_mean(X, Y, kind(value)),
         ValueError, r"bandwidth: expected 1e-09 to 1e\+17 for float32, got 1e.*rescale the features, or use float64")
        for kind in (ops.Gaussian, ops.Laplacian, ops.InverseMultiquadric)
        for value in (1e-20, 1e39)
    ],
    *[
        (f"epsilon {value!r}", lambda value=value: ops.softmin(X, Y, [1.0, value]), ValueError,
         r"epsilon: expected 1e-18 to 1e\+34 for float32, got 1e.*or use float64")
        for value in (1e-40, 1e39)
    ],
    # exclude_self
    ("other N", lambda: ops.knn(X, Y, 1, exclude_self=True), ValueError, r"exclude_self.*same points.*\(2, 4, 3\)"),
    ("exclude string", lambda: ops.knn(X, X, 1, exclude_self="no"), TypeError, "exclude_self: expected True or False, got str 'no'"),
    ("exclude int", lambda: ops.softmin(X, X, 1.0, exclude_self=1), TypeError, "exclude_self: expected True or False, got int 1"),
    ("other N in kernel_mean", lambda: ops.kernel_mean(X, Y, GAUSSIAN, exclude_self=True), ValueError, "exclude_self"),
    ("other N in softmin", lambda: ops.softmin(X, Y, 1.0, exclude_self=True), ValueError, "exclude_self"),
    ("other lengths", lambda: ops.knn(ragged([2, 3]), ragged([3, 2]), 1, exclude_self=True), ValueError,
     r"exclude_self: x and y: .*\[2, 3\] and \[3, 2\]"),
    # kernels
    ("no kernel", lambda: ops.kernel_mean(X, Y, "gaussian"), TypeError, "kernel: expected Gaussian.*got str 'gaussian'"),
    ("a class", lambda: ops.kernel_mean(X, Y, ops.Energy), TypeError, "kernel: expected Gaussian.*Energy"),
    *[
        (f"{kind.__name__} {value!r}", lambda kind=kind, value=value: kind(value), error, message)
        for kind in (ops.Gaussian, ops.Laplacian, ops.InverseMultiquadric)
        for value, error, message in [
            (0, ValueError, "bandwidth: expected a positive finite number, got 0"),
            (-1.5, ValueError, "bandwidth: expected a positive finite number, got -1.5"),
            (math.inf, ValueError, "bandwidth: expected a positive finite number, got inf"),
            (math.nan, ValueError, "bandwidth: expected a positive finite number, got nan"),
            ("1", TypeError, "bandwidth: expected a positive number, got str '1'"),
            (True, TypeError, "bandwidth: expected a positive number, got bool True"),
            (None, TypeError, "bandwidth: expected a positive number, got NoneType"),
        ]
    ],
    ("no bandwidths", lambda: ops.Gaussian([]), ValueError, "bandwidth: .*at least one.*empty"),
    ("one bad bandwidth", lambda: ops.Gaussian([1.0, 0.0]), ValueError, "bandwidth: .*positive.*got 0.0"),
    # weights
    ("weights per cloud", lambda: ops.kernel_mean(X, Y, GAUSSIAN, W[:, 0]), ValueError,
     r"weights: .*each point of y, \(B, M\); got float32 of shape \(2\).*y of shape \(2, 5, 3\)"),
    ("weights of x", lambda: ops.kernel_mean(X, Y, GAUSSIAN, W[:, :4]), ValueError, r"weights: .*\(2, 4\).*\(2, 5, 3\)"),
    ("weights list", lambda: ops.kernel_mean(X, Y, GAUSSIAN, [1.0]), TypeError, "weights: expected a torch.Tensor"),
    ("weights int", lambda: ops.kernel_mean(X, Y, GAUSSIAN, W.int()), TypeError, r"weights: .*int32.*weights.float\(\)"),
    ("weights double", lambda: ops.kernel_mean(X, Y, GAUSSIAN, W.double()), TypeError,
     r"weights: .*dtype of y.*float32.*float64.*weights.to\(y.dtype\)"),
    ("weights elsewhere", lambda: ops.kernel_mean(X, Y, GAUSSIAN, W.to("meta")), ValueError,
     r"weights: .*device of y.*meta.*weights.to\(y.device\)"),
    ("weights negative", lambda: ops.kernel_mean(X, Y, GAUSSIAN, -W), ValueError,
     "weights: expected non-negative values, got a minimum of -1"),
    ("weights all 0", lambda: ops.kernel_mean(X, Y, GAUSSIAN, 0 * W), ValueError, "weights: .*positive sum in every cloud"),
    ("one cloud's 0", lambda: ops.kernel_mean(X, Y, GAUSSIAN, torch.stack([W[0], 0 * W[0]])), ValueError,
     "weights: .*positive sum in every cloud"),
    ("weights nan", lambda: ops.kernel_mean(X, Y, GAUSSIAN, W * math.nan), ValueError, "weights: 10 of 10 values are NaN"),
    ("weights inf", lambda: ops.kernel_mean(X, Y, GAUSSIAN, filled((2, 5), math.inf)), ValueError, "weights: 1 of 10"),
    ("ragged weights", lambda: ops.kernel_mean(X, Y, GAUSSIAN, make_ragged(torch.ones(5), [2, 3])), ValueError,
     r"weights: .*each point of y, \(B, M\)"),
    ("dense weights", lambda: ops.kernel_mean(ragged([2, 3]), ragged([2, 3]), GAUSSIAN, torch.ones(2, 3)), ValueError,
     "weights: .*ragged, with the lengths of y"),
    ("weights of other clouds",
     lambda: ops.kernel_mean(ragged([2, 3]), ragged([2, 3]), GAUSSIAN, make_ragged(torch.ones(5), [3, 2])), ValueError,
     r"weights and y: .*same lengths.*\[3, 2\] and \[2, 3\]"),
    ("ragged weights 0",
     lambda: ops.kernel_mean(ragged([2, 3]), ragged([2, 3]), GAUSSIAN, make_ragged(torch.tensor([0.0, 0, 1, 1, 1]), [2, 3])),
     ValueError, "weights: .*positive sum in every cloud"),
    # softmin
    *[
        (f"epsilon {value!r}", lambda value=value: ops.softmin(X, Y, value), error, message)
        for value, error, message in [
            (0.0, ValueError, "epsilon: expected a positive finite number, got 0.0"),
            (-1, ValueError, "epsilon: expected a positive finite number, got -1"),
            (math.nan, ValueError, "epsilon: expected a positive finite number, got nan"),
            (math.inf, ValueError, "epsilon: expected a positive finite number, got inf"),
            ([1.0, 0.0], ValueError, "epsilon: expected a positive finite number, got 0.0"),
            ([], ValueError, "epsilon: expected at least one temperature, got an empty"),
            ("1", TypeError, "epsilon: expected a positive number, got str '1'"),
            (None, TypeError, "epsilon: expected a positive number, got NoneType"),
            (False, TypeError, "epsilon: expected a positive number, got bool False"),
        ]
    ],
    ("epsilon tensor", lambda: ops.softmin(X, Y, torch.tensor(1.0)), TypeError, "epsilon: .*got Tensor"),
    ("potential of x", lambda: ops.softmin(X, Y, 1.0, W[:, :4]), ValueError, r"potential: .*\(2, 4\).*\(2, 5, 3\)"),
    ("potential number", lambda: ops.softmin(X, Y, 1.0, 3.0), TypeError, "potential: expected a torch.Tensor, got float"),
    ("potential double", lambda: ops.softmin(X, Y, 1.0, W.double()), TypeError, "potential: .*dtype of y.*float64"),
    ("potential nan", lambda: ops.softmin(X, Y, 1.0, W * math.nan), ValueError, "potential: 10 of 10 values are NaN"),
    ("potential -inf", lambda: ops.softmin(X, Y, 1.0, filled((2, 5), -math.inf)), ValueError, "potential: 1 of 10"),
    ("log_weights of x", lambda: ops.softmin(X, Y, 1.0, log_weights=W[:, :4]), ValueError, r"log_weights: .*\(2, 4\)"),
    ("log_weights int", lambda: ops.softmin(X, Y, 1.0, log_weights=W.long()), TypeError, "log_weights: .*int64"),
    ("log_weights nan", lambda: ops.softmin(X, Y, 1.0, log_weights=W * math.nan), ValueError,
     "log_weights: expected finite values or -inf, got NaN"),
    ("log_weights +inf", lambda: ops.softmin(X, Y, 1.0, log_weights=filled((2, 5), math.inf)), ValueError,
     "log_weights: expected finite values or -inf"),
    ("log_weights of other clouds",
     lambda: ops.softmin(ragged([2, 3]), ragged([2, 3]), 1.0, log_weights=make_ragged(torch.ones(5), [3, 2])), ValueError,
     r"log_weights and y: .*same lengths"),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, error, message", [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_numbers_that_are_fine():
    """numpy's and integer numbers, tuples, and None for what is optional."""
    np = pytest.importorskip("numpy")
    assert ops.softmin(X, Y, np.float64(1.0)).shape == (2, 4)
    assert ops.softmin(X, Y, 1).shape == (2, 4)
    assert ops.softmin(X, Y, (1, 2), None, None).shape == (2, 4, 2)
    assert ops.Gaussian((1, 2)) == ops.Gaussian([1.0, 2.0])
    assert ops.kernel_mean(X, Y, ops.Laplacian(1), None).shape == (2, 4)
    assert repr(ops.InverseMultiquadric(2)) == "InverseMultiquadric(bandwidth=2.0)"


def test_large_but_fitting_values_are_fine():
    """A sum that overflows is no reason to refuse; each value is what counts."""
    big = torch.full((1, 1000, 3), 1e17)
    assert ops.nearest(big, big)[0].eq(0).all()
    wide = torch.full((1, 2, 3), 1e30, dtype=torch.float64)
    assert ops.nearest(wide, wide)[0].eq(0).all()
    half = torch.full((1, 2, 3), 60000.0, dtype=torch.float16)
    assert ops.nearest(half, -half)[0].eq(3 * (2 * half[0, 0, 0].float()) ** 2).all()


# ---------------------------------------------------------------------- torch.func, forward mode


# PyTorch scripts its own forward derivatives.
scripted = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@scripted
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "jvp"])
def test_torch_func_names_the_backend_that_can(name, transform, fused, device):
    """Tangents were 0 without a word; `grad` raised PyTorch's inner words."""
    dtype = widest(fused)
    x = torch.rand(2, 4, 3, dtype=dtype, device=device)
    y = torch.rand(2, 5, 3, dtype=dtype, device=device)

    def function(backend):
        def value(x):
            result = OPERATIONS[name](x, y, backend=backend)
            return (result[0] if isinstance(result, tuple) else result).square().sum()

        return value

    def transformed(backend):
        if transform == "jvp":
            return torch.func.jvp(function(backend), (x,), (torch.ones_like(x),))[1]
        return getattr(torch.func, transform)(function(backend))(x)

    with pytest.raises(RuntimeError, match=r'torch\.func.*backend="dense"'):
        transformed(fused)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(fused)(leaf), leaf, create_graph=True)
    if transform == "jvp":
        expected = gradient.sum()
    elif transform == "hessian":
        rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient.flatten()]
        expected = torch.stack(rows).view(*x.shape, *x.shape)
    else:
        expected = gradient
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(transformed("dense"), expected.detach(), **tolerance)


@scripted
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("argument", [0, 1])
def test_forward_mode_names_the_backend_that_can(name, argument, fused, device):
    points = [t.to(device).double() + torch.rand(t.shape, device=device) for t in (X, Y)]
    tangent = torch.ones_like(points[argument])
    with torch.autograd.forward_ad.dual_level():
        points[argument] = torch.autograd.forward_ad.make_dual(points[argument], tangent)
        with pytest.raises(RuntimeError, match=r'forward-mode.*backend="dense"'):
            OPERATIONS[name](*(t.to(widest(fused)) for t in points), backend=fused)
        result = OPERATIONS[name](*points, backend="dense")
        result = result[0] if isinstance(result, tuple) else result
        moved = torch.autograd.forward_ad.unpack_dual(result).tangent
        plain = OPERATIONS[name](points[0].detach(), points[1].detach(), backend="dense")
    plain = plain[0] if isinstance(plain, tuple) else plain
    step = 1e-6
    points = [t.detach() for t in points]
    points[argument] = points[argument] + step * tangent
    after = OPERATIONS[name](*points, backend="dense")
    after = after[0] if isinstance(after, tuple) else after
    torch.testing.assert_close(moved, (after - plain) / step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_range_ends_where_it_says(dtype, contiguous):
    """One value decides, however many others there are; the sum of their squares does not."""
    limit = (torch.finfo(dtype).max / (16 * 40)) ** 0.5
    y = torch.zeros(1, 30, 40, dtype=dtype)
    for value in (0.999 * limit, -0.999 * limit):
        x = torch.full((1, 30, 40), value, dtype=dtype)
        x = x if contiguous else x.mT.contiguous().mT
        assert ops.nearest(x, y)[0].isfinite().all()
        for bad, message in ((1.01, "magnitudes"), (float("nan"), "NaN"), (float("inf"), "NaN")):
            wrong = x * 0
            wrong[0, 7, 3] = bad * value
            for points in ((wrong, y), (y, wrong)):
                with pytest.raises(ValueError, match=message):
                    ops.nearest(*points)
