"""What a Distiller computes, infers, refuses and leaves alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from fad_loss import Distiller, FeatureAdversarialLoss, HeadDiscriminator, capture_features, ragged

from .networks import DGCNN, POINTS, PointNet2, Tuples, clouds


def both(kind, *narrow_and_wide):
    torch.manual_seed(3)
    narrow, wide = narrow_and_wide or (4, 8)
    return kind(narrow), kind(wide)


CASES = {
    "DGCNN": (DGCNN, {"conv5": "conv5"}, {}),
    "PointNet++": (PointNet2, {"sa1[1]": "sa1[1]", "sa2[1]": "sa2[1]"}, {"layout": "bcn"}),
    "tuples": (Tuples, {"[features]": "[1]"}, {}),
    "several": (DGCNN, {"conv5": "conv5", "linear2": "linear2", "": ""}, {}),
    "paired": (Tuples, {"second": "second"}, {"discriminator": "paired", "weight": 3.0}),
}


def build(case, **more):
    kind, layers, options = CASES[case]
    student, teacher = both(kind)
    return Distiller(student, teacher, layers, example=clouds(), **options, **more)


@pytest.mark.parametrize("case", CASES)
def test_the_sum_of_the_losses_of_captured_features(case):
    distiller = build(case)
    twins = copy.deepcopy(distiller.student), copy.deepcopy(distiller.teacher).eval()
    losses = copy.deepcopy(distiller.losses)
    points = clouds()
    torch.manual_seed(5)
    output, loss = distiller(points)
    (loss + (output.logits if case in {"tuples", "paired"} else output).square().mean()).backward()

    layers = CASES[case][1]
    torch.manual_seed(5)
    with (
        capture_features(twins[0], layers) as mine,
        capture_features(twins[1], layers.values()) as its,
    ):
        wanted = twins[0](points)
        with torch.no_grad():
            twins[1](points)
        total = 0
        for (path, its_path), fad in zip(layers.items(), losses.values(), strict=True):
            features = mine[path], its[its_path]
            if features[0].dim() == 3 and case not in {"tuples", "paired"}:
                features = features[0].mT, features[1].mT
            total = total + fad(*features)
        logits = wanted.logits if case in {"tuples", "paired"} else wanted
        (total + logits.square().mean()).backward()
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(loss, total)
    grads = {n: p.grad for n, p in distiller.student.named_parameters()}
    torch.testing.assert_close(grads, {n: p.grad for n, p in twins[0].named_parameters()})
    assert sum(g.abs().sum() for g in grads.values()) > 0
    for own, other in zip(distiller.losses.parameters(), losses.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    assert all(p.grad is None for p in distiller.teacher.parameters())


@pytest.mark.parametrize("case", CASES)
def test_it_learns(case):
    distiller = build(case)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        _, loss = distiller(clouds())
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert sum(history[-5:]) < 0.9 * sum(history[:5])


def test_in_evaluation_nothing_is_updated():
    distiller = build("DGCNN").eval()
    before = copy.deepcopy(distiller.state_dict())
    with torch.no_grad():
        _, loss = distiller(clouds())
    assert not loss.requires_grad
    torch.testing.assert_close(distiller.state_dict(), before)


# ------------------------------------------------------------------------------------ the teacher


def test_the_teacher_is_frozen_and_not_a_part():
    distiller = build("DGCNN")
    before = copy.deepcopy(distiller.teacher.state_dict())
    flags = [p.requires_grad for p in distiller.teacher.parameters()]
    distiller.train()
    assert distiller.student.training
    assert not any(module.training for module in distiller.teacher.modules())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    _, loss = distiller(clouds())
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(distiller.teacher.state_dict(), before, rtol=0, atol=0)
    assert [p.requires_grad for p in distiller.teacher.parameters()] == flags
    mine = {id(p) for p in distiller.parameters()}
    assert mine.isdisjoint(map(id, distiller.teacher.parameters()))
    assert {key.partition(".")[0] for key in distiller.state_dict()} == {"student", "losses"}
    assert distiller.teacher not in list(distiller.modules())


def test_the_teacher_moves_along():
    distiller = build("DGCNN").double()
    assert next(distiller.teacher.parameters()).dtype == torch.float64
    _, loss = distiller(clouds().double())
    assert loss.dtype == torch.float64


def test_both_networks_are_as_before_the_example():
    student, teacher = both(DGCNN)
    student.conv5[1].eval()  # a norm that somebody has frozen
    modes = [module.training for module in student.modules()]
    state = copy.deepcopy(student.state_dict())
    Distiller(student, teacher, {"conv5": "conv5"}, example=clouds())
    assert [module.training for module in student.modules()] == modes
    torch.testing.assert_close(student.state_dict(), state, rtol=0, atol=0)
    gc.collect()
    # And the hooks went with the distiller.
    assert not any(m._forward_hooks for n in (student, teacher) for m in n.modules())


def test_modes_come_back_if_the_example_does_not_fit():
    student, teacher = both(DGCNN)
    with pytest.raises(RuntimeError):
        Distiller(student, teacher, {"conv5": "conv5"}, example=torch.zeros(2, 4, 9))
    assert student.training
    assert teacher.training


# ------------------------------------------------------------------------------ what it works with


@pytest.mark.parametrize("kind, layers, channels", [
    (DGCNN, {"conv5": "conv5"}, (8, 16)),
    (Tuples, {"second": "first"}, (4, 8)),
    (PointNet2, {"pool": "pool"}, (8, 16)),  # (B, C, 1)
    (PointNet2, {"": ""}, (5, 5)),
])  # fmt: skip
def test_channels_and_layout_are_read_off_the_example(kind, layers, channels):
    distiller = Distiller(*both(kind), layers, example=clouds())
    (loss,) = distiller.losses.values()
    assert (loss.student_channels, loss.teacher_channels) == channels
    distiller(clouds())[1].backward()


def test_layouts_may_differ():
    student, teacher = both(Tuples)[0], both(DGCNN)[1]
    distiller = Distiller(student, teacher, {"second": "conv5"}, example=clouds())
    with capture_features(student, "second") as mine, capture_features(teacher, "conv5") as its:
        fad = copy.deepcopy(distiller.losses["second:conv5"])
        torch.manual_seed(2)
        _, loss = distiller(clouds())
        torch.manual_seed(2)
        torch.testing.assert_close(loss, fad(mine["second"], its["conv5"].mT))


class OnlyThose(nn.Module):
    """A network of as many points as it was made for."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        if max(x.shape[1:]) != POINTS:
            message = "made for other clouds"
            raise RuntimeError(message)
        return self.network(x)


