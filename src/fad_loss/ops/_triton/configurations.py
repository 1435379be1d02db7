"""The tiles that each kernel may use: one table, chosen from by shape, device, or timing.

An entry is (BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_CHANNELS, warps, stages, SLAB), at most 8 for a kernel
and a format, the heuristic's choice first. BLOCK_CHANNELS and SLAB are upper bounds: points with
fewer channels use all they have. Every entry is compiled offline for sm_80, sm_90, sm_100 and
sm_120 by `make kernels-report`, which fails on spills; a tile of 64 rows is the least that wgmma
and tcgen05 take.

The choice depends on the shape only through buckets (the format, channels padded to 16, 32, 64, 128
or a multiple of 64, and whether there are enough rows to fill the device), so a new number of
points compiles nothing new. With FAD_LOSS_TUNE=1 the first call in a bucket times all its entries
(`tuning.py`); without it the first entry is taken, or the one with smaller tiles if there are few
rows. Small clouds (`small.py`) take the entry whose columns are just enough.
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton

from fad_loss.ops._triton.launch import INTERPRETED, launch
from fad_loss.ops._triton.prepare import DIRECT_CHANNELS, Format, Points, schedule
from fad_loss.ops._triton.tuning import fastest


class Tile(NamedTuple):
    """One configuration."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int
    slab: int = 0

    def arguments(self, channels: int) -> dict[str, Any]:
        """As kernel arguments, for points stored with so many channels."""
        block = self.channels
        while channels % block:
            block //= 2
        result: dict[str, Any] = {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_CHANNELS": block,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
        if self.slab:
            result["SLAB"] = min(self.slab, triton.next_power_of_2(channels))
        return result


# tf32x3 splits every operand in two, so its tiles are smaller.
TABLE: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("reduce", "direct"): (Tile(64, 32, 16, 8, 2),),
    ("reduce", "tf32x3"): (Tile(64, 64, 32, 8, 2),),
    ("reduce", "tf32"): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    ("reduce", "half"): (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 8, 3)),
    ("backward", "direct"): (Tile(64, 32, 16, 4, 2, 16),),
    ("backward", "tf32x3"): (Tile(64, 32, 16, 8, 2, 128),),
    ("backward", "tf32"): (Tile(64, 64, 32, 8, 2, 128),),
    ("backward", "half"): (Tile(64, 64, 64, 8, 2, 128),),
    ("double_backward", "direct"): (Tile(32, 32, 16, 4, 2, 16),),
    ("double_backward", "tf32x3"): (Tile(64, 16, 32, 8, 2, 64),),
    ("double_backward", "tf32"): (Tile(64, 32, 32, 8, 2, 128),),
    ("small_reduce", "direct"): (Tile(32, 64, 16, 4, 2), Tile(32, 128, 16, 4, 2)),
    ("small_reduce", "tf32x3"): (Tile(32, 64, 32, 4, 2), Tile(32, 128, 32, 4, 2)),
    ("small_reduce", "tf32"): (Tile(32, 64, 32, 4, 2), Tile(32, 128, 32, 4, 2)),
    ("small_reduce", "half"): (Tile(32, 64, 64, 4, 2), Tile(32, 128, 64, 4, 2)),
    ("small_backward", "direct"): (Tile(32, 64, 16, 4, 2), Tile(32, 128, 16, 8, 2)),
    ("small_backward", "tf32x3"): (Tile(32, 64, 16, 4, 2), Tile(32, 128, 16, 8, 2)),
    ("small_backward", "tf32"): (Tile(32, 64, 16, 4, 2), Tile(32, 128, 16, 4, 2)),
    ("small_backward", "half"): (Tile(32, 64, 16, 4, 2), Tile(32, 128, 16, 8, 2)),
    ("scan", "direct"): (Tile(64, 64, 16, 8, 2),),
    ("scan", "tf32x3"): (Tile(64, 64, 32, 8, 2),),
    ("scan", "tf32"): (Tile(64, 64, 32, 8, 3),),
    ("scan", "half"): (Tile(64, 64, 64, 8, 3),),
    ("shortlist", "direct"): (Tile(64, 64, 16, 8, 2),),
    ("shortlist", "tf32x3"): (Tile(64, 64, 32, 8, 2),),
    ("shortlist", "tf32"): (Tile(64, 64, 32, 8, 3),),
    ("shortlist", "half"): (Tile(64, 64, 64, 8, 3),),
    ("longlist", "direct"): (Tile(64, 32, 16, 8, 2),),
    ("longlist", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("longlist", "tf32"): (Tile(64, 32, 32, 8, 3),),
    ("longlist", "half"): (Tile(64, 32, 64, 8, 3),),
}

