"""Which values may be looked at, and how errors are worded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fad_loss
from fad_loss import _checks, ragged
from fad_loss._checks import check_finite, check_tensor, look
from fad_loss._errors import choose, describe


def test_only_concrete_cpu_values_are_looked_at():
    assert look(torch.zeros(2))
    assert look(ragged(torch.zeros(2, 3), lengths=[2]))
    assert not look(torch.zeros(2, device="meta"))
    with FakeTensorMode():
        assert not look(torch.zeros(2))
    seen = []
    torch.vmap(lambda t: (seen.append(look(t)), t)[1])(torch.zeros(2, 2))
    assert seen == [False]


def test_nothing_is_looked_at_while_compiling():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(t):
        return t + int(look(t))

    assert compiled(torch.zeros(1)) == 0


class OnGpu(torch.Tensor):
    """A tensor that says that it lives on an accelerator."""

    @property
    def device(self):
        return torch.device("cuda:0")


def test_debug_looks_at_values_on_accelerators():
    t = torch.tensor([torch.nan]).as_subclass(OnGpu)
    assert not look(t)
    check_finite("student", t)
    fad_loss.debug()
    try:
        assert look(t)
        with pytest.raises(ValueError, match="student: 1 of 1 values are NaN"):
            check_finite("student", t)
        assert not look(torch.zeros(1, device="meta"))
    finally:
        fad_loss.debug(False)
    assert not look(t)


@pytest.mark.parametrize("value, expected", [(None, False), ("0", False), ("", False), ("1", True)])
def test_debug_by_environment(value, expected):
    environment = {name: v for name, v in os.environ.items() if name != "FAD_LOSS_DEBUG"}
    if value is not None:
        environment["FAD_LOSS_DEBUG"] = value
    code = (
        "import sys, torch; from torch import Tensor\n"
        "from fad_loss import _checks\n"
        "sys.exit(int(_checks._debug))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == int(expected)


@pytest.mark.parametrize(
    "value, expected",
    [
        (torch.zeros(2, 5, 3), "float32 of shape (2, 5, 3) on cpu"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "int64 of shape (4) on meta"),
        (torch.zeros(()), "float32 of shape () on cpu"),
        (3, "int 3"),
        (None, "NoneType None"),
        ("teacher", "str 'teacher'"),
    ],
)
def test_describe(value, expected):
    assert describe(value) == expected


def test_describe_ragged():
    assert describe(ragged(torch.zeros(3, 2), lengths=[1, 2])).startswith(
        "ragged float32 of shape (2, j"
    )


@pytest.mark.parametrize("dtype", _checks.FLOATS, ids=str)
def test_supported_dtypes(dtype):
    check_tensor("x", torch.zeros(1, dtype=dtype))
    check_finite("x", torch.zeros(1, dtype=dtype))
    for bad in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(
            ValueError, match=r"x: 2 of 3 values are NaN or infinite.*overflow in half"
        ):
            check_finite("x", torch.tensor([0.0, bad, bad], dtype=dtype))


@pytest.mark.parametrize(
    "value, message",
    [
        (
            torch.zeros(1, dtype=torch.int32),
            r"x: expected float32, .*got int32 of shape \(1\).*x.float\(\)",
        ),
        (torch.zeros(1, dtype=torch.complex64), "x: .*complex64"),
        ([1.0], "x: expected a torch.Tensor, got list"),
        (None, "x: expected a torch.Tensor, got NoneType"),
    ],
)
def test_unsupported_dtypes(value, message):
    with pytest.raises(TypeError, match=message):
        check_tensor("x", value)


def test_infinities_of_opposite_sign_do_not_cancel():
    with pytest.raises(ValueError, match="x: 2 of 3"):
        check_finite("x", torch.tensor([torch.inf, -torch.inf, 1.0]))


def test_a_sum_that_overflows_is_fine():
    check_finite("x", torch.full((10,), 1e308, dtype=torch.float64))
    check_finite("x", torch.zeros(0, 3))
    check_finite("x", torch.full((2,), torch.nan, device="meta"))


def test_choose():
    table = {"hinge": 1, "wasserstein": 2}
    assert choose("objective", "hinge", table) == 1
    with pytest.raises(
        ValueError,
        match=r"objective: .* 'hinge', 'wasserstein', got 'hing'; did you mean 'hinge'\?",
    ):
        choose("objective", "hing", table)
    with pytest.raises(ValueError, match=r"got 'xyz'$"):
        choose("objective", "xyz", table)
    with pytest.raises(ValueError, match="got 3"):
        choose("objective", 3, table)
