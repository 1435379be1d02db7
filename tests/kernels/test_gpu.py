"""The kernels on a GPU: every entry of the table against float64, and how they behave as launches.

`tests/ops` runs the whole suite of the operations with ``backend="triton"``, too; here is what only
concerns kernels. All of it is deselected without ``-m gpu``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from fad_loss import ops
from fad_loss.ops import Energy, Gaussian, Laplacian, _dense, _tiled

pytestmark = pytest.mark.gpu

EPSILON = [0.3, 1.0]
INPUTS = {
    "direct": (torch.float32, "highest", 1e-5),
    "bf16x6": (torch.float32, "highest", 1e-5),
    "tf32": (torch.float32, "high", 5e-3),
    "half": (torch.bfloat16, "highest", 2e-2),
}


def table():
    """Every entry of the table; known only where Triton is, so counted generously elsewhere."""
    if find_spec("triton") is None:
        return []
    configurations = import_module("fad_loss.ops._triton.configurations")
    return [(key, n) for key, entries in configurations.TABLE.items() for n in range(len(entries))]


@pytest.fixture(autouse=True)
def _precision():
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def cuda_clouds(B, N, M, C, dtype=torch.float32):
    x = (torch.randn(B, N, C, device="cuda") / C**0.5 + 1).to(dtype)
    y = (torch.randn(B, M, C, device="cuda") / C**0.5 + 1).to(dtype)
    return x.requires_grad_(), y.requires_grad_()


def close(got, want, tolerance):
    scale = float(want.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)


# How often a kernel's result is differentiated: what is beyond has entries of its own.
ORDERS = {"reduce": 0, "small_reduce": 0, "backward": 1, "small_backward": 1, "double_backward": 2}


def everything(x, y, backend, order=2):
    """Values, first and second derivatives of the smooth operations, up to an order."""
    results = []
    for value in (
        ops.softmin(x, y, EPSILON, backend=backend),
        ops.kernel_mean(x, y, Gaussian([0.5, 1.0]), backend=backend),
        ops.kernel_mean(x, y, Laplacian(1.0), backend=backend),
    ):
        results.append(value)
        if order > 0:
            gradients = torch.autograd.grad(value.sum(), (x, y), create_graph=order > 1)
            results += gradients
        if order > 1:
            penalty = sum(g.double().square().sum() for g in gradients)
            results += torch.autograd.grad(penalty, (x, y))
    return [r.detach() for r in results]


@pytest.mark.parametrize("C", [3, 17, 64, 100, 256, 1024])
@pytest.mark.parametrize("key, number", table(), ids=str)
def test_every_entry_of_the_table(key, number, C, monkeypatch):
    kernel, form = key
    if (form == "direct") != (C == 3):
        return
    configurations = import_module("fad_loss.ops._triton.configurations")
    stored = import_module("fad_loss.ops._triton.prepare").padded(C)
    small = kernel.startswith("small_")
    if not small and number not in configurations.fitting(configurations.TABLE[key], stored):
        return
    entry, original = configurations.TABLE[key][number], configurations.entries
    monkeypatch.setattr(
        configurations,
        "entries",
        lambda *wanted: (entry,) if wanted[:2] == key else original(*wanted),
    )
    dtype, precision, tolerance = INPUTS[form]
    torch.set_float32_matmul_precision(precision)
    sizes = (entry.columns - 5, entry.columns) if small else (300, 517)
    x, y = cuda_clouds(2, *sizes, C, dtype)
    wide = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    if kernel in {"scan", "shortlist", "longlist"}:
        k = {"scan": 1, "shortlist": 20, "longlist": 64}[kernel]
        distance, index = ops.knn(x, y, k, backend="triton")
        want, wanted = ops.knn(*wide, k, backend="tiled")
        close(distance, want, 1e-6)
        assert (index != wanted).float().mean() < 0.01
        return
    order = ORDERS[kernel]
    pairs = zip(everything(x, y, "triton", order), everything(*wide, "tiled", order), strict=True)
    for got, want in pairs:
        close(got, want, tolerance)


@pytest.mark.parametrize("C", [3, 64, 256, 1024])
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("k", [1, 20])
def test_exact_where_distances_cancel(C, precision, k):
    torch.set_float32_matmul_precision(precision)
    x = torch.randn(1, 2000, C, device="cuda") + 4
    y = x[:, torch.randperm(2000, device="cuda")] + 0.05 * torch.randn_like(x)
    distance, _ = ops.knn(x, y, k, backend="triton")
    want, _ = ops.knn(x.double(), y.double(), k, backend="tiled")
    torch.testing.assert_close(distance.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("N, M", [(70, 200_000), (8192, 8192)])
def test_columns_that_are_shared_out(N, M):
    """Few rows beside many columns: the shares' results come together as one."""
    x, y = cuda_clouds(1, N, M, 24)
    wide = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    for operation in (
        lambda x, y, backend: ops.softmin(x, y, EPSILON, backend=backend),
        lambda x, y, backend: ops.kernel_mean(x, y, Gaussian([0.5, 1.0]), backend=backend),
        lambda x, y, backend: ops.knn(x, y, 20, backend=backend)[0],
        lambda x, y, backend: ops.nearest(x, y, backend=backend)[0],
    ):
        got, want = operation(x, y, "triton"), operation(*wide, "tiled")
        close(got, want, 1e-5)
        gradients = torch.autograd.grad(got.sum(), (x, y))
        for a, b in zip(gradients, torch.autograd.grad(want.sum(), wide), strict=True):
            close(a, b, 1e-4)