class Sampled(nn.Module):
    """Half of the points, (B, N / 2, C)."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(3, width)

    def forward(self, x):
        return self.linear(x.mT[:, : POINTS // 2])


def test_the_axis_of_the_points_is_the_one_that_grows():
    """Though there are as many channels as points."""
    student, teacher = both(DGCNN, 4, POINTS // 2)
    distiller = Distiller(student, teacher, {"conv5": "conv5"}, example=clouds())
    assert distiller.losses["conv5:conv5"].teacher_channels == POINTS
    distiller(clouds())[1].backward()
    # Explicit, the layout counts for what the example would decide as well.
    other = Distiller(student, teacher, {"conv5": "conv5"}, example=clouds(), layout=("bnc", "bnc"))
    assert other.losses["conv5:conv5"].student_channels == POINTS


def test_without_one_more_point_as_many_channels_as_points_need_a_layout():
    student, teacher = both(DGCNN, 4, POINTS // 2)
    layers, networks = {"network.conv5": "network.conv5"}, (OnlyThose(student), OnlyThose(teacher))
    with pytest.raises(
        ValueError, match=r"teacher layer 'network.conv5': expected one axis .*layout=\"bnc"
    ):
        Distiller(*networks, layers, example=clouds())
    for layout in ("bcn", ("bcn", "bcn")):
        distiller = Distiller(*networks, layers, example=clouds(), layout=layout)
        assert distiller.losses["network/conv5:network/conv5"].teacher_channels == POINTS
    distiller(clouds())[1].backward()


def test_channels_are_not_taken_for_points_that_a_layer_has_sampled():
    with pytest.raises(ValueError, match=r"layer 'linear': expected .*for one more; say layout="):
        Distiller(Sampled(8), Sampled(POINTS), {"linear": "linear"}, example=clouds())
    distiller = Distiller(
        Sampled(8), Sampled(POINTS), {"linear": "linear"}, example=clouds(), layout="bnc"
    )
    assert distiller.losses["linear:linear"].teacher_channels == POINTS


def test_the_best_recipe_is_four_lines():
    student, teacher = both(DGCNN)
    layers = {"conv5": "conv5", "linear2": ("linear2", HeadDiscriminator(teacher.head))}
    distiller = Distiller(student, teacher, layers, example=clouds())
    _, loss = distiller(clouds())
    loss.backward()
    # A head that pools sees one point per cloud: the same as one that does not.
    layers["linear2"] = ("linear2", HeadDiscriminator(teacher.head, pool=None))
    other = Distiller(student, teacher, layers, example=clouds())
    other.load_state_dict(distiller.state_dict())
    distiller.eval()
    torch.testing.assert_close(distiller(clouds())[1], other.eval()(clouds())[1])
    assert distiller.losses["linear2:linear2"].weight == HeadDiscriminator.default_weight


def test_losses_of_ones_own():
    student, teacher = both(DGCNN)
    own = FeatureAdversarialLoss(8, 16, weight=7.0, warmup_steps=0, layout="bcn")
    layers = {"conv5": ("conv5", own), "linear2": ("linear2", "paired")}
    options = {"weight": 2.0, "warmup_steps": 0}
    distiller = Distiller(student, teacher, layers, example=clouds(), **options)
    assert distiller.losses["conv5:conv5"] is own
    distiller(clouds())[1].backward()
    statistics = distiller.statistics()
    assert statistics["conv5/weight"] == 7
    assert statistics["linear2/weight"] == 2
    assert {key.partition("/")[2] for key in statistics} == set(own.statistics())


def test_masks():
    distiller = build("tuples").eval()
    points = clouds()
    mask = torch.ones(4, POINTS, dtype=torch.bool)
    mask[:, 15:] = False
    changed = points.clone()
    changed[:, :, 15:] += 3 * torch.randn(4, 3, POINTS - 15)
    with torch.no_grad():
        _, loss = distiller(points, mask=mask)
        assert loss != distiller(points)[1]
        torch.testing.assert_close(loss, distiller(changed, mask=mask)[1])
        torch.testing.assert_close(loss, distiller(points, mask=(mask, mask))[1])


def captured(network, layers, points):
    with capture_features(network, layers) as features, torch.no_grad():
        network(points)
        return [features[layer] for layer in layers]


@pytest.mark.parametrize("points_last", [False, True])
def test_positions(points_last):
    distiller = build("several", discriminator="teacher").eval()
    points = clouds()
    xyz = points if points_last else points.mT
    loss = distiller(points, positions=(xyz, xyz))[1]
    assert loss != distiller(points)[1]
    layers = ["conv5", "linear2", ""]
    of_points, *of_clouds = zip(
        distiller.losses.values(),
        captured(distiller.student, layers, points),
        captured(distiller.teacher, layers, points),
        strict=True,
    )
    fad, mine, its = of_points
    wanted = fad(mine.mT, its.mT, positions=(points.mT, points.mT))
    torch.testing.assert_close(loss, wanted + sum(fad(*pair) for fad, *pair in of_clouds))


def test_positions_that_the_networks_choose_themselves():
    student, teacher = both(PointNet2)
    teacher.sa1.count = 16  # Other points than the student's.
    places = {"sa1[1]": ("sa1[0]", "sa1[0]")}
    options = {"example": clouds(), "layout": "bcn", "discriminator": "paired"}
    distiller = Distiller(student, teacher, {"sa1[1]": "sa1[1]"}, positions=places, **options)
    (fad,) = distiller.eval().losses.values()
    (at, mine), (there, its) = (
        captured(network, ["sa1"], clouds())[0] for network in (student, teacher)
    )
    wanted = fad(mine.mT, its.mT, positions=(at.mT, there.mT))
    torch.testing.assert_close(distiller(clouds())[1], wanted)


def test_labels_and_learning_discriminators():
    student, teacher = both(DGCNN)
    judge = HeadDiscriminator(teacher.head, target="labels")
    layers = {"linear2": ("linear2", judge), "conv5": ("conv5", "point")}
    distiller = Distiller(student, teacher, layers, example=clouds())
    distiller(clouds(), torch.arange(4))[1].backward()
    with pytest.raises(ValueError, match="labels"):
        distiller(clouds())


def test_ragged_networks():
    class Packed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(3, width)
            self.wrap = Wrap()

        def forward(self, cloud):
            return self.wrap(self.layer(cloud["points"]), cloud["offset"])

    class Wrap(nn.Module):
        def forward(self, values, offset):
            return ragged(values, offset=offset)

    data = {"points": torch.randn(9, 3), "offset": torch.tensor([4, 9])}
    distiller = Distiller(Packed(4), Packed(6), {"wrap": "wrap"}, example=data)
    distiller(data)[1].backward()
    assert distiller.student.layer.weight.grad.abs().sum() > 0


def test_layers_replaced_after_construction():
    distiller = build("several")
    student, teacher = distiller.student, distiller.teacher
    distiller = Distiller(student, teacher, {"conv5.1": "conv5.1"}, example=clouds())
    wanted = copy.deepcopy(distiller)
    distiller = nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    torch.manual_seed(0)
    loss = distiller(clouds())[1]
    torch.manual_seed(0)
    torch.testing.assert_close(loss, wanted(clouds())[1])


# ------------------------------------------------------------------------------ copies and states


def task(output):
    return (output if isinstance(output, torch.Tensor) else output.logits).square().mean()


def steps(distiller, optimizer, seeds):
    history = []
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        output, loss = distiller(clouds(seed=seed))
        (loss + task(output)).backward()
        optimizer.step()
        history += [loss.detach(), *(p.grad.clone() for p in distiller.student.parameters())]
    return history


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_the_same(way):
    distiller = build("several")
    steps(distiller, torch.optim.SGD(distiller.parameters(), lr=0.05), range(2))
    if way == "deepcopy":
        twin = copy.deepcopy(copy.deepcopy(distiller))
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(distiller))
    else:
        file = io.BytesIO()
        torch.save(distiller, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.teacher is not distiller.teacher
    histories = [
        steps(one, torch.optim.SGD(one.parameters(), lr=0.05), range(2, 5))
        for one in (distiller, twin)
    ]
    for mine, its in zip(*histories, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("case", ["several", "PointNet++", "tuples"])
def test_resuming_is_bit_for_bit(case):
    distiller = build(case, warmup_steps=4)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.01)
    steps(distiller, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": distiller.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = steps(distiller, optimizer, range(2, 5))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = build(case, warmup_steps=4)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    fresh.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for mine, its in zip(expected, steps(fresh, optimizer, range(2, 5)), strict=True):
        assert torch.equal(mine, its)
    torch.testing.assert_close(fresh.state_dict(), distiller.state_dict(), rtol=0, atol=0)


def test_features_are_let_go():
    distiller = build("DGCNN")
    distiller(clouds())
    assert len(distiller._of_student) == len(distiller._of_teacher) == 0


@pytest.mark.parametrize("case", ["DGCNN", "several", "PointNet++", "tuples", "paired"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
# TorchDynamo does what it warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph(case):
    torch.compiler.reset()
    # What is drawn at random would be drawn in another order.
    distiller = build(case, max_points=None)
    eager = copy.deepcopy(distiller)
    # What the module itself makes of what it returns does not pass by, and nothing is measured.
    measured = 0 if case == "tuples" else 2
    if not measured:
        for loss in eager.losses.values():
            loss.balance, loss.weight = None, loss.discriminator.default_weight
    compiled = torch.compile(distiller, backend="aot_eager", fullgraph=True)
    for seed in (1, 2, 3):
        output, loss = compiled(clouds(seed=seed))
        wanted, total = eager(clouds(seed=seed))
        torch.testing.assert_close((*output, loss), (*wanted, total))
        (loss + task(output)).backward()
        (total + task(wanted)).backward()
    grads = [{n: p.grad for n, p in one.named_parameters()} for one in (distiller, eager)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(distiller.statistics(), eager.statistics())
    for loss in distiller.losses.values():
        assert loss.balance is None or loss.balance.measured == measured
    torch.compiler.reset()


@pytest.mark.parametrize("begun", ["before", "after"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_student_that_is_compiled_has_its_share_measured(begun):
    torch.compiler.reset()
    wanted = build("DGCNN", max_points=None)
    student, teacher = copy.deepcopy(wanted.student), copy.deepcopy(wanted.teacher)
    if begun == "before":
        student = torch.compile(student, backend="aot_eager")
    made = Distiller(student, teacher, {"conv5": "conv5"}, example=clouds(), max_points=None)
    if begun == "after":
        made.student.compile(backend="aot_eager")
    made.losses.load_state_dict(wanted.losses.state_dict())
    for seed in (1, 2, 3):
        for distiller in (made, wanted):
            output, loss = distiller(clouds(seed=seed))
            (loss + task(output)).backward()
    assert made.losses["conv5:conv5"].balance.measured == 2
    torch.testing.assert_close(made.statistics(), wanted.statistics())
    grads = [[p.grad for p in one.parameters()] for one in (made, wanted)]
    torch.testing.assert_close(*grads)
    torch.compiler.reset()


def test_a_share_of_the_pull_unless_a_weight_is_named():
    def weights(**options):
        found = [(loss.weight, loss.balance is not None) for loss in layers(**options)]
        assert len(set(found)) == 1
        return found[0]

    def layers(**options):
        return build("several", discriminator="teacher", **options).losses.values()

    assert weights() == weights(weight=None) == weights(balance=True) == (0.3, True)
    assert weights(total_steps=100) == (1.0, True)
    assert weights(balance=False) == weights(balance=False, total_steps=100) == (20.0, False)
    assert weights(weight=2) == (2.0, False)
    assert weights(weight=2, balance=True) == (2.0, True)
    assert {loss.total_steps for loss in layers(total_steps=100)} == {100}


# --------------------------------------------------------------------------------------- refusals


def refuse(error, message, layers, kind=DGCNN, networks=None, **options):
    with pytest.raises(error, match=message):
        Distiller(*(networks or both(kind)), layers, **{"example": clouds(), **options})


def test_what_is_refused():
    ok = {"conv5": "conv5"}
    shared = nn.Linear(3, 4)
    refuse(ValueError, "DGCNN has no module 'conv6'; did you mean 'conv5'", {"conv6": "conv5"})
    refuse(ValueError, "no module 'conv4'; did you mean 'conv5'", {"conv5": "conv4"})
    refuse(TypeError, r'layers: expected a mapping .*\{"conv5": "conv5"\}, got list', ["conv5"])
    refuse(ValueError, "layers: expected a mapping .*, got an empty one", {})
    refuse(TypeError, r"layers\['conv5'\]: expected a path .*got int 3", {"conv5": 3})
    refuse(TypeError, r"layers\['conv5'\]: expected a path", {"conv5": ("conv5",)})
    refuse(TypeError, "student: expected a torch.nn.Module, got int", ok, networks=(1, shared))
    refuse(TypeError, "teacher: expected a torch.nn.Module, got str", ok, networks=(shared, "t"))
    refuse(
        ValueError,
        r"teacher: expected no module that the student has too, got '0' in both.*deepcopy",
        {"0": "0"},
        networks=(nn.Sequential(shared), nn.Sequential(shared)),
    )
    refuse(TypeError, r"layer 'sa1': .* returns a tensor, got tuple.*element", {"sa1": "sa1"},
           PointNet2)  # fmt: skip
    refuse(ValueError, r"layer 'edge': .*\(4, 4, 24, 4\).*behind the pooling", {"edge": "edge"})
    refuse(ValueError, r"two layers of .*\(4, 8, 24\) .* and .*\(4, 8\)", {"conv5": "linear2"})
    refuse(ValueError, "layout: expected one of 'bnc', 'bcn'", ok, layout="nbc")
    refuse(ValueError, "calls: expected one of 'last', 'error'", ok, calls="all")
    refuse(TypeError, "clone: expected True or False", ok, clone=3)
    refuse(TypeError, "unexpected keyword argument 'wait'", ok, wait=3)
    refuse(ValueError, r"positions: expected paths of layers, 'conv5', got 'x'", ok,
           positions={"x": ("a", "b")})  # fmt: skip
    own = FeatureAdversarialLoss(8, 12)
    refuse(
        ValueError,
        r"expected 8 and 12 channels, as the loss is made, got 8 and 16; make it with "
        r"FeatureAdversarialLoss\(8, 16\)",
        {"conv5": ("conv5", own)},
    )
    own = FeatureAdversarialLoss(8, 16)
    refuse(ValueError, "one loss for each pair, got the same for several",
           {"conv5": ("conv5", own), "conv5.0": ("conv5.0", own)})  # fmt: skip
    refuse(ValueError, r"one axis for the points.*an unknown number of points",
           {"second": "second"}, Tuples, example=torch.randn(2, 3, 3))  # fmt: skip


def test_packed_points_without_clouds_are_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x.mT.flatten(0, 1))

    refuse(ValueError, r"for B = 4 clouds, got float32 of shape \(96, 4\).*ragged",
           {"layer": "layer"}, networks=(Packed(), Packed()))  # fmt: skip


class Graphs:
    """As PyTorch Geometric's `Batch`: packed points, and how many clouds they are of."""

    def __init__(self, points, clouds):
        self.pos, self.num_graphs = points, clouds


