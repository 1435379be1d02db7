"""Which loss makes the best students, at 40 times fewer parameters? Many runs of `distill`.

    python examples/study tune synthetic             # weights, on a validation split
    python examples/study run synthetic              # every row, three seeds
    python examples/study run pointnet --data modelnet40.npz --rows alone kd fad fad+kd
    python examples/study again pointnet --data modelnet40.npz --rows kd  # and compare
    python examples/study report                     # tables and plots of all results
    python examples/study paired sampled --data modelnet40.npz   # today's losses, paired seeds
    python examples/study verdicts                   # and what those lines say

Every row is a command of `examples/distill`, which is kept with its result: one JSON line per run
in `results/`. What is there already is not run again (unless by `again`, which trains the students
of a row once more), and an interrupted run continues, so the same command can be given until all is
done. The teacher is that of `teachers/`, if the setting has one there; else it is trained, once per
setting, and once more without the validation clouds for `tune`.

Every method gets the same epochs, and from `tune` its weight by the same rule: the best of
`WEIGHTS`, or of the next ones while the best is the first or the last, judged on a tenth of the
training clouds and never on the test clouds. Of a combination, the last part is tuned so beside the
others; one that was not tuned takes the weights of its parts. A setting of `tables.BORROWED` in
which nothing was tuned takes all weights from another setting: do they carry over?
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from study import tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
DISTILL = HERE.parent / "distill"
# Which weights are tried first; they are on `tables.LADDER`.
WEIGHTS = (0.3, 3.0, 30.0)
# While the best one is the first or the last, so many more beyond it are tried.
FURTHER = 2

# What is distilled; options of distill. Sized for hours on two CPU cores: there the teacher is
# asked once about a few views of every cloud.
SETTINGS: dict[str, list[str]] = {
    "synthetic": ["--points", "64", "--epochs", "18", "--teacher-epochs", "12"],
    "pointnet": ["--points", "256", "--epochs", "12", "--teacher-epochs", "30", "--views", "8"],
    # As above at a sixth of the learning rate, and the customary temperature of KD.
    "slow": ["--points", "256", "--epochs", "12", "--teacher-epochs", "30", "--views", "8",
             "--learning-rate", "0.001", "--temperature", "4"],
    "dgcnn": ["--teacher-arch", "dgcnn", "--points", "256", "--epochs", "12",
              "--teacher-epochs", "12", "--views", "4"],
    "across": ["--teacher-arch", "dgcnn", "--student-arch", "pointnet", "--points", "256",
               "--epochs", "12", "--teacher-epochs", "12", "--views", "4"],
}  # fmt: skip
# A row is "alone" or some of these joined by "+"; options of distill that a part needs.
PARTS: dict[str, list[str]] = {
    **{
        name: []
        for name in (
            "kd", "logit", "mse", "fitnet", "fitnet-last", "sp", "rkd", "crd",
            "chamfer", "energy", "mmd", "sinkhorn", "fad-head", "fad-last",
        )
    },
    # As the README shows it.
    "fad": [],
    "fad-broad": ["--discriminator", "broad"],
    "fad-paired": ["--discriminator", "paired", "--fad", "max_points=64"],
    **{
        f"fad-{name}": ["--discriminator", name]
        for name in ("point", "neighborhood", "cloud", "match")
    },
}  # fmt: skip
# One thing changed of a part; it takes the weight of that part unless it was tuned itself.
VARIANTS: dict[str, dict[str, list[str]]] = {
    "fad": {
        "8points": ["--fad", "max_points=8"],
        "16points": ["--fad", "max_points=16"],
        **{
            name: ["--discriminator", name]
            for name in ("near", "sharp", "sharper", "witness", "energy-witness", "embedded")
        },
        "witness-16points": ["--discriminator", "witness", "--fad", "max_points=16"],
    },
    "fad-paired": {
        "balanced": ["--fad", "balance=True"],
        "raw": ["--fad", "normalize=False"],
        "warmup": ["--fad", "warmup_steps=300"],
        "8points": ["--fad", "max_points=8"],
        "16points": ["--fad", "max_points=16"],
        **{
            name: ["--fad", f"objective={name!r}"]
            for name in ("non_saturating", "least_squares", "relativistic")
        },
        "first": ["--curriculum", "first"],
        "fade": ["--curriculum", "fade"],
        **{name: ["--discriminator", name] for name in ("narrow", "wide")},
    },
    "fad-point": {
        **{
            name: ["--fad", f"objective={name!r}"]
            for name in ("non_saturating", "least_squares", "wasserstein", "relativistic")
        },
        "penalty": ["--fad", "gradient_penalty=1.0"],
        "lecam": ["--fad", "lecam=0.3"],
    },
}
BASES = {f"{base}-{name}": base for base, variants in VARIANTS.items() for name in variants}
# The comparison, where no rows are asked for.
ROWS = (
    "alone", *PARTS,
    "fitnet+kd", "crd+kd", "fad+kd", "fad-paired+kd", "fad-match+kd",
    "fitnet+fitnet-last", "fitnet+fitnet-last+kd", "fitnet+fad-head", "fitnet+fad-head+kd",
    "fad+fad-head", "fad-paired+fad-head", "fad-paired+fad-head+kd",
    "fad-paired+fad-last", "fad-paired+fad-last+kd", "fad-paired+fad-last+fad-head",
)  # fmt: skip
UNTUNED = {"alone"}
# Trained by distill --only teacher --points 256 on all training clouds of ModelNet40, with
# --teacher-epochs 25, or --teacher-arch dgcnn --teacher-epochs 12.
TEACHERS = {
    **dict.fromkeys(("pointnet", "slow"), HERE / "teachers" / "pointnet.pt"),
    **dict.fromkeys(("dgcnn", "across"), HERE / "teachers" / "dgcnn.pt"),
}


class Study:
    """One setting: where its runs go, and what is known already."""

    def __init__(self, setting: str, options: argparse.Namespace) -> None:
        self.setting, self.options = setting, options
        self.runs: Path = options.runs / setting
        self.common = ["--data", options.data, *SETTINGS[setting]]
        if options.epochs:
            self.common += ["--epochs", str(options.epochs)]
            if "--views" in self.common:
                self.common += ["--views", str(min(options.epochs, 8))]
        if options.teacher_epochs:
            self.common += ["--teacher-epochs", str(options.teacher_epochs)]
        self.common += ["--cache", str(self.runs / "cache")]

    def distill(self, folder: str, *arguments: str, jobs: int = 1) -> dict[str, Any]:
        """Run distill to its end, one of so many `jobs`; its results, and the command."""
        output = self.runs / folder
        command = [str(DISTILL), *self.common, *arguments, "--output", str(output)]
        threads = max(1, (os.cpu_count() or 1) // jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        output.mkdir(parents=True, exist_ok=True)
        with (output / "log.txt").open("a", encoding="utf-8") as log:
            done = subprocess.run(
                [sys.executable, *command], env=environment, stdout=log, stderr=log, check=False
            )
        if done.returncode:
            text = (output / "log.txt").read_text(encoding="utf-8").strip().splitlines()
            message = f"{shlex.join(command)}: {text[-1] if text else 'failed'}"
            raise SystemExit(message)
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        # As it would be given in the checkout, wherever that lies.
        return {**results, "command": shlex.join(command).replace(f"{ROOT}{os.sep}", "")}

    def teacher(self, split: str) -> str:
        """The checkpoint of the teacher that a split's students learn from."""
        more = ["--validate"] if split == "validation" else []
        given = self.options.teacher
        if not given and not self.options.teacher_epochs:
            given = TEACHERS.get(self.setting)
        more += ["--teacher", str(given)] if given else []
        results = self.distill(f"teacher-{split}", "--only", "teacher", *more)
        return str(results["rows"][0]["checkpoint"])

    def weights(self, row: str) -> dict[str, float]:
        """The tuned weights of a row, by part; 1 for what was not tuned.

        Of a combination that was not, those of its longest beginning that was, and of the others.
        """
        tuned = tables.tuned(tables.tried(RESULTS, self.setting))
        parts = row.split("+")
        for count in range(len(parts), 0, -1):
            found = tuned.get("+".join(parts[:count]))
            if found:
                break
        else:
            first = parts[0]
            base = BASES.get(first, first)
            found = {first: tuned[base][base] if base in tuned else 1.0}
        rest = "+".join(parts[count:])
        return {**found, **self.weights(rest)} if rest else found

    def run(
        self, teacher: str, split: str, row: str, seed: int, weights: dict[str, float], name: str
    ) -> tables.Line:
        """One run in a folder whose name begins so; its line."""
        arguments = [*how(row), "--no-baseline", "--teacher", teacher]
        arguments += ["--seed", str(seed)]
        if row not in UNTUNED:
            given = [f"{method(part)}={weight:g}" for part, weight in weights.items()]
            arguments += ["--weights", *given]
        arguments += ["--validate"] if split == "validation" else []
        label = "-".join(f"{weight:g}" for weight in weights.values())
        results = self.distill(f"{name}-{row}-{label}-{seed}", *arguments, jobs=self.options.jobs)
        teacher_row, student_row = results["rows"]
        return {
            "setting": self.setting,
            "split": split,
            "row": row,
            "seed": seed,
            "weights": weights,
            "accuracy": student_row["accuracy"],
            "information_lost": student_row["information_lost"],
            "cka": student_row["cka"],
            "neighbor_agreement": student_row["neighbor_agreement"],
            "corrupted": student_row["corrupted"],
            "parameters": student_row["parameters"],
            "seconds": student_row["seconds"],
            "teacher_accuracy": teacher_row["accuracy"],
            "teacher_corrupted": teacher_row["corrupted"],
            "teacher_parameters": teacher_row["parameters"],
            "data": results["data"],
            "torch": results["torch"],
            "fad_loss": results["fad_loss"],
            "commit": commit(),
            "command": results["command"],
            "epochs": epochs(Path(student_row["checkpoint"]).with_suffix(".jsonl")),
        }

    def keep(self, line: tables.Line) -> None:
        """Write a line to the results."""
        RESULTS.mkdir(exist_ok=True)
        with tables.path(RESULTS, self.setting, line["split"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['split']} {describe(line)}: {100 * line['accuracy']:.2f} %", flush=True)

    def tune(self, rows: list[str]) -> None:
        """Find the weights of some rows; of combinations, that of the last part."""
        tried = []
        for row in rows:
            others, _, last = row.rpartition("+")
            before = self.weights(others) if others else {}
            tried += [(row, 0, {**before, last: weight}) for weight in WEIGHTS]
        self.all("validation", tried)
        for _ in range(FURTHER):
            lines = tables.read(RESULTS, self.setting, "validation")
            edge = [(row, 0, further) for row, further in tables.at_the_edge(lines) if row in rows]
            if not edge:
                break
            self.all("validation", edge)

    def all(self, split: str, todo: Iterable[tuple[str, int, dict[str, float]]]) -> None:
        """Run what is not there yet, some side by side."""
        known = {
            (line["row"], line["seed"], json.dumps(line["weights"], sort_keys=True))
            for line in tables.read(RESULTS, self.setting, split)
        }
        missing = [
            (row, seed, weights)
            for row, seed, weights in todo
            if (row, seed, json.dumps(weights, sort_keys=True)) not in known
        ]
        if not missing:
            print("nothing is left to do")
            return
        teacher = self.teacher(split)

        def one(row: str, seed: int, weights: dict[str, float]) -> None:
            self.keep(self.run(teacher, split, row, seed, weights, split))

        with ThreadPoolExecutor(self.options.jobs) as pool:
            for future in [pool.submit(one, *run) for run in missing]:
                future.result()

    def again(self, rows: list[str], seeds: list[int]) -> None:
        """Train the students of some rows once more, and show what was and what is."""
        lines = [
            line
            for line in tables.read(RESULTS, self.setting, "test")
            if line["row"] in rows and line["seed"] in seeds
        ]
        if not lines:
            message = (
                f"{self.setting}: no line of {', '.join(rows)} with seeds {seeds} to run again"
            )
            raise SystemExit(message)
        teacher = self.teacher("test")
        # Not what another version of the code has trained before.
        name = f"again-{commit()}"

        def one(line: tables.Line) -> None:
            run = self.run(teacher, "test", line["row"], line["seed"], line["weights"], name)
            was, now = (100 * x["accuracy"] for x in (line, run))
            print(f"{describe(line)}: {was:.2f} % in the table, {now:.2f} % now", flush=True)

        with ThreadPoolExecutor(self.options.jobs) as pool:
            list(pool.map(one, lines))


def describe(line: tables.Line) -> str:
    """What was run."""
    return f"{line['row']} seed {line['seed']} {line['weights']}"


def how(row: str) -> list[str]:
    """The options of distill that make a row, without its weights."""
    if row == "alone":
        return ["--loss", "none"]
    parts = row.split("+")
    more = [option for part in parts for option in _options(part)]
    return ["--loss", "+".join(map(method, parts)), *more]


def _options(part: str) -> list[str]:
    if part in PARTS:
        return PARTS[part]
    base = BASES[part]
    changed = VARIANTS[base][part.removeprefix(f"{base}-")]
    return changed if "--discriminator" in changed else [*PARTS[base], *changed]


def method(part: str) -> str:
    """What distill calls a part of a row."""
    if part in {"fad-head", "fad-last"}:
        return part.removeprefix("fad-")
    return "fad" if part.startswith("fad") else part


def _row(text: str) -> str:
    unknown = [part for part in text.split("+") if part not in {**PARTS, **BASES}]
    if text != "alone" and unknown:
        known = ", ".join([*PARTS, *BASES])
        message = f"{text!r} (expected alone, or, joined by +, some of {known})"
        raise argparse.ArgumentTypeError(message)
    return text


def epochs(log: Path) -> list[dict[str, float]]:
    """What distill wrote about every epoch, to five digits."""
    records = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return [{name: float(f"{value:.5g}") for name, value in record.items()} for record in records]


def commit() -> str:
    """The commit of the checkout, with a mark if more was changed than the results."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    results = (HERE / "results").relative_to(ROOT).as_posix()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{results}")
    return f"{head}-dirty" if changed else head or "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Run the study."""
    from study import gradients, paired  # noqa: PLC0415  # they import this module

    summary, details = str(__doc__).split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, explanation in (
        ("tune", "find the weights"),
        ("run", "train all students"),
        ("again", "train students of the tables again, and compare"),
    ):
        add = commands.add_parser(name, help=explanation).add_argument
        add("setting", choices=SETTINGS)
        add("--data", default="synthetic", help="as for distill")
        add("--rows", nargs="+", type=_row, default=list(ROWS), metavar="ROW",
            help=f"alone, or of {', '.join([*PARTS, *BASES])} some, joined by + "
            f"({', '.join(ROWS)})")  # fmt: skip
        add("--jobs", type=int, default=1, help="runs side by side (1)")
        add("--epochs", type=int, help="of the students, instead of the setting's")
        add("--teacher-epochs", type=int, help="train a teacher for so many epochs")
        add("--teacher", type=Path, help="a checkpoint to take for both splits (that of teachers/, "
            "if there is one for the setting)")  # fmt: skip
        add("--runs", type=Path, default=Path("runs/study"), help="checkpoints (runs/study)")
        if name != "tune":
            add("--seeds", type=int, nargs="+", default=[0, 1, 2])
        if name == "run":
            add("--split", choices=["test", "validation"], default="test", help="to score on")
    commands.add_parser("report", help="tables and plots from all results")
    gradients.add_options(
        commands.add_parser(
            "gradients",
            help="how strongly, and where to, the terms of a distillation pull",
            description=gradients.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    paired.add_commands(commands)
    options = parser.parse_args(arguments)
    if options.command in paired.COMMANDS:
        return paired.main(options)
    if options.command == "report":
        return tables.write(RESULTS)
    if options.command == "gradients":
        return gradients.measure(options)
    if options.setting != "synthetic" and options.data == "synthetic":
        parser.error(f"{options.setting}: needs --data, ModelNet40 as distill reads it")
    study = Study(options.setting, options)
    if options.command == "tune":
        untuned = [(row, 0, {row: 1.0}) for row in options.rows if row in UNTUNED]
        if untuned:
            study.all("validation", untuned)
        rows = [row for row in options.rows if row not in UNTUNED]
        for size in sorted({row.count("+") for row in rows}):
            study.tune([row for row in rows if row.count("+") == size])
    elif options.command == "again":
        study.again(options.rows, options.seeds)
        return 0
    else:
        weights = {row: study.weights(row) for row in options.rows}
        study.all(
            options.split, [(row, s, weights[row]) for s in options.seeds for row in options.rows]
        )
    return tables.write(RESULTS)
