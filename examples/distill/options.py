"""The options of the command."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

import distill
from distill import networks
from distill.terms import DISCRIMINATORS, METHODS
from fad_loss import FeatureAdversarialLoss


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, those that depend on the data filled in."""
    summary, details = str(distill.__doc__).split("\n", 1)
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
        default=["fad+last"],
        metavar="METHOD",
        help=f"none, {', '.join(METHODS)}, or several of them joined by + (default: fad+last)",
    )
    add("--no-baseline", action="store_true", help="do not train the student alone")
    add("--only", choices=["teacher"], help="stop after the teacher")
    add("--weights", nargs="+", type=_weight, default=[], metavar="METHOD=WEIGHT",
        help="of the terms (methods.WEIGHTS)")  # fmt: skip
    add("--temperature", type=_positive, default=1.0, help="of kd (1)")
    add("--discriminator", help="of fad (the library's default)", choices=[
        "teacher", "paired", "point", "neighborhood", "cloud", "match", *DISCRIMINATORS,
    ])  # fmt: skip
    add("--fad", nargs="+", type=_setting, default=[], action="extend", metavar="NAME=VALUE",
        help="more arguments of FeatureAdversarialLoss: balance=True, "
        "max_points=32, objective='least_squares'")  # fmt: skip
    add("--curriculum", choices=["first", "fade"], help="the terms first, then the task too; or "
        "terms that fade to nothing")  # fmt: skip
    add("--views", type=int, default=0, metavar="V", help="ask the teacher about V augmented views "
        "of every cloud, once, instead of at every step (0: at every step)")  # fmt: skip
    add("--cache", type=Path, help="folder for the views, 1.3 GB each of 9,840 clouds (--output)")
    add("--validate", action="store_true", help="hold out a tenth of training as the test split")
    add("--points", type=_count, help="per cloud (default: 64 synthetic, else 256)")
    add("--ragged", action="store_true", help="keep clouds with fewer points as they are, in "
        "batches of unequal size, instead of repeating points")  # fmt: skip
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
    own = {"student_channels", "teacher_channels", "discriminator", "weight", "layout"}
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
