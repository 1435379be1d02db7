"""What one sees of it: progress, the final table, the plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor

from distill.data import CORRUPTIONS, Clouds, corrupted
from distill.networks import Network, pool
from distill.storage import write
from distill.training import Record, accuracy
from fad_loss import capture_features, metrics


class Screen:
    """A progress bar per training on a terminal; a line per epoch in a log file."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.task = TaskID(0)
        self.name = ""
        self.progress = self._bar()

    def _bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}", justify="left"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
        )
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    def begin(self, name: str, epochs: int, steps: int, history: list[Record]) -> None:
        done = len(history)
        self.name = name
        if 0 < done < epochs:
            self.console.print(f"{name}: continued after epoch {done}", highlight=False)
        elif done:
            self.console.print(f"{name}: already trained", highlight=False)
        self.progress = self._bar()
        self.progress.start()
        news = _news(history[-1]) if history else ""
        self.task = self.progress.add_task(
            name, total=epochs * steps, completed=done * steps, news=news
        )

    def step(self) -> None:
        self.progress.advance(self.task)

    def epoch(self, record: Record) -> None:
        self.progress.update(self.task, news=_news(record))
        if not self.console.is_terminal:
            line = f"{self.name}: {_news(record)}  {record['seconds']:.1f} s"
            self.console.print(line, highlight=False, soft_wrap=True)

    def end(self) -> None:
        self.progress.stop()


def _news(record: Record) -> str:
    train, test = (100 * record[f"{split}_accuracy"] for split in ("train", "test"))
    terms = f"loss {record['loss']:.3f}"
    if "distillation_loss" in record:
        terms = f"task {record['task_loss']:.3f}  distillation {record['distillation_loss']:.3f}"
    return f"epoch {record['epoch']:.0f}  {terms}  train {train:.1f} %  test {test:.1f} %"


@dataclass
class Row:
    """A line of the final table."""

    name: str
    checkpoint: str
    parameters: int
    accuracy: float
    seconds: float
    information_lost: float | None = None
    cka: float | None = None
    neighbor_agreement: float | None = None
    gap_recovered: float | None = None
    corrupted: dict[str, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """A network on the test clouds."""

    accuracy: float
    corrupted: dict[str, float]
    """Accuracy on each of `data.CORRUPTIONS`."""
    features: Tensor
    """The distilled features, max- and mean-pooled over each cloud: ``(n, 2 C)``."""


@torch.no_grad()
def evaluate(network: Network, clouds: Clouds, points: int) -> Evaluation:
    """Look at the features and the accuracy, and at the accuracy on corrupted clouds."""
    network.eval()
    rows = []
    with capture_features(network, network.layer) as features:
        for start in range(0, len(clouds), 128):
            network(clouds.select(slice(start, start + 128)).first(points))
            level = features[network.layer]
            rows.append(torch.cat([pool(level, "max"), pool(level, "mean")], dim=1))
    return Evaluation(
        accuracy(network, clouds, points),
        {name: accuracy(network, corrupted(clouds, name, points), points) for name in CORRUPTIONS},
        torch.cat(rows),
    )


def compare(row: Row, student: Evaluation, teacher: Evaluation) -> Row:
    """Fill in how much of the teacher's features the student's lack, and what corruption does."""
    ours, theirs = student.features, teacher.features
    row.information_lost = float(metrics.information_lost(ours, theirs))
    row.cka = float(metrics.cka(ours, theirs))
    row.neighbor_agreement = float(metrics.neighbor_agreement(ours, theirs, min(10, len(ours) - 1)))
    row.corrupted = student.corrupted
    return row


def recover(rows: Sequence[Row]) -> None:
    """Fill in the share of the gap between the student alone and the teacher that was closed."""
    teacher, alone = rows[0], next((row for row in rows if row.name == "student alone"), None)
    if alone is None or teacher.accuracy <= alone.accuracy:
        return
    for row in rows[1:]:
        if row is not alone:
            gap = teacher.accuracy - alone.accuracy
            row.gap_recovered = (row.accuracy - alone.accuracy) / gap


def table(rows: Sequence[Row], caption: str) -> Table:
    """The final table."""
    made = Table(caption=caption)
    made.add_column("network", no_wrap=True)
    columns = ("parameters", "accuracy", "gap\nrecovered", "information\nlost", "min:s")
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shares = (row.gap_recovered, row.information_lost)
        made.add_row(
            row.name,
            f"{row.parameters:,}",
            f"{100 * row.accuracy:.2f} %",
            *("" if share is None else f"{100 * share:.1f} %" for share in shares),
            f"{int(row.seconds) // 60}:{int(row.seconds) % 60:02d}",
        )
    return made


def results(rows: Sequence[Row], **more: object) -> dict[str, object]:
    """The final table for machines."""
    return {**more, "rows": [asdict(row) for row in rows]}


def plot(path: Path, histories: dict[str, list[Record]], title: str) -> None:
    """Draw accuracy over epochs, and the scores of the adversarial loss below."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    scored = {
        name: history for name, history in histories.items() if "fad_real_score" in history[-1]
    }
    figure, axes = plt.subplots(
        1 + bool(scored), 1, figsize=(7, 4 + 3 * bool(scored)), squeeze=False, layout="constrained"
    )
    top = axes[0, 0]
    for name, history in histories.items():
        epochs = [record["epoch"] for record in history]
        (line,) = top.plot(epochs, [100 * r["test_accuracy"] for r in history], label=name)
        top.plot(epochs, [100 * r["train_accuracy"] for r in history], ":", color=line.get_color())
    top.set_title(title, fontsize="medium", wrap=True)
    top.set(ylabel="accuracy in % (dotted: training)", xlabel="epoch")
    top.legend()
    top.grid(alpha=0.3)
    for name, history in scored.items():
        below = axes[1, 0]
        epochs = [record["epoch"] for record in history]
        for kind, style in (("real", "-"), ("fake", "--")):
            scores = [record[f"fad_{kind}_score"] for record in history]
            label = f"{'teacher' if kind == 'real' else 'student'}'s features, {name}"
            below.plot(epochs, scores, style, label=label)
        below.set(ylabel="discriminator's score", xlabel="epoch")
        below.legend()
        below.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    write(path, drawn.getvalue())
    plt.close(figure)
