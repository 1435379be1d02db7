"""torch.compile in one graph, fake and meta tensors, and no look at any value."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fad_loss import FeatureAdversarialLoss

from .cases import (
    DISCRIMINATORS,
    LEARNING,
    POSSIBLE,
    STUDENT,
    TEACHER,
    blind,
    clouds,
    features,
    gradients,
    make,
)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compare(fad, layout, backend="aot_eager", **options):
    eager = copy.deepcopy(fad)
    compiled = torch.compile(fad, backend=backend, fullgraph=True, **options)
    for seed in (1, 2):
        student, teacher, labels = features(layout, seed=seed)
        expected = eager(clouds(student, layout), teacher, labels)
        expected.backward()
        wanted, student.grad = student.grad, None
        loss = compiled(clouds(student, layout), teacher, labels)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(student.grad, wanted)
    torch.testing.assert_close(gradients(fad), gradients(eager))
    torch.testing.assert_close(fad.statistics(), eager.statistics())
    state, other = fad.state_dict(), eager.state_dict()
    torch.testing.assert_close(state, other)


# Those with every option contain those without.
@pytest.mark.parametrize(
    "name",
    [
        "teacher",
        "witness embedding",
        "point conditioned",
        "neighborhood conditioned",
        "cloud conditioned",
        "head",
        "custom",
    ],
)
def test_in_one_graph(name):
    compare(make(name, warmup_steps=5), "N == M")


def test_in_one_graph_with_a_gradient_penalty_and_lecam():
    compare(make("point", gradient_penalty=0.2, lecam=0.1), "N == M")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # on importing inductor
# PyTorch's own partitioner imports modules that script methods.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_in_one_graph_with_the_partitioner_of_inductor():
    # It computes again in the backward what is cheap: from buffers that must not have changed.
    compare(make("teacher", warmup_steps=5), "N == M", backend="aot_eager_decomp_partition")


# Inductor itself computes more of it again.
@pytest.mark.parametrize(
    "name, options",
    [("teacher", {"warmup_steps": 5}), ("point conditioned", {"lecam": 0.1})],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # on importing inductor
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning")
@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a compiler for C++")
def test_inductor_computes_nothing_again_from_buffers_that_have_changed(name, options):
    compare(make(name, **options), "N == M", backend="inductor")


def test_the_operator_that_keeps_what_buffers_hold():
    torch.library.opcheck(torch.ops.fad_loss.snapshot.default, (torch.randn(2, 3),))


def test_no_recompilation_for_clouds_of_other_sizes():
    fad = make("witness")
    compiled = torch.compile(fad, backend="aot_eager", fullgraph=True, dynamic=True)
    first = torch.randn(3, 7, STUDENT, dtype=torch.float64)
    compiled(first, torch.randn(3, 9, TEACHER, dtype=torch.float64))
    with torch.compiler.set_stance("fail_on_recompile"):
        student = torch.randn(3, 12, STUDENT, dtype=torch.float64)
        teacher = torch.randn(3, 5, TEACHER, dtype=torch.float64)
        compiled(student, teacher).backward()


class Looks(TorchDispatchMode):
    """Records every operation that would bring a value to the host, or wait for one."""

    WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = "aten.index" in name and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for i in arg
        )
        counted = "repeat_interleave" in name and (kwargs or {}).get("output_size") is None
        if by_mask or counted or any(w in name for w in self.WAIT):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, layout", [c for c in POSSIBLE if c[1] in {"N == M", "ragged"}])
def test_no_value_is_looked_at_where_looking_would_wait(name, layout, monkeypatch):
    # As on a GPU: `look` says no. What remains must not read a number off a tensor.
    blind(monkeypatch)
    options = {"gradient_penalty": 0.1, "lecam": 0.1} if name in LEARNING else {}
    fad = make(name, warmup_steps=5, **options)
    values, teacher, labels = features(layout)
    student = clouds(values, layout)
    fad(student, teacher, labels)
    # The operators' own kernels are not looked into: on a GPU, others run.
    with Looks() as looks:
        fad(student, teacher, labels).backward()
    assert looks.seen == []


# A head cannot be copied in this mode; what it does is in the test above.
@pytest.mark.parametrize("name", [name for name in DISCRIMINATORS if "head" not in name])
def test_fake_tensors_flow_through_forward_and_backward(name):
    # In this mode whatever depends on a value raises.
    with FakeTensorMode():
        options = {"gradient_penalty": 0.1, "lecam": 0.1} if name in LEARNING else {}
        fad = make(name, warmup_steps=5, dtype=torch.float32, **options)
        student = torch.empty(2, 7, STUDENT, requires_grad=True)
        loss = fad(student, torch.empty(2, 7, TEACHER), torch.zeros(2, dtype=torch.int64))
        loss.backward()
        assert loss.shape == ()
        assert student.grad.shape == student.shape
        assert set(fad.statistics())


@pytest.mark.parametrize("name", ["teacher", "point", "cloud"])
def test_meta_tensors(name):
    with torch.device("meta"):
        fad = FeatureAdversarialLoss(STUDENT, TEACHER, discriminator=name)
        student = torch.empty(2, 7, STUDENT, requires_grad=True)
        fad(student, torch.empty(2, 9, TEACHER)).backward()
    assert student.grad.shape == student.shape
