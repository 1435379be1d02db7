"""Tables and plots of the study, from its JSON lines alone."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Line = dict[str, Any]
# The weights that may be tried.
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
# Whose weights a setting takes where none were tried in it.
BORROWED = {"dgcnn": "pointnet", "across": "pointnet"}
# What "fad" was in the lines that do not say which version of the library they are of.
BROAD = {"fad": "fad-broad", **{f"fad-{n}points": f"fad-broad-{n}points" for n in (8, 16)}}
COLUMNS = (
    "student", "accuracy, %", "seeds", "gap recovered", "corrupted, %", "information lost", "CKA",
    "s", "weights",
)  # fmt: skip


def path(results: Path, setting: str, split: str) -> Path:
    """Where a setting's lines are."""
    return results / (f"{setting}.jsonl" if split == "test" else f"{setting}-{split}.jsonl")


def read(results: Path, setting: str, split: str) -> list[Line]:
    """All lines of a setting, their rows as they are called today."""
    file = path(results, setting, split)
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [renamed(json.loads(line)) for line in lines if line]


def renamed(line: Line) -> Line:
    """A line of fad_loss 0.1, whose losses were others, by names that say so.

    They are history: today's code trains other students, and weighs them otherwise.
    """
    if "fad_loss" in line:
        return line

    def name(part: str) -> str:
        ours = part.startswith("fad") or part == "logit"
        return f"{BROAD.get(part, part)} (0.1)" if ours else part

    row = "+".join(map(name, line["row"].split("+")))
    return {**line, "row": row, "weights": {name(p): w for p, w in line["weights"].items()}}


def tried(results: Path, setting: str) -> list[Line]:
    """The lines that a setting's weights follow from: its own trials, or those it borrows."""
    own = read(results, setting, "validation")
    return own or read(results, BORROWED.get(setting, setting), "validation")


def tuned(lines: list[Line]) -> dict[str, dict[str, float]]:
    """The best weights of every row, in the mean over seeds; the smaller ones of equals."""
    best: dict[str, tuple[float, float, dict[str, float]]] = {}
    for (row, _), found in trials(lines).items():
        weights = found[0]["weights"]
        accuracy = statistics.fmean(line["accuracy"] for line in found)
        candidate = (accuracy, -sum(weights.values()), weights)
        best[row] = max(best.get(row, candidate), candidate, key=lambda item: item[:2])
    return {row: weights for row, (_, _, weights) in best.items()}


def trials(lines: list[Line]) -> dict[tuple[str, str], list[Line]]:
    """The lines of every row and weights: its seeds."""
    found: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        found[line["row"], label(line)].append(line)
    return found


