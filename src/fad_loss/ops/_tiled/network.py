"""The smallest of many columns, for all rows at once: a sorting network of whole vectors.

A selection that looks at one row after the other, as `torch.topk` does, branches at every number. A
network compares the same places whatever the numbers are, so that one call of `torch.minimum` and
one of `torch.maximum` serve all rows.

Sources: odd-even merge sort and the bitonic merge, Batcher, *Sorting networks and their
applications*, AFIPS 1968.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smallest(keys: Tensor, count: int) -> Tensor:
    """The `count` smallest of each column, ascending, ``(count, n)``.

    Args:
        keys: ``(m, n)``, contiguous; overwritten.
        count: a power of two that divides m.
    """
    groups = keys.view(-1, count, keys.shape[1])
    memory = keys.new_empty(keys.numel() // 2)
    _sort(groups, memory)
    while len(groups) > 1:
        odd = groups[len(groups) // 2 * 2 :]
        groups = _merge(groups[: len(groups) // 2 * 2], memory)
        groups = torch.cat([groups, odd]) if len(odd) else groups
    return groups[0]


def _sort(groups: Tensor, memory: Tensor) -> None:
    """Sort every group of ``(groups, size, n)`` along the second axis."""
    size, n = groups.shape[1:]
    sorted_already = 1
    while sorted_already < size:
        pair = 2 * sorted_already
        blocks = groups.view(-1, pair, n)
        _compare(blocks[:, :sorted_already], blocks[:, sorted_already:], memory)
        step = sorted_already // 2
        while step:
            inner = blocks[:, step : pair - step].view(len(blocks), -1, 2, step, n)
            _compare(inner[:, :, 0], inner[:, :, 1], memory)
            step //= 2
        sorted_already = pair


def _merge(groups: Tensor, memory: Tensor) -> Tensor:
    """Of every two sorted groups, the lower half, sorted."""
    size, n = groups.shape[1:]
    pairs = groups.view(-1, 2, size, n)
    # Ascending against descending: the minima are the lower half, first rising, then falling.
    lower = torch.minimum(pairs[:, 0], pairs[:, 1].flip(1))
    step = size // 2
    while step:
        halves = lower.view(-1, 2, step, n)
        _compare(halves[:, 0], halves[:, 1], memory)
        step //= 2
    return lower


def _compare(low: Tensor, high: Tensor, memory: Tensor) -> None:
    """Put the smaller of every two into `low`, the larger into `high`."""
    smaller = memory[: low.numel()].view(low.shape)
    torch.minimum(low, high, out=smaller)
    torch.maximum(low, high, out=high)
    low.copy_(smaller)
