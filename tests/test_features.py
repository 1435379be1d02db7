"""Layouts, ragged clouds, and taking features out of models."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fad_loss import _checks
from fad_loss._points import as_points
from fad_loss.capture import CapturedFeatures, capture_features
from fad_loss.ragged import ragged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layouts_become_points_without_a_copy(dtype):
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    assert as_points(x) is x
    channels_first = as_points(x, "bcn")
    assert torch.equal(channels_first, x.mT)
    assert channels_first.data_ptr() == x.data_ptr()
    for layout in ("bnc", "bcn"):
        flat = as_points(x[0], layout)
        assert torch.equal(flat, x[:1])


def test_ragged_clouds_pass_through():
    x = ragged(torch.ones(3, 2), lengths=[1, 2])
    assert as_points(x, "bcn") is x


@pytest.mark.parametrize(
    "features, layout, error, message",
    [
        (torch.zeros(4), "bnc", ValueError, r"student: expected \(B, N, C\).*shape \(4\)"),
        (torch.zeros(4, 3, 2, 1), "bcn", ValueError, r"\(B, C, N\).*\(4, 3, 2, 1\).*flatten"),
        (torch.zeros(0, 3, 2), "bnc", ValueError, r"at least one cloud.*\(0, 3, 2\)"),
        (torch.zeros(2, 0, 2), "bnc", ValueError, r"one point.*\(2, 0, 2\)"),
        (torch.zeros(2, 3, 0), "bnc", ValueError, r"one channel.*\(2, 3, 0\)"),
        (torch.zeros(0, 3), "bnc", ValueError, r"\(0, 3\)"),
        (torch.zeros(2, 3, 4), "nbc", ValueError, "layout: expected one of 'bnc', 'bcn'"),
        (torch.zeros(2, 3, 4).long(), "bnc", TypeError, r"student: expected float32.*int64"),
        ([[1.0]], "bnc", TypeError, r"student: expected a torch.Tensor, got list"),
        (ragged(torch.zeros(3), lengths=[3]), "bnc", ValueError, r"ragged cloud \(B, j, C\)"),
        (ragged(torch.zeros(0, 2), lengths=[0]), "bnc", ValueError, r"\(0, 2\)"),
        (ragged(torch.zeros(3, 2), lengths=[3]).transpose(1, 2), "bnc", ValueError, "fad_loss.rag"),
    ],
)
def test_bad_features(features, layout, error, message):
    with pytest.raises(error, match=message):
        as_points(features, layout, "student")


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    as_list=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=40, deadline=None)
def test_ragged_from_lengths_offset_and_batch_agree(lengths, as_list, dtype):
    total = sum(lengths)
    values = torch.randn(total, 3, dtype=torch.float64, requires_grad=True)
    expected = values.split(lengths)

    def given_as(numbers: list[int]) -> Any:
        return numbers if as_list else torch.tensor(numbers, dtype=dtype)

    ways: list[dict[str, Any]] = [{"lengths": given_as(lengths)}]
    if lengths[0] or not total:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        ways.append({"offset": given_as(ends)})
    if total:
        batch = [cloud for cloud, length in enumerate(lengths) for _ in range(length)]
        ways.append({"batch": given_as(batch), "batch_size": len(lengths)})
        if lengths[-1]:
            ways.append({"batch": given_as(batch)})
    for way in ways:
        cloud = ragged(values, **way)
        assert cloud.layout == torch.jagged
        assert cloud.shape[0] == len(lengths)
        parts = cloud.offsets().diff().tolist()
        assert parts == lengths
        assert torch.equal(cloud.values(), values)
        for part, whole in zip(cloud.values().split(parts), expected, strict=True):
            assert torch.equal(part, whole)


def test_ragged_is_differentiable():
    def cubes(values: Tensor) -> Tensor:
        from fad_loss._ragged import cloud_sum, pointwise

        cloud = ragged(values, offset=[2, 5])
        return cloud_sum(pointwise(lambda z: z**3, cloud))

    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cubes, values)
    assert torch.autograd.gradgradcheck(cubes, values)


V = torch.zeros(6, 2)


@pytest.mark.parametrize(
    "values, kwargs, error, message",
    [
        (V, {}, ValueError, "exactly one of batch, offset and lengths, got none of them"),
        (V, {"batch": [0] * 6, "offset": [6]}, ValueError, "got batch and offset"),
        (V, {"offset": [0, 2, 6]}, ValueError, r"without a leading zero.*offset\[1:\]"),
        (V, {"offset": [2, 5]}, ValueError, r"number of points, 6.*got 5 \(\[2, 5\]\)"),
        (V, {"offset": [4, 2]}, ValueError, r"ascending ends.*\[4, 2\].*lengths="),
        (V, {"lengths": [2, 2]}, ValueError, r"sum of 6 as values has rows, got 4 \(\[2, 2\]\)"),
        (V, {"lengths": [7, -1]}, ValueError, r"no negative length, got \[7, -1\]"),
        (V, {"lengths": [1] * 9}, ValueError, r"got 9 \(\[1, 1, 1, 1, 1, 1, 1, 1, \.\.\.\]\)"),
        (V, {"lengths": []}, ValueError, "at least one cloud, got an empty lengths"),
        (V, {"batch": [0, 0, 1]}, ValueError, "6 as values has rows, got 3"),
        (V, {"batch": [0, 0, 2, 1, 1, 1]}, ValueError, "got 1 after 2 at position 3; sort first"),
        (V, {"batch": [-1, 0, 0, 0, 0, 0]}, ValueError, "from 0 to 0 for 1 clouds, got -1 to 0"),
        (V, {"batch": [0, 0, 0, 0, 3, 3], "batch_size": 3}, ValueError, "got 0 to 3"),
        (V, {"batch": [0] * 6, "batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        (V, {"batch": [0] * 6, "batch_size": 1.0}, TypeError, "batch_size: expected an int, got f"),
        (V, {"lengths": [6], "batch_size": 1}, ValueError, "batch_size: only goes with batch"),
        (V, {"lengths": torch.tensor([6.0])}, TypeError, "lengths: expected integers, got float32"),
        (V, {"lengths": torch.tensor([[6]])}, ValueError, r"one dimension, got int64.*\(1, 1\)"),
        ([1.0], {"lengths": [1]}, TypeError, "values: expected a torch.Tensor, got list"),
        (torch.tensor(1.0), {"lengths": [1]}, ValueError, "values: expected the packed points"),
        (
            ragged(V, lengths=[6]),
            {"lengths": [6]},
            ValueError,
            "values: expected the packed points",
        ),
    ],
)
def test_partitions_that_do_not_add_up(values, kwargs, error, message):
    with pytest.raises(error, match=message):
        ragged(values, **kwargs)


def test_ragged_looks_at_nothing_when_it_must_not(monkeypatch):
    # What happens on a GPU: no look at the numbers, so no error from here, and no synchronisation.
    monkeypatch.setattr(sys.modules["fad_loss.ragged"], "look", lambda tensor: False)
    assert ragged(V, lengths=[3, 3]).shape[0] == 2
    assert ragged(V, batch=torch.tensor([0, 0, 2, 1, 1, 1]), batch_size=3).shape[0] == 3
    assert _checks.look(V)


def test_ragged_of_fake_tensors_has_the_right_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):
        values, batch = torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)
        cloud = ragged(values, batch=batch, batch_size=4)
        assert (cloud.shape[0], cloud.shape[2]) == (4, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv5 = nn.Linear(3, 4)
        self.conv6 = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.conv5(x)
        return self.conv6(hidden), {"skip": hidden}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Block()
        self.act = nn.LeakyReLU()
        self.register_module("absent", None)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        hidden, _ = self.encoder(x)
        if fail:
            message = "no"
            raise RuntimeError(message)
        # A layer that is called twice.
        return self.head(self.act(self.act(hidden) - 1))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> list[int]:
    return [
        len(module._forward_hooks)
        + len(module._forward_hooks_with_kwargs)
        + len(module._forward_pre_hooks)
        + len(module._backward_hooks)
        for module in model.modules()
    ]


def snapshot(model: nn.Module) -> list[Any]:
    return [
        hooks(model),
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        {name: value.clone().tolist() for name, value in model.state_dict().items()},
    ]


def test_captures_what_the_layers_return(model, x):
    before = snapshot(model)
    expected = model.encoder.conv5(x)
    with capture_features(model, ["encoder.conv5", "encoder"]) as features:
        assert isinstance(features, CapturedFeatures)
        assert list(features) == []
        output = model(x)
        assert torch.equal(features["encoder.conv5"], expected)
        hidden, extra = features["encoder"]
        assert extra["skip"] is features["encoder.conv5"]
        assert hidden.grad_fn is not None
        assert list(features) == ["encoder.conv5", "encoder"]
        assert len(features) == 2
        assert "encoder" in features
    assert torch.equal(output, model(x))
    assert snapshot(model) == before


def test_the_gradient_reaches_the_model(model, x):
    with capture_features(model, "encoder.conv5") as features:
        model(x)
        features["encoder.conv5"].sum().backward()
    assert torch.allclose(model.encoder.conv5.weight.grad, x.sum(0).expand(4, 3))
    assert model.encoder.conv6.weight.grad is None


def test_handle_over_many_steps(model, x):
    features = capture_features(model, ["act", ""])
    for step in range(3):
        output = model(x + step)
        # The last of two calls.
        hidden = model.encoder(x + step)[0]
        expected = nn.functional.leaky_relu(nn.functional.leaky_relu(hidden) - 1)
        assert torch.equal(features["act"], expected)
        assert features[""] is output
    features.clear()
    assert len(features) == 0
    with pytest.raises(KeyError, match=r"'act': nothing captured yet.*torch.compiler.reset"):
        features["act"]
    model(x)
    assert len(features) == 2
    features.remove()
    features.remove()
    assert hooks(model) == [0] * len(hooks(model))
    assert repr(features) == "CapturedFeatures('act', '', removed)"
    with pytest.raises(KeyError, match="the capture has ended"):
        features["act"]


def test_unknown_key_of_a_capture(model):
    features = capture_features(model, "encoder.conv5")
    assert 5 not in features
    assert features.get(5) is None
    assert repr(features) == "CapturedFeatures('encoder.conv5')"
    with pytest.raises(
        KeyError, match=r"'encoder.conv' is not being captured.*mean 'encoder.conv5"
    ):
        features["encoder.conv"]
    assert "head" not in features


def test_inputs_and_detach(model, x):
    with capture_features(model, ["head", "encoder"], inputs=True) as features:
        model(x)
        assert features["encoder"] is x
        assert torch.equal(model.head(features["head"]), model(x))
    with capture_features(model, "", inputs=True) as features:
        model(x, fail=False)
        assert features[""] == (x, False)
    with capture_features(model, "encoder", detach=True) as features:
        model(x)
        hidden, extra = features["encoder"]
        assert not hidden.requires_grad
        assert not extra["skip"].requires_grad


def test_the_model_is_left_alone_when_it_raises(model, x):
    before = snapshot(model)
    with (
        pytest.raises(RuntimeError, match="no"),
        capture_features(model, ["encoder.conv5", "head"]) as features,
    ):
        model(x, fail=True)
    assert snapshot(model) == before
    assert len(features) == 0
    model.eval().requires_grad_(False)
    before = snapshot(model)
    with capture_features(model, "head"):
        model(x)
    assert snapshot(model) == before


def test_a_bad_path_installs_nothing(model):
    with pytest.raises(ValueError, match="no module 'nope'"):
        capture_features(model, ["encoder", "nope"])
    assert sum(hooks(model)) == 0


def test_a_forgotten_handle_leaves_no_hook(model, x):
    capture_features(model, "head")
    gc.collect()
    assert sum(hooks(model)) == 0


def test_hooks_of_others_stay(model, x):
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output))
    with capture_features(model, "head"), capture_features(model, "head") as second:
        model(x)
        assert second["head"] is seen[-1]
    model(x)
    assert len(seen) == 2


def test_copies_of_a_captured_model_record_nothing(model, x):
    with capture_features(model, ["encoder.conv5", "encoder"]) as features:
        output = model(x)
        original = features["encoder.conv5"]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), output)
            assert features["encoder.conv5"] is original


@pytest.mark.parametrize(
    "layers, error, message",
    [
        ("encoder.conv", ValueError, "Net has no module 'encoder.conv'; did you mean 'encoder.con"),
        ("conv5", ValueError, "did you mean 'encoder.conv5'"),
        ("xyz", ValueError, "at the top level there are 'encoder', 'act', 'head'"),
        ([], ValueError, "layers: expected at least one path, got none"),
        ([3], TypeError, "layers: every path: expected a str, got int"),
        (3, TypeError, "layers: expected a path .*, or several, got int"),
        (nn.Sequential(nn.ReLU()), TypeError, "layers: expected a path .* got Sequential"),
    ],
)
def test_bad_paths(model, layers, error, message):
    with pytest.raises(error, match=message):
        capture_features(model, layers)


def test_bad_models(x):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        capture_features(lambda z: z, "head")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_says_why_not(x):
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), x)
    with pytest.raises(TypeError, match="'0' lies in a TorchScript module, which runs no"):
        capture_features(scripted, "0")


class Wrapper(nn.Module):
    """What DataParallel, EMA wrappers and many frameworks look like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("path", ["encoder.conv5", "module.encoder.conv5"])
