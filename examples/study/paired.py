"""Rows that differ in nothing but the loss, over seeds, on one device, within so many seconds.

    python examples/study paired sampled --data modelnet40.npz --output results --limit 400
    python examples/study verdicts --output results

Every finished run is a line of JSON in OUTPUT/SETTING.jsonl as soon as it is there, and is not run
again by the next call with the same folder. Runs go on from the last epoch that was finished: their
checkpoints are in `--state`, and, packed, in OUTPUT/unfinished.zip, so that OUTPUT is all that has
to be kept between two calls, or carried to another machine.

Exit status: 0 if all is done, 1 if a run failed, 3 if there is more to do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study import verdicts
from study.fleet import HERE, Fleet, Line, Worker

# Seconds that the end of a call needs.
CLOSE = 5
UNFINISHED = "unfinished.zip"


@dataclass(frozen=True)
class Setting:
    """What is distilled, and how long, where the command says nothing else.

    Attributes:
        arch: of the networks, see `worker.Plan`.
        rows: of `study.rows`, the most important first.
        teacher: a checkpoint that is there; else one is trained, in `teacher_epochs`.
        views, labels: see `worker.Plan`.
    """

    arch: str
    epochs: int
    batch_size: int
    seeds: int
    rows: tuple[str, ...]
    teacher: Path | None = None
    teacher_epochs: int = 0
    points: int = 256
    views: int = 0
    labels: int = 0
    learning_rate: float = 6e-3


SETTINGS = {
    "sampled": Setting(
        "pointnet2", 10, 32, 6, ("alone", "fad", "fad-positions", "squared", "fitnet", "kd"),
        teacher=HERE / "teachers" / "pointnet2.pt", teacher_epochs=12, views=10,
    ),
    # Larger batches, so that a GPU sees more epochs in the same time.
    "pointnet": Setting(
        "pointnet", 60, 64, 6, ("alone", "fad-two", "squared-two", "kd"),
        teacher=HERE / "teachers" / "pointnet.pt", views=12,
    ),
    # Real scans of few objects, of which students have few.
    "scans": Setting(
        "pointnet", 200, 32, 6, ("alone", "fad-two", "squared-two", "kd"),
        teacher_epochs=100, views=20, labels=20,
    ),
    "parts": Setting(
        "segmenter", 20, 32, 6, ("alone", "fad-two", "squared-two", "kd"),
        teacher_epochs=30, points=128, views=10,
    ),
}  # fmt: skip
COMMANDS = {
    "paired": "train students that differ in nothing but the loss",
    "verdicts": "what their lines say",
    "worker": "a process of `paired`, which starts it",
}
# What lines of the same table have in common.
SAME = "epochs", "batch_size", "views", "labels"
# For a look at whether everything works: generated shapes, on any machine.
TINY = {"points": 32, "epochs": 2, "teacher_epochs": 1, "batch_size": 40}


def pack(state: Path, file: Path) -> None:
    """The checkpoints of unfinished runs in one file; none if there are none."""
    from distill.storage import write  # noqa: PLC0415  # it needs torch

    found = [path for path in sorted(state.glob("*/*")) if not path.name.startswith(".")]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as parts:
        for path in found:
            # A run may have been finished, and its folder removed, just now.
            with contextlib.suppress(FileNotFoundError):
                parts.writestr(path.relative_to(state).as_posix(), path.read_bytes())
    if buffer.tell() and parts.namelist():
        write(file, buffer.getvalue())
    else:
        file.unlink(missing_ok=True)


def unpack(file: Path, state: Path) -> None:
    """What another machine did not finish; what is here already has come as far, or further."""
    if not file.exists():
        return
    with zipfile.ZipFile(file) as parts:
        folders = {name.partition("/")[0] for name in parts.namelist()}
        here = {folder for folder in folders if (state / folder).exists()}
        parts.extractall(
            state, [name for name in parts.namelist() if name.partition("/")[0] not in here]
        )


def add_commands(commands: Any) -> None:
    """What `study.main` takes beside its own."""
    for name, explanation in COMMANDS.items():
        parser = commands.add_parser(
            name,
            help=explanation,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "paired":
            add_options(parser)
        elif name == "verdicts":
            add_output(parser)


def main(options: argparse.Namespace) -> int:
    """Run one of `COMMANDS`."""
    if options.command == "worker":
        from study.worker import serve  # noqa: PLC0415  # the report needs no torch

        return serve()
    return run(options) if options.command == "paired" else report(options.output)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    from study.rows import ROWS  # noqa: PLC0415

    add = parser.add_argument
    add("setting", choices=SETTINGS)
    add("--data", help="as for distill (synthetic); parts has its own")
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    add("--seeds", type=int, nargs="+", help="which seeds (six)")
    add("--points", type=int, help="of a cloud (256)")
    add("--epochs", type=int, help="of the students")
    add("--teacher-epochs", type=int, help="of a teacher that has to be trained")
    add("--teacher", type=Path, help="its checkpoint, instead of the setting's")
    add("--batch-size", type=int)
    add("--views", type=int, help="of every cloud, recorded, and seen by all students in turn; 0: "
        "no two epochs have the same clouds")  # fmt: skip
    add("--labels", type=int, help="train students on so many clouds of every class, their teacher "
        "on half of all, and test on the other half, other halves for every seed; 0: as the data "
        "says")  # fmt: skip
    add("--learning-rate", type=float, help="of the students (0.006)")
    add("--teacher-learning-rate", type=float, default=1e-3, help="(0.001)")
    add("--compress", type=float, default=40.0, help="how many times fewer parameters (40)")
    add("--jobs", type=int, default=8, help="runs at once (8)")
    add("--limit", type=float, default=math.inf, help="seconds; no limit if not given")
    add("--carry-on", action="store_true", help="start runs too that will not be finished within "
        "the limit; another call goes on with them")  # fmt: skip
    add("--device", help="(cuda if there is one)")
    add("--backend", choices=["auto", "triton", "tiled", "dense"], default="auto",
        help="of the operations in the library's discriminators (auto)")  # fmt: skip
    add_output(parser)
    add("--state", type=Path, default=Path("runs/paired"), help="checkpoints (runs/paired)")
    add("--commit", help="what the code is called, where there is no git")
    add("--tiny", action="store_true", help="few generated shapes of few points, to try it")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where the lines are."""
    default = HERE / "results" / "paired"
    parser.add_argument("--output", type=Path, default=default, help="folder of the lines")


