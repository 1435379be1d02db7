"""The Triton kernels in Triton's interpreter, against the dense reference in float64.

`test_interpreter.py` runs this file in a process of its own, because the interpreter is chosen when
triton is imported. Tensors are on the CPU, and tf32 is computed exactly, apart from the rounding
that the kernels do themselves: what is tested is the algebra, the edges and the addressing.
"""

from __future__ import annotations

import pytest
import torch

from fad_loss.ops import Energy, Gaussian, InverseMultiquadric, Laplacian, _dense, _tiled, _triton
from fad_loss.ops._triton import configurations, kernel_sums, prepare, small
from fad_loss.ops._triton.launch import INTERPRETED

if not INTERPRETED:
    message = "run tests/kernels/test_interpreter.py instead: these need TRITON_INTERPRET=1"
    raise RuntimeError(message)

# numpy, which interprets, warns of what is meant: the logarithm of an empty sum is minus infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPSILON = [0.3, 1.0]
KERNELS = [
    pytest.param(Gaussian(0.8), id="gaussian"),
    pytest.param(Gaussian([2.0, 0.5, 1.0]), id="gaussian ladder of 4"),
    pytest.param(Gaussian([1.0, 2**0.5]), id="gaussian ladder of 2"),
    pytest.param(Gaussian([0.5, 0.7]), id="gaussian apart"),
    pytest.param(Laplacian(1.2), id="laplacian"),
    pytest.param(Energy(), id="energy"),
    pytest.param(InverseMultiquadric(0.7), id="inverse multiquadric"),
]
# B, N, M, C: one pair, few channels, one block, several blocks, none of them full.
SHAPES = [(1, 1, 1, 1), (2, 17, 23, 3), (2, 50, 37, 32), (1, 33, 70, 100)]
# dtype, precision, and the largest error relative to the largest value.
FORMATS = [
    pytest.param(torch.float32, "highest", 3e-6, id="float32 highest"),
    pytest.param(torch.float32, "high", 2e-3, id="float32 high"),
    pytest.param(torch.float32, "medium", 4e-2, id="float32 medium"),
    pytest.param(torch.bfloat16, "highest", 2e-3, id="bfloat16"),
    pytest.param(torch.float16, "highest", 2e-3, id="float16"),
]


@pytest.fixture(autouse=True)
def _precision():
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=[small.LARGEST, 0], ids=["one tile", "tiles"])
def route(request, monkeypatch):
    """Small clouds as small ones, and tile by tile like large ones."""
    monkeypatch.setattr(small, "LARGEST", request.param)


def clouds(B, N, M, C, dtype=torch.float32):
    x = (torch.randn(B, N, C) / C**0.5 + 1).to(dtype)
    y = (torch.randn(B, M, C) / C**0.5 + 1).to(dtype)
    return x, y


def double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def close(got, want, tolerance=3e-6):
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    want = want.detach()
    scale = want[want.isfinite()].abs().max() if want.isfinite().any() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(scale))


def first_and_second(function, tensors, moves):
    """Value, gradients, and gradients of the gradients' product with `moves`, by autograd."""
    value = function(*tensors)
    grad = torch.randn_like(value).requires_grad_()
    needed = [t for t in tensors if t is not None]
    first = torch.autograd.grad(value, needed, grad, create_graph=True)
    moved = sum((a * b).sum() for a, b in zip(first, moves, strict=True) if b is not None)
    second = torch.autograd.grad(moved, [grad, *needed])
    return value, grad.detach().float(), first, second


def softmin(*arguments):
    """The result alone."""
    return _triton.softmin(*arguments)[0]


def softmin_backward(grad, x, y, bias, found, *others):
    """As `_library` calls it, with what softmin has returned."""
    _, least, total = found
    grad = grad / torch.where(total > 0, total, 1.0)
    return _triton.softmin_backward(grad, x, y, bias, least, *others)


def softmin_double_backward(u, v, t, grad, x, y, bias, found, *others):
    return _triton.softmin_double_backward(u, v, t, grad, x, y, bias, *found[1:], *others)


