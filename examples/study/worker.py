"""One process of the paired study: reads runs from its input, a line of JSON each, and trains.

A GPU is not busy with one student: several processes share it, each with the clouds in its memory.
They are started by `paired`, not by hand. A training writes a checkpoint after every epoch, and one
that is stopped goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import sys
import traceback
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fad_loss
from distill import networks
from distill.data import Clouds, Dataset
from distill.methods import Supervised
from distill.networks import Network
from distill.storage import load_checkpoint, save
from distill.training import Record, Run, Settings, accuracy, fit
from distill.views import Views
from study.ordered import Epochs, Sampled, both_orders, parts
from study.rows import ROWS, Recipe, Replay
from study.segments import Segmenter, mean_iou

Line = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What all runs of a setting share.

    Attributes:
        setting: its name.
        arch: "pointnet"; "pointnet2", networks that sample (`Sampled`); "segmenter" (`Segmenter`).
        clouds: the data as `write_clouds` wrote it.
        data: its digest.
        teachers: where the checkpoint is; with `labels`, one for every seed. Trained if not there.
        state: where checkpoints of runs are.
        views: of every cloud, recorded with what the teacher makes of them, for all students;
            none if every student is to see clouds of its own.
        labels: students are trained on so many clouds of every class, of the half that the teacher
            is trained on, and the other half is the test, other halves for every seed; 0: as the
            data says, and all on the same.
    """

    setting: str
    arch: str
    clouds: str
    data: str
    teachers: str
    state: str
    points: int
    epochs: int
    teacher_epochs: int
    batch_size: int
    views: int
    labels: int
    learning_rate: float
    teacher_learning_rate: float
    compress: float
    device: str
    backend: str
    commit: str

    @property
    def sampled(self) -> bool:
        """Whether networks see ordered clouds."""
        return self.arch == "pointnet2"

    def teacher(self, seed: int) -> Path:
        """The checkpoint of the teacher for the students of a seed."""
        path = Path(self.teachers)
        return path.with_stem(f"{path.stem}-{seed}") if self.labels else path

    def folder(self, row: str, seed: int) -> Path:
        """Where a run keeps its checkpoint until it is finished."""
        # The same row for longer, or on other data, is another run.
        own = self.setting, row, seed, self.epochs, self.data[:6]
        return Path(self.state) / "-".join(map(str, own))


class Quiet:
    """Nobody watches."""

    def begin(self, name: str, epochs: int, steps: int, history: list[Record]) -> None: ...
    def step(self) -> None: ...
    def epoch(self, record: Record) -> None: ...
    def end(self) -> None: ...


def write_clouds(path: Path, data: Dataset) -> None:
    """The data as workers read it: arrays as they are, no decoding."""
    splits = {"train": data.train, "test": data.test}
    tensors = {name: (split.points, split.labels) for name, split in splits.items()}
    save(path, {"name": data.name, "classes": [str(name) for name in data.classes], **tensors})


def build(arch: str, classes: int, width: float = 1.0) -> Network:
    """A network that does not see ordered clouds, by its name."""
    make = Segmenter if arch == "segmenter" else networks.ARCHITECTURES[arch]
    return make(classes, width)


def few(train: Clouds, test: Clouds, labels: int, seed: int) -> tuple[Clouds, Clouds, Clouds]:
    """All clouds anew: the teacher's half, so many of each of its classes, and the test's half."""
    both = Clouds(torch.cat([train.points, test.points]), torch.cat([train.labels, test.labels]))
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))
    both = both.select(order.to(both.labels.device))
    half = len(both) // 2
    taught, test = both.select(slice(half)), both.select(slice(half, None))
    kinds = torch.nn.functional.one_hot(taught.labels)
    chosen = ((kinds.cumsum(0) <= labels) & (kinds == 1)).any(1)
    return taught, taught.select(chosen), test


