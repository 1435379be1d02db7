"""What the lines of the paired study say: tables, differences per seed, and words made of them."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from study.rows import ROWS

Line = dict[str, Any]
# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


class Difference(NamedTuple):
    """Of two rows, in points of accuracy, over the seeds that both have."""

    mean: float
    error: float  # the standard error of the mean
    low: float  # the 95 % interval
    high: float
    seeds: int

    @property
    def word(self) -> str:
        """What follows from the interval."""
        if self.seeds < 2:
            return "unknown from one seed"
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "not to be told apart"


def read(folder: Path) -> list[Line]:
    """All lines of a folder."""
    files = sorted(folder.glob("*.jsonl"))
    texts = [text for file in files for text in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in map(_parsed, texts) if line is not None]


def _parsed(text: str) -> Line | None:
    """A line, or None if writing it was cut off in the middle."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return None


def difference(ours: dict[int, float], others: dict[int, float]) -> Difference | None:
    """Paired by seed; None without a common one."""
    pairs = [100 * (ours[seed] - others[seed]) for seed in sorted(ours.keys() & others.keys())]
    if not pairs:
        return None
    mean, count = statistics.fmean(pairs), len(pairs)
    if count == 1:
        return Difference(mean, math.nan, -math.inf, math.inf, 1)
    error = statistics.stdev(pairs) / math.sqrt(count)
    freedom = count - 1
    quantile = QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else 1.96 + 2.5 / freedom
    return Difference(mean, error, mean - quantile * error, mean + quantile * error, count)


def scores(lines: list[Line]) -> dict[str, dict[int, float]]:
    """The accuracy of every row and seed; of several, the latest."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        found[line["row"]][line["seed"]] = line["accuracy"]
    return dict(found)


def shown(found: Difference | None) -> str:
    """A difference in a cell."""
    if found is None:
        return ""
    if found.seeds == 1:
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} ± {found.error:.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def table(lines: list[Line], teacher: float | None) -> list[str]:
    """The rows of one setting, the best first."""
    found = scores(lines)
    alone = found.get("alone", {})
    text = [
        "| student | accuracy, % | seeds | minus alone | minus its ablation | below the teacher |",
        f"|{' --- |' * 6}",
    ]
    for row in sorted(found, key=lambda row: -statistics.fmean(found[row].values())):
        values = [100 * value for value in found[row].values()]
        mean = statistics.fmean(values)
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        ablation = ROWS[row].against[:1] if row.startswith("fad") else ()
        cells = [
            row,
            f"{mean:.2f}{deviation}",
            str(len(values)),
            shown(difference(found[row], alone)) if row != "alone" else "",
            "".join(shown(difference(found[row], found.get(name, {}))) for name in ablation),
            "" if teacher is None else f"{100 * teacher - mean:.2f}",
        ]
        text.append(f"| {' | '.join(cells)} |")
    return text


def sentences(lines: list[Line], teacher: float | None) -> list[str]:
    """What every row claims against the others, and how far the best is from the teacher."""
    found = scores(lines)
    text = []
    for row in ROWS:
        for other in ("alone", *ROWS[row].against):
            if row == other or row not in found:
                continue
            one = difference(found[row], found.get(other, {}))
            if one is None:
                continue
            figures = f"{one.mean:+.2f} points"
            if one.seeds > 1:
                figures += f", standard error {one.error:.2f}, 95 % interval {one.low:+.2f} to "
                figures += f"{one.high:+.2f}, {one.seeds} seeds"
            text.append(f"- {row} against {other}: {one.word} ({figures}).")
    if teacher is not None and found:
        best = max(found, key=lambda row: statistics.fmean(found[row].values()))
        below = 100 * (teacher - statistics.fmean(found[best].values()))
        text.append(f"- The best, {best}, is {below:.2f} points below its teacher.")
    return text


def report(lines: list[Line]) -> str:
    """Every setting and length, as Markdown."""
    text = [
        "# The paired study",
        "",
        "Written by `python examples/study verdicts` from the JSON lines beside it. Rows of one",
        "seed share initial weights, batches, augmentation, dropout masks and, for the same",
        "layers, adapters. Accuracy: the mean over the disjoint parts of every test cloud, then",
        "mean and standard deviation over the seeds. Differences are per seed: mean ± standard",
        "error, and the 95 % interval of Student's t. No weight is tuned; what the rows are says",
        "`examples/study/rows.py`.",
        "",
    ]
    groups: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        if line["row"] in ROWS:
            names = "setting", "epochs", "batch_size", "views", "labels", "data"
            groups[tuple(line[name] for name in names)].append(line)
    for (setting, epochs, batch, views, labels, data), found in sorted(groups.items()):
        sought = "teacher", setting, labels, data
        names = "row", "setting", "labels", "data"
        # Of one seed, the latest.
        teachers = {line["seed"]: line for line in lines if tuple(map(line.get, names)) == sought}
        first = found[0]
        commits = ", ".join(sorted({line["commit"] for line in found}))
        devices = ", ".join(sorted({line["device"] for line in found}))
        train, test = first["clouds"]
        described = (
            f"{train:,} training and {test:,} test clouds, {len(first['parts'])} parts of "
            f"{first['points']} points each; batches of {batch}; {first['arch']} students of "
            f"{first['parameters']:,} parameters."
        )
        if views:
            described += f" All learn from the same {views} views of every cloud."
        if labels:
            described += (
                f" Each seed has another split: half of the clouds are the test, and of those of "
                f"its teacher a student sees {labels} of a class."
            )
        if first["arch"] == "segmenter":
            described += " The score is the mean IoU of the parts."
        several = len({line["data"] for line in lines if line["setting"] == setting}) > 1
        of = f" of {first['dataset']}" if several else ""
        text += [
            f"## {setting}{of}, {epochs} epochs",
            "",
            described,
        ]
        score = None
        if teachers:
            size = next(iter(teachers.values()))["parameters"]
            score = statistics.fmean(line["accuracy"] for line in teachers.values())
            of = f", the mean of {len(teachers)}" if len(teachers) > 1 else ""
            text.append(f"Teacher: {size:,} parameters, {100 * score:.2f} %{of}.")
        text += [f"Commits: {commits}. Devices: {devices}.", ""]
        text += [*table(found, score), "", *sentences(found, score), ""]
    return "\n".join(text)
