"""One training loop for all networks, resumable after any epoch to the same result."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from distill.data import Clouds, DataError, Dataset, augment, packed
from distill.storage import load_checkpoint, save, write

Record: TypeAlias = dict[str, float]


class Objective(Protocol):
    """What is minimised: an `nn.Module` that runs the network on a batch."""

    progress: float  # the share of the training that is over

    def __call__(self, points: Tensor, labels: Tensor, known: Any = None) -> Any:
        """The terms of the loss and the logits, a `methods.Step`."""

    def statistics(self) -> dict[str, Tensor]:
        """What to log of the latest batch."""


class Views(Protocol):
    """Augmented clouds, chosen before, and what the teacher makes of them; see views.py."""

    def take(self, epoch: int, index: Tensor) -> tuple[Tensor, Any]:
        """For the clouds of a batch."""


class Watcher(Protocol):
    """Who is told how a training proceeds."""

    def begin(self, name: str, epochs: int, steps: int, history: list[Record]) -> None: ...
    def step(self) -> None: ...
    def epoch(self, record: Record) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What, besides the data and the networks, decides the result of a training."""

    epochs: int
    points: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    clip: float = 5.0
    jitter: float = 0.0
    rotate: bool = False
    seed: int = 0

    def rate(self, progress: float) -> float:
        """The learning rate: a linear warm-up, then a cosine to zero; `progress` in epochs."""
        warmup = min(self.warmup_epochs, self.epochs / 2)
        if progress < warmup:
            return self.learning_rate * (progress + 1e-3) / warmup
        share = (progress - warmup) / (self.epochs - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def epoch_seed(self, epoch: int) -> int:
        """Every random number of an epoch follows from this, so there is no state to save."""
        return int(hashlib.sha256(f"{self.seed}/{epoch}".encode()).hexdigest()[:12], 16)


@dataclass
class Run:
    """A training on disk: a checkpoint, named by everything that decides its result.

    The same settings find the same file: finished, it is loaded; half-way, it is continued.
    """

    folder: Path
    name: str
    description: dict[str, Any]
    settings: Settings
    history: list[Record] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        everything = json.dumps({**self.description, **asdict(self.settings)}, sort_keys=True)
        digest = hashlib.sha256(everything.encode()).hexdigest()[:8]
        return self.folder / f"{self.name}-{digest}.pt"

    @property
    def seconds(self) -> float:
        """How long the training took, interruptions not counted."""
        return sum(record["seconds"] for record in self.history)

    def save(self, **parts: Any) -> None:
        """Write checkpoint and log; see `storage.write`."""
        description = {"description": self.description, "settings": asdict(self.settings)}
        save(self.path, {"format": 1, **description, "history": self.history, **parts})
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        write(self.path.with_suffix(".jsonl"), lines.encode())


def batches(labels: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of shuffled batches of equal size; what is left over waits for the next epoch."""
    order = torch.randperm(len(labels), generator=generator, device=labels.device)
    for start in range(0, len(labels) - size + 1, size):
        yield order[start : start + size]


@torch.no_grad()
def accuracy(network: nn.Module, clouds: Clouds, points: int, batch_size: int = 128) -> float:
    """The share of clouds (or points) classified correctly, by the first `points` of each."""
    network.eval()
    right = torch.zeros((), dtype=torch.int64, device=clouds.labels.device)
    for start in range(0, len(clouds), batch_size):
        batch = clouds.select(slice(start, start + batch_size))
        right += (network(batch.first(points)).argmax(dim=-1) == batch.labels).sum()
    return right.item() / clouds.labels.numel()


def _means(records: list[dict[str, Tensor]]) -> Record:
    """The mean of each value over the batches."""
    return {k: torch.stack([r[k] for r in records]).double().mean().item() for k in records[0]}


def fit(
    network: nn.Module,
    objective: Objective,
    data: Dataset,
    run: Run,
    watch: Watcher,
    views: Views | None = None,
) -> None:
    """Train a network (and what the objective has to train), from wherever its run stands.

    The checkpoint of every epoch holds the weights, the optimizer and the objective's state, and
    the rest follows from the seed and the number of the epoch: a training that was interrupted and
    continued ends in the same weights as one that was not. Clouds are augmented anew in every
    epoch, or taken from `views`.

    Raises:
        DataError: the checkpoint is broken, or the loss is no longer finite.
    """
    settings, device = run.settings, data.train.labels.device
    trained = nn.ModuleDict({"network": network, "objective": objective})
    # The settings set the rate before each step; 1.0 here is never used.
    optimizer = torch.optim.AdamW(
        trained.parameters(), 1.0, weight_decay=settings.weight_decay, fused=device.type != "mps"
    )
    if run.path.exists():
        state = load_checkpoint(run.path, "loss", "optimizer")
        try:
            network.load_state_dict(state["network"])
            objective.load_state_dict(state["loss"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            message = f"{run.path}: does not fit ({reason}); remove it to train anew"
            raise DataError(message) from error
        run.history = state["history"]
    run.folder.mkdir(parents=True, exist_ok=True)
    batch_size = min(settings.batch_size, len(data.train))
    steps = len(data.train) // batch_size
    watch.begin(run.name, settings.epochs, steps, run.history)
    for epoch in range(len(run.history), settings.epochs):
        started = time.perf_counter()
        torch.manual_seed(settings.epoch_seed(epoch))
        generator = torch.Generator(device).manual_seed(settings.epoch_seed(epoch))
        trained.train()
        losses, right = [], torch.zeros((), dtype=torch.int64, device=device)
        logged: list[dict[str, Tensor]] = []
        for step, index in enumerate(batches(data.train.labels, batch_size, generator)):
            done = epoch + step / steps
            objective.progress = done / settings.epochs
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(done)
            batch, known = data.train.select(index), None
            if views is None:
                batch = batch.draw(settings.points, generator)
                points = augment(
                    batch.points, generator, jitter=settings.jitter, rotate=settings.rotate
                )
                points = packed(points, batch.lengths)
            else:
                points, known = views.take(epoch, index)
            made = objective(points, batch.labels, known)
            optimizer.zero_grad(set_to_none=True)
            made.loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
            optimizer.step()
            terms = {"loss": made.loss, "task_loss": made.task}
            if made.distillation is not None:
                terms["distillation_loss"] = made.distillation
            losses.append({name: term.detach() for name, term in terms.items()})
            right += (made.logits.argmax(dim=-1) == batch.labels).sum()
            if step % max(1, steps // 20) == 0:
                logged.append(objective.statistics())
            watch.step()
        record = {
            "epoch": epoch + 1,
            **_means(losses),
            "learning_rate": settings.rate(epoch),
            "train_accuracy": right.item() / (steps * batch.labels.numel()),
            "test_accuracy": accuracy(network, data.test, settings.points),
            **_means(logged),
        }
        if not math.isfinite(record["loss"]):
            message = (
                f"{run.name}: the loss is {record['loss']} in epoch {epoch + 1}; "
                "try a lower --learning-rate"
            )
            raise DataError(message)
        record["seconds"] = time.perf_counter() - started
        run.history.append(record)
        run.save(
            network=network.state_dict(),
            loss=objective.state_dict(),
            optimizer=optimizer.state_dict(),
        )
        watch.epoch(record)
    watch.end()
