"""The hosts: every script runs and prints its comparison, in the lines that its table says.

What trains is marked `hosts` and runs in the environment that `make hosts` builds; what trains at
full length is `long` too. In every environment the lines are counted, and hosts that need torch
alone are killed and go on.
"""

from __future__ import annotations

import ast
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
HOSTS = ROOT / "examples" / "hosts"
SHARED = {"recording", "toy"}
SCRIPTS = sorted(path.stem for path in HOSTS.glob("*.py") if path.stem not in SHARED)
DISTRIBUTED = {"ddp", "fsdp2"}
# Without a framework of their own: one process, two processes, a distiller.
PLAIN = {"plain", "ddp", "parts"}
# What names the library, or what was made with it.
CONCERNS = re.compile(r"\b(fad|fad_loss|FeatureAdversarialLoss|Distiller|ragged)\b")
VARIANTS = [*SCRIPTS, "sgd --two-optimizers", "ddp --gather"]


def marked(script):
    lines = (HOSTS / f"{script}.py").read_text("utf-8").splitlines()
    return [line for line in lines if line.endswith("# fad_loss")]


def command(script, *options):
    name, *more = script.split()
    start = [sys.executable]
    if name in DISTRIBUTED:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*start, str(HOSTS / f"{name}.py"), *more, *map(str, options)]


def run(script, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(script, *options), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short_and_few_of_their_lines_concern_the_library(script):
    source = (HOSTS / f"{script}.py").read_text("utf-8")
    assert len(source.splitlines()) <= 80
    lines = marked(script)
    assert (script == "export") != bool(lines)  # where nothing of the library is left
    assert len(lines) <= (4 if any("Distiller" in line for line in lines) else 6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_line_that_concerns_the_library_is_left_unmarked(script):
    source = (HOSTS / f"{script}.py").read_text("utf-8")
    lines = source.splitlines()
    spoken = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for number in range(node.lineno, node.end_lineno + 1)
        if node.end_lineno > node.lineno or '"""' in lines[node.lineno - 1]
    }
    for number, line in enumerate(lines, 1):
        if number not in spoken and CONCERNS.search(line.partition("#")[0]):
            assert line.endswith("# fad_loss"), f"{script}.py:{number}: {line}"


def test_the_table_names_every_script_with_its_lines():
    table = (ROOT / "examples" / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| \[`(\w+)\.py`\]\(hosts/\1\.py\) \| (\d+) \|", table, re.MULTILINE))
    assert rows == {script: str(len(marked(script))) for script in SCRIPTS}


def comparison(printed):
    """The three figures that every host prints, in per cent."""
    found = re.findall(
        r"^(teacher|student alone|student with the loss) .*? ([\d.]+) %", printed, re.MULTILINE
    )
    means = {name: float(value) for name, value in found}
    assert len(means) == 3, printed
    return means


@pytest.mark.hosts
@pytest.mark.parametrize("script", VARIANTS)
def test_one_epoch_ends_in_the_comparison(script, tmp_path):
    means = comparison(run(script, "--folder", tmp_path, "--epochs", 1, "--seeds", 1))
    assert all(0 <= value <= 100 for value in means.values())


@pytest.mark.hosts
@pytest.mark.long
@pytest.mark.parametrize("script", VARIANTS)
def test_the_student_with_the_loss_is_not_behind(script, tmp_path):
    means = comparison(run(script, "--folder", tmp_path))
    assert means["student alone"] < means["teacher"]
    assert means["student with the loss"] >= means["student alone"] - 2


def checkpoints(folder):
    """The files with weights that a script has left so far."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".pt", ".ckpt"} or path.name == "model.safetensors":
            yield path.relative_to(folder)


def weights(folder):
    """Every tensor of every checkpoint that the script left, by file and key."""
    found = {}

    def collect(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, one in value.items():
                collect(f"{name}/{key}", one)
        elif isinstance(value, list | tuple):
            for key, one in enumerate(value):
                collect(f"{name}/{key}", one)

    for path in checkpoints(folder):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            collect(str(path), load_file(folder / path))
        else:
            collect(str(path), torch.load(folder / path, weights_only=False))
    return found


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=() if script in PLAIN else [pytest.mark.hosts, pytest.mark.long])
        for script in SCRIPTS
        if script != "export"
    ],
)
def test_killed_and_resumed_it_ends_in_the_same_weights(script, tmp_path):
    options = ["--epochs", 3, "--seeds", 1]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(script, "--folder", straight, *options)
    begun = subprocess.Popen(
        command(script, "--folder", broken, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    # Somewhere in the training of the student with the loss, with a checkpoint to go on from.
    while begun.poll() is None and not any("with-0" in str(path) for path in checkpoints(broken)):
        time.sleep(0.01)
    time.sleep(2 * random.random())
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    run(script, "--folder", broken, *options, "--resume")
    first, second = weights(straight), weights(broken)
    assert first.keys() == second.keys()
    assert any("with-0" in name for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.hosts
def test_replayed_features_are_the_live_ones_and_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HOSTS))
    import recording
    import toy

    points, teacher = toy.clouds(32)[0], toy.PointNet(4).eval()
    path = tmp_path / "features.safetensors"
    recording.record(path, points, teacher)
    replayed = recording.replay(path, points, teacher)
    for number in range(recording.VIEWS):
        seen, lengths = recording.view(points, number)
        with torch.no_grad():
            live = teacher.encoder(seen)
        assert len(replayed[number]) == lengths.sum()
        assert torch.equal(replayed[number], live.half())
        torch.testing.assert_close(replayed[number].float(), live, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="other clouds; record again"):
        recording.replay(path, points + 1, teacher)
    with pytest.raises(ValueError, match="other teachers"):
        recording.replay(path, points, toy.PointNet(4).eval())
    monkeypatch.setattr(recording, "VIEWS", 3)
    with pytest.raises(ValueError, match="other augmentations"):
        recording.replay(path, points, teacher)
