"""Processes that share a device, and the runs that are dealt out to them until time is up."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Line = dict[str, Any]
# While the teacher trains, no student but "alone" can; and few of those, for all wait for it.
BESIDE = 2
# Seconds between two calls of `keep`.
KEEP = 20


class Worker:
    """A process that trains one student after the other; see `study.worker`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.start()

    def start(self) -> None:
        """Begin a process."""
        command = [sys.executable, str(HERE), "worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def tell(self, what: Line) -> None:
        """Send a line: the plan first, then runs."""
        # Whether the process is gone shows when it is asked for an answer.
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def ask(self, task: Line) -> Line:
        """What comes of a run, or an "error"."""
        self.tell(task)
        answer = self.process.stdout.readline()
        if answer.endswith("\n"):
            return json.loads(answer)
        return {"error": "the process ended", "trace": self.log.read_text(encoding="utf-8")}

    def stop(self) -> None:
        """End the process, whatever it does: its checkpoints are whole."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """The same, when nobody waits for an answer any more."""
        self.stop()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not sent yet
                pipe.close()


class Fleet:
    """The runs of a setting, dealt out to workers until all are done or time is up."""

    def __init__(
        self,
        plan: Any,
        tasks: list[Line],
        known: list[Line],
        output: Path,
        *,
        deadline: float = math.inf,
        carry_on: bool = False,
    ) -> None:
        self.plan, self.waiting, self.output = plan, tasks, output
        self.deadline, self.carry_on = deadline, carry_on
        self.running: list[Line] = []
        self.failed: list[Line] = []
        self.total = len(tasks)
        self.changed = threading.Condition()
        self.stopped = False
        self.seconds: dict[str, list[float]] = {}
        for line in known:
            self.seconds.setdefault(line["row"], []).append(line["seconds"])

    def take(self) -> Line | None:
        """The next run that can start, waiting for one if need be; None if there is none."""
        with self.changed:
            while not self.stopped:
                task = next(filter(self._ready, self.waiting), None)
                if task is not None:
                    self.waiting.remove(task)
                    self.running.append(task)
                    return task
                # What waits for the teacher will be ready, what does not fit will not.
                if not any(task["row"] == "teacher" for task in self.running):
                    return None
                self.changed.wait(1)
        return None

    def _ready(self, task: Line) -> bool:
        if task["row"] == "teacher":
            return True
        if not self.plan.teacher(task["seed"]).exists():
            needed = task["row"] != "alone" or self.plan.views  # which the teacher has seen too
            if needed or len(self.running) > BESIDE:
                return False
        return self.carry_on or time.monotonic() + self._estimate(task) <= self.deadline

    def _estimate(self, task: Line) -> float:
        """How long a run will take, from those of its row, less what it has done already."""
        known = self.seconds.get(task["row"])
        if not known:
            return 0.0
        log = next(self.plan.folder(**task).glob("student-*.jsonl"), None)
        done = len(log.read_text(encoding="utf-8").splitlines()) if log else 0
        return statistics.median(known) * (1 - done / self.plan.epochs)

    def work(self, worker: Worker) -> None:
        """Keep a worker busy."""
        worker.tell(asdict(self.plan))
        while (task := self.take()) is not None:
            line = worker.ask(task)
            with self.changed:
                if self.stopped and "error" in line:
                    return  # it was stopped, and goes on in the next call
                self.running.remove(task)
                self._finish(task, line)
                self.changed.notify_all()
                if "error" in line:
                    # What has failed on a GPU may have left it unusable to the process.
                    worker.close()
                    worker.start()
                    worker.tell(asdict(self.plan))

    def _finish(self, task: Line, line: Line) -> None:
        name = f"{self.plan.setting} {task['row']} seed {task['seed']}"
        if "error" in line:
            print(f"{name}: failed: {line['error']}", flush=True)
            if task["row"] not in {one["row"] for one in self.failed}:
                print(line["trace"][-1500:], flush=True)
            self.failed.append(task)
            return
        append(self.output / f"{self.plan.setting}.jsonl", line)
        shutil.rmtree(self.plan.folder(**task), ignore_errors=True)
        self.seconds.setdefault(task["row"], []).append(line["seconds"])
        left = len(self.waiting) + len(self.running)
        print(
            f"{name}: {100 * line['accuracy']:.2f} % in {line['seconds']:.0f} s, {left} left",
            flush=True,
        )

    def run(self, workers: list[Worker], keep: Any) -> None:
        """Until all is done, or until the deadline; `keep` is called every now and then."""
        threads = [threading.Thread(target=self.work, args=(one,), daemon=True) for one in workers]
        try:
            for thread in threads:
                thread.start()
            kept = time.monotonic()
            while any(t.is_alive() for t in threads) and time.monotonic() < self.deadline:
                time.sleep(0.1)
                if time.monotonic() - kept > KEEP:
                    keep()
                    kept = time.monotonic()
        finally:
            with self.changed:
                self.stopped = True
                self.changed.notify_all()
            for worker in workers:
                worker.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            keep()


def append(path: Path, line: Line) -> None:
    """Write a line such that it is there even if the machine goes away now."""
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
