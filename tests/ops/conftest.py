"""Fixtures of the operations' tests: every backend that runs here, and the device it runs on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from op_cases import BACKENDS, FUSED, device_of

HERE = Path(__file__).parent


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


# Tests that are in float64 throughout, by module: the kernels, which stop at float32, have the
# comparisons of tests/kernels in their place.
IN_FLOAT64 = {
    "test_bounds": {
        "test_coinciding_clusters_in_float64",
    },
    "test_gradients": {
        "test_a_cloud_with_itself",
        "test_derivatives_where_points_coincide_are_those_of_the_others",
        "test_every_argument",
        "test_every_entry_of_the_jacobians",
        "test_ragged",
        "test_second_derivatives_equal_those_of_the_reference",
    },
    "test_laws": {
        "test_all_backends_agree",
        "test_closed_form_on_a_simplex",
        "test_closed_form_on_one_distance",
        "test_points_left_out_by_their_log_weight",
        "test_relations_between_the_operations",
        "test_rotation_and_scale",
        "test_symmetry",
        "test_the_order_of_points_does_not_matter",
        "test_translation_does_not_matter",
    },
    "test_library": {
        "test_gradient_through_vmap",
    },
    "test_ragged_clouds": {
        "test_a_cloud_with_itself",
        "test_neighbors_within_a_cloud",
        "test_searches",
        "test_smooth_operations",
    },
    "test_reference": {
        "test_a_cloud_with_itself",
        "test_any_strides",
        "test_only_some_inputs_require_grad",
    },
    "test_search": {
        "test_closed_form_on_a_line",
        "test_gradcheck",
        "test_gradients",
        "test_gradients_neighbor_by_neighbor",
        "test_ties_go_to_the_lowest_index",
    },
}


def _refused(item):
    """Whether a test asks the kernels for the dtype that they refuse (`_backends.why_not`)."""
    parameters = getattr(item, "callspec", None)
    if parameters is None or "triton" not in parameters.params.values():
        return False
    named = IN_FLOAT64.get(item.module.__name__.rpartition(".")[2], ())
    return torch.float64 in parameters.params.values() or item.originalname in named


def pytest_collection_modifyitems(config, items):
    refused = [item for item in items if item.path.parent == HERE and _refused(item)]
    config.hook.pytest_deselected(items=refused)
    items[:] = [item for item in items if item not in refused]
