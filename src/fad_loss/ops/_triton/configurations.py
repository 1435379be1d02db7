"""The tiles that each kernel may use: one table, chosen from by shape, device, or timing.

An entry is (BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_CHANNELS, warps, stages, SLAB), at most 8 for a kernel
and a format, the heuristic's choice first. BLOCK_CHANNELS and SLAB are upper bounds: points with
fewer channels use all they have. Every entry is compiled offline for sm_80, sm_90 and sm_100 by
`make kernels-report`, which fails on spills; a tile of 64 rows is the least that wgmma and tcgen05
take.

The choice depends on the shape only through buckets (the format, channels padded to 16, 32, 64, 128
or a multiple of 64, and whether there are enough rows to fill the device), so a new number of
points compiles nothing new. With FAD_LOSS_TUNE=1 the first call in a bucket times all its entries
and remembers the fastest in a file, in FAD_LOSS_CACHE or ~/.cache/fad_loss; without it the first
entry is taken, or the one with smaller tiles if there are few rows.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fad_loss.ops._triton.launch import INTERPRETED, launch
from fad_loss.ops._triton.prepare import Points, schedule


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
    ("pull", "direct"): (Tile(64, 32, 16, 4, 2, 16),),
    ("pull", "tf32x3"): (Tile(64, 32, 16, 8, 2, 128),),
    ("pull", "tf32"): (Tile(64, 64, 32, 8, 2, 128),),
    ("pull", "half"): (Tile(64, 64, 64, 8, 2, 128),),
    ("pull_twice", "direct"): (Tile(32, 32, 16, 4, 2, 16),),
    ("pull_twice", "tf32x3"): (Tile(64, 16, 32, 8, 2, 64),),
    ("pull_twice", "tf32"): (Tile(64, 32, 32, 8, 2, 128),),
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
    ("reduce", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("reduce", "tf32"): (Tile(64, 64, 32, 8, 3),),
    ("reduce", "half"): (Tile(64, 64, 64, 8, 3),),
    ("pull", "tf32x3"): (Tile(64, 16, 32, 8, 2, 128),),
    ("pull", "tf32"): (Tile(64, 32, 32, 8, 2, 128),),
    ("pull", "half"): (Tile(64, 16, 64, 8, 2, 128),),
    ("pull_twice", "tf32"): (Tile(64, 16, 32, 8, 2, 128),),
    ("scan", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("shortlist", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("shortlist", "tf32"): (Tile(64, 32, 32, 8, 3),),
    ("shortlist", "half"): (Tile(64, 32, 64, 8, 3),),
    ("longlist", "tf32x3"): (Tile(64, 16, 32, 8, 2),),
}


# And what would spill on compute capability 10 with Triton 3.6.
BLACKWELL: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("pull", "tf32"): (Tile(64, 32, 32, 8, 2, 128),),
    ("shortlist", "tf32x3"): (Tile(64, 32, 32, 8, 2),),
    ("longlist", "tf32"): (Tile(64, 32, 16, 8, 3),),
}


def entries(name: str, form: str, major: int) -> tuple[Tile, ...]:
    """The entries of a kernel and a format, for a compute capability; none if there is no such."""
    own = {8: AMPERE, 10: BLACKWELL}.get(major, {})
    return own.get((name, form)) or TABLE.get((name, form), ())


def format_of(points: Points) -> str:
    """The table's name for how points are multiplied."""
    if points.direct:
        return "direct"
    if points.values.dtype != torch.float32:
        return "half"
    return points.format.precision


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
    form, channels = format_of(rows), rows.values.shape[1]
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
    start(tiles[choose(bucket, tiles, few, timer)])


def choose(
    bucket: str, tiles: tuple[Tile, ...], few: bool, timer: Callable[[Tile], float] | None
) -> int:
    """The number of the entry to take: the fastest if that was timed, else the heuristic's."""
    choices = tuned()
    if timer is not None and len(tiles) > 1 and bucket not in choices:
        times = [timer(entry) for entry in tiles]
        remember(bucket, times.index(min(times)))
    number = choices.get(bucket, len(tiles))
    # A file of another version of the table may name an entry that is not there.
    if 0 <= number < len(tiles):
        return number
    return min(range(len(tiles)), key=lambda i: tiles[i].rows) if few else 0


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


def cache_file() -> Path:
    """Where tuned choices are kept."""
    folder = os.environ.get("FAD_LOSS_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "fad_loss") / "tiles.json"


@cache
def tuned() -> dict[str, int]:
    """Choices made by timing, by device and bucket; none if the file is missing or unreadable."""
    try:
        found = json.loads(cache_file().read_text())
        return {str(bucket): int(number) for bucket, number in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def remember(bucket: str, number: int) -> None:
    """Keep a choice, for this process and, where the file can be written, for the next."""
    choices = tuned()
    choices[bucket] = number
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may read at any time: it sees the old file or the new one.
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
        part.replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("tuned tiles are not kept: %s", error)
