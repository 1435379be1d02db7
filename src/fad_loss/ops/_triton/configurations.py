"""The tiles that each kernel may use: one table, chosen from by shape, device, or timing.

An entry is (BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_CHANNELS, warps, stages, KEPT, SLAB), at most 8 for a
kernel and a format, the heuristic's choice first. BLOCK_CHANNELS and SLAB are upper bounds: points
with fewer channels use all they have. Entries that keep all channels of a point (KEPT) are for it;
the last one is for wider points too. Every entry is compiled offline for sm_80, sm_90, sm_100 and
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
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from fad_loss.ops._triton.launch import INTERPRETED, launch
from fad_loss.ops._triton.prepare import DIRECT_CHANNELS, Format, Points, resolution, schedule
from fad_loss.ops._triton.tuning import fastest

# Shares of the columns at most, what each costs in tiles, and from how many rounds of programs on
# there are none.
MOST_SHARES = 128
SHARE = 4
ROUNDS = 4


class Tile(NamedTuple):
    """One configuration."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int
    kept: int | None = None
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
        if self.kept is not None:
            result["KEPT"] = self.kept
        if self.slab:
            # One program has all blocks of the channels that it keeps.
            wide = min(self.slab, triton.next_power_of_2(channels))
            result["SLAB"] = block if channels <= self.all_kept else wide
        return result

    def slabs(self, channels: int) -> int:
        """How many programs share the channels of a gradient."""
        return 1 if channels <= self.all_kept else triton.cdiv(channels, self.slab)

    @property
    def all_kept(self) -> int:
        """Up to how many channels one program has all of them, and rereads none."""
        return self.kept or 0


