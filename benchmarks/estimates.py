"""What limits each kernel, from how it was compiled: an estimate, with no GPU in sight.

A tile of the loop over the columns takes, on one multiprocessor, at least as many cycles as each of
its units needs for it:

- issue: the loop's machine instructions, times the warps, over 4 schedulers;
- tensor: its products, over what the matrix units do in a cycle in this format;
- L2: the bytes that it reads, over a multiprocessor's share of what the L2 cache has been seen to
  give;
- exponential: one for each pair and temperature (or root), 16 a cycle.

The largest is the limit, if the others are hidden behind it; none is hidden completely. The share
of the matrix units' peak that is left, tensor / limit, is at most what a measurement can find.

    python benchmarks/estimates.py       # compile what KERNEL_CASES names for an H100, write JSON
    python benchmarks/estimates.py --page   # put its table into docs/kernels.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
OUTPUT = RESULTS / "kernels-estimates.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- estimates -->", "<!-- end of estimates -->"


class Unit(NamedTuple):
    """What a multiprocessor does in a cycle."""

    half: float  # floating-point operations of products of half precision, accumulated in float32
    tf32: float
    l2: float  # bytes
    exponentials: float = 16
    schedulers: float = 4


# A100, H100, B200, RTX 5090: data sheets, but for the L2 cache, where microbenchmarks report about
# half of what the data sheets promise. Nobody has measured them with these kernels.
UNITS = {
    80: Unit(2048, 1024, 32),
    90: Unit(4096, 2048, 25),
    100: Unit(8192, 4096, 25),
    120: Unit(1024, 512, 25),
}
# Products of a tile with the columns: for distances, and of its weights with the points.
DISTANCES = {"double_backward_kernel": 3}
GRADIENTS = {"backward_kernel": 1, "small_backward_kernel": 1, "double_backward_kernel": 2}


def limits(
    function: str, arguments: dict[str, Any], architecture: int, loop: tuple[int, int]
) -> dict[str, int]:
    """Cycles that a tile of the loop over the columns takes at least, by unit."""
    unit = UNITS[architecture]
    rows, columns = arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"]
    block, channels = arguments["BLOCK_CHANNELS"], arguments["CHANNELS"]
    small = function.startswith("small_")
    kept = channels <= arguments.get("KEPT", 0)
    rounds = channels // block
    instructions = loop[0] + loop[1] * (rounds - 1)
    if small and loop[1] == 0:
        # Its loops are over channels, and one tile has all columns.
        instructions = loop[0] * rounds
    points = arguments["x"] if "x" in arguments else arguments["row"]
    storage: int = points.element_size()
    # A float32 is the sum of three numbers of bfloat16, and a product that of six products of them.
    six = arguments["PRECISION"] == "bf16x6"
    each = 6 if six else 1
    # Beside half precision weights are in two parts.
    halves = storage == 2 or arguments["PRECISION"] == "tf32x2"
    pulled = 2 if halves and not six else each
    exact = bool(arguments.get("EXACT"))
    # Of wide points a program has SLAB channels of the gradient.
    width = channels if kept or small or exact else min(arguments.get("SLAB", 0), channels)
    pairs = rows * columns
    distances, gradients = DISTANCES.get(function, 1), GRADIENTS.get(function, 0)
    products = each * distances * channels + pulled * gradients * width
    rate = unit.half if six or storage == 2 else unit.tf32
    if arguments.get("DIRECT") or exact:
        products = 0
    reads = columns * channels
    if not kept and not small and not arguments.get("DIRECT"):
        reads = distances * (rows + columns) * channels + gradients * columns * width
    searches = function in {"scan_kernel", "shortlist_kernel"}
    exponentials = 0 if searches else pairs * (1 if arguments.get("LADDER") else arguments["COUNT"])
    # Small clouds are divided into their parts when they have been read.
    read = 3 * storage if six and not small else storage
    return {
        "issue": round(instructions * arguments["num_warps"] / unit.schedulers),
        "tensor": round(2 * pairs * products / rate),
        "l2": round(reads * read / unit.l2),
        "exponential": round(exponentials / unit.exponentials),
    }


# What the targets are about: kernel, format, channels.
KERNEL_CASES = [
    *(("scan", "half", C) for C in (64, 128, 256, 1024)),
    *(("scan", "tf32", C) for C in (64, 256)),
    *(("scan", "bf16x6", C) for C in (64, 256)),
    *(("reduce", "half", C) for C in (64, 128, 256, 1024)),
    *(("reduce", "tf32", C) for C in (64, 256)),
    *(("reduce", "bf16x6", C) for C in (64, 256)),
    *(("backward", "half", C) for C in (64, 128, 256)),
    *(("backward", "tf32", C) for C in (64, 256)),
]
NAMES = {"scan": "nearest", "reduce": "softmin", "backward": "softmin, backward"}
FORMATS = {"half": "bf16", "tf32": "tf32", "bf16x6": "bf16x6"}


def estimate(kernel: str, form: str, channels: int) -> dict[str, Any]:
    """Compile a kernel as the shapes of the targets take it, on an H100."""
    import torch  # noqa: PLC0415

    import kernels_report  # noqa: PLC0415
    from fad_loss.ops import _triton  # noqa: PLC0415
    from fad_loss.ops._triton import configurations  # noqa: PLC0415

    dtype, precision, _ = kernels_report.FORMATS[form]
    x = torch.empty(1, 100_000, channels, dtype=dtype, device="meta")
    values = torch.empty(1, 100_000, 1, device="meta")
    offsets = None, None
    calls = {
        "scan": lambda: _triton.knn(x, x, 1, False, *offsets),
        "reduce": lambda: _triton.softmin(x, x, None, [0.5], False, *offsets),
        "backward": lambda: _triton.softmin_backward(
            values, x, x, None, values, [0.5], False, *offsets, True, False
        ),
    }
    launches = kernels_report.recorded(calls[kernel], precision)
    function, arguments = kernels_report.main_launch(launches)
    found = kernels_report.describe(function, arguments, 90)
    stored = arguments["CHANNELS"]
    tiles = configurations.entries(kernel, form, 9)
    tile = tiles[configurations.fitting(tiles, stored)[0]]
    return {
        "kernel": kernel,
        "format": form,
        "channels": channels,
        "tile": tile._asdict(),
        "slabs": tile.slabs(stored) if kernel == "backward" else 1,
        **found,
    }


def share(entry: dict[str, Any]) -> float:
    """The most that can be left of the matrix units' peak, for the products that are needed.

    What slabs of channels recompute is not needed.
    """
    cycles = entry["limits"]
    needed = cycles["tensor"]
    if entry["slabs"] > 1:
        needed *= 2 / (1 + entry["slabs"])
    share_of_peak: float = needed / max(cycles.values())
    return share_of_peak


def page(entries: list[dict[str, Any]]) -> str:
    """The table of the documentation."""
    names = "operation, format, C, rows × columns, registers, issue, tensor, L2, exp, at most"
    columns = names.split(", ")
    lines = [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join(3 * ['---'] + ['---'] + (len(columns) - 4) * ['---:'])} |",
    ]
    for entry in entries:
        tile, cycles = entry["tile"], entry["limits"]
        lines.append(
            f"| {NAMES[entry['kernel']]} | {FORMATS[entry['format']]} | {entry['channels']} "
            f"| {tile['rows']} × {tile['columns']} | {entry['registers']} "
            f"| {cycles['issue']} | {cycles['tensor']} | {cycles['l2']} | {cycles['exponential']} "
            f"| {share(entry):.0%} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compile and write, or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--page", action="store_true", help="only put the table into the page")
    options = parser.parse_args()
    if not options.page:
        import triton  # noqa: PLC0415

        entries = [estimate(*case) for case in KERNEL_CASES]
        report = {"triton": triton.__version__, "architecture": 90, "kernels": entries}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    table = page(json.loads(options.output.read_text())["kernels"])
    if options.page:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
