"""Every operation on GPUs that are not there (`stub.py`): does it compile, launch, and how often?

Values are not looked at, which the interpreter's tests do; nor registers, which the report does.
Hopper gets every format. The other architectures get every operation in every dtype; how float32 is
multiplied takes turns.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch

from fad_loss import FeatureAdversarialLoss, ops, ragged

pytest.importorskip("triton")
if find_spec("triton") is not None:
    from stub import MACHINES, stub_gpu

# dtype, precision, channels: how points are multiplied.
FORMS = {
    "direct": (torch.float32, "highest", 3),
    "bf16x6": (torch.float32, "highest", 40),
    "tf32": (torch.float32, "high", 100),
    "bfloat16": (torch.bfloat16, "highest", 64),
    "float16": (torch.float16, "highest", 64),
    "medium": (torch.float32, "medium", 64),
}
# Launches at most, forward, and with the first and with the second derivatives.
OPERATIONS = {
    "softmin": (4, 10, 20),
    "kernel_mean": (4, 10, 18),
    "nearest": (4, 4, 4),
    "knn": (4, 4, 4),
}
SINGLE = [form for form, (dtype, *_) in FORMS.items() if dtype == torch.float32]
CASES = [(90, form, operation) for form in FORMS for operation in OPERATIONS] + [
    (architecture, form, operation)
    for place, architecture in enumerate((80, 100, 120))
    for number, operation in enumerate(OPERATIONS)
    for form in ("bfloat16", "float16", SINGLE[(number + place) % 4])
]


def run(operation, x, y, backend):
    if operation == "softmin":
        along = y.detach()[..., 0].float()
        return ops.softmin(x, y, [0.3, 1.0], potential=along, backend=backend)
    if operation == "kernel_mean":
        return ops.kernel_mean(x, y, ops.Gaussian([0.5, 1.0]), backend=backend)
    if operation == "nearest":
        return ops.nearest(x, y, backend=backend)[0]
    return ops.knn(x, y, 20, backend=backend)[0]


@pytest.fixture(autouse=True)
def _precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def clouds(form, B=2, N=300, M=170):
    dtype, precision, C = FORMS[form]
    torch.set_float32_matmul_precision(precision)
    return [torch.randn(B, n, C).to(dtype).requires_grad_() for n in (N, M)]


@pytest.mark.parametrize("architecture, form, operation", CASES)
def test_forward_backward_and_twice(architecture, form, operation, monkeypatch):
    with stub_gpu(architecture, monkeypatch) as counts:
        x, y = clouds(form)
        launches = []
        value = run(operation, x, y, "triton")
        launches.append(len(counts.launched))
        gradients = torch.autograd.grad(value.sum(), (x, y), create_graph=True)
        launches.append(len(counts.launched))
        sum(g.float().square().sum() for g in gradients).backward()
        launches.append(len(counts.launched))
        assert launches[0] > 0
        assert all(a <= b for a, b in zip(launches, OPERATIONS[operation], strict=True))
        # What is launched again is not compiled again: at most what differs in its arguments.
        assert 0 < len(counts.compiled) <= 15


@pytest.mark.parametrize("form", ["direct", "bf16x6"])
def test_another_size_in_the_same_bucket_compiles_nothing(form, monkeypatch):
    with stub_gpu(90, monkeypatch) as counts:
        # Columns that one program walks over, and columns that several share.
        for sizes in ((2, 300, 170), (1, 20, 9000)):
            for operation in OPERATIONS:
                run(operation, *clouds(form, *sizes), "auto").sum().backward()
        counts.clear()
        for N, M in ((301, 171), (256, 128), (1000, 1), (1, 4096)):
            for operation in OPERATIONS:
                if operation != "knn" or M >= 20:
                    run(operation, *clouds(form, 3, N, M), "auto").sum().backward()
        assert len(counts.launched) > 50
        assert counts.compiled == []


def test_ragged_clouds(monkeypatch):
    with stub_gpu(90, monkeypatch) as counts:
        x = torch.randn(60, 24, requires_grad=True)
        clouds = ragged(x, lengths=[25, 0, 35])
        value = ops.softmin(clouds, clouds, 0.5, exclude_self=True, backend="triton")
        value.values().sum().backward()
        # One set is prepared once, and each kernel is followed by what it flags.
        assert len(counts.launched) == 8


@pytest.mark.parametrize("rows, columns", [(64, 1_000_000), (8192, 8192)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_few_rows_fill_the_device(operation, rows, columns, monkeypatch):
    """Columns are shared out where there are too few tiles of rows, backward too."""
    with stub_gpu(90, monkeypatch) as counts:
        x, y = torch.randn(1, rows, 3, requires_grad=True), torch.randn(1, columns, 3)
        run(operation, x, y, "triton").sum().backward()
        programs = {name.removesuffix("_kernel"): math.prod(grid) for name, grid in counts.launched}
        main = {"softmin": "softmin", "kernel_mean": "kernel_sum"}
        names = [main[operation], "backward"] if operation in main else ["scan", "shortlist"]
        # 31 lists of 32 candidates are all that one row can choose 20 neighbors from.
        least = 32 if operation == "knn" and rows == 64 else 128
        assert all(programs.get(name, 1 << 30) >= least for name in names)
        assert set(names) & set(programs)


@pytest.mark.parametrize(
    "architecture, form", [(90, "bf16x6"), *((number, "bfloat16") for number in MACHINES)]
)
def test_one_graph_for_the_compiler(architecture, form, monkeypatch):
    """``fullgraph=True``, forward and backward, with the choice of the backend left to `auto`."""

    def everything(x, y):
        return sum(run(operation, x, y, "auto").float().mean() for operation in OPERATIONS)

    torch._dynamo.reset()
    with stub_gpu(architecture, monkeypatch) as counts:
        compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=True)
        compiled(*clouds(form)).backward()
        assert {name.removesuffix("_kernel") for name, _ in counts.launched} >= {
            *("softmin", "kernel_sum", "scan", "shortlist", "rerank", "backward"),
        }
        counts.clear()
        compiled(*clouds(form, 2, 333, 222)).backward()
        assert counts.compiled == []
        assert len(counts.launched) <= 4 * 4 + 2 * 6


@pytest.mark.parametrize("architecture", MACHINES)
def test_a_step_of_the_loss(architecture, monkeypatch):
    """The default loss, on the clouds that it trains with."""
    with stub_gpu(architecture, monkeypatch) as counts:
        loss = FeatureAdversarialLoss(student_channels=64, teacher_channels=128)
        student = torch.randn(8, 128, 64, requires_grad=True)
        teacher = torch.randn(8, 128, 128)
        loss(student, teacher).backward()
        counts.clear()
        loss(student, teacher).backward()
        # Four densities, and the gradients of the two that the student's points stand in.
        assert [name for name, _ in counts.launched] == [
            *["small_reduce_kernel"] * 4,
            *["small_backward_kernel"] * 2,
        ]
        # Other clouds of the same bucket, fewer and smaller ones, compile nothing.
        loss(student[:3, :50], teacher[:3, :40]).backward()
        assert len(counts.launched) == 12
        assert counts.compiled == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", ["softmin", "kernel_mean"])
def test_small_clouds_take_one_launch_for_each_result(form, operation, monkeypatch):
    with stub_gpu(90, monkeypatch) as counts:
        run(operation, *clouds(form, 2, 100, 70), "auto").sum().backward()
        # The value, and the gradients of x and of y.
        assert len(counts.launched) == 3
        compiled = len(counts.compiled)
        for N, M in ((128, 128), (65, 127), (96, 96)):
            run(operation, *clouds(form, 5, N, M), "auto").sum().backward()
        assert len(counts.launched) == 12
        assert len(counts.compiled) == compiled
        counts.clear()
        run(operation, *clouds(form, 2, 129, 70), "auto")
        assert len(counts.launched) > 1


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_float64_is_refused_by_name_and_served_by_auto(architecture, monkeypatch):
    with stub_gpu(architecture, monkeypatch) as counts:
        x = torch.randn(1, 20, 5, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="float64"):
            ops.nearest(x, x, backend="triton")
        distance, _ = ops.nearest(x, x)
        assert torch.equal(distance, torch.zeros(1, 20, dtype=torch.float64))
        assert counts.launched == []


def test_shared_memory_is_checked_as_on_the_machine(monkeypatch):
    """The stub refuses what the device would: a test of the stub itself."""
    from triton.runtime.errors import OutOfResources

    from fad_loss.ops._triton import configurations

    monkeypatch.setitem(MACHINES, 120, (1, 170))
    monkeypatch.setattr(
        configurations, "entries", lambda *_: (configurations.Tile(64, 64, 64, 4, 3, 0),)
    )
    torch.set_float32_matmul_precision("highest")
    # Another number of channels than elsewhere: nothing of it is compiled, nor its limits known.
    x = torch.randn(1, 300, 150).bfloat16()
    with stub_gpu(120, monkeypatch) as counts:
        from triton.compiler import compiler

        compiler.max_shared_mem.cache_clear()
        with pytest.raises(OutOfResources, match="shared memory"):
            ops.softmin(x, x, 0.5, backend="triton")
        compiler.max_shared_mem.cache_clear()
        assert all("softmin" not in name for name, _ in counts.launched)