# ------------------------------------------------------------------------------------- softmin


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("route")
def test_softmin(shape):
    x, y = clouds(*shape)
    bias = torch.randn(*y.shape[:2], 2)
    want = _dense.softmin(*double(x, y, bias), EPSILON, exclude_self=False)
    close(softmin(x, y, bias, EPSILON, False, None, None), want)


@pytest.mark.parametrize("dtype, precision, tolerance", FORMATS)
@pytest.mark.usefixtures("route")
def test_softmin_gradients(dtype, precision, tolerance):
    torch.set_float32_matmul_precision(precision)
    x, y = clouds(1, 40, 40, 50, dtype)
    bias = torch.randn(1, 40, 2)
    xd, yd, bd = double(x, y, bias)
    want = _dense.softmin(xd, yd, bd, EPSILON, exclude_self=True)
    grad = torch.randn(want.shape)
    found = _triton.softmin(x, y, bias, EPSILON, True, None, None)
    out = found[0]
    close(out, want, tolerance)
    wanted = torch.autograd.grad(want, (xd, yd, bd), grad.double())
    got = softmin_backward(grad, x, y, bias, found, EPSILON, True, None, None, True, True)
    for a, b in zip(got, wanted, strict=True):
        close(a, b, tolerance)


def test_softmin_gradient_of_some():
    x, y = clouds(1, 20, 30, 8)
    found = _triton.softmin(x, y, None, EPSILON, False, None, None)
    arguments = torch.ones(1, 20, 2), x, y, None, found, EPSILON, False, None, None
    both = softmin_backward(*arguments, True, True)
    neither = softmin_backward(*arguments, False, False)
    bias = softmin_backward(*arguments, False, True)
    assert neither[1].shape == neither[2].shape == bias[1].shape == (0,)
    assert torch.equal(both[0], neither[0])
    assert torch.equal(both[2], bias[2])


@pytest.mark.parametrize("C", [3, 40])
@pytest.mark.parametrize("full", [True, False], ids=["all", "x only"])
def test_softmin_second_derivatives(C, full):
    x, y = clouds(1, 20, 37, C)
    bias = torch.randn(1, 37, 2) if full else None
    u, v, t = torch.randn(x.shape), torch.randn(y.shape), torch.randn(1, 37, 2)
    if not full:
        v = t = None
    tensors = double(x, y, bias)
    _, grad, _, wanted = first_and_second(
        lambda *a: _dense.softmin(*a, EPSILON, exclude_self=False),
        tensors,
        [u, v, t] if full else [u, v],
    )
    found = _triton.softmin(x, y, bias, EPSILON, False, None, None)
    got = softmin_double_backward(u, v, t, grad, x, y, bias, found, EPSILON, False, None, None)
    for a, b in zip(got, wanted, strict=False):
        close(a, b, 2e-5)


def test_many_temperatures_are_done_in_groups():
    epsilon = [0.2, 0.3, 0.5, 0.7, 1.0, 2.0]
    x, y = clouds(1, 18, 25, 5)
    bias = torch.randn(1, 25, 6)
    tensors = double(x, y, bias)
    moves = [torch.randn_like(t) for t in (x, y, bias)]
    want, grad, first, second = first_and_second(
        lambda *a: _dense.softmin(*a, epsilon, exclude_self=False), tensors, moves
    )
    found = _triton.softmin(x, y, bias, epsilon, False, None, None)
    out = found[0]
    close(out, want)
    got = softmin_backward(grad, x, y, bias, found, epsilon, False, None, None, True, True)
    for a, b in zip(got, first, strict=True):
        close(a, b, 1e-5)
    got = softmin_double_backward(*moves, grad, x, y, bias, found, epsilon, False, None, None)
    for a, b in zip(got, second, strict=True):
        close(a, b, 3e-5)


