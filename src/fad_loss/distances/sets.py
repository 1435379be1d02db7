"""What all distances do first and last: check the sets, and reduce over the clouds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fad_loss._checks import check_tensor, look
from fad_loss._errors import choose, describe
from fad_loss._ragged import cloud_lengths, is_ragged

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "none": lambda per_cloud: per_cloud,
}


def reduce(per_cloud: Tensor, reduction: str) -> Tensor:
    """Of the distances of all clouds, what the caller asked for."""
    return choose("reduction", reduction, REDUCTIONS)(per_cloud)


def check_sets(x: Tensor, y: Tensor) -> None:
    """The operators check everything but this: a distance to an empty set does not exist."""
    for name, t in (("x", x), ("y", y)):
        check_tensor(name, t)
        if t.dim() != 3:
            continue  # the operator words this error
        lengths = cloud_lengths(t) if is_ragged(t) else None
        if lengths is not None:
            empty = look(lengths) and bool((lengths == 0).any())
        else:
            empty = t.shape[1] == 0
        if empty or t.shape[0] == 0:
            message = (
                f"{name}: expected at least one cloud, and at least one point in every cloud, got "
                f"{describe(t)}; leave empty clouds out of the batch"
            )
            raise ValueError(message)
