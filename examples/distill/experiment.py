"""The command: a teacher, the students, and the comparison at the end."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import fad_loss
from distill import networks, readers, report
from distill.data import DataError, Dataset, synthetic
from distill.methods import Distilled, Supervised
from distill.networks import Network
from distill.options import parse
from distill.storage import load_checkpoint, save, write
from distill.terms import COMPARED, of_discriminator, title
from distill.training import Run, Settings, fit
from distill.views import Views
from fad_loss import FeatureAdversarialLoss


def check_losses(options: argparse.Namespace) -> None:
    """Find what is wrong with the options of the losses before any network is trained."""
    used = {name for method in options.loss for name in method.split("+")}
    for name, _ in options.weights:
        if name not in used:
            message = f"--weights {name}: not a part of --loss {' '.join(options.loss)}"
            raise DataError(message)
    try:
        FeatureAdversarialLoss(8, 8, **adversarial(options, 8))
    except (ValueError, TypeError) as error:
        message = f"--loss fad: {error}"
        raise DataError(message) from error


def check_ragged(options: argparse.Namespace) -> None:
    """Find what does not go with clouds of unequal size."""
    known = ", ".join(sorted(networks.RAGGED))
    for role, arch in (("teacher", options.teacher_arch), ("student", options.student_arch)):
        if arch not in networks.RAGGED:
            message = f"--ragged: the {role}'s {arch} needs clouds of equal size; take {known}"
            raise DataError(message)
    dense = {n for method in options.loss for n in method.split("+") if n not in {"none", "fad"}}
    for name in sorted(dense - COMPARED.keys()):
        message = f"--ragged: {name} needs clouds of equal size; take fad, {', '.join(COMPARED)}"
        raise DataError(message)
    if options.views:
        message = "--ragged: --views keeps clouds of equal size; leave one of them out"
        raise DataError(message)


def adversarial(options: argparse.Namespace, channels: int) -> dict[str, Any]:
    """What is given of the options of "fad"; without any it is the library's default."""
    return {**of_discriminator(options.discriminator, channels), **dict(options.fad)}


def load_data(options: argparse.Namespace) -> Dataset:
    """The clouds to train and test on."""
    if options.data == "synthetic":
        # The same clouds whatever --seed is: it decides initial weights and the order of batches.
        data = synthetic(points=max(512, options.points))
    else:
        data = readers.read(
            Path(options.data),
            cache=options.output,
            points=max(1024, options.points),
            ragged=options.ragged,
        )
    if options.ragged and data.train.lengths is None:
        message = (
            f"--ragged: the clouds of {options.data} are of equal size; "
            "save an .npz with points, lengths and labels"
        )
        raise DataError(message)
    if options.validate:
        data = data.validation()
    for split in (data.train, data.test):
        if split.points.shape[1] < options.points:
            message = (
                f"{options.data}: clouds have {split.points.shape[1]} points; "
                f"--points {options.points} asks for more"
            )
            raise DataError(message)
    return data


