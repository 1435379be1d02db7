"""The accuracy study: what it runs, what it does not run again, and what its tables say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from distill import data, networks  # noqa: E402
from distill.options import parse  # noqa: E402
from distill.storage import load_checkpoint  # noqa: E402
from study import gradients, study, tables  # noqa: E402


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Commands instead of trainings; a student's accuracy follows from its weight and its loss."""
    commands = []

    def run(self, folder, *arguments, jobs=1):
        commands.append(arguments)
        options = parse([*self.common, *arguments])
        weight = options.weights[-1][1] if options.weights else 1.0
        accuracy = 0.6 + 0.1 * ("fad" in options.loss[0]) - 0.05 * abs(weight - 0.3)
        accuracy += 0.01 * options.seed
        row = {
            "accuracy": accuracy,
            "information_lost": 0.4,
            "cka": 0.5,
            "neighbor_agreement": 0.3,
            "corrupted": {"noise": 0.5},
            "parameters": 100,
            "seconds": 2.0,
        }
        log = tmp_path / "student.jsonl"
        log.write_text(
            json.dumps({"epoch": 1, "loss": 0.123456789, "fad_separability": 0.8}) + "\n"
        )
        row["checkpoint"] = str(log.with_suffix(".pt"))
        teacher = {**row, "accuracy": 0.9, "parameters": 4000, "checkpoint": "teacher.pt"}
        rows = [teacher] if options.only else [teacher, row]
        return {"rows": rows, "data": "clouds", "torch": "2", "fad_loss": "2", "command": "distill"}

    monkeypatch.setattr(study.Study, "distill", run)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    return commands


def test_every_row_is_a_command_of_the_example():
    for setting, common in study.SETTINGS.items():
        for row in [*study.ROWS, *study.BASES, "fad-paired-16points+fad-head+kd"]:
            options = parse([*common, *study.how(row)])
            assert len(options.loss) == 1, (setting, row)
            assert options.loss[0].count("+") == row.count("+")
    options = parse(study.how("fad-paired-16points+fad-head+kd"))
    assert options.loss == ["fad+head+kd"]
    assert (options.discriminator, dict(options.fad)) == ("paired", {"max_points": 16})
    # Two parts may have options each.
    assert dict(parse(study.how("fad-paired-balanced")).fad) == {
        "max_points": 64,
        "balance": True,
    }
    assert parse(study.how("fad-sharp")).discriminator == "sharp"


def test_a_row_that_is_none_is_an_error(capsys):
    with pytest.raises(SystemExit):
        study.main(["run", "synthetic", "--rows", "fitnet+fad-pared"])
    assert "'fitnet+fad-pared' (expected alone, or, joined by +, some of kd" in (
        capsys.readouterr().err
    )


def test_every_line_of_the_results_can_be_run_again():
    for setting in study.SETTINGS:
        for split in ("test", "validation"):
            for line in tables.read(study.RESULTS, setting, split):
                assert " /" not in line["command"]
                if "(0.1)" in line["row"]:  # of losses that the library had
                    assert "fad_loss" not in line
                else:
                    (loss,) = parse(study.how(line["row"])).loss
                    assert f"--loss {loss} " in line["command"]


def test_lines_of_another_version_are_called_so():
    def line(row, **more):
        return {"row": row, "weights": dict.fromkeys(row.split("+"), 3.0), **more}

    assert tables.renamed(line("fad+kd", fad_loss="0.2")) == line("fad+kd", fad_loss="0.2")
    assert tables.renamed(line("fad+kd")) == line("fad-broad (0.1)+kd")
    assert tables.renamed(line("fad-paired+logit")) == line("fad-paired (0.1)+logit (0.1)")
    assert tables.renamed(line("mse")) == line("mse")