# ---------------------------------------------------------------------------------- kernel_sum


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("C", [3, 40])
@pytest.mark.usefixtures("route")
def test_kernel_sum_and_its_derivatives(kernel, C):
    x, y = clouds(1, 20, 37, C)
    weights = torch.rand(1, 37)
    tensors = double(x, y, weights)
    moves = [torch.randn_like(t) for t in (x, y, weights)]
    want, grad, first, second = first_and_second(
        lambda *a: _dense.kernel_sum(*a, kernel, exclude_self=False), tensors, moves
    )
    arguments = x, y, weights, kernel, False, None, None
    close(_triton.kernel_sum(*arguments), want)
    got = _triton.kernel_sum_backward(grad, *arguments, True, True)
    for a, b in zip(got, first, strict=True):
        close(a, b, 1e-5)
    got = _triton.kernel_sum_double_backward(*moves, grad, *arguments)
    for a, b in zip(got, second, strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("dtype, precision, tolerance", FORMATS)
@pytest.mark.usefixtures("route")
def test_kernel_sum_without_weights_and_without_oneself(dtype, precision, tolerance):
    torch.set_float32_matmul_precision(precision)
    x, _ = clouds(1, 40, 1, 50, dtype)
    xd, yd = double(x, x)
    want = _dense.kernel_sum(xd, yd, None, Energy(), exclude_self=True)
    arguments = x, x, None, Energy(), True, None, None
    close(_triton.kernel_sum(*arguments), want, tolerance)
    grad = torch.randn(want.shape)
    first = torch.autograd.grad(want, (xd, yd), grad.double())
    got = _triton.kernel_sum_backward(grad, *arguments, True, False)
    for a, b in zip(got[:2], first, strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
def test_coinciding_points_have_finite_derivatives(kernel):
    x = torch.randn(1, 20, 3)
    arguments = x, x, None, kernel, False, None, None
    grad, u = torch.ones(1, 20), torch.randn(x.shape)
    results = (
        _triton.kernel_sum(*arguments),
        *_triton.kernel_sum_backward(grad, *arguments, True, True),
        *_triton.kernel_sum_double_backward(u, u, None, grad, *arguments),
    )
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize(
    "bandwidths, ladder",
    [
        ((1.0,), 0),
        ((1.0, 2.0, 4.0), 2),
        ((4.0, 1.0, 2.0), 2),
        ((1.0, 2**0.5, 2.0), 1),
        ((1.0, 3.0), 0),
        (tuple(2.0**i for i in range(8)), 0),
    ],
    ids=str,
)
def test_which_bandwidths_share_an_exponential(bandwidths, ladder):
    assert kernel_sums.family(Gaussian(bandwidths))["LADDER"] == ladder


# ------------------------------------------------------------------------------ knn and nearest


def check_neighbors(x, y, k, *, exclude_self=False):
    distance, index = _triton.knn(x, y, k, exclude_self, None, None)
    want, wanted = _dense.knn(x.double(), y.double(), k, exclude_self=exclude_self)
    close(distance, want, 1e-6)
    # Distances that agree to the last digit may be ordered either way.
    differs = index != wanted
    assert differs.float().mean() < 0.02
    assert index.dtype == torch.int64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 4, 20])
def test_knn(shape, k):
    x, y = clouds(*shape)
    check_neighbors(x, y, min(k, y.shape[1]))


@pytest.mark.parametrize("dtype, precision, _", FORMATS)
@pytest.mark.parametrize("k", [1, 5])
def test_knn_is_exact_whatever_the_multiply(dtype, precision, _, k):
    torch.set_float32_matmul_precision(precision)
    x, _ = clouds(1, 70, 1, 30, dtype)
    check_neighbors(x, x, k, exclude_self=True)


@pytest.mark.parametrize("C", [3, 64, 256, 1024])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_nearest_of_a_noisy_copy_with_an_offset(C, precision):
    torch.set_float32_matmul_precision(precision)
    x = torch.randn(1, 40, C) + 4
    y = x[:, torch.randperm(40)] + 0.05 * torch.randn(1, 40, C)
    check_neighbors(x, y, 1)


def test_ties_go_to_the_lowest_index():
    x = torch.zeros(1, 5, 2)
    for k in (1, 3):
        distance, index = _triton.knn(x, torch.ones(1, 80, 2), k, False, None, None)
        assert torch.equal(distance, torch.full((1, 5, k), 2.0))
        assert torch.equal(index, torch.arange(k).expand(1, 5, k))


