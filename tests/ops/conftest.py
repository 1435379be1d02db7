"""Fixtures of the operations' tests: every backend that runs here, and the device it runs on."""

from __future__ import annotations

import pytest
from op_cases import BACKENDS, FUSED, device_of


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=FUSED)
def fused(request):
    """A backend that is an operator to PyTorch, so not the reference."""
    return request.param


@pytest.fixture
def device(request):
    name = "backend" if "backend" in request.fixturenames else "fused"
    return device_of(request.getfixturevalue(name))