def make_folder(option: str, path: Path) -> None:
    """Create a folder for results."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{option} {path}: {error.strerror}"
        raise DataError(message) from error


class Experiment:
    """Everything that the trainings share: the options, the data and where results go."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        check_losses(options)
        if options.ragged:
            check_ragged(options)
        try:
            self.device = torch.device(options.device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            message = f"--device {options.device}: {str(error).splitlines()[0]}"
            raise DataError(message) from error
        for name in ("output", "cache"):
            make_folder(f"--{name}", getattr(options, name))
        with console.status("reading the data"):
            data = load_data(options)
            self.fingerprint = data.fingerprint()
            self.data = data.to(self.device)
        for note in data.notes:
            console.print(note, highlight=False, soft_wrap=True)
        self.rows: list[report.Row] = []
        self.histories: dict[str, list[dict[str, float]]] = {}
        self.screen = report.Screen(console)

    def settings(self, epochs: int) -> Settings:
        given = vars(self.options)
        names = {field.name for field in dataclasses.fields(Settings)} - {"epochs"}
        return Settings(epochs=epochs, **{name: given[name] for name in names & given.keys()})

    def build(self, arch: str, width: float) -> Network:
        torch.manual_seed(self.options.seed)
        return networks.build(arch, len(self.data.classes), width).to(self.device)

    def describe(self, role: str, arch: str, width: float, **more: Any) -> dict[str, Any]:
        """What a checkpoint is named by, besides its settings."""
        return {
            "role": role,
            "arch": arch,
            "width": width,
            "classes": len(self.data.classes),
            "data": self.fingerprint,
            "label_smoothing": self.options.label_smoothing,
            **more,
        }

    def add_row(self, name: str, run: Run, network: Network) -> report.Row:
        row = report.Row(
            name=name,
            checkpoint=str(run.path),
            parameters=networks.parameters(network),
            accuracy=run.history[-1]["test_accuracy"],
            seconds=run.seconds,
        )
        self.rows.append(row)
        self.histories[name] = run.history
        return row

    def teacher(self) -> Network:
        """The teacher: from --teacher, or trained here, or as this command trained it before."""
        options = self.options
        if options.teacher:
            return self._given_teacher(options.teacher)
        arch = options.teacher_arch
        settings = dataclasses.replace(
            self.settings(options.teacher_epochs), learning_rate=options.teacher_learning_rate
        )
        description = self.describe("teacher", arch, 1.0)
        run = Run(options.output, f"teacher-{arch}", description, settings)
        network = self.build(arch, 1.0)
        objective = Supervised(network, options.label_smoothing)
        fit(network, objective, self.data, run, self.screen)
        row = self.add_row("teacher", run, network)
        row.corrupted = self.evaluate(network).corrupted
        return network

    def _given_teacher(self, path: Path) -> Network:
        state = load_checkpoint(path)
        description = state["description"]
        if description["classes"] != len(self.data.classes):
            message = (
                f"{path}: the teacher knows {description['classes']} classes, "
                f"the data has {len(self.data.classes)}"
            )
            raise DataError(message)
        network = self.build(description["arch"], description["width"])
        try:
            network.load_state_dict(state["network"])
        except RuntimeError as error:
            message = f"{path}: the weights are not those of a {description['arch']}"
            raise DataError(message) from error
        run = Run(path.parent, path.stem, description, self.settings(1), state["history"])
        row = self.add_row("teacher", run, network)
        row.checkpoint = str(path)
        # It may have been trained on other data or with another number of points: ask again.
        found = self.evaluate(network)
        row.accuracy, row.corrupted = found.accuracy, found.corrupted
        return network

    def evaluate(self, network: Network) -> report.Evaluation:
        """The teacher on the test clouds, remembered for the next run."""
        points = self.options.points
        name = f"evaluation-{digest(network)}-{self.fingerprint}-{points}.pt"
        path = self.options.cache / name
        if path.exists():
            return report.Evaluation(**torch.load(path, map_location=self.device))
        found = report.evaluate(network, self.data.test, points)
        save(path, vars(found))
        return found

    def views(self, teacher: Network) -> Views | None:
        """What the teacher says about a fixed set of views, if that is wanted."""
        if not self.options.views:
            return None
        settings, data = self.settings(1), self.data
        key = {"teacher": digest(teacher), "data": self.fingerprint}
        bar = functools.partial(track, description="views", console=self.console, transient=True)
        count, cache = self.options.views, self.options.cache
        return Views.make(cache, key, teacher, data.train, settings, count, bar)

    def student(self, method: str, teacher: Network) -> None:
        """Train one student, and compare its features with the teacher's."""
        options, arch = self.options, self.options.student_arch
        budget = networks.parameters(teacher) / options.compress
        try:
            width = networks.widest(arch, len(self.data.classes), budget)
        except ValueError as error:
            message = f"--compress {options.compress:g}: {error}"
            raise DataError(message) from error
        network = self.build(arch, width)
        more: dict[str, Any] = {"method": method}
        steps = len(self.data.train) // min(options.batch_size, len(self.data.train))
        if method == "none":
            objective = Supervised(network, options.label_smoothing)
        else:
            try:
                objective = Distilled(
                    network,
                    teacher,
                    method,
                    weights=dict(options.weights),
                    temperature=options.temperature,
                    smoothing=options.label_smoothing,
                    curriculum=options.curriculum,
                    discriminator=options.discriminator,
                    **{"total_steps": options.epochs * steps, **dict(options.fad)},
                ).to(self.device)
            except (ValueError, TypeError) as error:
                message = f"--loss {method}: {error}"
                raise DataError(message) from error
            more |= {"weights": objective.weights, "teacher": digest(teacher)}
            # What is not given is the default of this version of the library.
            more |= {"fad_loss": fad_loss.__version__}
            if "fad" in method.split("+"):
                more |= {"discriminator": options.discriminator, **dict(options.fad)}
            more |= {"curriculum": options.curriculum} if options.curriculum else {}
            more |= {"temperature": options.temperature} if "kd" in method.split("+") else {}
        more |= {"views": options.views} if options.views else {}
        description = self.describe("student", arch, width, **more)
        name = f"student-{'alone' if method == 'none' else method}"
        run = Run(options.output, name, description, self.settings(options.epochs))
        fit(network, objective, self.data, run, self.screen, self.views(teacher))
        row = self.add_row(title(method), run, network)
        report.compare(
            row, report.evaluate(network, self.data.test, options.points), self.evaluate(teacher)
        )

    def finish(self) -> None:
        """Show the table; write the table and the plot."""
        options, data = self.options, self.data
        report.recover(self.rows)
        caption = (
            f"{data.name}: {len(data.train):,} training and {len(data.test):,} test clouds, "
            f"{len(data.classes)} classes, {'up to ' if options.ragged else ''}"
            f"{options.points} points"
        )
        self.console.print(report.table(self.rows, caption))
        report.plot(options.output / "curves.png", self.histories, caption)
        chosen = {key: str(value) for key, value in vars(options).items()}
        content = report.results(
            self.rows,
            data=caption,
            torch=torch.__version__,
            fad_loss=fad_loss.__version__,
            options=chosen,
        )
        path = options.output / "results.json"
        write(path, (json.dumps(content, indent=2) + "\n").encode())
        places = f"plot: {options.output / 'curves.png'}\nresults: {path}"
        self.console.print(places, highlight=False, soft_wrap=True)


def digest(network: Network) -> str:
    """Eight characters that change with the weights."""
    hashed = hashlib.sha256()
    for tensor in network.state_dict().values():
        hashed.update(tensor.cpu().contiguous().numpy())
    return hashed.hexdigest()[:8]


def main(arguments: list[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    options = parse(arguments)
    console = Console()
    try:
        experiment = Experiment(options, console)
        teacher = experiment.teacher()
        if options.only == "teacher":
            experiment.views(teacher)
        else:
            baseline = [] if options.no_baseline else ["none"]
            for method in dict.fromkeys([*baseline, *options.loss]):
                experiment.student(method, teacher)
        experiment.finish()
    except DataError as error:
        print(f"distill: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"distill: error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distill: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0
