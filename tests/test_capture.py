"""Taking features out of models."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fad_loss.capture import CapturedFeatures, capture_features


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


class Fields(NamedTuple):
    positions: Tensor
    features: Tensor


class Several(nn.Module):
    """A layer that returns several things, in every way that people do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Fields]:
        hidden = self.linear(x)
        return x, {"skip": hidden}, Fields(x, 2 * hidden)


@pytest.mark.parametrize("compile_it", [False, True])
def test_elements_of_what_a_layer_returns(x, compile_it, fresh_compiler):
    model: nn.Module = nn.Sequential(Several())
    run = torch.compile(model, backend="eager", fullgraph=True) if compile_it else model
    hidden = model[0].linear(x)
    paths = ["0[0]", "0[1][skip]", "0[2][features]", "0[2][1]", "[1][skip]"]
    with capture_features(run, paths) as features:
        run(x)
        assert list(features) == paths
        assert torch.equal(features["0[0]"], x)
        for path, wanted in zip(paths[1:], (hidden, 2 * hidden, 2 * hidden, hidden), strict=True):
            assert torch.equal(features[path], wanted), path


@pytest.mark.parametrize(
    "path, message",
    [
        ("0[3]", r"'0\[3\]': tuple has \[0\], \[1\], \[2\], not \[3\]"),
        ("0[1][skp]", r"dict has \[skip\], not \[skp\]"),
        ("0[2][x]", r"Fields has \[0\], \[1\], \[positions\], \[features\], not \[x\]"),
        ("0.linear[0]", r"Tensor has no elements, not \[0\]"),
    ],
)
def test_elements_that_are_not_there(x, path, message):
    model = nn.Sequential(Several())
    with capture_features(model, path), pytest.raises(ValueError, match=message):
        model(x)
    with pytest.raises(ValueError, match=r"no module '1'; at the top level there are '0'"):
        capture_features(model, "1[0]")


def test_a_module_with_brackets_in_its_name_comes_first(x):
    model = nn.ModuleDict({"a": Several(), "a[0]": nn.Linear(3, 1)})
    with capture_features(model, "a[0]") as features:
        model["a[0]"](x)
        assert features["a[0]"].shape == (5, 1)


@pytest.mark.parametrize("compile_it", [False, True])
def test_a_layer_that_is_called_twice(model, x, compile_it, fresh_compiler):
    hidden = model.encoder(x)[0]
    first = nn.functional.leaky_relu(hidden)
    second = nn.functional.leaky_relu(first - 1)
    run = torch.compile(model, backend="eager") if compile_it else model
    for _ in range(2):
        with capture_features(run, ["act", "head"], calls="all") as features:
            for _ in range(2):  # Every run begins anew.
                run(x)
                assert len(features["act"]) == 2
                torch.testing.assert_close(features["act"], (first, second))
                assert len(features["head"]) == 1
        with capture_features(run, "act", calls="last") as last:
            run(x)
            torch.testing.assert_close(last["act"], second)


def test_a_second_call_can_be_an_error(model, x):
    with capture_features(model, ["act", "head"], calls="error") as features:
        with pytest.raises(RuntimeError, match=r"'act': called a second time.*calls='all'"):
            model(x)
        features.clear()
        model.act(x)
        with pytest.raises(RuntimeError, match="'act': called a second time"):
            model.act(x)
    with capture_features(model, "head", calls="error") as features:
        for _ in range(2):
            model(x)
            assert features["head"].shape == (5, 2)


def test_a_layer_left_out_of_this_run_has_no_features_of_the_last(model, x):
    with capture_features(model, ["encoder", "head"]) as features:
        model(x)
        with pytest.raises(RuntimeError, match="no"):
            model(x, fail=True)
        assert list(features) == ["encoder"]
        with pytest.raises(KeyError, match="or in the model's latest run"):
            features["head"]


@pytest.mark.parametrize("detach", [False, True])
def test_a_change_in_place_is_noticed(x, detach):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    hidden = model[0](x)
    with capture_features(model, ["0", "1"], detach=detach) as features:
        model(x)
        assert torch.equal(features["1"], hidden.relu())
        with pytest.raises(RuntimeError, match=r"'0': changed in place .*clone=True.*that changed"):
            features["0"]
        assert "0" in features
    with capture_features(model, ["0", "1"], detach=detach, clone=True) as features:
        model(x)
        assert torch.equal(features["0"], hidden)
        assert torch.equal(features["1"], hidden.relu())
        assert features["0"].requires_grad != detach


def test_a_change_of_one_element_in_place_is_noticed(x):
    class Doubled(nn.Module):
        def forward(self, parts: tuple[Tensor, dict[str, Tensor], Fields]) -> Tensor:
            return parts[1]["skip"].mul_(2)

    model = nn.Sequential(Several(), Doubled())
    with capture_features(model, ["0", "0[0]"]) as features:
        model(x)
        assert features["0[0]"] is x
        with pytest.raises(RuntimeError, match="'0': changed in place"):
            features["0"]


