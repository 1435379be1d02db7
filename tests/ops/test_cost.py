"""Predictions of time and memory: their arithmetic, where constants come from, and how far off."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fad_loss import __main__ as main_module
from fad_loss import _measure, ops, ragged
from fad_loss.ops import _backends, _cost

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FAD_LOSS_CACHE", str(tmp_path))
    _cost.measurements.cache_clear()
    yield
    _cost.measurements.cache_clear()


def clouds(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


def predict(operation, N, C, **options):
    options = {"backend": "tiled", "device": "cpu", **options}
    return ops.cost(operation, clouds(2, N, C), clouds(2, N, C), **options)


@pytest.mark.parametrize("operation", _cost.OPERATIONS)
def test_large_problems_grow_with_the_pairs_and_memory_with_the_points(operation):
    small, large = predict(operation, 20_000, 64), predict(operation, 40_000, 64)
    assert large.seconds / small.seconds == pytest.approx(4, rel=0.05)
    assert large.bytes / small.bytes < 2.01
    assert predict(operation, 20_000, 64, backward=True).bytes >= small.bytes


def test_what_costs_more():
    base = predict("softmin", 5000, 64).seconds
    assert predict("softmin", 5000, 64, backward=True).seconds > 2 * base
    assert predict("softmin", 5000, 64, temperatures=4).seconds > base
    assert predict("softmin", 5000, 256).seconds > base
    assert predict("knn", 5000, 64, k=50).seconds > predict("nearest", 5000, 64).seconds
    assert predict("softmin", 5000, 64, backend="dense").bytes > 4 * 2 * 5000**2 * 64


def test_the_memory_of_the_reference_is_what_it_takes():
    """The differences and their squares at once, and then the matrix of distances."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                sizes.append(made.untyped_storage().nbytes())
            return made

    x, y = torch.randn(1, 300, 40), torch.randn(1, 200, 40)
    with Watch():
        ops.softmin(x, y, 1.0, backend="dense")
    two_largest = sum(sorted(sizes)[-2:])
    assert ops.cost("softmin", x, y, backend="dense").bytes == pytest.approx(two_largest, rel=0.05)


def test_ragged_clouds_count_as_if_all_had_the_mean_length():
    x = ragged(torch.randn(60, 5), lengths=[10, 20, 30])
    even = torch.randn(3, 20, 5)
    got, want = ops.cost("nearest", x, x), ops.cost("nearest", even, even)
    assert got == want


def test_estimates_until_something_is_measured(monkeypatch, capsys):
    assert not ops.cost("nearest", clouds(1, 9, 3), clouds(1, 9, 3), device="cpu").measured
    monkeypatch.setattr(_measure, "SECONDS", 0.01)
    assert main_module.main(["--measure"]) == 0
    assert "machines.json" in capsys.readouterr().out
    _cost.measurements.cache_clear()
    assert ops.cost("nearest", clouds(1, 9, 3), clouds(1, 9, 3), device="cpu").measured


@pytest.mark.parametrize("content", ["", "[1]", '{"cpu": 3}', '{"cpu": {"speed": 1}}'])
def test_a_file_that_makes_no_sense(content, tmp_path):
    (tmp_path / "machines.json").write_text(content)
    assert _cost.machine_of(CPU) == _cost.ESTIMATES["cpu"]


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAD_LOSS_CACHE", str(tmp_path / "file"))
    assert _cost.remember(CPU, _cost.ESTIMATES["cpu"]) is None
    assert "not kept" in caplog.text


def test_measured_constants_predict_this_machine(monkeypatch):
    """Within a factor of 6, on a machine that may be busy."""
    monkeypatch.setattr(_measure, "SECONDS", 0.05)
    _cost.remember(CPU, _measure.measure(CPU))
    x = torch.randn(2, 1500, 48)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        ops.softmin(x, x, 1.0)
        times.append(time.perf_counter() - start)
    predicted = ops.cost("softmin", x, x)
    assert predicted.measured
    assert 1 / 6 < predicted.seconds / min(times) < 6


@pytest.mark.parametrize("major", [8, 9, 10, 12])
@pytest.mark.parametrize("C", [3, 64, 1024])
def test_auto_is_the_cheapest_on_gpus(major, C, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(_backends, "_missing", lambda _: None)
    for operation in _cost.OPERATIONS:
        costs = {
            backend: predict(operation, 4096, C, backend=backend, device="cuda")
            for backend in ("auto", "tiled", "dense")
        }
        assert costs["auto"].backend == "triton"
        assert costs["auto"].seconds == min(found.seconds for found in costs.values())


def test_errors():
    x = clouds(1, 9, 3)
    with pytest.raises(ValueError, match="operation: expected one of 'nearest'"):
        ops.cost("chamfer", x, x)
    with pytest.raises(ValueError, match="backend"):
        ops.cost("nearest", x, x, backend="fast")
    with pytest.raises(RuntimeError, match="meta"):
        ops.cost("nearest", x, x, backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"):
            ops.cost("nearest", x, x, device="cuda")