def prepare(options: argparse.Namespace) -> Any:
    """The plan that the options make, its data on disk."""
    import torch  # noqa: PLC0415  # the report needs none of these

    from distill import readers  # noqa: PLC0415
    from distill.data import synthetic  # noqa: PLC0415
    from study.segments import shapes  # noqa: PLC0415
    from study.study import commit  # noqa: PLC0415
    from study.worker import Plan, write_clouds  # noqa: PLC0415

    setting = SETTINGS[options.setting]
    defaults = {**asdict(setting), **(TINY if options.tiny else {})}
    if setting.arch == "segmenter":
        data = shapes(80, 40, TINY["points"]) if options.tiny else shapes()
    elif options.data is None or options.data == "synthetic":
        size = (2, 1, 2 * TINY["points"]) if options.tiny else (30, 12, 1024)
        data = synthetic(*size)
    else:
        data = readers.read(Path(options.data), cache=options.state, points=1024)
    if options.tiny:
        defaults |= {
            name: min(defaults[name], most) for name, most in (("labels", 1), ("views", 2))
        }
    given = {name: getattr(options, name) for name in (*TINY, "views", "labels", "learning_rate")}
    digest = data.fingerprint()
    clouds = options.state / f"clouds-{digest}.pt"
    if not clouds.exists():
        write_clouds(clouds, data)
    anew = options.tiny or options.teacher_epochs is not None
    teacher = options.teacher or (None if anew else setting.teacher)
    made = f"teacher-{options.setting}-{digest}.pt"
    return Plan(
        setting=options.setting,
        arch=setting.arch,
        clouds=str(clouds),
        data=digest,
        teachers=str(teacher or options.output / made),
        state=str(options.state / "unfinished"),
        teacher_learning_rate=options.teacher_learning_rate,
        compress=options.compress,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        backend=options.backend,
        commit=options.commit or commit(),
        **{name: defaults[name] if own is None else own for name, own in given.items()},
    )


def run(options: argparse.Namespace) -> int:
    """What is not there yet; the exit status."""
    began = time.monotonic()
    unfinished, logs = options.state / "unfinished", options.state / "logs"
    for folder in (options.output, unfinished, logs):
        folder.mkdir(parents=True, exist_ok=True)
    # Stopped from outside, it ends as it does when time is up.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    workers: list[Worker] = []
    try:
        # They load what they need while the data is read here.
        workers += [Worker(logs / f"worker-{number}.txt") for number in range(options.jobs)]
        unpack(options.output / UNFINISHED, unfinished)
        fleet = deal(prepare(options), options, began)
        print(f"{fleet.total} runs to do, on {fleet.plan.device}", flush=True)
        fleet.run(workers, lambda: pack(unfinished, options.output / UNFINISHED))
    finally:
        signal.signal(signal.SIGTERM, before)
        for worker in workers:
            worker.close()
        report(options.output)
    left = len(fleet.waiting) + len(fleet.running)
    done = fleet.total - left - len(fleet.failed)
    seconds = time.monotonic() - began
    print(f"{done} done, {len(fleet.failed)} failed, {left} left; {seconds:.0f} s", flush=True)
    if fleet.failed:
        return 1
    return 3 if left else 0


def deal(plan: Any, options: argparse.Namespace, began: float) -> Fleet:
    """The runs that are not there yet."""
    setting = SETTINGS[options.setting]
    known = [line for line in verdicts.read(options.output) if belongs(line, plan)]
    done = {(line["row"], line["seed"]) for line in known}
    for row, seed in done:
        shutil.rmtree(plan.folder(row, seed), ignore_errors=True)
    seeds = range(setting.seeds) if options.seeds is None else options.seeds
    # Seed by seed, so that what is there when time is up can be compared.
    wanted = [(row, seed) for seed in seeds for row in options.rows or setting.rows]
    for seed in reversed(seeds if plan.labels else [0]):
        # A teacher that is there only has to be scored, and nobody waits for it.
        last = plan.teacher(seed).exists()
        place = len(wanted) if last else next(i for i, own in enumerate(wanted) if own[1] >= seed)
        wanted.insert(place, ("teacher", seed))
    tasks = [{"row": row, "seed": seed} for row, seed in wanted if (row, seed) not in done]
    end = began + options.limit - CLOSE
    return Fleet(plan, tasks, known, options.output, deadline=end, carry_on=options.carry_on)


def belongs(line: Line, plan: Any) -> bool:
    """Whether a line is of a run of this plan."""
    if (line["setting"], line["data"]) != (plan.setting, plan.data):
        return False
    names = ("labels",) if line["row"] == "teacher" else SAME
    return all(line[name] == getattr(plan, name) for name in names)


def report(output: Path) -> int:
    """Write what the lines say beside them, and show it."""
    lines = verdicts.read(output)
    if lines:
        text = verdicts.report(lines)
        (output / "report.md").write_text(text, encoding="utf-8")
        print(text, flush=True)
    return 0
