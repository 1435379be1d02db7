"""What every test shares: a fixed seed, one thread, and repeatable generated problems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# Compiling, or a busy machine, makes single examples slow without making them wrong.
settings.register_profile(
    "fad_loss",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fad_loss")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
