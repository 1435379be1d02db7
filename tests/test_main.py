"""``python -m fad_loss``: what it says about this machine, and that it notices a wrong kernel."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fad_loss import __main__ as main_module
from fad_loss import _selfcheck, ops
from fad_loss.ops import _backends

BACKENDS = ("tiled", "dense")


@pytest.fixture
def only_float32(monkeypatch):
    monkeypatch.setattr(_selfcheck, "FLOATS", (torch.float32,))


def test_passes_on_this_machine_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "fad_loss", "--verbose"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Neither a warning of PyTorch's nor one of ours.
    assert done.stderr == ""
    assert done.stdout.startswith("versions\n")
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
    assert done.stdout.splitlines()[-1].endswith("checks passed: everything is right")


@pytest.mark.usefixtures("only_float32")
def test_without_verbose_a_summary(capsys):
    assert main_module.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("self-check"))
    count = len(_selfcheck._operations())
    assert len(lines) - start == 1 + len(BACKENDS) + 2
    for line, backend in zip(lines[start + 1 :], BACKENDS, strict=False):
        assert f"{backend}   {count} of {count} passed, the nearest at " in line
        assert 0 < int(line.split("%")[0].split()[-1]) <= 100
    assert lines[-1] == f"{2 * count} of {2 * count} checks passed: everything is right"


@pytest.mark.usefixtures("only_float32")
def test_json_holds_the_same(capsys):
    assert main_module.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"]["cpu"]["knn"]["uses"] in BACKENDS
    assert "CUDA" in report["backends"]["cpu"]["knn"]["not"]["triton"]
    assert len(report["self_check"]) == len(_selfcheck._operations()) * len(BACKENDS)
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
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if "FAILED" in line]
    assert failed
    assert lines[-1].endswith("checks passed: SOMETHING IS WRONG")
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
    assert main_module.main(["--verbose"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no kernel image is available" in out
    assert sum(line.endswith("   ok") for line in out.splitlines()) == 2 * (
        len(_selfcheck._operations()) - 1
    )


def test_dtypes_that_a_backend_refuses_are_not_checked(monkeypatch):
    """On an NVIDIA GPU the kernels run, but not in float64."""
    real = _backends.why_not

    def on_gpu(name, device, dtype=None):
        return real(name, torch.device("cuda", 0), dtype)

    monkeypatch.setattr(_backends, "why_not", on_gpu)
    monkeypatch.setattr(_backends, "_missing", lambda device: None)
    monkeypatch.setattr(_selfcheck, "_check", lambda *arguments: arguments)
    checks = [arguments[-2:] for arguments in _selfcheck.self_check(torch.device("cpu"))]
    count = len(_selfcheck._operations())
    dtypes = [dtype for dtype, backend in checks if backend == "triton"]
    assert sorted(map(str, dtypes)) == sorted(
        count * ["torch.float32"] + count * ["torch.bfloat16"] + count * ["torch.float16"]
    )
    assert len(checks) == count * (3 + 4 + 4)


def test_tolerances_of_the_kernels_are_their_own(monkeypatch):
    """Three tf32 products err more than float32 does, whichever way the user asks for precision."""
    run = _selfcheck._operations()["softmin"]
    monkeypatch.setattr(_selfcheck, "_evaluate", lambda *_: (torch.zeros(1), []))
    cpu = torch.device("cpu")
    bound = {
        backend: _selfcheck._check("softmin", run, cpu, torch.float32, backend)
        for backend in ("tiled", "triton")
    }
    assert bound["tiled"].bound < bound["triton"].bound <= 1e-4
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        coarse = _selfcheck._check("softmin", run, cpu, torch.float32, "triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert coarse.bound == 2e-3


def test_a_result_of_the_wrong_shape_is_infinitely_wrong():
    a, b = torch.ones(2), torch.ones(3)
    assert _selfcheck._relative(a, b, each=True) == float("inf")
    assert _selfcheck._relative(a[:0], b[:0], each=True) == 0