@pytest.mark.parametrize("M, k", [(70, 60), (150, 61), (64, 64)])
def test_the_largest_lists(M, k):
    x, y = clouds(1, 3, M, 5)
    check_neighbors(x, y, k)


# ---------------------------------------------------------------------------- shares of the columns


@pytest.fixture
def shared(monkeypatch):
    """Columns shared out among as many programs as are said, whatever would pay."""

    def among(number):
        monkeypatch.setattr(configurations, "shares", lambda *limits: min(number, limits[-1]))

    return among


def smooth_results(x, y, offsets):
    """Values and derivatives of the smooth reductions."""
    torch.manual_seed(1)
    bias, weights = torch.randn(*y.shape[:-1], 2), torch.rand(y.shape[:-1])
    moves = torch.randn(x.shape), torch.randn(y.shape)
    found = _triton.softmin(x, y, bias, EPSILON, False, *offsets)
    grad = torch.where(found[0].isfinite(), torch.randn(found[0].shape), 0.0)
    of_softmin = grad, x, y, bias, found, EPSILON, False, *offsets
    of_sum = x, y, weights, Laplacian(1.0), False, *offsets
    return [
        *found,
        *softmin_backward(*of_softmin, True, True),
        *softmin_double_backward(*moves, bias, *of_softmin),
        _triton.kernel_sum(*of_sum),
        *_triton.kernel_sum_backward(grad[..., 0], *of_sum, True, True),
        *_triton.kernel_sum_double_backward(*moves, weights, grad[..., 0], *of_sum),
    ]