def test_prefixes_of_wrappers_may_be_left_out(model, x, path):
    with capture_features(Wrapper(model), path) as features:
        model(x)
        assert torch.equal(features[path], model.encoder.conv5(x))


def test_a_layer_that_is_called_module_is_no_wrapper(x):
    model = nn.ModuleDict({"module": nn.Linear(3, 2), "other": nn.Linear(3, 1)})
    with capture_features(model, "module") as features:
        model["module"](x)
        assert features["module"].shape == (5, 2)
    with pytest.raises(ValueError, match="no module 'weight'"):
        capture_features(model, "weight")


def test_distributed_data_parallel(model, x, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for path in ("encoder.conv5", "module.encoder.conv5"):
            with capture_features(wrapped, path) as features:
                wrapped(x).sum().backward()
                assert torch.equal(features[path], model.encoder.conv5(x))
        with capture_features(wrapped, "") as features:
            assert features.layers == ("",)
            output = wrapped(x)
            assert torch.equal(features[""], output)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Net, how: str) -> nn.Module:
    if how == "wrapper":
        return torch.compile(model, backend="eager", fullgraph=True)  # type: ignore[return-value]
    if how == "in place":
        model.compile(backend="eager", fullgraph=True)
    elif how == "region in place":
        model.encoder.compile(backend="eager")
    else:
        model.encoder = torch.compile(model.encoder, backend="eager")  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("how", ["wrapper", "in place", "region", "region in place"])
