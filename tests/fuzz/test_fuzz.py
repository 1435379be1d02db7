"""A few random cases of every property; `python -m tests.fuzz` runs many."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .properties import PROPERTIES, SLOW


@pytest.mark.parametrize("name", PROPERTIES)
def test_random_cases(name):
    # Few of the many that `make fuzz` runs: all properties together stay below 90 seconds.
    @settings(max_examples=max(1, 40 // SLOW.get(name, 1)))
    @given(st.data())
    def run(data):
        PROPERTIES[name](data)

    run()