def test_tuning_then_running_then_nothing_is_left(runs, capsys):
    chosen = ["--rows", "alone", "mse", "fad", "fad+kd"]
    assert study.main(["tune", "synthetic", *chosen]) == 0
    # The trials of each row that has weights, and one more because the best was the smallest: in
    # each round with one teacher, all on the validation split; and the student alone, once.
    assert sum("--only" not in arguments for arguments in runs) == 3 * (len(study.WEIGHTS) + 1) + 1
    assert all("--validate" in arguments for arguments in runs)
    runs.clear()
    assert study.main(["run", "synthetic", "--seeds", "0", "1", *chosen]) == 0
    assert len(runs) == 1 + 4 * 2
    assert not any("--validate" in arguments for arguments in runs)
    weights = {a[a.index("--weights") + 1 :] for a in runs if "--weights" in a}
    assert weights == {("mse=0.3",), ("fad=0.3",), ("fad=0.3", "kd=0.3")}
    runs.clear()
    assert study.main(["run", "synthetic", "--seeds", "0", "1", *chosen]) == 0
    assert runs == []
    assert "nothing is left" in capsys.readouterr().out
    # Another seed is new, and only that is run.
    assert study.main(["run", "synthetic", "--seeds", "0", "1", "2", *chosen]) == 0
    assert len(runs) == 1 + 4


def test_a_row_of_the_tables_is_trained_again_and_compared(runs, capsys):
    chosen = ["--rows", "mse"]
    assert study.main(["run", "synthetic", "--seeds", "0", "1", *chosen]) == 0
    file = tables.path(study.RESULTS, "synthetic", "test")
    before = file.read_text()
    # As in the table, whatever weight would be taken today.
    lines = [json.loads(line) | {"weights": {"mse": 30.0}} for line in before.splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs.clear()
    capsys.readouterr()
    assert study.main(["again", "synthetic", "--seeds", "0", *chosen]) == 0
    assert sum("mse=30" in arguments for arguments in runs) == 1
    (shown,) = capsys.readouterr().out.splitlines()
    # 0.6 - 0.05 * 0.7 and 0.6 - 0.05 * 29.7.
    assert shown == "mse seed 0 {'mse': 30.0}: 56.50 % in the table, -88.50 % now"
    assert file.read_text() == "".join(json.dumps(line) + "\n" for line in lines)
    with pytest.raises(SystemExit, match="synthetic: no line of sp with seeds"):
        study.main(["again", "synthetic", "--rows", "sp"])


def test_a_setting_takes_the_teacher_that_is_there(runs):
    options = ["--data", "clouds", "--seeds", "0", "--rows", "alone"]
    assert study.main(["run", "pointnet", *options]) == 0
    assert str(study.TEACHERS["pointnet"]) in runs[0]
    runs.clear()
    assert study.main(["run", "slow", *options, "--teacher", "other.pt"]) == 0
    assert "other.pt" in runs[0]
    runs.clear()
    assert study.main(["run", "synthetic", *options]) == 0
    assert "--teacher" not in runs[0]
    for path in set(study.TEACHERS.values()):
        state = load_checkpoint(path)
        network = networks.build(state["description"]["arch"], state["description"]["classes"])
        network.load_state_dict(state["network"])


def test_the_commit_is_marked_if_more_than_the_results_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        user = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *user, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "HERE", tmp_path / "study")
    assert study.commit() == "unknown"
    (tmp_path / "study" / "results").mkdir(parents=True)
    code, lines = tmp_path / "code.py", tmp_path / "study" / "results" / "lines.jsonl"
    for file in (code, lines):
        file.write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    head = study.commit()
    assert len(head) == 12
    lines.write_text("2\n")
    assert study.commit() == head
    code.write_text("2\n")
    assert study.commit() == f"{head}-dirty"


def test_the_report_says_what_the_lines_say(runs):
    study.main(["run", "synthetic", "--rows", "alone", "mse", "fad", "fad+kd"])
    lines = tables.read(study.RESULTS, "synthetic", "test")
    assert len(lines) == 4 * 3
    assert all(
        line["epochs"] == [{"epoch": 1, "loss": 0.12346, "fad_separability": 0.8}] for line in lines
    )
    text = (study.RESULTS / "report.md").read_text()
    assert (study.RESULTS / "synthetic.png").stat().st_size > 1000
    # 0.6 - 0.05 * 0.7 + 0.01 seed, and 0.1 more with FAD; the gap to the teacher's 0.9 is 0.325.
    assert "| alone | 57.50 ± 1.00 | 3 |" in text
    assert "| fad | 67.50 ± 1.00 | 3 | 31 % | 50.00 | 40.0 %" in text
    assert "FAD + KD recovers half of the gap: no. fad+kd: 31 %." in text
    assert "single feature loss, on one layer each: yes. fad minus mse: +10.00" in text


