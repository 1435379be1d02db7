"""Nothing in a training step waits for the device: neither the loss, nor what it is made of.

On a GPU, `torch.cuda.set_sync_debug_mode` would say so (`test_gpu.py`). Here whatever brings a
number to the host, or makes a tensor of the host's numbers, is forbidden while the operations take
the tensors for a GPU's, on which nobody looks at values (`fad_loss._checks.look`).
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fad_loss import FeatureAdversarialLoss, distances, ops

pytest.importorskip("triton")
if find_spec("triton") is not None:
    from stub import stub_gpu

# Methods and functions that copy between host and device, and wait for it.
WAITING = [
    *((torch.Tensor, name) for name in ("item", "tolist", "new_tensor", "cpu", "numpy", "nonzero")),
    *((torch.Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__")),
    *((torch, name) for name in ("tensor", "as_tensor", "equal", "nonzero", "from_numpy")),
]
# The same where only the dispatcher sees them.
OPERATORS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
# With a mask for an index, which has to be counted.
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        chosen = [i for i in args[1] if i is not None] if function in INDEXING else []
        waits = function in OPERATORS or any(i.dtype == torch.bool for i in chosen)
        assert not waits, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting(monkeypatch):
    """A context in which nothing may wait; what is prepared before it may."""

    def forbid(name):
        def waits(*_, **__):
            pytest.fail(f"{name} waits for the device")

        return waits

    def start():
        for name, module in list(sys.modules.items()):
            if name.startswith("fad_loss") and hasattr(module, "look"):
                monkeypatch.setattr(module, "look", lambda _: False)
        for owner, name in WAITING:
            monkeypatch.setattr(owner, name, forbid(name))
        return _NoWaiting()

    return start


@pytest.mark.parametrize("call", ["item", "new_tensor", "dispatched"])
def test_what_waits_is_seen(call, no_waiting):
    """Of the fixture itself."""
    x = torch.ones(3)
    calls = {
        "item": lambda: x.sum().item(),
        "new_tensor": lambda: x.new_tensor([1.0, 2.0]),
        "dispatched": lambda: x[x > 0],
    }
    with no_waiting(), pytest.raises((AssertionError, pytest.fail.Exception), match="waits"):
        calls[call]()


LOSSES = {
    "default": {},
    "paired": {"discriminator": "paired"},
    "witness": {"discriminator": "witness"},
    "point": {"discriminator": "point"},
    "relativistic": {"objective": "relativistic"},
    "all points": {"max_points": None},
    "warm-up": {"warmup_steps": 3},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_step_of_the_loss(name, masked, no_waiting, monkeypatch):
    options = dict(LOSSES[name])
    if options.get("discriminator") == "witness":
        from fad_loss import TeacherDiscriminator

        options["discriminator"] = TeacherDiscriminator(mode="witness")
    with stub_gpu(90, monkeypatch):
        loss = FeatureAdversarialLoss(student_channels=24, teacher_channels=40, **options)
        student = torch.randn(2, 70, 24, requires_grad=True)
        teacher = torch.randn(2, 70, 40)
        given = {"mask": torch.rand(2, 70) > 0.3} if masked else {}
        with no_waiting():
            for _ in range(2):
                loss(student, teacher, **given).backward()


def test_the_operations(no_waiting, monkeypatch):
    with stub_gpu(90, monkeypatch):
        x = torch.randn(2, 30, 20, requires_grad=True)
        y = torch.randn(2, 40, 20, requires_grad=True)
        weights, log_weights = torch.rand(2, 40), torch.randn(2, 40)
        with no_waiting():
            values = [
                ops.softmin(x, y, [0.3, 1.0], weights, log_weights, backend="triton"),
                ops.kernel_mean(x, y, ops.Energy(), weights, backend="triton"),
                ops.nearest(x, y, backend="triton")[0],
                ops.knn(x, y, 5, backend="triton")[0],
            ]
            sum(value.sum() for value in values).backward()


def test_distances_between_sets(no_waiting, monkeypatch):
    """Of Sinkhorn's with a known diameter, and no stopping by the error."""
    with stub_gpu(90, monkeypatch):
        x = torch.randn(2, 30, 20, requires_grad=True)
        y = torch.randn(2, 40, 20)
        with no_waiting():
            distances.sinkhorn(x, y, 0.5, diameter=20.0, tolerance=None).sum().backward()
            distances.energy(x, y).sum().backward()