@pytest.mark.parametrize(
    "example",
    [
        Graphs(torch.randn(21, 3), 3),
        {"pos": torch.randn(21, 3), "offset": torch.tensor([5, 12, 21])},
    ],
    ids=["graphs", "offset"],
)
def test_packed_points_are_not_taken_for_one_feature_per_cloud(example):
    class Packed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer, self.pool = nn.Linear(3, width), nn.Identity()

        def forward(self, batch):
            points = self.layer(batch["pos"] if isinstance(batch, dict) else batch.pos)
            return self.pool(points[:3])

    networks = Packed(4), Packed(6)
    with pytest.raises(ValueError, match=r"for B = 3 clouds, got float32 of shape \(21, 4\)"):
        Distiller(*networks, {"layer": "layer"}, example=example)
    distiller = Distiller(*networks, {"pool": "pool"}, example=example)
    distiller(example)[1].backward()
    assert distiller.student.layer.weight.grad.abs().sum() > 0


def test_positions_that_nobody_uses_are_refused():
    student, teacher = both(DGCNN)
    layers = {"conv5": ("conv5", "point"), "linear2": "linear2"}
    distiller = Distiller(student, teacher, layers, example=clouds())
    with pytest.raises(
        ValueError, match="positions: expected a pair of layers whose discriminator"
    ):
        distiller(clouds(), positions=(clouds(), clouds()))


def test_a_layer_that_is_called_twice():
    class Twice(Tuples):
        def forward(self, x):
            self.second(self.first(x.mT))
            return super().forward(x)

    student, teacher = Twice(4), Tuples(8)
    with pytest.raises(RuntimeError, match=r"'second': called a second time.*calls='last'"):
        Distiller(student, teacher, {"second": "second"}, example=clouds())
    Distiller(student, teacher, {"second": "second"}, example=clouds(), calls="last")(clouds())


def test_repr():
    text = repr(build("several"))
    assert "layers={'conv5': 'conv5', 'linear2': 'linear2', '': ''}, teacher=DGCNN" in text