# What would spill on compute capability 8, where operands are in registers as well as the sums.
AMPERE: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("small_reduce", "tf32"): (Tile(32, 64, 32, 4, 2), Tile(32, 128, 16, 4, 2)),
    ("small_backward", "tf32"): (Tile(32, 64, 16, 4, 2),),
    ("reduce", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("reduce", "tf32"): (Tile(64, 64, 32, 8, 3),),
    ("reduce", "half"): (Tile(64, 64, 64, 8, 3),),
    ("backward", "tf32x3"): (Tile(64, 16, 32, 8, 2, 128),),
    ("backward", "tf32"): (Tile(64, 32, 32, 8, 2, 128),),
    ("backward", "half"): (Tile(64, 16, 64, 8, 2, 128),),
    ("double_backward", "tf32"): (Tile(64, 16, 32, 8, 2, 128),),
    ("scan", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("shortlist", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("shortlist", "tf32"): (Tile(64, 32, 32, 8, 3),),
    ("shortlist", "half"): (Tile(64, 32, 64, 8, 3),),
    ("longlist", "tf32x3"): (Tile(64, 16, 32, 8, 2),),
}


# And what would spill on compute capability 10 with Triton 3.6 or 3.9.
BLACKWELL: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("backward", "tf32"): (Tile(64, 32, 32, 8, 2, 128),),
    ("double_backward", "tf32"): (Tile(64, 16, 32, 8, 2, 128),),
    ("shortlist", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("longlist", "tf32"): (Tile(64, 32, 16, 8, 3),),
}


def entries(name: str, form: str, major: int) -> tuple[Tile, ...]:
    """The entries of a kernel and a format, for a compute capability; none if there is no such."""
    # Consumer Blackwell (12) has Ampere's matrix instructions and less shared memory than Hopper.
    own = {8: AMPERE, 10: BLACKWELL, 11: BLACKWELL, 12: AMPERE}.get(major, {})
    return own.get((name, form)) or TABLE.get((name, form), ())


def format_of(form: Format, channels: int) -> str:
    """The table's name for how points are multiplied."""
    if channels <= DIRECT_CHANNELS:
        return "direct"
    if form.storage != torch.float32:
        return "half"
    return form.precision


def smallest_that_holds(
    columns: int, name: str, form: Format, channels: int, device: torch.device
) -> Tile:
    """The entry with the fewest columns that are enough."""
    tiles = entries(name, format_of(form, channels), capability(device))
    return min((tile for tile in tiles if tile.columns >= columns), key=lambda tile: tile.columns)


def run(
    name: str,
    kernel: Any,
    rows: Points,
    columns: Points,
    arguments: dict[str, Any],
    *,
    slabs: bool = False,
) -> None:
    """Launch a kernel over all tiles of the rows, and slabs of channels, by the best entry."""
    form, channels = format_of(rows.format, rows.channels), rows.values.shape[1]
    tiles = entries(name, form, capability(rows.values.device))

    def start(entry: Tile) -> None:
        tile = entry.arguments(channels)
        count, where = schedule(rows.clouds, columns.clouds, entry.rows)
        parts = triton.cdiv(channels, tile["SLAB"]) if slabs else 1
        launch(kernel, (count, parts), {**arguments, **where, **tile})

    device = rows.values.device
    few = rows.clouds.total < tiles[0].rows * processors(device)
    bucket = f"{device_name(device)}/{name}/{form}/{channels}/{'few' if few else 'many'}"
    if INTERPRETED:
        # Small tiles where edges are what is tested, large ones where their number costs.
        size = 32 if rows.clouds.total <= 128 else 128
        start(tiles[0]._replace(rows=size, columns=size))
        return
    measure = partial(triton.testing.do_bench, return_mode="median")
    timer = (lambda entry: measure(partial(start, entry))) if may_time(device) else None
    number = fastest(bucket, tiles, timer)
    if number is None:
        # Smaller tiles, where larger ones would leave processors without any.
        number = min(range(len(tiles)), key=lambda i: tiles[i].rows) if few else 0
    start(tiles[number])


def may_time(device: torch.device) -> bool:
    """Whether the user wants choices timed, and that is possible: a capture cannot wait."""
    wanted = os.environ.get("FAD_LOSS_TUNE") == "1" and device.type == "cuda"
    return wanted and not torch.cuda.is_current_stream_capturing()


@cache
def capability(device: torch.device) -> int:
    """Major compute capability of a device; that of Hopper for what is no GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def device_name(device: torch.device) -> str:
    """What tuned choices are valid for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}/triton {triton.__version__}"