def test_repeatable_and_deterministic():
    x, y = cuda_clouds(3, 1000, 777, 64)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = everything(x, y, "triton"), everything(x, y, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_synchronisation():
    x, y = cuda_clouds(3, 500, 400, 64)
    everything(x, y, "triton")
    everything(x[:, :100], y[:, :70], "triton")
    ops.knn(x, y, 20, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(x, y, "triton")
        everything(x[:, :100], y[:, :70], "triton")
        ops.knn(x, y, 20, backend="triton")
        ops.nearest(x, y, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ragged_without_synchronisation():
    module = import_module("fad_loss.ops._triton")
    offsets = torch.tensor([0, 100, 100, 450, 451], device="cuda")
    x = torch.randn(451, 64, device="cuda")
    run = lambda: (  # noqa: E731
        module.softmin(x, x, None, EPSILON, True, offsets, offsets)[0],
        *module.knn(x, x, 5, True, offsets, offsets),
    )
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, distance, index = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, *_ = _tiled.softmin(x.double(), x.double(), None, EPSILON, True, offsets, offsets)
    assert torch.equal(out.isinf(), want.isinf())
    close(out[:450], want[:450], 1e-5)
    reference = lambda a, b: _dense.knn(a, b, 5, exclude_self=True)  # noqa: E731
    want, wanted = _dense.per_cloud(reference, x.double(), offsets, offsets, x.double())
    assert torch.equal(index[:450], wanted[:450])
    torch.testing.assert_close(distance.double(), want, rtol=1e-6, atol=0)


def test_graph_capture():
    x, y = cuda_clouds(2, 500, 400, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(x, y, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(x, y, "triton")
    with torch.no_grad():
        x.copy_(torch.randn_like(x) / 8)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, everything(x, y, "triton"), strict=True):
        assert torch.equal(got, want)


def test_another_stream():
    x, y = cuda_clouds(1, 2000, 2000, 64)
    want = ops.softmin(x, y, 0.5, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.softmin(x, y, 0.5, backend="triton")
    stream.synchronize()
    assert torch.equal(got, want)


def test_a_new_size_compiles_nothing():
    kernels = import_module("fad_loss.ops._triton.smooth_minimum").softmin_kernel
    count = lambda: sum(len(cached[0]) for cached in kernels.device_caches.values())  # noqa: E731
    sizes = [(1000, 1000), (1024, 512), (1, 16), (333, 1)]
    for N, M in sizes[:2]:
        ops.softmin(*cuda_clouds(1, N, M, 64), 0.5, backend="triton")
    before = count()
    for N, M in sizes:
        ops.softmin(*cuda_clouds(1, N, M, 64), 0.5, backend="triton")
    # Few rows may choose smaller tiles: one more.
    assert count() <= before + 1


def test_more_than_two_to_the_31_pairs():
    N = 60_000
    x, y = cuda_clouds(1, N, N, 32)
    rows = torch.tensor([0, 1, N // 2, N - 1], device="cuda")
    wide = x.detach()[:, rows].double(), y.detach().double()
    close(
        ops.kernel_mean(x, y, Energy(), backend="triton")[:, rows].detach(),
        ops.kernel_mean(*wide, Energy(), backend="tiled"),
        1e-5,
    )
    distance, index = ops.nearest(x, y, backend="triton")
    want, wanted = ops.nearest(*wide, backend="tiled")
    close(distance[:, rows].detach(), want, 1e-6)
    assert torch.equal(index[:, rows], wanted)


def test_more_than_two_to_the_31_elements():
    N, C = 17_000_000, 128
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.fail("this needs 24 GiB of free GPU memory")
    x = torch.randn(1, N, C, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(1, 40, C, device="cuda", dtype=torch.bfloat16)
    got = ops.softmin(x, y, 1.0, backend="triton")[:, -5:]
    want = ops.softmin(x[:, -5:].double(), y.double(), 1.0, backend="tiled")
    close(got, want, 1e-4)


def test_memory_of_a_hundred_thousand_points():
    N, C = 100_000, 256
    torch.set_float32_matmul_precision("high")
    x, y = cuda_clouds(1, N, N, C)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.softmin(x, y, 0.5, backend="triton").sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1e9


def test_tuning_is_remembered(tmp_path):
    code = (
        "import torch; from fad_loss import ops; x = torch.randn(1, 3000, 64, device='cuda');"
        "torch.set_float32_matmul_precision('high'); ops.softmin(x, x, 0.5, backend='triton')"
    )
    environment = {**os.environ, "FAD_LOSS_TUNE": "1", "FAD_LOSS_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    choices = json.loads((tmp_path / "tiles.json").read_text())
    assert any("reduce/tf32/64" in bucket for bucket in choices)
