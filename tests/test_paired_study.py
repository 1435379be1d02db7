"""The paired study: what its rows share, that it goes on where it stopped, what its report says."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from distill import networks  # noqa: E402
from distill.data import Clouds  # noqa: E402
from distill.methods import teach  # noqa: E402
from distill.storage import load_checkpoint, save  # noqa: E402
from distill.training import Settings  # noqa: E402
from study import attempts, fleet, ordered, paired, rows, segments, study, verdicts, worker  # noqa: E402

EPOCHS = 12


def command(folder, *more):
    return [
        sys.executable, str(ROOT / "examples" / "study"), "paired", "sampled", "--tiny",
        "--rows", "alone", "fad-positions", "--seeds", "0", "--jobs", "1", "--epochs", str(EPOCHS),
        "--output", str(folder / "output"), "--state", str(folder / "state"),
        "--commit", "tested", "--device", "cpu", *more,
    ]  # fmt: skip


def test_a_call_goes_on_where_another_one_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    output, state = tmp_path / "output", tmp_path / "state"
    first = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "3 runs to do, on cpu\n"
    assert first.stdout.readline().startswith("sampled teacher seed 0: ")
    begun = state / "unfinished"
    while not list(begun.glob(f"sampled-alone-0-{EPOCHS}-*/student-*.jsonl")):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 143
    first.stdout.close()
    lines = output / "sampled.jsonl"
    assert [line["row"] for line in verdicts.read(output)] == ["teacher"]

    # Another machine has the folder of the output alone. Its checkpoint gets a mark, that shows
    # whether a run went on from there.
    shutil.rmtree(state)
    paired.unpack(output / "unfinished.zip", state / "unfinished")
    (checkpoint,) = begun.glob("*/student-*.pt")
    content = load_checkpoint(checkpoint)
    assert 1 <= len(content["history"]) < EPOCHS
    content["history"][0]["test_accuracy"] = 0.125
    save(checkpoint, content)
    paired.pack(state / "unfinished", output / "unfinished.zip")
    shutil.rmtree(state)

    assert study.main(command(tmp_path)[2:]) == 0
    assert capsys.readouterr().out.startswith("2 runs to do, on cpu\n")
    assert not (output / "unfinished.zip").exists()
    found = [json.loads(text) for text in lines.read_text().splitlines()]
    assert [line["row"] for line in found] == ["teacher", "alone", "fad-positions"]
    assert all(line["commit"] == "tested" and len(line["parts"]) == 2 for line in found)
    assert found[1]["every_epoch"][0] == 0.125
    assert len(found[1]["every_epoch"]) == EPOCHS
    text = (output / "report.md").read_text()
    assert "\n| fad-positions | " in text
    assert "- fad-positions against alone: unknown from one seed" in text


@dataclass
class Plan:
    state: str
    setting: str = "sampled"
    epochs: int = 4
    views: int = 0

    def teacher(self, seed):
        return Path(self.state) / "teacher.pt"

    def folder(self, row, seed):
        return Path(self.state) / f"{row}-{seed}"


def test_a_call_starts_what_will_end_in_time(tmp_path, monkeypatch):
    """And the teacher first, beside few others; who waits for it waits no longer than it takes."""

    monkeypatch.setattr(fleet.time, "monotonic", lambda: 100.0)
    wanted = [("teacher", 0), ("fad", 0), *(("alone", seed) for seed in range(4))]
    tasks = [{"row": row, "seed": seed} for row, seed in wanted]
    known = [{"row": "alone", "seconds": seconds} for seconds in (10.0, 12.0, 50.0)]
    runs = fleet.Fleet(Plan(str(tmp_path)), tasks, known, tmp_path, deadline=111.0)
    assert runs.take() == {"row": "teacher", "seed": 0}
    # Twelve seconds is too long, but not where one of four epochs is done.
    assert not any(map(runs._ready, runs.waiting))
    (tmp_path / "alone-2").mkdir()
    (tmp_path / "alone-2" / "student-1.jsonl").write_text("{}\n")
    assert runs.take() == {"row": "alone", "seed": 2}
    (tmp_path / "teacher.pt").touch()
    runs._finish(
        runs.running.pop(0), {"row": "teacher", "seed": 0, "accuracy": 0.5, "seconds": 1.0}
    )
    # Nothing is known of how long "fad" takes.
    assert runs.take() == {"row": "fad", "seed": 0}
    assert runs.take() is None
    assert len(runs.waiting) == 3


def test_a_failure_costs_its_own_run_and_the_process_it_was_in(tmp_path, capsys):
    said = []
    answers = iter(
        [
            {"error": "RuntimeError: broken", "trace": "in that line"},
            {"row": "kd", "seed": 1, "accuracy": 0.5, "seconds": 1.0},
        ]
    )

    class Worker:
        def tell(self, plan):
            said.append(plan["setting"])

        def ask(self, task):
            return next(answers)

        def stop(self):
            said.append("stop")

        def close(self):
            said.append("close")

        def start(self):
            said.append("start")

    (tmp_path / "teacher.pt").touch()
    tasks = [{"row": "kd", "seed": seed} for seed in (0, 1)]
    runs = fleet.Fleet(Plan(str(tmp_path)), tasks, [], tmp_path)
    runs.run([Worker()], lambda: None)
    assert said == ["sampled", "close", "start", "sampled", "stop"]
    assert runs.failed == [{"row": "kd", "seed": 0}]
    assert [line["seed"] for line in verdicts.read(tmp_path)] == [1]
    shown = capsys.readouterr().out
    assert "sampled kd seed 0: failed: RuntimeError: broken\nin that line" in shown
    assert "sampled kd seed 1: 50.00 % in 1 s, 0 left" in shown


def test_the_first_points_are_the_farthest_and_each_side_begins_elsewhere():
    points = torch.randn(3, 64, 3)
    made = ordered.both_orders(points, random=True)
    for side in (made[..., :3], made[..., 3:]):
        torch.testing.assert_close(side.sort(1).values, points.sort(1).values)
        for count in (2, 31):
            distance = torch.cdist(side, side[:, :count]).amin(-1)
            farthest = distance.amax(1)
            torch.testing.assert_close(distance[:, count], farthest)
    assert not torch.equal(made[..., :3], made[..., 3:])
    # The same network as distill's, whose sampling is a loop, where both begin at the same point.
    theirs = networks.build("pointnet2", 5, 0.1).eval()
    ours = ordered.Sampled(5, 0.1, teacher=True).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ordered.both_orders(points, random=False)), theirs(points), atol=1e-5, rtol=1e-4
        )


def test_an_epoch_follows_from_its_number_and_the_seed():
    clouds = Clouds(torch.randn(6, 40, 3), torch.arange(6))
    index = torch.tensor([4, 1])
    settings = Settings(3, 16, seed=1)
    first, second = (ordered.Epochs(clouds, settings, sampled=True) for _ in range(2))
    found, _ = first.take(1, index)
    second.take(0, index)
    assert found.shape == (2, 16, 6)
    assert torch.equal(found, second.take(1, index)[0])
    assert not torch.equal(found, second.take(2, index)[0])
    tests = ordered.parts(clouds, 16, sampled=False)
    assert [len(part) for part in tests] == [6, 6]
    assert torch.equal(torch.cat([part.points for part in tests], 1), clouds.points[:, :32])


@pytest.mark.parametrize("sampled", [True, False])
def test_all_rows_of_a_seed_begin_alike_and_pull_with_the_same_share(sampled):
    clouds = torch.randn(4, 32, 3)
    clouds = ordered.both_orders(clouds, random=True) if sampled else clouds
    labels = torch.arange(4)

    def network(width, **which):
        if sampled:
            return ordered.Sampled(5, width, **which)
        return networks.build("pointnet", 5, width)

    teacher = network(0.2, **({"teacher": True} if sampled else {})).eval().requires_grad_(False)
    tasks, adapters = set(), {}
    for name, row in rows.ROWS.items():
        torch.manual_seed(0)
        student = network(0.1)
        torch.manual_seed(1)
        taught = teacher if row.taught else None
        recipe = rows.Recipe(student, taught, row, example=clouds, seed=2, backend="dense")
        made = recipe(clouds, labels)
        tasks.add(made.task.item())
        made.loss.backward()
        if row.taught:
            # The same where the teacher's part was recorded, and the teacher is not run.
            torch.manual_seed(0)
            student, taught = network(0.1), copy.deepcopy(teacher)
            torch.manual_seed(1)
            other = rows.Recipe(student, taught, row, example=clouds, seed=2, backend="dense")
            known = teach(teacher, clouds)
            other.replay = rows.Replay(taught)
            judge = set(taught.classifier[-1].parameters())
            for parameter in set(taught.parameters()) - judge:
                parameter.fill_(torch.nan)
            assert torch.equal(other(clouds, labels, known).loss, made.loss)
        assert (made.distillation is None) == (name == "alone")
        if recipe._distiller:
            losses = list(recipe.terms.values())
            shares = {loss.weight for loss in losses}
            if row.balance:
                assert shares == {row.share or (1.0 if row.recipe else 0.3)}
            assert {loss.balance is not None for loss in losses} == {row.balance}
            assert {loss.total_steps for loss in losses} == {1000 if row.fades else None}
            assert {loss.warmup_steps for loss in losses} == {100 if row.recipe else 500}
            assert len(losses) == 2 if row.last else 1
            adapters[name] = losses[0].adapter.weight
            kinds = [type(loss.discriminator).__name__ for loss in losses]
            own = row.points in attempts.ATTEMPTS
            assert (kinds[0] == "TeacherDiscriminator") == (row.points in {"fad", "narrow"})
            paired_up = losses[0].discriminator.corresponding
            assert paired_up == (own or row.positions or not sampled)
            if hasattr(losses[0].discriminator, "backend"):
                assert losses[0].discriminator.backend == "dense"
    assert len(tasks) == 1
    first, *others = adapters.values()
    assert all(torch.equal(first, other) for other in others)


def test_few_labels_are_another_split_for_every_seed():
    labels = torch.arange(24) % 4
    clouds = Clouds(torch.arange(24.0).view(24, 1, 1).expand(24, 2, 3), labels)
    given = clouds.select(slice(9)), clouds.select(slice(9, 24))
    splits = [worker.few(*given, 2, seed) for seed in (0, 1)]
    for taught, train, test in splits:
        assert (len(taught), len(test)) == (12, 12)
        assert train.labels.bincount().tolist() == [2] * 4
        seen = torch.cat([taught.points, test.points])[:, 0, 0]
        assert torch.equal(seen.sort().values, torch.arange(24.0))
        assert set(train.points[:, 0, 0].tolist()) <= set(taught.points[:, 0, 0].tolist())
        for split in (taught, train, test):
            assert torch.equal(split.labels, split.points[:, 0, 0].long() % 4)
    assert not torch.equal(splits[0][0].points, splits[1][0].points)


def test_labels_stay_with_their_points():
    made = segments.shapes(6, 4, 16)
    split = made.train
    assert split.labels.shape == (6, 16)
    generator = torch.Generator().manual_seed(0)
    drawn = split.draw(9, generator)
    for cloud in range(6):
        pairs, found = (
            {(*point, label) for *point, label in torch.cat([points, labels], -1).tolist()}
            for points, labels in (
                (one.points[cloud], one.labels[cloud].unsqueeze(-1)) for one in (split, drawn)
            )
        )
        assert len(found) == 9
        assert found < pairs
    # Epochs scale and shift them, and keep their order.
    points, _ = ordered.Epochs(split, Settings(1, 16), sampled=False).take(0, torch.arange(6))
    spread = (points - points.mean(1, keepdim=True)) / points.std(1, keepdim=True)
    own = (split.points - split.points.mean(1, keepdim=True)) / split.points.std(1, keepdim=True)
    torch.testing.assert_close(spread, own, rtol=1e-4, atol=1e-4)
    assert ordered.parts(split, 4, sampled=False) == [split]


def test_the_score_of_parts_is_the_mean_iou():
    clouds = Clouds(torch.zeros(1, 6, 3), torch.tensor([[0, 0, 1, 1, 2, 3]]))
    guess = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1, 1, 2, 2]]), 4).float()

    class Network(torch.nn.Module):
        def forward(self, points):
            return guess

    # 1 of 2, 2 of 3, 1 of 2, 0 of 1.
    expected = (1 / 2 + 2 / 3 + 1 / 2 + 0) / 4
    assert segments.mean_iou(Network(), clouds) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("setting", ["parts", "scans"])
def test_other_settings_run(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    arguments = [
        "paired", setting, "--tiny", "--rows", "alone", "fad-two", "--seeds", "0", "1",
        "--jobs", "1", "--output", str(tmp_path / "output"), "--state", str(tmp_path / "state"),
        "--commit", "tested", "--device", "cpu",
    ]  # fmt: skip
    assert study.main(arguments) == 0
    found = verdicts.read(tmp_path / "output")
    teachers = [line["seed"] for line in found if line["row"] == "teacher"]
    assert teachers == ([0, 1] if setting == "scans" else [0])
    assert [line["row"] for line in found if line["seed"] == 1][-2:] == ["alone", "fad-two"]
    said = {
        "parts": "mean IoU",
        "scans": "Each seed has another split: half of the clouds are the test",
    }
    assert said[setting] in capsys.readouterr().out


def test_the_ablation_is_the_squared_error_and_nothing_else():
    student = torch.randn(2, 8, 4, requires_grad=True)
    teacher = torch.randn(2, 8, 4)
    judge = attempts.SquaredDiscriminator()
    found = judge(attempts.Game.of(student, teacher))
    torch.testing.assert_close(found.student, -(student - teacher).square().mean(-1))
    assert torch.equal(found.teacher, torch.zeros(2, 8))


def test_verdicts_are_what_the_pairs_say():
    def line(row, seed, accuracy):
        return {
            "setting": "sampled", "row": row, "seed": seed, "accuracy": accuracy, "epochs": 9,
            "batch_size": 32, "views": 0, "labels": 0, "data": "d", "commit": "c", "device": "gpu",
            "clouds": [9, 3], "parts": [accuracy], "points": 256, "parameters": 40,
            "arch": "pointnet2",
        }  # fmt: skip

    # Seeds differ by far more than rows do.
    alone = [0.70, 0.75, 0.80, 0.72]
    gains = {"fad": [0.01, 0.02, 0.01, 0.02], "squared": [0.01, 0.02, 0.02, 0.01]}
    lines = [line("alone", seed, accuracy) for seed, accuracy in enumerate(alone)]
    for row, gain in gains.items():
        lines += [line(row, seed, alone[seed] + more) for seed, more in enumerate(gain)]
    lines.append(line("kd", 0, 0.69))
    lines.append({**line("teacher", 0, 0.9), "epochs": 20})
    text = verdicts.report(lines)
    # 1.5 ± 0.58 / 2, times 3.182.
    assert "| fad | 75.75 ± 4.27 | 4 | +1.50 ± 0.29 [+0.58, +2.42] | +0.00 ± 0.41" in text
    assert "- fad against alone: ahead (+1.50 points, standard error 0.29" in text
    assert "- fad against squared: not to be told apart (+0.00 points" in text
    assert "- kd against alone: unknown from one seed (-1.00 points)." in text
    assert "below its teacher" in text
    assert verdicts.difference({0: 0.5, 1: 0.5}, {0: 0.6, 1: 0.7}).word == "not to be told apart"
    worse = verdicts.difference(dict.fromkeys(range(3), 0.5), {0: 0.6, 1: 0.61, 2: 0.6})
    assert worse.word == "behind"
    assert worse.high < 0


def test_a_line_that_was_cut_off_is_none(tmp_path):
    (tmp_path / "sampled.jsonl").write_text('{"row": "alone"}\n{"row": "fa')
    assert verdicts.read(tmp_path) == [{"row": "alone"}]
    fleet.append(tmp_path / "sampled.jsonl", {"row": "kd"})
    fleet.append(tmp_path / "sampled.jsonl", {"row": "fitnet"})
    assert [line["row"] for line in verdicts.read(tmp_path)] == ["alone", "kd", "fitnet"]