# For rows that are computed anew (`exact.py`), whatever the kernel: a few channels of all pairs are
# in registers. Interpreted, where the number of tiles costs, as many as there are.
EXACT = Tile(32, 32, 64, 4, 1, 0) if INTERPRETED else Tile(32, 32, 8, 8, 1, 0)
EXACT_ON_BLACKWELL = Tile(32, 32, 4, 8, 1, 0)
# bf16x6 has three parts of every operand, so its tiles are smaller.
TABLE: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("reduce", "direct"): (Tile(64, 32, 16, 8, 2, 0),),
    ("reduce", "bf16x6"): (
        Tile(128, 64, 64, 8, 2, 64),
        Tile(64, 64, 64, 4, 3, 64),
        Tile(128, 64, 32, 8, 3, 0),
    ),
    ("reduce", "tf32"): (
        Tile(128, 64, 32, 8, 3, 128),
        Tile(64, 64, 32, 4, 3, 128),
        Tile(128, 32, 64, 8, 2, 256),
        Tile(128, 64, 32, 8, 3, 0),
    ),
    ("reduce", "half"): (
        Tile(128, 64, 64, 8, 3, 256),
        Tile(64, 64, 64, 4, 3, 256),
        Tile(128, 64, 64, 8, 3, 0),
    ),
    ("backward", "direct"): (Tile(64, 32, 16, 4, 2, 0, 16),),
    ("backward", "bf16x6"): (
        Tile(128, 16, 64, 8, 3, 64, 64),
        Tile(64, 16, 64, 4, 3, 64, 64),
        Tile(128, 32, 32, 8, 3, 0, 128),
    ),
    ("backward", "tf32"): (
        Tile(128, 32, 32, 8, 3, 64, 64),
        Tile(64, 32, 32, 4, 3, 64, 64),
        Tile(128, 32, 32, 8, 2, 0, 128),
    ),
    ("backward", "half"): (
        Tile(128, 32, 64, 8, 3, 128, 128),
        Tile(64, 16, 64, 4, 3, 128, 128),
        Tile(128, 16, 64, 8, 3, 256, 256),
        Tile(128, 32, 64, 8, 2, 0, 256),
    ),
    ("double_backward", "direct"): (Tile(32, 32, 16, 4, 2, 0, 16),),
    ("double_backward", "bf16x6"): (Tile(32, 16, 32, 4, 2, 32, 64),),
    ("double_backward", "tf32"): (Tile(128, 16, 32, 8, 2, 0, 128),),
    ("small_reduce", "direct"): (Tile(32, 64, 16, 4, 2), Tile(32, 128, 16, 4, 2)),
    ("small_reduce", "bf16x6"): (Tile(32, 64, 32, 4, 2), Tile(32, 128, 32, 4, 2)),
    ("small_reduce", "tf32"): (Tile(32, 64, 32, 4, 2), Tile(32, 128, 32, 4, 2)),
    ("small_reduce", "half"): (Tile(32, 64, 64, 4, 2), Tile(32, 128, 64, 4, 2)),
    ("small_backward", "direct"): (Tile(32, 64, 16, 4, 2), Tile(32, 128, 16, 8, 2)),
    ("small_backward", "bf16x6"): (Tile(32, 64, 32, 4, 2), Tile(32, 128, 16, 8, 2)),
    ("small_backward", "tf32"): (Tile(32, 64, 32, 4, 2), Tile(32, 128, 16, 4, 2)),
    ("small_backward", "half"): (Tile(32, 64, 16, 4, 2), Tile(32, 128, 16, 8, 2)),
    ("scan", "direct"): (Tile(64, 64, 16, 8, 2, 0),),
    ("scan", "bf16x6"): (Tile(128, 32, 64, 8, 3, 64), Tile(128, 64, 32, 8, 3, 0)),
    ("scan", "tf32"): (
        Tile(128, 64, 32, 8, 3, 128),
        Tile(64, 64, 32, 4, 3, 128),
        Tile(128, 32, 64, 8, 2, 256),
        Tile(128, 64, 32, 8, 3, 0),
    ),
    ("scan", "half"): (
        Tile(128, 64, 64, 8, 3, 256),
        Tile(64, 64, 64, 4, 3, 256),
        Tile(128, 64, 64, 8, 3, 0),
    ),
    ("shortlist", "direct"): (Tile(64, 64, 16, 8, 2, 0),),
    ("shortlist", "bf16x6"): (Tile(64, 32, 64, 4, 2, 64), Tile(128, 64, 32, 8, 2, 0)),
    ("shortlist", "tf32"): (Tile(64, 64, 32, 8, 3, 32),),
    ("shortlist", "half"): (Tile(64, 64, 64, 8, 3, 64),),
    ("longlist", "direct"): (Tile(64, 32, 16, 8, 2, 0),),
    ("longlist", "bf16x6"): (Tile(64, 32, 64, 8, 2, 64),),
    ("longlist", "tf32"): (Tile(64, 32, 32, 8, 3, 32),),
    ("longlist", "half"): (Tile(64, 32, 64, 8, 3, 64),),
}

# What would spill on compute capability 8, where operands are in registers as well as the sums.
AMPERE: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("small_reduce", "tf32"): (Tile(32, 64, 32, 4, 2), Tile(16, 128, 32, 4, 2)),
    ("small_backward", "half"): (Tile(16, 64, 32, 4, 2), Tile(32, 128, 16, 4, 2)),
    ("reduce", "bf16x6"): (Tile(64, 32, 32, 8, 2, 32),),
    ("reduce", "tf32"): (Tile(64, 64, 32, 8, 3, 32),),
    ("reduce", "half"): (Tile(64, 64, 64, 8, 3, 64),),
    ("backward", "bf16x6"): (Tile(64, 16, 32, 8, 2, 32, 128),),
    ("backward", "tf32"): (Tile(64, 32, 16, 8, 2, 0, 128),),
    ("backward", "half"): (Tile(64, 16, 32, 8, 2, 0, 128),),
    ("double_backward", "tf32"): (Tile(64, 16, 32, 8, 2, 0, 128),),
    ("scan", "bf16x6"): (Tile(64, 32, 32, 8, 2, 32),),
    ("scan", "tf32"): (Tile(64, 64, 32, 8, 3, 32),),
    ("scan", "half"): (Tile(64, 64, 64, 8, 3, 64),),
    ("shortlist", "bf16x6"): (Tile(64, 32, 32, 8, 2, 32),),
    ("shortlist", "tf32"): (Tile(64, 32, 32, 8, 3, 32),),
    ("shortlist", "half"): (Tile(64, 32, 64, 8, 3, 64),),
    ("longlist", "bf16x6"): (Tile(64, 16, 32, 8, 2, 32),),
}


