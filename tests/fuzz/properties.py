"""All properties by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import operations

PROPERTIES: dict[str, Callable[[Any], None]] = {
    "search": operations.search,
    "kernel_mean": operations.kernel_mean,
    "softmin": operations.softmin,
    "mistakes": operations.mistakes,
}