class Bench:
    """The data and the networks on the device."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.device = plan, torch.device(plan.device)
        state = torch.load(plan.clouds, map_location=self.device, weights_only=True)
        self.name, self.classes = state["name"], state["classes"]
        self.clouds = [Clouds(*state[split]) for split in ("train", "test")]
        self.seed: int | None = None

    def choose(self, seed: int) -> None:
        """Take the training and test clouds of a seed."""
        plan, (train, test) = self.plan, self.clouds
        if self.seed is not None and (seed == self.seed or not plan.labels):
            return
        taught = train
        if plan.labels:
            taught, train, test = few(train, test, plan.labels, seed)
        self.seed, self.taught, self.train = seed, taught, train
        self.tests = parts(test, plan.points, sampled=plan.sampled)
        # What is scored after every epoch is the first part; of many clouds for few, some.
        self.seen = self.tests[0].select(slice(len(train))) if plan.labels else self.tests[0]

    def network(self, seed: int, width: float = 1.0, *, teacher: bool) -> Network:
        """A fresh one; its weights are drawn on the CPU, the same for every device."""
        torch.manual_seed(seed)
        if self.plan.sampled:
            made: Network = Sampled(len(self.classes), width, teacher=teacher)
        else:
            made = build(self.plan.arch, len(self.classes), width)
        return made.to(self.device)

    def fit(
        self,
        network: Network,
        objective: Supervised,
        run: Run,
        train: Clouds,
        views: Views | None = None,
    ) -> None:
        """Train, from wherever the run stands, on the `views` or on clouds of its own."""
        data = Dataset(self.name, train, self.seen, self.classes)
        epochs = views or Epochs(train, run.settings, sampled=self.plan.sampled)
        fit(network, objective, data, run, Quiet(), epochs)

    def views(self) -> Views | None:
        """What all students see, recorded by the first process that asks for it."""
        plan, teacher = self.plan, self.plan.teacher(self.seed)
        if not plan.views:
            return None
        key = {"data": plan.data, "teacher": hashlib.sha256(teacher.read_bytes()).hexdigest()}
        settings = self.settings(plan.epochs, plan.learning_rate, 0)
        prepare = partial(both_orders, random=True) if plan.sampled else lambda points: points
        folder = Path(plan.state).parent / "views"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            torch.manual_seed(0)  # where samples begin is drawn by the global generator
            return Views.make(
                folder, key, self.teacher(), self.train, settings, plan.views,
                prepare=prepare, most=plan.points,
            )  # fmt: skip

    def settings(self, epochs: int, rate: float, seed: int) -> Settings:
        plan = self.plan
        return Settings(epochs, plan.points, plan.batch_size, rate, seed=seed)

    def teacher(self) -> Network:
        """The trained teacher, frozen."""
        state = load_checkpoint(self.plan.teacher(self.seed))
        network = self.network(0, teacher=True)
        network.load_state_dict(state["network"])
        return network.eval().requires_grad_(False)

    def train_teacher(self, seed: int) -> Line:
        """The teacher, unless it is there, and its score."""
        self.choose(seed)
        plan, path, history = self.plan, self.plan.teacher(seed), []
        if not path.exists():
            network = self.network(seed, teacher=True)
            settings = self.settings(plan.teacher_epochs, plan.teacher_learning_rate, seed)
            description = {"arch": plan.arch, "width": 1.0, "classes": len(self.classes)}
            run = Run(plan.folder("teacher", seed), "teacher", description, settings)
            self.fit(network, Supervised(network), run, self.taught)
            history = run.history
            content = {"description": description, "settings": asdict(settings)}
            save(path, {**content, "history": history, "network": network.state_dict()})
        return self.line("teacher", seed, self.teacher(), history)

    def train_student(self, row: str, seed: int) -> Line:
        """One student of a row, and its score."""
        self.choose(seed)
        plan, chosen = self.plan, ROWS[row]
        with torch.device("meta"):
            full = build(plan.arch, len(self.classes))
        budget = networks.parameters(full) / plan.compress
        width = networks.widest(plan.arch, len(self.classes), budget, build=build)
        student = self.network(seed, width, teacher=False)
        teacher, views = self.teacher() if chosen.taught else None, self.views()
        example = self.train.points[:2, : plan.points]
        if plan.sampled:
            example = both_orders(example, random=True)
        # The same adapters for the same layers.
        torch.manual_seed(seed + 1)
        steps = plan.epochs * (len(self.train) // min(plan.batch_size, len(self.train)))
        objective = Recipe(
            student, teacher, chosen, example=example, seed=seed, steps=steps, backend=plan.backend
        )
        if teacher is not None and views:
            objective.replay = Replay(teacher)
        settings = self.settings(plan.epochs, plan.learning_rate, seed)
        description = {"row": row, "arch": plan.arch, "width": width, "data": plan.data}
        description |= {"classes": len(self.classes), "views": plan.views, "commit": plan.commit}
        run = Run(plan.folder(row, seed), "student", description, settings)
        self.fit(student, objective, run, self.train, views)
        return self.line(row, seed, student, run.history)

    def line(self, row: str, seed: int, network: Network, history: list[Record]) -> Line:
        """What is known of a finished run."""
        plan, trained = self.plan, self.taught if row == "teacher" else self.train
        # Of a cloud's parts in the mean: less noise than one of them, from the same students.
        if plan.arch == "segmenter":
            scores = [mean_iou(network, part) for part in self.tests]
        else:
            scores = [accuracy(network, part, plan.points, 256) for part in self.tests]
        cuda = self.device.type == "cuda"
        return {
            "setting": plan.setting,
            "row": row,
            "seed": seed,
            "epochs": plan.teacher_epochs if row == "teacher" else plan.epochs,
            "batch_size": plan.batch_size,
            "views": plan.views,
            "labels": plan.labels,
            "learning_rate": plan.learning_rate,
            "points": plan.points,
            "accuracy": sum(scores) / len(scores),
            "parts": scores,
            "every_epoch": [round(record["test_accuracy"], 5) for record in history],
            "last_epoch": {name: float(f"{v:.5g}") for name, v in (history or [{}])[-1].items()},
            "seconds": round(sum(record["seconds"] for record in history), 2),
            "parameters": networks.parameters(network),
            "arch": plan.arch,
            "data": plan.data,
            "dataset": self.name,
            "clouds": [len(trained), len(self.tests[0])],
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "backend": plan.backend,
            "torch": torch.__version__,
            "fad_loss": fad_loss.__version__,
            "commit": plan.commit,
        }


def serve() -> int:
    """Answer every line of the input but the first, the plan, with one of the output."""
    torch.set_num_threads(1)
    # Both take seconds at first, and the plan is not there yet.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    if torch.cuda.is_available():
        torch.cuda.init()
    # What else is printed, by whatever part of the process, is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("default")
    plan = sys.stdin.readline()
    if not plan:
        return 0
    bench = Bench(Plan(**json.loads(plan)))
    for request in sys.stdin:
        task = json.loads(request)
        try:
            if task["row"] == "teacher":
                answer = bench.train_teacher(task["seed"])
            else:
                answer = bench.train_student(**task)
        except Exception as error:  # noqa: BLE001  # another run may do better
            reason, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
            answer = {"error": reason[:500], "trace": trace}
        print(json.dumps(answer), file=answers, flush=True)
    return 0
