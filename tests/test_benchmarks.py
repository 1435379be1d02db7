"""The benchmarks, at sizes that only show that they run and write what they promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "2,40,36,24"


@pytest.fixture(autouse=True)
def _paths(monkeypatch):
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(capsys, module, *arguments, output):
    assert module.main([*arguments, "--output", str(output)]) == 0
    assert str(output.name) in capsys.readouterr().out.replace("\n", "")
    return json.loads(output.read_text())


def check_context(report):
    context = report["context"]
    assert context["device"] == "cpu"
    assert context["threads"] == torch.get_num_threads()
    assert context["packages"]["torch"] == torch.__version__
    assert context["cpu"]
    assert context["command"]
    assert isinstance(context["dirty"], bool)
    if (ROOT / ".git").exists():
        assert len(context["commit"]) == 40


def test_pairwise_times_every_operation_beside_the_matrix_product(tmp_path, capsys):
    import pairwise

    output = tmp_path / "times.json"
    arguments = ("--quick", "--seconds", "0.001", "--shapes", SHAPE, "--no-memory")
    report = run(capsys, pairwise, *arguments, output=output)
    check_context(report)
    rows = [row for row in report["cases"] if "skipped" not in row]
    for op in pairwise.OPERATIONS:
        for direction in ("forward", "backward"):
            found = {
                row["implementation"]: row
                for row in rows
                if (row["op"], row["pass"]) == (op, direction)
            }
            assert set(found) == {
                "torch.bmm",
                "fad_loss tiled",
                "fad_loss dense",
                "torch.cdist + reduce",
            }
            for row in found.values():
                low, high = row["quartiles_s"]
                assert 0 < row["fastest_s"] <= low <= row["median_s"] <= high
                assert row["rounds"] >= 1
                assert row["ratio_to_gemm"] > 0
                assert (row["B"], row["N"], row["M"], row["C"]) == (2, 40, 36, 24)
            assert found["torch.bmm"]["ratio_to_gemm"] == 1
            assert found["fad_loss tiled"]["faster_than"]["torch.cdist + reduce"] > 0
    skipped = [row for row in report["cases"] if "skipped" in row]
    assert any("CUDA" in row["skipped"] for row in skipped)


def test_pairwise_resumes_without_measuring_again(tmp_path, capsys):
    import pairwise

    output = tmp_path / "times.json"
    first = ("--quick", "--shapes", SHAPE, "--no-memory", "--ops", "nearest", "--resume")
    before = run(capsys, pairwise, *first, "--passes", "forward", output=output)
    after = run(capsys, pairwise, *first, output=output)
    assert after["cases"][: len(before["cases"])] == before["cases"]
    assert [row["pass"] for row in after["cases"][len(before["cases"]) :]].count("forward") == 0
    assert after["resumed_from"]["command"] == before["context"]["command"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the pages")
def test_pairwise_measures_memory(tmp_path, capsys):
    import pairwise

    report = run(
        capsys,
        pairwise,
        "--quick",
        "--shapes",
        "1,4096,4096,24",
        "--ops",
        "nearest",
        "--passes",
        "forward",
        "--backends",
        "tiled",
        output=tmp_path / "memory.json",
    )
    extra = {row["implementation"]: row.get("extra_bytes") for row in report["cases"]}
    # The one allocates the matrix of all pairs, the other tiles of it.
    assert extra["torch.cdist + reduce"] > 4096 * 4096 * 4 * 0.9
    assert 0 < extra["fad_loss tiled"] < 4096 * 4096 * 4 * 0.75


def test_accuracy_where_distances_cancel():
    import pairwise

    rows = list(pairwise.accuracy(torch.device("cpu"), ("tiled",), points=128, channels=(3, 64)))
    ours = [row for row in rows if row["implementation"] == "fad_loss tiled"]
    assert {(row["op"], row["C"]) for row in ours} == {
        (op, C) for op in ("nearest", "knn") for C in (3, 64)
    }
    assert all(row["largest_relative_error"] <= 1e-6 for row in ours)


@pytest.mark.parametrize(
    "arguments",
    [["--ops", "nearset"], ["--shapes", "8,8"], ["--passes", "sideways"], ["--device", "tpu"]],
)
def test_wrong_arguments_are_named(arguments, capsys):
    import pairwise

    with pytest.raises(SystemExit):
        pairwise.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_every_implementation_computes_the_same():
    import implementations

    cpu = torch.device("cpu")
    # KeOps compiles for minutes; whoever measures it sees its results beside the others.
    names = tuple(name for name in implementations.PEER_GROUPS["all"] if name != "KeOps")
    for op in implementations.OPERATIONS:
        case = implementations.Case(op, 2, 30, 26, 20, "float64")
        x, y = case.inputs(cpu)
        expected = implementations.ours(case, "dense")(x, y)
        for found in implementations.implementations(case, cpu, ("tiled",), names, 1 << 30):
            if found.function is not None:
                torch.testing.assert_close(found.function(x, y), expected, rtol=1e-9, atol=1e-9)


def test_a_ratio_is_taken_within_rounds():
    import measure

    slow, fast = measure.Timing([2.0, 20.0, 4.0]), measure.Timing([1.0, 10.0, 2.0])
    assert slow.over(fast) == 2
    assert measure.quartiles([3.0]) == (3.0, 3.0)


def test_a_slow_function_is_timed_once():
    import time

    import measure

    runs = {"slow": lambda: time.sleep(0.05), "fast": lambda: None}
    timings = measure.interleave(runs, torch.device("cpu"), seconds=0.06, rounds=(3, 5))
    assert len(timings["slow"].seconds) == 1
    assert len(timings["fast"].seconds) >= 3
    once = measure.interleave(runs, torch.device("cpu"), seconds=1, warm_up=False)
    assert [len(timing.seconds) for timing in once.values()] == [1, 1]


def test_a_large_matrix_product_goes_through_a_buffer(monkeypatch):
    import implementations

    x, y = torch.rand(1, 70, 4), torch.rand(1, 50, 4)
    product = implementations.gemm(x, y, 1 << 30)()
    torch.testing.assert_close(product, x @ y.mT)
    assert implementations.gemm(x, y, 1)() is None


def test_latency_compares_teacher_and_student(tmp_path, capsys):
    import latency

    arguments = "--points", "32", "--seconds", "0.01", "--rounds", "2"
    report = run(capsys, latency, *arguments, output=tmp_path / "latency.json")
    teacher, student = report["latencies"]
    assert (teacher["network"], student["network"]) == ("teacher", "student")
    assert 30 < teacher["parameters"] / student["parameters"] < 50
    assert teacher["of_teacher"] == 1
    assert student["of_teacher"] > 0


def test_step_compares_with_and_without_the_loss(tmp_path, capsys):
    import step

    arguments = ("--points", "24", "--batch", "2", "--seconds", "0.01", "--rounds", "2")
    report = run(capsys, step, *arguments, "--compress", "200", output=tmp_path / "step.json")
    check_context(report)
    rows = {row["step"]: row for row in report["steps"]}
    assert set(rows) == {"student alone", "without", "teacher"}
    assert rows["without"]["ratio_to_without"] == 1
    assert rows["teacher"]["ratio_to_without"] > 0


def test_plot_draws_every_series(tmp_path, capsys):
    import plot

    rows = [
        {
            "op": "nearest",
            "pass": "forward",
            "dtype": "float32",
            "B": 1,
            "N": N,
            "M": N,
            "C": C,
            "implementation": name,
            "median_s": 1e-3 * N * C,
            "ratio_to_gemm": 1.25,
            "extra_bytes": 1 << 20,
        }
        for name in ("torch.bmm", "fad_loss tiled")
        for N, C in ((64, 8), (128, 8), (128, 16), (128, 32))
    ]
    rows.append({**rows[0], "skipped": "not possible"})
    context = {"cpu": "a processor", "threads": 2, "packages": {"torch": "2.0"}, "commit": "0" * 40}
    source = tmp_path / "pairwise-cpu.json"
    source.write_text(json.dumps({"context": context, "cases": rows}))
    assert plot.main([str(source), "--output", str(tmp_path)]) == 0
    for kind in ("time", "gemm", "memory"):
        path = tmp_path / f"pairwise-cpu-{kind}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in capsys.readouterr().out or kind != "time"

    source.write_text(json.dumps({"context": context, "cases": rows[:1]}))
    assert plot.main([str(source), "--output", str(tmp_path)]) == 1


def test_scripts_do_not_shadow_each_other():
    paths = [path for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    names = {path.stem for path in paths}
    assert len(names) == len(paths)
    assert not names & set(sys.stdlib_module_names)