@pytest.mark.parametrize("C", [3, 40])
@pytest.mark.parametrize("layout", ["batch", "ragged"])
def test_shares_of_the_columns_add_up(C, layout, shared):
    if layout == "batch":
        x, y = clouds(1, 10, 150, C)
        offsets = None, None
    else:
        x, y, *offsets = ragged_case(C)
    whole = smooth_results(x, y, offsets)
    shared(3)
    parts, again = smooth_results(x, y, offsets), smooth_results(x, y, offsets)
    for a, b, c in zip(whole, parts, again, strict=True):
        assert torch.equal(b, c)
        close(b, a.double(), 1e-5)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_shares_of_the_columns_find_the_same_neighbors(k, shared):
    x, y = clouds(1, 10, 300, 20)
    y[0, 250:] = y[0, :50]  # ties, in different shares
    whole = _triton.knn(x, y, k, False, None, None)
    for number in (2, 3, 500):
        shared(number)
        distance, index = _triton.knn(x, y, k, False, None, None)
        assert torch.equal(index, whole[1])
        # Longer lists add up fewer channels at a time.
        torch.testing.assert_close(distance, whole[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "programs, walk, slots, most, number",
    [
        (1, 15_625, 132, 128, 128),  # 64 x 1,000,000
        (1, 15_625, 132, 8, 8),
        (64, 128, 132, 128, 2),  # 8192 x 8192 in tiles of 128 rows
        (128, 128, 264, 128, 2),
        (4000, 128, 132, 128, 1),
        (1, 3, 132, 128, 1),
        (0, 3, 132, 128, 1),
    ],
)
def test_how_many_shares(programs, walk, slots, most, number):
    assert configurations.shares(programs, walk, slots, most) == number


@pytest.mark.usefixtures("route")
def test_weights_sum_to_one_however_large_distances_are_beside_epsilon():
    """exp((out - d) / eps) would be off by the rounding of out, divided by epsilon."""
    x, y = torch.randn(1, 30, 3) + 100, torch.randn(1, 50, 3)
    bias = torch.randn(1, 50, 1)
    found = _triton.softmin(x, y, bias, [0.01], False, None, None)
    assert float(found[0].min()) > 10_000
    gradients = softmin_backward(
        torch.ones(1, 30, 1), x, y, bias, found, [0.01], False, None, None, True, True
    )
    assert float(gradients[2].sum()) == pytest.approx(-30, rel=1e-5)


# ------------------------------------------------------------------------------ ragged and edges

X_OFFSETS = torch.tensor([0, 5, 5, 40, 41, 41])
Y_OFFSETS = torch.tensor([0, 7, 20, 20, 53, 53])


def ragged_case(C=20, same=False):
    x = torch.randn(41, C) / C**0.5
    y = x if same else torch.randn(53, C) / C**0.5
    return x, y, X_OFFSETS, X_OFFSETS if same else Y_OFFSETS


@pytest.mark.parametrize("same", [False, True], ids=["two sets", "one set"])
def test_ragged_softmin_equals_a_loop(same):
    x, y, *offsets = ragged_case(same=same)
    bias = torch.randn(len(y), 2)
    tensors = double(x, y, bias)
    moves = [torch.randn_like(t) for t in tensors]
    reference = lambda x, y, h: (  # noqa: E731
        _dense.softmin(x, y, h, EPSILON, exclude_self=same),
    )
    loop = lambda x, y, h: _dense.per_cloud(reference, x, *offsets, y, h)[0]  # noqa: E731
    want, grad, first, second = first_and_second(loop, tensors, moves)
    found = _triton.softmin(x, y, bias, EPSILON, same, *offsets)
    out = found[0]
    close(out, want)
    got = softmin_backward(grad, x, y, bias, found, EPSILON, same, *offsets, True, True)
    for a, b in zip(got, first, strict=True):
        close(a, b, 1e-5)
    moves = [t.float() for t in moves]
    got = softmin_double_backward(*moves, grad, x, y, bias, found, EPSILON, same, *offsets)
    for a, b in zip(got, second, strict=True):
        close(a, b, 3e-5)


@pytest.mark.parametrize("C", [3, 70])
def test_ragged_kernel_sum_equals_a_loop(C):
    x, y, *offsets = ragged_case(C)
    weights = torch.rand(len(y))
    tensors = double(x, y, weights)
    moves = [torch.randn_like(t) for t in tensors]
    reference = lambda x, y, w: (  # noqa: E731
        _dense.kernel_sum(x, y, w, Laplacian(2.0), exclude_self=False),
    )
    loop = lambda x, y, w: _dense.per_cloud(reference, x, *offsets, y, w)[0]  # noqa: E731
    want, grad, first, second = first_and_second(loop, tensors, moves)
    arguments = x, y, weights, Laplacian(2.0), False, *offsets
    close(_triton.kernel_sum(*arguments), want)
    got = _triton.kernel_sum_backward(grad, *arguments, True, True)
    for a, b in zip(got, first, strict=True):
        close(a, b, 1e-5)
    moves = [t.float() for t in moves]
    got = _triton.kernel_sum_double_backward(*moves, grad, *arguments)
    for a, b in zip(got, second, strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("k", [1, 10])
def test_ragged_knn_equals_a_loop(k):
    x, y, *offsets = ragged_case()
    distance, index = _triton.knn(x, y, k, False, *offsets)
    reference = lambda x, y: _dense.knn(x, y, k, exclude_self=False)  # noqa: E731
    want, wanted = _dense.per_cloud(reference, x.double(), *offsets, y.double())
    close(distance, want, 1e-6)
    assert torch.equal(index, wanted)


def test_many_ragged_clouds():
    lengths = torch.tensor([3, 0, 33, 1, 0, 0, 64, 2, 31, 0, 5])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    x = torch.randn(int(offsets[-1]), 2)
    distance, index = _triton.knn(x, x, 1, False, offsets, offsets)
    own = torch.cat([torch.arange(n) for n in lengths])
    assert torch.equal(index.squeeze(1), own)
    assert (distance == 0).all()


def test_another_clouds_nan_stays_there():
    x, y, *offsets = ragged_case()
    found = _triton.softmin(x, y, None, EPSILON, False, *offsets)
    clean = found[0]
    grad = torch.ones(clean.shape)
    backward = grad, x, y, None, found, EPSILON, False, *offsets, True, True
    clean_gradient = softmin_backward(*backward)[0]
    y[20:53] = torch.nan
    out = softmin(x, y, None, EPSILON, False, *offsets)
    assert torch.equal(out[:5], clean[:5])
    assert out[40:41].isnan().all()
    after = softmin_backward(grad, x, y, None, found, EPSILON, False, *offsets, True, True)
    assert torch.equal(after[0][:5], clean_gradient[:5])


@pytest.mark.parametrize("N, M", [(0, 5), (5, 0), (0, 0)])
def test_no_points(N, M):
    x, y = torch.randn(2, N, 20), torch.randn(2, M, 20)
    found = _triton.softmin(x, y, None, EPSILON, False, None, None)
    out = found[0]
    assert torch.equal(out, torch.full((2, N, 2), torch.inf))
    grads = softmin_backward(
        torch.ones(2, N, 2), x, y, None, found, EPSILON, False, None, None, True, True
    )
    assert all((g == 0).all() for g in grads)
    assert torch.equal(
        _triton.kernel_sum(x, y, None, Energy(), False, None, None), torch.zeros(2, N)
    )
    distance, index = _triton.knn(x, y, 1, False, None, None)
    assert (distance == torch.inf).all()
    assert (index == -1).all()


def test_points_left_out_by_their_weight():
    x, y = clouds(1, 10, 20, 20)
    bias = torch.zeros(1, 20, 1)
    bias[:, 10:] = -torch.inf
    found = _triton.softmin(x, y, bias, [0.5], False, None, None)
    out = found[0]
    close(out, _dense.softmin(*double(x, y[:, :10]), None, [0.5], exclude_self=False))
    got = softmin_backward(
        torch.ones(out.shape), x, y, bias, found, [0.5], False, None, None, True, True
    )
    assert all(g.isfinite().all() for g in got)
    assert (got[1][:, 10:] == 0).all()


def test_an_awkward_size():
    x, y = clouds(1, 252, 507, 123)
    want = _dense.softmin(*double(x, y), None, [0.5], exclude_self=False)
    close(softmin(x, y, None, [0.5], False, None, None), want)


# N and M around the largest that one tile holds, several tiles of rows, and rows that are few.
AROUND = [(128, 128), (129, 128), (128, 129), (40, 128), (100, 3)]


@pytest.mark.parametrize("N, M", AROUND, ids=str)
@pytest.mark.parametrize("C", [3, 70])
def test_small_clouds_and_the_first_large_ones_softmin(N, M, C):
    x, y = clouds(2, N, M, C)
    bias = torch.randn(2, M, 2)
    tensors = double(x, y, bias)
    want = _dense.softmin(*tensors, EPSILON, exclude_self=False)
    grad = torch.randn(want.shape)
    found = _triton.softmin(x, y, bias, EPSILON, False, None, None)
    out = found[0]
    close(out, want)
    wanted = torch.autograd.grad(want, tensors, grad.double())
    got = softmin_backward(grad, x, y, bias, found, EPSILON, False, None, None, True, True)
    for a, b in zip(got, wanted, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("N, M", [(30, 20), (129, 20)], ids=["small", "large"])
def test_small_clouds_far_from_the_origin_kernel_sum(kernel, N, M):
    """Centered on the mean of whichever side is the columns."""
    x, y = (t / 4 + 30 for t in clouds(1, N, M, 40))
    weights = torch.rand(1, M)
    tensors = double(x, y, weights)
    want = _dense.kernel_sum(*tensors, kernel, exclude_self=False)
    arguments = x, y, weights, kernel, False, None, None
    close(_triton.kernel_sum(*arguments), want, 1e-5)
    grad = torch.randn(want.shape)
    wanted = torch.autograd.grad(want, tensors, grad.double())
    got = _triton.kernel_sum_backward(grad, *arguments, True, True)
    for a, b in zip(got, wanted, strict=True):
        close(a, b, 2e-5)


def test_one_of_many_clouds_with_nan_does_not_spoil_the_others():
    x, y = clouds(3, 20, 30, 24)
    clean = softmin(x, y, None, EPSILON, False, None, None)
    y[1, 4, 3] = torch.nan
    out = softmin(x, y, None, EPSILON, False, None, None)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert out[1].isnan().all()


def test_views_and_repetition():
    x, y = clouds(2, 20, 30, 24)
    view = x.mT.contiguous().mT
    first = softmin(view, y, None, EPSILON, False, None, None)
    assert torch.equal(first, softmin(x, y, None, EPSILON, False, None, None))


# -------------------------------------------------------------------------------- what goes where


def test_float64_and_long_lists_are_the_tiled_backends():
    x, y = torch.randn(1, 20, 5).double(), torch.randn(1, 70, 5).double()
    got = _triton.softmin(x, y, None, EPSILON, False, None, None)
    wanted = _tiled.softmin(x, y, None, EPSILON, False, None, None)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    x, y = x.float(), y.float()
    got, index = _triton.knn(x, y, 65, False, None, None)
    want, wanted = _tiled.knn(x, y, 65, False, None, None)
    assert torch.equal(got, want)
    assert torch.equal(index, wanted)


def test_formats_follow_the_precision():
    form = {}
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        form[precision] = prepare.multiply_format(torch.float32, 64)
    assert form["highest"].precision == "bf16x6"
    assert (form["high"].precision, form["high"].rounding) == ("tf32", "tf32")
    assert form["medium"].rounding == "bf16"
    assert prepare.multiply_format(torch.float16, 64).storage == torch.float16
    assert prepare.multiply_format(torch.float16, 64, wide=True).storage == torch.float32


def test_prepared_points_are_centered_rounded_and_padded():
    torch.set_float32_matmul_precision("high")
    y = torch.randn(1, 1200, 20) + 100
    points, _ = prepare.prepare_pair(y, y, None, None)
    assert points.values.shape == (1200, 32)
    assert (points.values[:, 20:] == 0).all()
    assert points.values.mean().abs() < 0.1
    bits = points.values.view(torch.int32)
    assert (bits & 0x1FFF == 0).all()
    torch.testing.assert_close(points.norms, points.values.square().sum(1))
    shifted = points.values[:, :20] - points.values[:1, :20]
    torch.testing.assert_close(shifted, y[0] - y[0, 0], rtol=0, atol=4e-3)


def test_the_newer_switch_for_tf32_is_obeyed():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert prepare.multiply_format(torch.float32, 64).precision == "tf32"
        x, y = clouds(1, 20, 30, 24)
        out = softmin(x, y, None, EPSILON, False, None, None)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    close(out, _dense.softmin(*double(x, y), None, EPSILON, exclude_self=False), 2e-3)
    assert prepare.multiply_format(torch.float32, 64).precision == "bf16x6"


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1], ids=hex)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_nan_stays_nan_when_rounded(bits, precision):
    torch.set_float32_matmul_precision(precision)
    x, y = clouds(1, 20, 30, 40)
    x[0, 3, 7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found = _triton.softmin(x, y, None, EPSILON, False, None, None)
    out = found[0]
    assert out[0, 3].isnan().all()
    assert out[0, :3].isfinite().all()
    grad = torch.ones(out.shape)
    dx, dy, _ = softmin_backward(grad, x, y, None, found, EPSILON, False, None, None, True, False)
    assert dx[0, 3].isnan().all()
    assert dx[0, 4:].isfinite().all()
    assert dy.isnan().any()


def test_infinity_and_the_largest_numbers_are_rounded_as_numbers():
    torch.set_float32_matmul_precision("high")
    x = torch.tensor([1e38, -1e38, 1 + 2**-12, -(1 + 3 * 2**-11)]).repeat(1, 5, 6)
    form = prepare.Format(torch.float32, "tf32", "tf32", center=False)
    points = prepare.prepare(x[0], prepare.Clouds.of(x, None), form)
    want = torch.tensor([1e38, -1e38, 1.0, -(1 + 2**-9)])
    torch.testing.assert_close(points.values[0, :4], want, rtol=2**-11, atol=0)
    assert torch.equal(points.values[0, 2:4], want[2:])