def test_a_loss_that_is_not_ahead_is_said_not_to_be():
    def line(row, accuracy, seed):
        score = accuracy + 0.01 * seed
        return {"row": row, "accuracy": score, "teacher_accuracy": 0.9, "weights": {row: 1.0}}

    rows = tables.grouped(
        [line(r, a, s) for r, a in (("fad", 0.70), ("mse", 0.705)) for s in range(3)]
    )
    assert list(rows) == ["mse", "fad"]
    found = tables.verdicts(rows)
    assert all("no. fad minus mse: -0.50 points, standard error 0.82" in line for line in found)
    # More seeds than three of one row do not silence the others.
    more = {**rows, "fad": [*rows["fad"], *rows["fad"]]}
    assert tables.verdicts(more)[0].startswith("- FAD ahead of every other single feature loss")
    # A row of a single seed claims nothing.
    lucky = {**rows, "fad-paired": [line("fad-paired", 0.9, 0)]}
    assert tables.verdicts(lucky) == found
    # Two discriminators are FAD still, and two layers of MSE a feature loss; both together are not.
    many = {**rows}
    for name, accuracy in (("fad+fad-head", 0.8), ("mse+fitnet", 0.75), ("fad+mse", 0.9)):
        many[name] = [line(name, accuracy, seed) for seed in range(3)]
    one_layer, several = tables.verdicts(many)
    assert one_layer == found[0]
    assert "yes. fad+fad-head minus mse+fitnet: +5.00 points" in several


def test_the_report_lists_the_weights_and_the_gradients(runs):
    study.RESULTS.mkdir()
    terms = [{"term": name, "share": s, "cosine": 0.1} for name, s in (("kd", 0.5), ("fad", 0.02))]
    (study.RESULTS / "gradients.json").write_text(json.dumps({"terms": terms}))
    study.main(["tune", "synthetic", "--rows", "fad"])
    study.main(["run", "synthetic", "--rows", "alone", "fad"])
    text = (study.RESULTS / "report.md").read_text()
    assert "| fad | 0.1: 69.0 (0.80); 0.3: 70.0 (0.80); 3: 56.5 (0.80)" in text
    table = (study.RESULTS / "gradients.md").read_text().splitlines()
    assert table[2:] == ["| fad | 2.0 % | +0.10 |", "| kd | 50.0 % | +0.10 |"]


def test_an_ablation_takes_the_weight_of_what_it_changes(runs):
    study.main(["tune", "synthetic", "--rows", "fad-point"])
    runs.clear()
    chosen = ["fad-point", "fad-point-lecam", "fad-paired", "fad-paired-raw", "fad-witness"]
    study.main(["run", "synthetic", "--seeds", "0", "--rows", *chosen])
    lines = tables.read(study.RESULTS, "synthetic", "test")
    weights = {line["row"]: line["weights"][line["row"]] for line in lines}
    # "fad" and "fad-paired" were not tuned.
    assert weights == dict(zip(chosen, (0.3, 0.3, 1.0, 1.0, 1.0), strict=True))


def test_weights_are_borrowed_where_none_were_tried(runs):
    options = ["--data", "clouds", "--rows", "mse"]
    study.main(["tune", "pointnet", *options])
    study.main(["run", "across", *options])
    lines = tables.read(study.RESULTS, "across", "test")
    assert [line["weights"] for line in lines] == [{"mse": 0.3}] * 3
    report = study.RESULTS / "report.md"
    assert "No weights were tried here: every row has those of `pointnet`." in report.read_text()
    study.main(["tune", "across", *options])
    assert "every row has those of" not in report.read_text()
    assert tables.tried(study.RESULTS, "across") == tables.read(
        study.RESULTS, "across", "validation"
    )


def test_a_row_with_several_weights_is_several_rows():
    lines = [
        {"row": row, "weights": {row: w}, "accuracy": a}
        for row, w, a in (("fad", 1.0, 0.5), ("mse", 3.0, 0.6), ("mse", 100.0, 0.7))
    ]
    found = tables.grouped(lines)
    assert {name: len(rows) for name, rows in found.items()} == {
        "mse at 100": 1,
        "mse at 3": 1,
        "fad": 1,
    }
    assert list(found) == ["mse at 100", "mse at 3", "fad"]


def test_the_smaller_of_equally_good_weights_is_taken():
    lines = [
        {"row": "fad", "weights": {"fad": w}, "accuracy": a}
        for w, a in ((0.1, 0.5), (3.0, 0.6), (0.3, 0.6))
    ]
    assert tables.tuned(lines) == {"fad": {"fad": 0.3}}


