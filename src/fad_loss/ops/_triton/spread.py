"""Sums of rows that belong together, in a fixed order: what neighbors pull (`_library.py`).

Rows are sorted by where they go, and a program adds up those of its own, one after another in the
order in which they came: no atomics, so that the result is repeatable.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fad_loss.ops._triton.launch import INTERPRETED, launch, on_device

# Rows of the result, and channels of them, that a program has.
ROWS = 32 if INTERPRETED else 4
CHANNELS = 128


@triton.jit(do_not_specialize=["rows"])
def spread_kernel(
    values,
    order,
    starts,
    out,
    rows,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """out[i] = the sum of values[order[n]] for n from starts[i] to starts[i + 1]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    present = (channels < C)[None, :]
    first = tl.load(starts + row, row < rows, 0)
    end = tl.load(starts + row + 1, row < rows, 0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for n in range(tl.max(end - first, 0)):
        own = first + n < end
        number = tl.load(order + first + n, own, 0)
        place = values + (number[:, None] * C + channels[None, :])
        total += tl.load(place, own[:, None] & present, 0.0)
    target = out + (row[:, None] * C + channels[None, :])
    tl.store(target, total, (row < rows)[:, None] & present)


def add_at(values: Tensor, where: Tensor, rows: int) -> Tensor:
    """The sums (rows, C) of the values (E, C), float32, that go to each row."""
    channels = values.shape[1]
    out = values.new_empty(rows, channels)
    with on_device(values):
        # Half of the digits take half of the time to sort.
        keys = where.int() if rows < 2**31 else where
        found, order = torch.sort(keys, stable=True)
        numbers = torch.arange(rows + 1, dtype=found.dtype, device=found.device)
        block = min(triton.next_power_of_2(channels), CHANNELS)
        arguments = {
            "values": values.contiguous(),
            "order": order,
            "starts": torch.searchsorted(found, numbers),
            "out": out,
            "rows": rows,
            "C": channels,
            "BLOCK_ROWS": ROWS,
            "BLOCK_CHANNELS": block,
            "num_warps": 4,
        }
        launch(spread_kernel, (triton.cdiv(rows, ROWS), triton.cdiv(channels, block)), arguments)
    return out