def test_where_versions_are_not_counted_the_record_is_a_copy(x, fresh_compiler):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    hidden = model[0](x)
    with capture_features(model, "0") as features, torch.inference_mode():
        model(x)
        assert torch.equal(features["0"], hidden)
    for backend in ("eager", "aot_eager"):
        run = torch.compile(model, backend=backend, fullgraph=True)
        with capture_features(run, "0") as features:
            run(x)
            assert torch.equal(features["0"], hidden)
            features["0"].sum().backward()
        assert torch.allclose(model[0].weight.grad, x.sum(0).expand(4, 3))
        model.zero_grad()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_reentrant_checkpoint_has_no_graph_to_capture(x):
    model = Checkpointed(use_reentrant=True)
    with capture_features(model, "block.0") as features:
        with pytest.raises(RuntimeError, match=r"'block.0': .*reentrant.*use_reentrant=False"):
            model(x)
        # A teacher needs no graph.
        with torch.no_grad():
            model(x)
        assert torch.equal(features["block.0"], model.block[0](model.first(x)))
    with capture_features(model, ["block.0", "block", "first"], detach=True) as features:
        output = model(x)
        kept = features["block.0"]
        output.sum().backward()
        assert features["block.0"] is kept
    with capture_features(model, "first") as features:
        model(x)
        assert features["first"].requires_grad


def test_what_a_checkpoint_computes_again_is_not_recorded(x):
    model = Checkpointed(use_reentrant=False)
    with capture_features(model, ["block.0"], calls="error") as features:
        output = model(x)
        kept = features["block.0"]
        assert kept.requires_grad
        (output.sum() + kept.sum()).backward()
        assert features["block.0"] is kept
    plain = copy.deepcopy(model)
    plain.zero_grad()
    hidden = plain.block[0](plain.first(x))
    (hidden.relu().sum() + hidden.sum()).backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad), name


def test_a_whole_model_that_is_checkpointed_keeps_its_records(model, x):
    with capture_features(model, "encoder.conv5") as features:
        output = checkpoint(model, x, use_reentrant=False)
        kept = features["encoder.conv5"]
        output.sum().backward()
        assert features["encoder.conv5"] is kept


def test_replicas_of_data_parallel_say_what_to_use(model, x):
    # As torch.nn.parallel.replicate makes them, on as many GPUs as there are.
    replica = model.encoder.conv5._replicate_for_data_parallel()
    replica.weight, replica.bias = model.encoder.conv5.weight, model.encoder.conv5.bias
    with (
        capture_features(nn.DataParallel(model), "encoder.conv5") as features,
        pytest.raises(RuntimeError, match=r"'encoder.conv5'.*DistributedDataParallel, or one GPU"),
    ):
        replica(x)
    assert len(features) == 0


def test_data_parallel_on_one_device_is_the_model_itself(model, x):
    with capture_features(nn.DataParallel(model), "encoder.conv5") as features:
        model(x)
        assert torch.equal(features["encoder.conv5"], model.encoder.conv5(x))


def test_layers_that_were_replaced_since(x):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    features = capture_features(model, ["1", "2"])
    model(x)
    assert features.replaced == ()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model(x)
    assert features.replaced == ("1",)
    assert list(features) == ["2"]
    with pytest.raises(KeyError, match=r"'1': .* another module .*convert_sync_batchnorm.*capture"):
        features["1"]
    features.remove()
    with capture_features(model, "1") as features:
        model(x)
        assert features["1"].shape == (5, 4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_exporting_while_a_capture_is_alive(model, x, strict, fresh_compiler):
    if strict and torch.__version__ < "2.7":
        pytest.skip("PyTorch 2.6 exports no module with such hooks strictly")
    with capture_features(model, ["encoder.conv5", "head"]) as features:
        program = torch.export.export(model, (x,), strict=strict)
        assert list(features) == []
        output = model(x)
        assert list(features) == ["encoder.conv5", "head"]
    assert torch.equal(program.module()(x), output)
    assert len(program.graph_signature.user_outputs) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_while_a_capture_is_alive(x):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with capture_features(model, "0") as features:
        traced = torch.jit.trace(model, x, check_trace=False)
        assert list(features) == []
        assert torch.equal(traced(x), model(x))
        with pytest.raises(AttributeError, match=r"torch.jit.script cannot .* call remove\(\)"):
            torch.jit.script(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"calls": "first"}, ValueError, "calls: expected one of 'last', 'all', 'error', got"),
        ({"clone": 1}, TypeError, "clone: expected True or False, got int 1"),
        ({"inputs": "x"}, TypeError, "inputs: expected True or False"),
        ({"detach": None}, TypeError, "detach: expected True or False"),
    ],
)
def test_bad_options(model, options, error, message):
    with pytest.raises(error, match=message):
        capture_features(model, "head", **options)
    assert sum(hooks(model)) == 0
