"""All properties by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import losses, operations, sets

PROPERTIES: dict[str, Callable[[Any], None]] = {
    "search": operations.search,
    "kernel_mean": operations.kernel_mean,
    "softmin": operations.softmin,
    "mistakes": operations.mistakes,
    "set_to_set": sets.set_to_set,
    "sinkhorn": sets.sinkhorn,
    "similarity": sets.similarity,
    "metric_of_sets": sets.metric_of_sets,
    "teacher": losses.teacher,
    "learned": losses.learned,
    "loss": losses.loss,
}

# What takes long runs so many times less often.
SLOW = {"sinkhorn": 20, "loss": 2}
