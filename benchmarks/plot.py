"""Figures of what `pairwise.py` measured: time against N, share of the GEMM against C, memory.

    python benchmarks/plot.py                                  every JSON in benchmarks/results
    python benchmarks/plot.py results/pairwise-cpu.json --output docs/figures

Each file gives up to three figures, ``<name>-time.png``, ``<name>-gemm.png`` and
``<name>-memory.png``; one for which a file holds nothing is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from measure import RESULTS, load

Row = dict[str, Any]
Series = dict[str, list[tuple[int, float]]]

# Distinguishable in grey and by the colour-blind; ours in the strongest ones.
STYLES = {
    "fad_loss triton": {"color": "#D55E00", "marker": "o", "linewidth": 2.5},
    "fad_loss tiled": {"color": "#0072B2", "marker": "o", "linewidth": 2.5},
    "fad_loss dense": {"color": "#56B4E9", "marker": "o"},
    "torch.bmm": {"color": "#000000", "marker": "", "linestyle": "--"},
    "torch.cdist + reduce": {"color": "#009E73", "marker": "s"},
    "torch eager": {"color": "#CC79A7", "marker": "^"},
    "torch.compile": {"color": "#E69F00", "marker": "v"},
    "KeOps": {"color": "#7F7F7F", "marker": "D"},
    "geomloss": {"color": "#8C564B", "marker": "P"},
    "flash-sinkhorn": {"color": "#9467BD", "marker": "X"},
    "pytorch3d": {"color": "#17BECF", "marker": "<"},
    "chamferdist": {"color": "#BCBD22", "marker": ">"},
    "flash-kmeans": {"color": "#E377C2", "marker": "*"},
}


def _select(
    rows: Sequence[Row], against: str, value: Callable[[Row], float | None]
) -> dict[tuple[str, str, str], Series]:
    """One panel per operation, pass and dtype, with the values of each implementation.

    Of the shapes that differ in more than what the axis shows, the largest family is drawn.
    """
    panels: dict[tuple[str, str, str], Series] = {}
    families: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found = None if "skipped" in row else value(row)
        if found is None or (against == "N" and row["N"] != row["M"]):
            continue
        rest = (row["B"], row["C"]) if against == "N" else (row["B"], row["N"], row["M"])
        families[(row["op"], row["pass"], row["dtype"]), rest].append(row)

    def spread(family: list[Row]) -> int:
        return len({row[against] for row in family})

    best: dict[tuple[str, str, str], list[Row]] = {}
    for (panel, _), family in families.items():
        if spread(family) > 1 and spread(family) > spread(best.get(panel, [])):
            best[panel] = family
    for panel, family in best.items():
        series: Series = defaultdict(list)
        for row in family:
            series[row["implementation"]].append((row[against], value(row) or 0.0))
        panels[panel] = {name: sorted(points) for name, points in series.items()}
    return panels


def _draw(axes: Axes, series: Series) -> None:
    for name, points in sorted(series.items()):
        style = {"linewidth": 1.5, "markersize": 5, **STYLES.get(name, {"marker": "."})}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.set_xscale("log", base=2)
    ticks = sorted({place for points in series.values() for place, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=30)
    axes.minorticks_off()


def figure(
    rows: Sequence[Row],
    path: Path,
    *,
    against: str,
    label: str,
    value: Callable[[Row], float | None],
    log: bool,
    title: str,
) -> bool:
    """Draw one figure, a panel for each operation, pass and dtype; whether there was anything."""
    panels = _select(rows, against, value)
    if not panels:
        return False
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    drawn, grid = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes, (panel, series) in zip(grid.flat, sorted(panels.items()), strict=False):
        _draw(axes, series)
        axes.set_title(", ".join(panel), fontsize=10)
        axes.set_xlabel(against)
        axes.set_ylabel(label)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    drawn.suptitle(title, fontsize=11)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return True


def _share(row: Row) -> float | None:
    # What fraction of the matrix product's speed is reached; the product itself is the line at 1.
    return 1 / row["ratio_to_gemm"]


def _memory(row: Row) -> float | None:
    return row["extra_bytes"] / 2**20 if row.get("extra_bytes") else None


def plot(source: Path, output: Path) -> list[Path]:
    """Draw what a JSON file holds."""
    report = load(source)
    rows, where = report.get("cases", []), report["context"]
    machine = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
    title = f"{machine}, torch {where['packages']['torch']}, {where['commit'][:10]}"
    output.mkdir(parents=True, exist_ok=True)
    wanted = (
        ("time", "N", "seconds", lambda row: row["median_s"], True),
        ("gemm", "C", "speed relative to torch.bmm", _share, False),
        ("memory", "N", "extra memory, MiB", _memory, True),
    )
    written = []
    for kind, against, label, value, log in wanted:
        path = output / f"{source.stem}-{kind}.png"
        if figure(rows, path, against=against, label=label, value=value, log=log, title=title):
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Draw every file that was named, or found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of pairwise.py")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder for the figures")
    arguments = parser.parse_args(argv)
    sources = arguments.results or sorted(RESULTS.glob("pairwise-*.json"))
    written = [path for source in sources for path in plot(source, arguments.output)]
    for path in written:
        print(path)
    if not written:
        print("nothing to draw: no file holds a series over N or C", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