def test_weights_beyond_the_best_are_tried_while_it_is_at_the_edge():
    def lines(**best):
        return [
            {"row": row, "weights": {row: w}, "accuracy": 0.5 + 0.1 * (w == b)}
            for row, b in best.items()
            for w in (0.3, 1.0, 3.0, 10.0)
        ]

    both = [
        {"row": "mse+kd", "weights": {"mse": 3.0, "kd": w}, "accuracy": 1 - w} for w in (0.3, 1.0)
    ]
    found = tables.at_the_edge([*lines(low=0.3, inside=1.0, high=10.0), *both])
    wanted = {"low": {"low": 0.1}, "high": {"high": 30.0}, "mse+kd": {"mse": 3.0, "kd": 0.1}}
    assert dict(found) == wanted


@pytest.mark.parametrize("end", [tables.LADDER[0], tables.LADDER[-1]])
def test_no_weight_beyond_the_end_of_the_ladder_is_tried(end):
    tried = [{"row": "fad", "weights": {"fad": w}, "accuracy": 0.5} for w in (0.3, 3.0)]
    best = {"row": "fad", "weights": {"fad": end}, "accuracy": 0.6}
    assert tables.at_the_edge([*tried, best]) == []


def test_trials_of_several_seeds_count_by_their_mean(runs):
    study.RESULTS.mkdir()
    chosen = ["--rows", "fad", "--split", "validation", "--seeds", "0", "2"]
    assert study.main(["run", "synthetic", *chosen]) == 0
    assert all("--validate" in arguments for arguments in runs)
    lines = tables.read(study.RESULTS, "synthetic", "validation")
    assert "| fad | 1: 67.5 ×2 (0.80) |" in "\n".join(tables.weights(lines))
    better = {**lines[0], "weights": {"fad": 3.0}, "accuracy": 0.67}
    assert tables.tuned([*lines, better]) == {"fad": {"fad": 1.0}}


def test_a_combination_takes_the_weights_of_its_longest_beginning(monkeypatch):
    best = {"fad": {"fad": 10.0}, "kd": {"kd": 3.0}, "fad+mse": {"fad": 10.0, "mse": 30.0}}
    monkeypatch.setattr(tables, "tuned", lambda _: {row: dict(w) for row, w in best.items()})
    weights = study.Study.weights
    unused = type("Any", (), {"setting": "synthetic"})()
    unused.weights = lambda row: weights(unused, row)
    assert unused.weights("fad+kd") == {"fad": 10.0, "kd": 3.0}
    assert unused.weights("fad+mse+kd") == {"fad": 10.0, "mse": 30.0, "kd": 3.0}
    assert unused.weights("sp+kd") == {"sp": 1.0, "kd": 3.0}


def test_a_real_data_setting_needs_its_data(capsys):
    with pytest.raises(SystemExit):
        study.main(["run", "pointnet"])
    assert "needs --data" in capsys.readouterr().err


def test_gradients_are_compared_with_the_tasks(monkeypatch):
    monkeypatch.setattr(gradients, "STEPS", 4)
    split = data.Clouds(torch.randn(512, 16, 3), torch.arange(512) % 3)
    teacher, student = networks.build("pointnet", 3, 0.2), networks.build("dgcnn", 3, 0.05)
    bench = gradients.Bench(student.eval(), teacher.eval(), split, 12)
    trained = {id(p) for p in bench.parameters}
    assert all(id(p) in trained for p in student.embedding.parameters())
    assert not any(id(p) in trained for p in student.classifier.parameters())

    term = bench.fitted("kd")
    of_task, of_term = bench.gradients(term, 0)
    points, labels, known = bench.take(0)
    loss = F.cross_entropy(student(points), labels, label_smoothing=0.1)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, bench.parameters)])
    torch.testing.assert_close(of_task, wanted)
    loss = term.terms["kd"](student(points), known.logits)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, bench.parameters)])
    torch.testing.assert_close(of_term, wanted, atol=1e-5, rtol=1e-3)

    found = list(gradients.sampling(bench))
    assert [entry["discriminator"] for entry in found] == ["teacher", "paired"]
    for entry in found:
        # More points than there are: all of them.
        assert entry["points"]["64"] == pytest.approx(1, abs=1e-3)
        assert entry["points"]["16"] == pytest.approx(1, abs=1e-3)
