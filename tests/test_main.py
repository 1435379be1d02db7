"""``python -m fad_loss``: what it says about this machine, and that it notices a wrong kernel."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fad_loss import __main__ as main_module
from fad_loss import ops
from fad_loss.ops import _backends

BACKENDS = ("tiled", "dense")


@pytest.fixture
def only_float32(monkeypatch):
    monkeypatch.setattr(main_module, "FLOATS", (torch.float32,))


def test_passes_on_this_machine_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "fad_loss"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    for expected in ("fad_loss", "torch", "triton", "cpu", "not triton: ", "not dense: "):
        assert expected in done.stdout
    for operation in ("nearest", "knn", "kernel_mean", "softmin"):
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            for backend in BACKENDS:
                assert any(
                    operation in line and f" {backend} " in line and dtype in line
                    for line in done.stdout.splitlines()
                )
    assert "checks passed" in done.stdout


@pytest.mark.usefixtures("only_float32")
def test_json_holds_the_same(capsys):
    assert main_module.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"]["cpu"]["knn"]["uses"] in BACKENDS
    assert "CUDA" in report["backends"]["cpu"]["knn"]["not"]["triton"]
    assert len(report["self_check"]) == len(main_module._operations()) * len(BACKENDS)
    for check in report["self_check"]:
        assert check["passed"]
        assert check["error"] <= check["bound"]


def _off_by(factor, *, gradient_only=False):
    real = ops.softmin

    def wrong(*args, backend, **kwargs):
        result = real(*args, backend=backend, **kwargs)
        if backend != "tiled":
            return result
        if gradient_only:
            return result.detach() * (1 - factor) + result * factor
        return result * factor

    return wrong


@pytest.mark.usefixtures("only_float32")
@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_wrong_kernel_fails_the_check(monkeypatch, capsys, gradient_only):
    monkeypatch.setattr(ops, "softmin", _off_by(1.001, gradient_only=gradient_only))
    assert main_module.main([]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert failed
    assert all("softmin" in line and "tiled" in line for line in failed)


@pytest.mark.usefixtures("only_float32")
def test_not_a_number_fails_the_check(monkeypatch, capsys):
    monkeypatch.setattr(ops, "softmin", _off_by(float("nan")))
    assert main_module.main([]) == 1
    assert "nan" in capsys.readouterr().out


@pytest.mark.usefixtures("only_float32")
def test_a_crash_is_reported_and_the_rest_still_checked(monkeypatch, capsys):
    def crashes(*args, backend, **kwargs):
        message = "no kernel image is available"
        raise RuntimeError(message)

    monkeypatch.setattr(ops, "knn", crashes)
    assert main_module.main([]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no kernel image is available" in out
    assert sum(line.endswith("   ok") for line in out.splitlines()) == 2 * (
        len(main_module._operations()) - 1
    )


@pytest.mark.usefixtures("only_float32")
def test_a_new_backend_is_checked_as_soon_as_it_can_run(monkeypatch):
    real = _backends.why_not
    monkeypatch.setattr(
        _backends, "why_not", lambda name, device: None if name == "triton" else real(name, device)
    )
    outcomes = list(main_module.self_check(torch.device("cpu")))
    triton = [outcome for outcome in outcomes if outcome.backend == "triton"]
    assert len(triton) == len(main_module._operations())


def test_a_result_of_the_wrong_shape_is_infinitely_wrong():
    a, b = torch.ones(2), torch.ones(3)
    assert main_module._relative(a, b, each=True) == float("inf")
    assert main_module._relative(a[:0], b[:0], each=True) == 0