# And what would spill on compute capability 10 with Triton 3.6 or 3.9.
BLACKWELL: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("reduce", "bf16x6"): (Tile(64, 64, 64, 8, 2, 64), Tile(64, 64, 32, 8, 3, 0)),
    ("reduce", "tf32"): (Tile(64, 64, 32, 8, 3, 32),),
    ("reduce", "half"): (Tile(64, 64, 64, 8, 3, 64),),
    ("backward", "bf16x6"): (
        Tile(128, 16, 64, 8, 3, 64, 64),
        Tile(64, 16, 64, 4, 3, 64, 64),
        Tile(64, 16, 64, 4, 2, 0, 64),
    ),
    ("backward", "half"): (Tile(64, 32, 64, 8, 2, 64, 128),),
    ("backward", "tf32"): (Tile(64, 32, 32, 8, 2, 0, 128),),
    ("double_backward", "bf16x6"): (Tile(64, 16, 16, 4, 2, 0, 64),),
    ("double_backward", "tf32"): (Tile(64, 16, 32, 4, 2, 0, 64),),
    ("small_reduce", "bf16x6"): (Tile(32, 64, 32, 4, 2), Tile(16, 128, 32, 4, 2)),
    ("small_backward", "half"): (Tile(32, 64, 32, 4, 2), Tile(32, 128, 16, 8, 2)),
    ("scan", "bf16x6"): (Tile(128, 32, 64, 8, 3, 64), Tile(64, 64, 32, 8, 2, 0)),
    ("shortlist", "bf16x6"): (Tile(64, 32, 32, 8, 2, 32),),
    ("shortlist", "tf32"): (Tile(64, 32, 32, 8, 3, 32),),
    ("shortlist", "half"): (Tile(64, 32, 64, 8, 3, 64),),
    ("longlist", "bf16x6"): (Tile(64, 16, 64, 8, 2, 64),),
    ("longlist", "tf32"): (Tile(64, 32, 16, 8, 3, 0),),
    ("longlist", "half"): (Tile(64, 32, 32, 8, 3, 0),),
}


def entries(name: str, form: str, major: int) -> tuple[Tile, ...]:
    """The entries of a kernel and a format, for a compute capability; none if there is no such."""
    # Consumer Blackwell (12) has Ampere's matrix instructions and less shared memory than Hopper.
    own = {8: AMPERE, 10: BLACKWELL, 11: BLACKWELL, 12: AMPERE}.get(major, {})
    return own.get((name, form)) or TABLE.get((name, form), ())


def exact_tile(major: int) -> Tile:
    """The tile with which rows are computed anew, for a compute capability."""
    return EXACT_ON_BLACKWELL if major in {10, 11} else EXACT


def fitting(tiles: tuple[Tile, ...], channels: int) -> tuple[int, ...]:
    """The numbers of the entries for points stored with so many channels.

    Those that keep all of them; or else the last, which is made for any number.
    """
    keep = tuple(number for number, tile in enumerate(tiles) if channels <= tile.all_kept)
    return keep or (len(tiles) - 1,)


def format_of(form: Format, channels: int) -> str:
    """The table's name for how points are multiplied."""
    if channels <= DIRECT_CHANNELS:
        return "direct"
    if form.precision == "bf16x6":
        return "bf16x6"
    return "tf32" if form.storage == torch.float32 else "half"


def smallest_that_holds(
    columns: int, name: str, form: Format, channels: int, device: torch.device
) -> Tile:
    """The entry with the fewest columns that are enough."""
    tiles = entries(name, format_of(form, channels), capability(device))
    return min((tile for tile in tiles if tile.columns >= columns), key=lambda tile: tile.columns)


