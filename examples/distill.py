"""Distil a large point-cloud network into one 40 times smaller, and see what it was worth.

    python examples/distill.py                                  # generated shapes, a few minutes
    python examples/distill.py --data modelnet40_ply_hdf5_2048  # or any layout in readers.py
    python examples/distill.py --data clouds.npz --loss fad kd fad+kd --points 1024 --epochs 200

Trains a teacher (or takes one, --teacher), the student alone and the student with each --loss,
then shows a table of parameters, accuracy and information lost. Everything lands in --output:
checkpoints, a log of every epoch (JSON lines), results.json and curves.png. Interrupted, the same
command goes on where it stopped and ends in the same result; what is finished is not trained again.

The three lines that matter to your own loop are in methods.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import networks
import readers
import report
from data import DataError, Dataset, synthetic
from fad_loss import FeatureAdversarialLoss
from methods import DISCRIMINATORS, METHODS, Distilled, Network, Supervised, adversarial, title
from training import Run, Settings, fit, load_checkpoint
from views import Views


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, those that depend on the data filled in."""
    summary, details = str(__doc__).split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="synthetic", help="'synthetic', a folder, an .npz or an .h5 file")
    add("--output", type=Path, help="folder for all results (default: runs/NAME OF THE DATA)")
    add("--teacher", type=Path, help="checkpoint of a teacher that this example trained")
    add("--teacher-arch", choices=networks.ARCHITECTURES, default="pointnet")
    add("--student-arch", choices=networks.ARCHITECTURES, help="default: the teacher's")
    add("--compress", type=_positive, default=40, help="how many times fewer parameters (40)")
    add(
        "--loss",
        nargs="+",
        type=_method,
        default=["fad"],
        metavar="METHOD",
        help=f"none, {', '.join(METHODS)}, or several of them joined by + (default: fad)",
    )
    add("--no-baseline", action="store_true", help="do not train the student alone")
    add("--only", choices=["teacher"], help="stop after the teacher")
    add("--weights", nargs="+", type=_weight, default=[], metavar="METHOD=WEIGHT",
        help="of the terms (methods.WEIGHTS)")  # fmt: skip
    add("--temperature", type=_positive, default=1.0, help="of kd (1)")
    add("--discriminator", default="paired", help="of fad (paired)", choices=[
        "teacher", "paired", "point", "neighborhood", "cloud", "match", *DISCRIMINATORS,
    ])  # fmt: skip
    add("--objective", default="hinge", choices=[
        "hinge", "non_saturating", "least_squares", "wasserstein", "relativistic"])  # fmt: skip
    add("--fad", nargs="+", type=_setting, default=[], action="extend", metavar="NAME=VALUE",
        help="more arguments of FeatureAdversarialLoss: balance=True, max_points=32")  # fmt: skip
    add("--curriculum", choices=["first", "fade"], help="the terms first, then the task too; or "
        "terms that fade to nothing")  # fmt: skip
    add("--views", type=int, default=0, metavar="V", help="ask the teacher about V augmented views "
        "of every cloud, once, instead of at every step (0: at every step)")  # fmt: skip
    add("--cache", type=Path, help="folder for the views, 1.3 GB each of 9,840 clouds (--output)")
    add("--validate", action="store_true", help="hold out a tenth of training as the test split")
    add("--points", type=_count, help="per cloud (default: 64 synthetic, else 256)")
    add("--epochs", type=_count, help="of the students (default: 18 synthetic, else 30)")
    add("--teacher-epochs", type=_count, help="(default: 12 synthetic, else 30)")
    add("--batch-size", type=_count, default=32)
    add("--learning-rate", type=_positive, default=6e-3, help="of the students (0.006)")
    add("--teacher-learning-rate", type=_positive, default=1e-3, help="(0.001)")
    add("--weight-decay", type=_amount, default=0.05)
    add("--label-smoothing", type=_share, default=0.1)
    add("--jitter", type=_amount, default=0.0, help="noise on every point, standard deviation (0)")
    add("--rotate", action="store_true", help="turn clouds about z while training")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    small = options.data == "synthetic"
    options.points = options.points or (64 if small else 256)
    options.epochs = options.epochs or (18 if small else 30)
    options.teacher_epochs = options.teacher_epochs or (12 if small else 30)
    options.student_arch = options.student_arch or options.teacher_arch
    options.output = options.output or Path("runs") / Path(options.data).stem
    options.cache = options.cache or options.output
    return options