@pytest.mark.usefixtures("fresh_compiler")
# Dynamo looks at the .grad of what it is called with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_models_that_have_already_run(model, x, how):
    plain = copy.deepcopy(model)
    expected = plain.encoder.conv5(x)
    model = compiled(model, how)
    output = model(x)
    for layers in (["encoder.conv5", "encoder", "head"], ["encoder.conv5"], [""]):
        with capture_features(model, layers) as features:
            for _ in range(2):
                features.clear()
                assert torch.allclose(model(x), output)
                assert list(features) == layers
                if "encoder.conv5" in layers:
                    assert torch.allclose(features["encoder.conv5"], expected)
        # Off again: nothing is recorded, and the output is the same.
        assert torch.allclose(model(x), output)
        assert len(features) == 0
    with capture_features(model, "encoder.conv5") as features:
        model(x)
        features["encoder.conv5"].sum().backward()
    weight = dict(model.named_parameters())
    name = next(name for name in weight if name.endswith("conv5.weight"))
    assert torch.allclose(weight[name].grad, x.sum(0).expand(4, 3))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_that_cannot_be_seen_says_what_to_do(model, x):
    step = torch.compile(lambda z: model(z).sum(), backend="eager")
    step(x)
    features = capture_features(model, "encoder.conv5")
    step(x)
    with pytest.raises(KeyError, match=re.escape("call torch.compiler.reset() after it")):
        features["encoder.conv5"]
    torch.compiler.reset()
    step(x)
    assert torch.allclose(features["encoder.conv5"], model.encoder.conv5(x))
    features.remove()


def test_checkpointed_layers(x):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 4)), nn.Linear(4, 2))
    with capture_features(model, "0") as features:
        output = model(x)
        first = features["0"]
        output.sum().backward()
        # The recomputation in backward does not overwrite what was captured.
        assert features["0"] is first
        assert first.requires_grad
