"""Which backend runs, and the reason why another one cannot."""

from __future__ import annotations

import importlib
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch

from fad_loss.ops import _backends

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine on which everything is as the kernels want it."""
    triton = SimpleNamespace(__version__="3.3.1")
    monkeypatch.setattr(_backends, "find_spec", lambda name: name)
    monkeypatch.setattr(_backends, "import_module", lambda name: triton)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("FAD_LOSS_ROCM", raising=False)
    forget()
    yield triton
    forget()


def forget():
    _backends._look_for.cache_clear()
    _backends._announce.cache_clear()


def test_the_kernels_are_chosen_where_they_run():
    assert _backends.select("auto", CUDA, torch.float32) == "triton"
    assert _backends.select("triton", CUDA, torch.bfloat16) == "triton"
    assert _backends.select("auto", torch.device("cpu"), torch.float32) == "tiled"


def lack(machine, monkeypatch, what):
    if what == "old triton":
        machine.__version__ = "3.2.0"
    elif what == "no triton":
        monkeypatch.setattr(_backends, "find_spec", lambda name: None)
    elif what == "rocm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


@pytest.mark.parametrize(
    "what, reason",
    [
        ("old triton", "need Triton 3.3 or newer, and this is 3.2.0"),
        ("no triton", "not installed"),
        ("rocm", "NVIDIA.*FAD_LOSS_ROCM=1"),
        ("old gpu", "compute capability 8.0"),
    ],
)
def test_what_is_missing_is_said_once_by_auto_and_always_by_name(
    machine, monkeypatch, what, reason
):
    lack(machine, monkeypatch, what)
    with pytest.warns(UserWarning, match=f"cuda:0 run as tiles.*{reason}"):
        assert _backends.select("auto", CUDA, torch.float32) == "tiled"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.select("auto", CUDA, torch.float32) == "tiled"
        assert _backends.select("tiled", CUDA, torch.float32) == "tiled"
    with pytest.raises(RuntimeError, match=reason):
        _backends.select("triton", CUDA, torch.float32)


def test_what_runs_is_said_at_the_first_call(caplog):
    caplog.set_level(logging.INFO, logger="fad_loss")
    for _ in range(3):
        _backends.select("auto", CUDA, torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "operations on cuda:0 run as Triton kernels"
    ]


def test_rocm_runs_behind_a_switch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setenv("FAD_LOSS_ROCM", "1")
    assert _backends.select("auto", CUDA, torch.float32) == "triton"


def test_float64_is_not_for_the_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.select("auto", CUDA, torch.float64) == "tiled"
    with pytest.raises(RuntimeError, match="float64"):
        _backends.select("triton", CUDA, torch.float64)


@pytest.mark.parametrize("oldest, chosen", [((3, 3), 1.0), ((99, 0), 2.0)])
def test_the_choice_is_made_while_a_graph_is_traced(monkeypatch, oldest, chosen):
    """In one graph: nothing is imported, and no device asked, by what is traced."""
    monkeypatch.setattr(_backends, "import_module", importlib.import_module)
    monkeypatch.setattr(_backends, "OLDEST_TRITON", oldest)

    def f(x):
        backend = _backends.select("auto", CUDA, x.dtype)
        return x + (1.0 if backend == "triton" else 2.0)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(f, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(())) == chosen
    if chosen == 1.0:
        named = torch.compile(
            lambda x: x + (_backends.select("triton", CUDA, x.dtype) == "triton"),
            fullgraph=True,
            backend="eager",
        )
        assert named(torch.zeros(())) == 1
