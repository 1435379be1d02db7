"""Copies, pickles and checkpoints: whatever is saved goes on to the same bits."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from .cases import DISCRIMINATORS, features, make

OPTIONS = {"warmup_steps": 8}
LEARNED = OPTIONS | {"gradient_penalty": 0.5, "penalty_every": 3, "lecam": 0.1}


def steps(fad, count, start=0):
    """A few training steps; the losses and gradients of each."""
    history = []
    optimizer = torch.optim.SGD(fad.parameters(), lr=0.05)
    for step in range(start, start + count):
        student, teacher, labels = features("N == M", seed=step)
        optimizer.zero_grad()
        loss = fad(student, teacher, labels)
        loss.backward()
        optimizer.step()
        history += [loss.detach(), student.grad]
    return history


def through_pickle(fad, name):
    return pickle.loads(pickle.dumps(fad))


def through_a_checkpoint(fad, name):
    # Loaded with weights_only, as a careful user does.
    file = io.BytesIO()
    torch.save(fad.state_dict(), file)
    file.seek(0)
    fresh = build(name)
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def through_torch_save(fad, name):
    file = io.BytesIO()
    torch.save(fad, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# PyTorch serialises modules with a spectral norm only through their state.
PICKLED = ["teacher", "head"]
WAYS = {
    "deepcopy": lambda fad, name: copy.deepcopy(fad),
    "pickle": through_pickle,
    "checkpoint": through_a_checkpoint,
    "torch.save": through_torch_save,
}


def build(name):
    learns = name in {"point", "neighborhood", "cloud conditioned", "witness embedding"}
    return make(name, **(LEARNED if learns else OPTIONS))


@pytest.mark.parametrize(
    "name, way",
    [
        (name, way)
        for name in ("teacher", "point", "cloud conditioned", "witness embedding", "head")
        for way in WAYS
        if way in {"deepcopy", "checkpoint"} or name in PICKLED
    ],
)
def test_training_goes_on_the_same(name, way):
    # In the middle of the warm-up, of the lazy penalty's cycle, of the running statistics.
    fad = build(name)
    steps(fad, 4)
    twin = WAYS[way](fad, name)
    assert twin.steps == 4
    expected, got = steps(fad, 4, start=4), steps(twin, 4, start=4)
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    for key, value in fad.state_dict().items():
        other = twin.state_dict()[key]
        assert value == other if isinstance(value, dict) else torch.equal(value, other), key


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_state_is_complete_and_the_teacher_is_not_in_it(name):
    fad = make(name)
    keys = set(fad.state_dict())
    assert {"state", "steps", "average_scores", "penalty_step"} <= keys
    assert {"student_units.mean", "teacher_units.variance", "teacher_units.batches"} <= keys
    assert all(isinstance(value, torch.Tensor) for value in fad.state_dict().values())
    if "head" in name:
        assert not any(k.startswith("discriminator") for k in keys)
    make(name).load_state_dict(fad.state_dict(), strict=True)


def test_the_state_of_an_older_version_is_refused_by_name():
    fad = make("teacher")
    old = {key: value for key, value in fad.state_dict().items() if key.startswith("adapter")}
    old |= {"teacher_mean": torch.zeros(6), "teacher_variance": torch.ones(6)}
    with pytest.raises(
        RuntimeError, match=r"state: expected a state of fad_loss 0\.2, got one of 0"
    ):
        fad.load_state_dict(old)


def test_the_state_of_a_newer_version_is_refused_by_name():
    fad = make("teacher")
    newer = fad.state_dict()
    newer["state"] = torch.tensor(3)
    with pytest.raises(RuntimeError, match="state: expected version 2 or older, got 3; update"):
        make("teacher").load_state_dict(newer)


@pytest.mark.parametrize("name", ["teacher", "point", "match queue"])
def test_a_hand_written_average_of_all_state_goes_on(name):
    # As training scripts have it: every entry of the state dict, or every parameter and buffer.
    fad = make(name)
    average = copy.deepcopy(fad)
    steps(fad, 2)
    with torch.no_grad():
        for mean, value in zip(
            average.state_dict().values(), fad.state_dict().values(), strict=True
        ):
            if value.is_floating_point():
                mean.mul_(0.9).add_(value, alpha=0.1)
            else:
                mean.copy_(value)
    assert all(torch.isfinite(loss).all() for loss in steps(average, 2, start=2))
    assert average.steps == 4


def test_tensors_in_the_state_share_no_memory():
    # What safetensors refuses to save.
    state = make("point", balance=True).state_dict()
    memory = [value.untyped_storage().data_ptr() for value in state.values() if value.numel()]
    assert len(set(memory)) == len(memory)


def test_the_random_state_is_left_alone():
    fad = make("point", gradient_penalty=0.1)
    student, teacher, _ = features()
    state = torch.get_rng_state()
    fad(student, teacher).backward()
    fad.statistics()
    assert torch.equal(torch.get_rng_state(), state)


def test_results_do_not_depend_on_the_random_state():
    losses = []
    student, teacher, _ = features()
    for seed in (0, 1):
        fad = make("neighborhood")
        torch.manual_seed(seed)
        losses.append(fad(student, teacher))
    assert torch.equal(*losses)


def test_repr_says_what_it_is():
    text = repr(make("point", objective="relativistic", weight=0.5, layout="bcn"))
    for part in ("Relativistic()", "weight=0.5", "layout='bcn'", "PointDiscriminator", "adapter"):
        assert part in text
