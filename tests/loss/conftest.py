"""What the tests of the loss share."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items):
    # Most tests look at values alone; test_advice.py looks at the warning.
    for item in items:
        if item.path.parent.name == "loss" and item.path.stem != "test_advice":
            item.add_marker(pytest.mark.filterwarnings("ignore:.*carry no graph"))