def flags(rows: Points, shares: int) -> Tensor:
    """Room for whether each row has a near pair among each share of the columns."""
    return torch.empty((shares, rows.clouds.total), dtype=torch.int8, device=rows.values.device)


Results = TypeVar("Results", dict[str, Tensor], dict[str, Tensor | None])


def run(
    name: str,
    kernel: Any,
    rows: Points,
    columns: Points,
    arguments: dict[str, Any],
    results: Callable[[int], Results],
    *,
    slabs: bool = False,
    most: int = MOST_SHARES,
    exact: dict[str, Any] | None = None,
) -> Results:
    """Launch a kernel over all tiles of the rows, slabs of channels, and shares of the columns.

    By the best entry. `results` makes room for what a number of shares find, at most `most` of
    them: tensors whose first axis they are. `exact`: the arguments with which it computes rows that
    have near pairs anew; without them it knows of none.
    """
    form, channels = format_of(rows.format, rows.channels), rows.stored
    device = rows.values.device
    table = entries(name, form, capability(device))
    tiles = tuple(table[number] for number in fitting(table, channels))

    def start(entry: Tile) -> Results:
        tile = entry.arguments(channels)
        count, _ = schedule(rows.clouds, columns.clouds, entry.rows)
        parts = entry.slabs(channels) if slabs else 1
        each = columns.clouds.total // max(columns.clouds.count, 1)
        walk = triton.cdiv(each, entry.columns)
        splits = shares(count * parts, walk, processors(device) * max(8 // entry.warps, 1), most)
        _, where = schedule(rows.clouds, columns.clouds, entry.rows, splits)
        found = results(splits)
        everything = {**arguments, **where, **found, **tile}
        if exact is None:
            launch(kernel, (count, parts, splits), everything)
            return found
        everything |= resolution(rows, columns, exclude_self=arguments["EXCLUDE_SELF"])
        everything |= {"flags": flags(rows, splits), "EXACT": False, "SHARED": entry.columns}
        launch(kernel, (count, parts, splits), everything)
        if not rows.direct:
            again = exact_tile(capability(device))
            once_more = {**again.arguments(again.channels), "EXACT": True}
            count, where = schedule(rows.clouds, columns.clouds, again.rows, splits)
            launch(kernel, (count, 1, splits), {**everything, **where, **exact, **once_more})
        return found

    few = rows.clouds.total < tiles[0].rows * processors(device)
    bucket = f"{device_name(device)}/{name}/{form}/{channels}/{'few' if few else 'many'}"
    if INTERPRETED:
        # Small tiles where edges are what is tested, large ones where their number costs.
        size = 32 if rows.clouds.total <= 128 else 128
        return start(tiles[0]._replace(rows=size, columns=size))
    measure = partial(triton.testing.do_bench, return_mode="median")
    timer = (lambda entry: measure(partial(start, entry))) if may_time(device) else None
    number = fastest(bucket, tiles, timer)
    if number is None:
        # Smaller tiles, where larger ones would leave processors without any.
        number = min(range(len(tiles)), key=lambda i: tiles[i].rows) if few else 0
    return start(tiles[number])


@lru_cache(maxsize=1024)
def shares(programs: int, walk: int, slots: int, most: int) -> int:
    """Among how many programs the columns of each tile of rows are shared out.

    `programs` walk over `walk` tiles of columns each, in rounds of `slots` at a time: as many
    shares as make the last of them end first. Each costs its rows and results again, as much as
    SHARE tiles.
    """
    if not programs:
        return 1

    def end(number: int) -> int:
        rounds: int = triton.cdiv(programs * number, slots)
        return rounds * int(triton.cdiv(walk, number) + SHARE)

    # Where processors are busy anyway the columns stay together.
    limit = min(most, max(walk // SHARE, 1)) if programs < ROUNDS * slots else 1
    number: int = min(range(1, limit + 1), key=end)
    return number


def added(parts: Tensor) -> Tensor:
    """The sum of what the shares have found, in a fixed order."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


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