def _method(text: str) -> str:
    names = text.split("+")
    unknown = [name for name in names if name not in METHODS]
    if text != "none" and (unknown or len(set(names)) < len(names)):
        known = ", ".join(["none", *METHODS])
        message = f"{text!r} (choose from {known}, or join several with +)"
        raise argparse.ArgumentTypeError(message)
    return text


def _pair(text: str, names: Collection[str]) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        if name in names:
            return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    message = f"expected NAME=VALUE with a name from {', '.join(names)}, got {text!r}"
    raise argparse.ArgumentTypeError(message)


def _weight(text: str) -> tuple[str, float]:
    name, value = _pair(text, METHODS)
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        message = f"{name}: expected a weight of at least 0, got {value!r}"
        raise argparse.ArgumentTypeError(message)
    return name, float(value)


def _setting(text: str) -> tuple[str, Any]:
    names = inspect.signature(FeatureAdversarialLoss).parameters
    own = {"student_channels", "teacher_channels", "discriminator", "objective", "weight", "layout"}
    return _pair(text, [name for name in names if name not in own])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        message = f"expected a positive number, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        if fits(float(text)):
            return float(text)
    except ValueError:
        pass
    message = f"expected {expected}, got {text!r}"
    raise argparse.ArgumentTypeError(message)


def _positive(text: str) -> float:
    return _number(text, "a number above 0", lambda value: 0 < value < math.inf)


def _amount(text: str) -> float:
    return _number(text, "a number of at least 0", lambda value: 0 <= value < math.inf)


def _share(text: str) -> float:
    return _number(text, "a number from 0 to below 1", lambda value: 0 <= value < 1)


def check_losses(options: argparse.Namespace) -> None:
    """Find what is wrong with the options of the losses before any network is trained."""
    used = {name for method in options.loss for name in method.split("+")}
    for name, _ in options.weights:
        if name not in used:
            message = f"--weights {name}: not a part of --loss {' '.join(options.loss)}"
            raise DataError(message)
    try:
        adversarial((8, 8), options.discriminator, objective=options.objective, **dict(options.fad))
    except (ValueError, TypeError) as error:
        message = f"--loss fad: {error}"
        raise DataError(message) from error


def load_data(options: argparse.Namespace) -> Dataset:
    """The clouds to train and test on."""
    if options.data == "synthetic":
        # The same clouds whatever --seed is: it decides initial weights and the order of batches.
        data = synthetic(points=max(512, options.points))
    else:
        data = readers.read(
            Path(options.data), cache=options.output, points=max(1024, options.points)
        )
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
        network.load_state_dict(state["network"])
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
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(vars(found), partial)
        partial.replace(path)
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
        if method == "none":
            objective = Supervised(network, options.label_smoothing)
        else:
            adversarial = {
                "discriminator": options.discriminator,
                "objective": options.objective,
                **dict(options.fad),
            }
            try:
                objective = Distilled(
                    network,
                    teacher,
                    method,
                    weights=dict(options.weights),
                    temperature=options.temperature,
                    smoothing=options.label_smoothing,
                    curriculum=options.curriculum,
                    **adversarial,
                ).to(self.device)
            except (ValueError, TypeError) as error:
                message = f"--loss {method}: {error}"
                raise DataError(message) from error
            more |= {"weights": objective.weights, "teacher": digest(teacher)}
            # What is not given is the library's default, and not part of a checkpoint's name.
            more |= adversarial if "fad" in method.split("+") else {}
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
            f"{len(data.classes)} classes, {options.points} points"
        )
        self.console.print(report.table(self.rows, caption))
        report.plot(options.output / "curves.png", self.histories, caption)
        chosen = {key: str(value) for key, value in vars(options).items()}
        content = report.results(self.rows, data=caption, torch=torch.__version__, options=chosen)
        path = options.output / "results.json"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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
        print(f"distill.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distill.py: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