def at_the_edge(lines: list[Line]) -> list[tuple[str, dict[str, float]]]:
    """For every row whose best weight is the largest or the smallest tried, the next ones to try.

    Of a combination, the last weight is the one that is tried; none is at the end of the ladder.
    """
    following: list[tuple[str, dict[str, float]]] = []
    for row, best in tuned(lines).items():
        part = list(best)[-1]
        tried = [line["weights"][part] for line in lines if line["row"] == row]
        if best[part] == max(tried):
            beyond = [weight for weight in LADDER if weight > best[part]][:1]
        elif best[part] == min(tried):
            beyond = [weight for weight in LADDER if weight < best[part]][-1:]
        else:
            beyond = []
        following += [(row, {**best, part: weight}) for weight in beyond]
    return following


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds (0 of one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def label(line: Line) -> str:
    """The weights of a line."""
    return ", ".join(f"{weight:g}" for weight in line["weights"].values())


def grouped(lines: list[Line]) -> dict[str, list[Line]]:
    """The lines of every row, the best row first; a row with several weights is several."""
    given: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        given[line["row"]].add(label(line))
    rows: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        row = line["row"]
        rows[row if len(given[row]) == 1 else f"{row} at {label(line)}"].append(line)
    ranked = sorted(rows, key=lambda r: -statistics.fmean(x["accuracy"] for x in rows[r]))
    return {row: rows[row] for row in ranked}


def verdicts(rows: dict[str, list[Line]]) -> list[str]:
    """What the numbers say about the claims of the method, of the rows with three seeds or more."""
    enough = min(3, max(map(len, rows.values()), default=0))
    rows = {row: found for row, found in rows.items() if len(found) >= enough}
    means = {row: spread([line["accuracy"] for line in rows[row]]) for row in rows}

    def compare(claim: str, ours: set[str], others: set[str]) -> list[str]:
        if not ours & means.keys() or not others & means.keys():
            return []
        first = max(ours & means.keys(), key=lambda r: means[r][0])
        second = max(others & means.keys(), key=lambda r: means[r][0])
        difference = means[first][0] - means[second][0]
        error = sum(means[r][1] ** 2 / len(rows[r]) for r in (first, second)) ** 0.5
        outcome = "yes" if difference > error else "no"
        figures = f"{100 * difference:+.2f} points, standard error {100 * error:.2f}"
        return [f"- {claim}: {outcome}. {first} minus {second}: {figures}."]

    parts = {row: row.split(" at ")[0].split("+") for row in rows}
    adversarial = {row for row in rows if "fad" in row}
    combined = {row for row in adversarial if "kd" in parts[row]}
    result = compare("FAD + KD ahead of every row without FAD", combined, rows.keys() - adversarial)
    others = {"alone", "kd", "logit", "logit (0.1)"}
    features = {row for row in rows if not others & {*parts[row]}}
    # Two discriminators are FAD still, as two layers are FitNet.
    own = {row for row in features if all(part.startswith("fad") for part in parts[row])}
    single = {row for row in features if len(parts[row]) == 1}
    for claim, group in (
        ("FAD ahead of every other single feature loss, on one layer each", single),
        ("FAD ahead of every other feature loss, on as many layers", features),
    ):
        result += compare(claim, own & group, group - adversarial)
    teacher = next(iter(rows.values()))[0]["teacher_accuracy"] if rows else 0.0
    if combined and "alone" in rows and teacher > means["alone"][0]:
        best = max(combined, key=lambda row: means[row][0])
        share = (means[best][0] - means["alone"][0]) / (teacher - means["alone"][0])
        outcome = "yes" if share >= 0.5 else "no"
        result.append(
            f"- FAD + KD recovers half of the gap: {outcome}. {best}: {100 * share:.0f} %."
        )
    return result


def schedule(line: Line) -> str:
    """How long a student trained."""
    rate = max(record.get("learning_rate", 0.0) for record in line["epochs"])
    return f"{len(line['epochs'])} epochs, learning rate {rate:g}"


def table(setting: str, lines: list[Line]) -> list[str]:
    """One setting as Markdown."""
    rows = grouped(lines)
    first = lines[0]
    teacher = first["teacher_accuracy"]
    alone = spread([x["accuracy"] for x in rows["alone"]])[0] if "alone" in rows else None
    text = [
        f"## {setting}",
        "",
        f"{first['data']}.",
        f"Teacher: {first['teacher_parameters']:,} parameters, {100 * teacher:.2f} %,",
        f"corrupted {100 * statistics.fmean(first['teacher_corrupted'].values()):.2f} %.",
        f"Students: {first['parameters']:,} parameters, {schedule(first)}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for row, found in rows.items():
        mean, deviation = spread([line["accuracy"] for line in found])
        gap = ""
        if alone is not None and row != "alone" and teacher > alone:
            gap = f"{100 * (mean - alone) / (teacher - alone):.0f} %"
        corrupted = statistics.fmean(x for line in found for x in line["corrupted"].values())
        lost, cka, seconds = (
            statistics.fmean(line[name] for line in found)
            for name in ("information_lost", "cka", "seconds")
        )
        weights = "" if row == "alone" else label(found[0])
        text.append(
            f"| {row} | {100 * mean:.2f} ± {100 * deviation:.2f} | {len(found)} | {gap} | "
            f"{100 * corrupted:.2f} | {100 * lost:.1f} % | {cka:.3f} | {seconds:.0f} | {weights} |"
        )
    return [*text, "", *verdicts(rows), ""]


def weights(lines: list[Line]) -> list[str]:
    """What every weight gave on the validation split, as Markdown."""
    text = [
        f"Weights tried, {schedule(lines[0])}: accuracy on the validation split in %, of one seed",
        "(×2: the mean of two); in brackets the share of the scores that were on the right side in",
        "the last epoch, where there is a discriminator.",
        "",
        "| loss | weight: accuracy |",
        "| --- | --- |",
    ]
    by_row: dict[str, list[str]] = {line["row"]: [] for line in lines}
    for (row, given), found in sorted(trials(lines).items(), key=_order):
        mean, _ = spread([line["accuracy"] for line in found])
        shown = f"{given}: {100 * mean:.1f}" + (f" ×{len(found)}" if len(found) > 1 else "")
        last = [
            line["epochs"][-1].get("fad_separability", line["epochs"][-1].get("fad_accuracy"))
            for line in found
        ]
        told = "" if None in last else f" ({statistics.fmean(last):.2f})"
        by_row[row].append(shown + told)
    text += [f"| {row} | {'; '.join(tried)} |" for row, tried in by_row.items()]
    return [*text, ""]


def _order(trial: tuple[tuple[str, str], list[Line]]) -> tuple[float, ...]:
    return tuple(trial[1][0]["weights"].values())


def gradients(results: Path) -> None:
    """The table of gradients, as Markdown beside it."""
    file = results / "gradients.json"
    if not file.exists():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    text = ["| term | share of the task's gradient | cosine |", "| --- | --- | --- |"]
    text += [
        f"| {term['term']} | {100 * term['share']:.1f} % | {term['cosine']:+.2f} |"
        for term in sorted(found["terms"], key=lambda term: term["share"])
    ]
    (results / "gradients.md").write_text("\n".join([*text, ""]), encoding="utf-8")


def plot(file: Path, setting: str, lines: list[Line]) -> None:
    """Accuracy of every seed, row by row."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    rows = grouped(lines)
    figure, axes = plt.subplots(figsize=(7, 1 + 0.3 * len(rows)), layout="constrained")
    for place, (row, found) in enumerate(reversed(rows.items())):
        values = [100 * line["accuracy"] for line in found]
        color = "tab:red" if row.startswith("fad") else "tab:blue"
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5)
        axes.plot([statistics.fmean(values)], [place], "|", color=color, markersize=16)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set(xlabel="test accuracy in % (dots: seeds, bars: means)", title=setting)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write(results: Path) -> int:
    """Write the report and the plots of all settings that have results."""
    settings = [file.stem for file in sorted(results.glob("*.jsonl")) if "-" not in file.stem]
    text = [
        "# The study",
        "",
        "Written by `python examples/study report` from the JSON lines beside it, which",
        "hold the command of every run. Accuracy: mean and standard deviation over the seeds. Gap",
        "recovered: the share of the distance between the student alone and the teacher.",
        "Corrupted: mean accuracy on test clouds with noise, with a missing region, turned and",
        "scaled (`CORRUPTIONS` in `examples/distill/data.py`). s: seconds of training, with other",
        "runs beside it. Weights were tried on a validation split of the training clouds, in fewer",
        "epochs. Rows with (0.1) are of the losses of fad_loss 0.1, which standardised and weighed",
        "features otherwise; `fad-broad` was its default then.",
        "",
        "<!-- report -->",
        "",
        "Read the results with care. A teacher of `teachers/` has seen the validation clouds in",
        "its own training. FAD was tried in more variants than the other losses, and not every",
        "combination with as many weights; the tables of weights list all trials. A row with",
        "several weights (`at`) takes part in the verdicts with each of them, so that the best was",
        "chosen on the test clouds. Trials of one seed differ by chance: see those of several.",
        "",
    ]
    gradients(results)
    for setting in settings:
        lines = read(results, setting, "test")
        text += [*table(setting, lines), f"![{setting}]({setting}.png)", ""]
        trials_here = read(results, setting, "validation")
        if trials_here:
            text += weights(trials_here)
        elif setting in BORROWED:
            text += [
                f"No weights were tried here: every row has those of `{BORROWED[setting]}`.",
                "",
            ]
        plot(results / f"{setting}.png", setting, lines)
    if settings:
        (results / "report.md").write_text("\n".join(text), encoding="utf-8")
        print(results / "report.md")
    return 0
