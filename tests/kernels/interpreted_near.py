"""In Triton's interpreter: near pairs, whose rows are computed anew.

`test_interpreter.py` runs this file as it does `interpreted.py`.
"""

from __future__ import annotations

from itertools import product
from unittest import mock

import pytest
import torch

from fad_loss import ops, ragged
from fad_loss.ops import Energy, Gaussian, InverseMultiquadric, Laplacian, _backends
from fad_loss.ops._triton import configurations, prepare, small
from fad_loss.ops._triton.launch import INTERPRETED

if not INTERPRETED:
    message = "run tests/kernels/test_interpreter.py instead: these need TRITON_INTERPRET=1"
    raise RuntimeError(message)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def operations(h):
    """Every smooth operation, that resolves distances of h."""
    return {
        "gaussian": lambda x, y, **o: ops.kernel_mean(x, y, Gaussian(h), **o),
        "laplacian": lambda x, y, **o: ops.kernel_mean(x, y, Laplacian(h), **o),
        "energy": lambda x, y, **o: ops.kernel_mean(x, y, Energy(), **o),
        "imq": lambda x, y, **o: ops.kernel_mean(x, y, InverseMultiquadric(h), **o),
        "softmin": lambda x, y, **o: ops.softmin(x, y, h * h, **o),
    }


OPERATIONS = operations(0.1)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_backends, "why_not", lambda *_: None)


@pytest.fixture(params=[small.LARGEST, 0], ids=["small", "tiles"])
def route(request, monkeypatch):
    """Small clouds as small ones, and tile by tile like large ones."""
    monkeypatch.setattr(small, "LARGEST", request.param)


def two_clusters(C, points, dtype, offset=10.0, noise=0.0125):
    side = torch.where(torch.rand(1, points, 1) < 0.5, offset, -offset)
    return (side + noise * torch.randn(1, points, C)).to(dtype)


def first_and_second(operation, x, y, **options):
    """Value, first derivatives, and those of a function of them."""
    value = operation(x, y, **options)
    given = [x] if x is y else [x, y]
    first = torch.autograd.grad(value.sum(), given, create_graph=True)
    total = sum((g.double() * g.detach().double().sin()).sum() for g in first)
    return [value, *first, *torch.autograd.grad(total, given)]


def compare(operation, x, y, tolerance, **options):
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    if x is y:
        wide[1] = wide[0]
    got = first_and_second(operation, x, y, backend="triton", **options)
    want = first_and_second(operation, *wide, backend="dense", **options)
    for a, b in zip(got, want, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("C, name", [*product((3, 17), OPERATIONS), (70, "softmin")])
@pytest.mark.usefixtures("route")
def test_clusters(C, name):
    """Far from each other and tight: their distances are lost in those of products."""
    x, y = (two_clusters(C, n, torch.float32).requires_grad_() for n in (21, 40))
    compare(OPERATIONS[name], x, y, 2e-5)


@pytest.mark.parametrize("name", ["gaussian", "softmin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clusters_of_half_precision(dtype, name, monkeypatch):
    monkeypatch.setattr(small, "LARGEST", 0)
    x, y = (two_clusters(40, n, dtype, 2.0, 0.05).requires_grad_() for n in (10, 12))
    got = first_and_second(OPERATIONS[name], x, y, backend="triton")
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    want = first_and_second(OPERATIONS[name], *wide, backend="dense")
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=1e-5)
    for a, b in zip(got[1:3], want[1:3], strict=True):
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(
            a.double(), b, rtol=unit, atol=unit * float(b.detach().abs().max())
        )


@pytest.mark.parametrize("exclude_self", [False, True], ids=["with itself", "without itself"])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.usefixtures("route")
def test_one_set(name, exclude_self):
    """A point is at distance 0 from itself, and no row has to be computed anew for that."""
    x = (torch.randn(1, 40, 30) + 3).requires_grad_()
    launched = []

    def keep(kernel, grid, arguments):
        if arguments.get("EXACT"):
            launched.append(int(arguments["flags"].sum()))
        return launch(kernel, grid, arguments)

    launch = configurations.launch
    with mock.patch.object(configurations, "launch", keep):
        compare(operations(4.0)[name], x, x, 2e-5, exclude_self=exclude_self)
    assert not any(launched)


def test_a_copy_is_computed_anew_and_other_rows_are_not(monkeypatch):
    monkeypatch.setattr(small, "LARGEST", 0)
    x, y = torch.randn(2, 40, 30), torch.randn(2, 50, 30)
    y[1, 7] = x[1, 3]
    flags = []
    launch = configurations.launch

    def keep(kernel, grid, arguments):
        if arguments.get("EXACT"):
            flags.append(arguments["flags"].clone())
        return launch(kernel, grid, arguments)

    with mock.patch.object(configurations, "launch", keep):
        value = ops.kernel_mean(x, y, Energy(), backend="triton")
    want = ops.kernel_mean(x.double(), y.double(), Energy(), backend="dense")
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)
    (rows,) = flags
    assert rows.view(-1).nonzero().tolist() == [[43]]


def test_rows_of_shares_and_ragged_clouds_are_computed_anew(monkeypatch):
    """Of several tiles, clouds and shares of the columns."""
    monkeypatch.setattr(configurations, "processors", lambda _: 400)
    lengths = [33, 0, 70]
    x = two_clusters(20, sum(lengths), torch.float32)[0].requires_grad_()
    y = two_clusters(20, 1000, torch.float32)[0].requires_grad_()
    offsets = torch.tensor([0, 33, 33, 103]), torch.tensor([0, 400, 450, 1000])
    wide = [t.detach().double().requires_grad_() for t in (x, y)]

    def operation(a, b, **options):
        return ops.kernel_mean(
            ragged(a, offset=offsets[0][1:]),
            ragged(b, offset=offsets[1][1:]),
            Energy(),
            **options,
        )

    results = []
    for pair, backend in (((x, y), "triton"), (wide, "dense")):
        value = operation(*pair, backend=backend)
        results.append([value.values(), *torch.autograd.grad(value.values().sum(), pair)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_parts_add_up_to_the_points():
    points, _ = prepare.prepare_pair(*(torch.randn(1, n, 20) * 1e3 for n in (30, 40)), None, None)
    parts = points.values.view(30, 3, 32)
    assert torch.equal(parts, parts.bfloat16().float())
    centered = points.given - points.given[:1]
    shifted = points.whole()[:, :20] - points.whole()[:1, :20]
    torch.testing.assert_close(shifted, centered, rtol=0, atol=1e-3)
    assert (points.whole()[:, 20:] == 0).all()
