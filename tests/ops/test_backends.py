"""Which backend runs, and the reason why another one cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fad_loss.ops import _backends

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine on which everything is as the kernels want it."""
    triton = SimpleNamespace(__version__="3.6.0")
    monkeypatch.setattr(_backends, "find_spec", lambda name: name)
    monkeypatch.setattr(_backends, "import_module", lambda name: triton)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return triton


def test_the_kernels_are_chosen_where_they_run():
    assert _backends.select("auto", CUDA, torch.float32) == "triton"
    assert _backends.select("triton", CUDA, torch.bfloat16) == "triton"
    assert _backends.select("auto", torch.device("cpu"), torch.float32) == "tiled"


def lack(machine, monkeypatch, what):
    if what == "old triton":
        machine.__version__ = "3.5.1"
    elif what == "no triton":
        monkeypatch.setattr(_backends, "find_spec", lambda name: None)
    elif what == "rocm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


@pytest.mark.parametrize(
    "what, reason",
    [
        ("old triton", "need Triton 3.6 or newer, and this is 3.5.1"),
        ("no triton", "not installed"),
        ("rocm", "NVIDIA"),
        ("old gpu", "compute capability 8.0"),
    ],
)
def test_what_is_missing_is_said(machine, monkeypatch, what, reason):
    lack(machine, monkeypatch, what)
    assert _backends.select("auto", CUDA, torch.float32) == "tiled"
    with pytest.raises(RuntimeError, match=reason):
        _backends.select("triton", CUDA, torch.float32)


def test_float64_is_not_for_the_kernels():
    assert _backends.select("auto", CUDA, torch.float64) == "tiled"
    with pytest.raises(RuntimeError, match="float64"):
        _backends.select("triton", CUDA, torch.float64)
