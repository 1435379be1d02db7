"""The main job, tiny: networks, training, interruption, and the command as a user runs it."""

from __future__ import annotations

import errno
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from fad_loss import (
    FeatureAdversarialLoss,
    HeadDiscriminator,
    capture_features,
    interpolate,
    ragged,
)

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from distill import (  # noqa: E402
    data,
    experiment,
    methods,
    networks,
    report,
    storage,
    terms,
    training,
    views,
)

ARCHITECTURES = list(networks.ARCHITECTURES)
DESCRIPTION = {"arch": "pointnet", "width": 0.1, "classes": 3}
TINY = ["--points", "16", "--epochs", "2", "--teacher-epochs", "2", "--compress", "20"]


@pytest.fixture(scope="module")
def clouds(tmp_path_factory):
    """A file of three classes, told apart by their proportions."""
    random = np.random.default_rng(0)
    sizes = np.array([[1, 1, 1], [3, 1, 1], [1, 3, 1]])
    labels = np.arange(60) % 3
    points = random.normal(size=(60, 24, 3)) * sizes[labels][:, None]
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, points=points.astype(np.float32), labels=labels)
    return path


@pytest.fixture(scope="module")
def teacher(clouds, tmp_path_factory):
    """A checkpoint of a trained teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    assert (
        experiment.main(
            ["--data", str(clouds), "--output", str(folder), *TINY, "--only", "teacher"]
        )
        == 0
    )
    (path,) = folder.glob("teacher-*.pt")
    return path


# ------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("arch, millions", [("pointnet", 3.5), ("pointnet2", 1.47), ("dgcnn", 1.8)])
def test_networks_have_their_published_size(arch, millions):
    size = networks.parameters(networks.build(arch, 40))
    assert size / 1e6 == pytest.approx(millions, abs=0.05)
    width = networks.widest(arch, 40, size / 40)
    student, wider = (networks.build(arch, 40, w) for w in (width, width + 1 / 32))
    assert 0.95 * size / 40 < networks.parameters(student) <= size / 40
    assert networks.parameters(wider) > size / 40


def test_no_network_is_small_enough():
    with pytest.raises(ValueError, match="no pointnet for 40 classes has as few as 10 parameters"):
        networks.widest("pointnet", 40, 10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_networks_do_not_see_the_order_of_points(arch):
    network = networks.build(arch, 5, 0.25).double().eval()
    points = torch.randn(3, 40, 3, dtype=torch.float64)
    order = torch.randperm(40)
    assert torch.allclose(network(points), network(points[:, order]), atol=1e-10)


@pytest.mark.parametrize("arch", sorted(networks.RAGGED))
def test_ragged_clouds_are_seen_as_each_of_them_alone(arch):
    torch.manual_seed(0)
    network = networks.build(arch, 5, 0.25).double()
    for module in network.modules():  # so that the transforms move points
        if isinstance(module, networks.TransformNet):
            torch.nn.init.normal_(module.matrix.weight, std=0.1)
    parts = [torch.randn(n, 3, dtype=torch.float64) for n in (40, 1, 7)]
    clouds = ragged(torch.cat(parts), lengths=[40, 1, 7])
    with capture_features(network.eval(), network.layer) as features:
        together = network(clouds)
        level = features[network.layer]
        for logits, part, ours in zip(together, parts, level.unbind(), strict=True):
            torch.testing.assert_close(network(part[None])[0], logits)
            torch.testing.assert_close(features[network.layer][0], ours)
    # In training all points of the batch are normed alike: clouds of equal size are a dense batch.
    network.train()
    network.classifier[2].p = 0.0
    points = torch.randn(4, 10, 3, dtype=torch.float64)
    results = []
    for batch in (points, ragged(points.flatten(0, 1), lengths=[10] * 4)):
        network.zero_grad()
        network(batch).square().sum().backward()
        results.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_distilled_layer_has_a_feature_per_point(arch):
    network = networks.build(arch, 5, 0.25)
    with capture_features(network, [network.layer, network.places]) as features:
        assert network(torch.randn(2, 30, 3)).shape == (2, 5)
        count = 7 if network.samples else 30
        assert features[network.layer].shape == (2, count, network.channels)
        assert features[network.places].shape == (2, count, 3)


def test_sampled_points_are_farthest_from_each_other_and_of_the_cloud():
    points = torch.randn(3, 40, 3, dtype=torch.float64)
    index = networks.farthest_points(points, 12, random=False)
    assert all(len(set(row.tolist())) == 12 for row in index)
    for cloud, row in zip(points, index, strict=True):
        distance = torch.cdist(cloud, cloud)
        assert row[0] == (cloud - cloud.mean(0)).norm(dim=-1).argmax()
        for k in range(1, 12):
            assert row[k] == distance[:, row[:k]].amin(1).argmax()
    starts = {networks.farthest_points(points, 1, random=True)[0].item() for _ in range(20)}
    assert len(starts) > 5


def test_set_abstraction_is_a_small_pointnet_for_every_group():
    layer = networks.SetAbstraction([5, 6, 7], 2, 100, 4).double().eval()
    positions = torch.randn(2, 10, 3, dtype=torch.float64)
    features = torch.randn(2, 10, 5, dtype=torch.float64)
    centers, found = layer(positions, features)
    assert centers.shape == (2, 5, 3)
    for b in range(2):
        for i, center in enumerate(centers[b]):
            near = (positions[b] - center).norm(dim=-1).topk(4, largest=False).indices
            group = torch.cat([positions[b, near] - center, features[b, near]], dim=-1)
            torch.testing.assert_close(found[b, i], layer.layers(group).amax(0))


@pytest.mark.parametrize("archs", [("pointnet2", "pointnet2"), ("pointnet", "pointnet2")])
@pytest.mark.parametrize("method", ["fad", "fitnet"])
def test_networks_that_sample_are_compared_by_position(archs, method):
    student, teacher = (networks.build(arch, 3, 0.1) for arch in archs)
    objective = methods.Distilled(student, teacher, method)
    points, labels = torch.randn(4, 24, 3), torch.tensor([0, 1, 2, 0])
    step = objective(points, labels)
    step.loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())
    known = methods.teach(teacher, points)
    with methods.watch(student.eval()) as features:
        asked = objective.eval()(points, labels)
        mine = methods.seen(student, features)
    if method == "fad":
        wanted = objective.terms["fad"](
            mine.points, known.points, positions=(mine.positions, known.positions)
        )
    else:
        matched = interpolate(known.points, known.positions, mine.positions)
        wanted = objective.weights["fitnet"] * objective.terms["fitnet"](mine.points, matched)
    torch.testing.assert_close(asked.distillation, wanted)
    torch.testing.assert_close(objective(points, labels, known).distillation, wanted)


@pytest.mark.parametrize("discriminator", ["paired", "cloud", "match"])
def test_every_discriminator_takes_networks_that_sample(discriminator):
    student, teacher = networks.build("pointnet2", 3, 0.1), networks.build("pointnet2", 3, 0.2)
    objective = methods.Distilled(student, teacher, "fad", discriminator=discriminator)
    points, labels = torch.randn(4, 24, 3), torch.tensor([0, 1, 2, 0])
    for known in (None, methods.teach(teacher, points)):
        assert objective(points, labels, known).loss.isfinite()


def test_dgcnn_takes_clouds_smaller_than_its_neighborhoods():
    assert networks.build("dgcnn", 5, 0.25)(torch.randn(2, 7, 3)).shape == (2, 5)


def test_the_first_largest_is_what_argmax_finds():
    scores = torch.randn(40, 3, 50)
    ties = torch.cat([scores.round(), torch.zeros(1, 3, 50), torch.full((1, 3, 50), -1e30)])
    broken = scores.clone()
    broken[3, 1, 7] = torch.nan
    broken[5, 0] = torch.inf
    for given in (scores, ties, 1e-12 * scores, broken, scores.bfloat16()):
        assert torch.equal(networks.first_largest(given), given.argmax(-1))


@pytest.mark.parametrize("mode", [True, False])
def test_max_pool_layer_is_linear_norm_and_max(mode):
    layer = networks.MaxPoolLayer(5, 7).double().train(mode)
    with torch.no_grad():
        layer.norm.weight.copy_(torch.linspace(-1, 1, 7))
        layer.norm.running_mean.normal_()
    weights = [layer.linear.weight, layer.norm.weight, layer.norm.bias]
    points = torch.randn(4, 9, 5, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(4, 7, dtype=torch.float64)

    mean, variance = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    flat = layer.linear(points).flatten(0, 1)
    normed = F.batch_norm(flat, mean, variance, *weights[1:], training=mode, momentum=0.1)
    expected = normed.unflatten(0, (4, 9)).max(dim=1).values
    wanted = torch.autograd.grad((expected * cotangent).sum(), [points, *weights])

    output = layer(points)
    got = torch.autograd.grad((output * cotangent).sum(), [points, *weights])
    for a, b in zip([output, *got], [expected, *wanted], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(layer.norm.running_mean, mean)
    torch.testing.assert_close(layer.norm.running_var, variance)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(points), layer.eval()(points.requires_grad_()))


@pytest.mark.parametrize("mode", [True, False])
def test_edge_conv_is_a_linear_layer_on_edges(mode):
    layer = networks.EdgeConv(3, 6, neighbors=4).double().train(mode)
    with torch.no_grad():
        layer.norm.weight.copy_(torch.tensor([-1, -0.5, -0.1, 0.2, 0.7, 1]))
        layer.norm.running_mean.normal_()
    a, b = layer.neighbor.weight, layer.center.weight
    weights = [a, b, layer.norm.weight, layer.norm.bias]
    points = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 10, 6, dtype=torch.float64)

    mean, variance = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    index = torch.cdist(points, points).topk(4, largest=False).indices
    neighbors = points[torch.arange(2)[:, None, None], index]
    centers = points.unsqueeze(2).expand_as(neighbors)
    weight = torch.cat([a, a + b], dim=1)  # W [x_j - x_i, x_i], so its second half is A + B
    edges = (torch.cat([neighbors - centers, centers], dim=-1) @ weight.T).flatten(0, 2)
    normed = F.batch_norm(edges, mean, variance, *weights[2:], training=mode, momentum=0.1)
    expected = F.leaky_relu(normed, 0.2).unflatten(0, (2, 10, 4)).max(dim=2).values
    wanted = torch.autograd.grad((expected * cotangent).sum(), [points, *weights])

    output = layer(points)
    got = torch.autograd.grad((output * cotangent).sum(), [points, *weights])
    for ours, theirs in zip([output, *got], [expected, *wanted], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(layer.norm.running_mean, mean)
    torch.testing.assert_close(layer.norm.running_var, variance)


# ------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", [*terms.METHODS, "fad+head+kd", "mse+kd"])
def test_every_method_teaches_the_student_and_leaves_the_teacher(method):
    student, teacher = networks.build("pointnet", 3, 0.1), networks.build("pointnet", 3, 0.2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective = methods.Distilled(student, teacher, method)
    objective.train()
    step = objective(torch.randn(4, 12, 3), torch.tensor([0, 1, 2, 0]))
    step.loss.backward()
    assert step.logits.shape == (4, 3)
    alone = F.cross_entropy(step.logits, torch.tensor([0, 1, 2, 0]), label_smoothing=0.1)
    torch.testing.assert_close(step.task, alone)
    assert step.distillation > 0
    torch.testing.assert_close(step.loss, alone + step.distillation)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert student.local[0].linear.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert ("fad_fake_score" in objective.statistics()) == ("fad" in method)
    assert not any("teacher.local" in name for name in objective.state_dict())


@pytest.mark.parametrize("method", ["mse", "fitnet", "chamfer", "energy", "mmd", "sinkhorn"])
def test_distances_are_least_for_the_teachers_own_features(method):
    term = terms.METHODS[method](6, 6)
    with torch.no_grad():
        term.adapter.weight.copy_(torch.eye(6))
        term.adapter.bias.zero_()
    teacher = torch.randn(3, 20, 6)
    assert term(teacher, teacher).abs() < 1e-4
    assert term(teacher + 1, teacher) > 0.1


@pytest.mark.parametrize("method", ["sp", "rkd"])
def test_relations_do_not_see_a_rotation_of_the_features(method):
    term = terms.METHODS[method](6, 6, classes=3)
    teacher = torch.randn(5, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert term(2 * teacher @ rotation, teacher).abs() < 1e-6
    assert term(torch.randn(5, 6), teacher) > 1e-3


def test_contrast_is_least_where_clouds_are_recognised():
    term = terms.METHODS["crd"](6, 6, classes=3, width=6)
    with torch.no_grad():
        for layer in (term.student, term.teacher):
            layer.weight.copy_(torch.eye(6))
            layer.bias.zero_()
    teacher = torch.eye(6)
    assert term(teacher, teacher) < 1e-4
    assert term(teacher.roll(1, 0), teacher) > 10


def test_weights_are_those_of_the_study_unless_given():
    networks_ = networks.build("pointnet", 3, 0.1), networks.build("pointnet", 3, 0.2)

    def weights(method, **options):
        term = methods.Distilled(*networks_, method, **options)
        for name in {"fad", "head", "last"} & term.terms.keys():
            assert term.terms[name].weight == term.weights[name]
        return term.weights

    best = terms.WEIGHTS
    assert weights("fad+kd") == {"fad": 0.3, "kd": best["kd"]}
    assert weights("fad+last", total_steps=9) == {"fad": 1.0, "last": 1.0}
    assert weights("fad+last", weights={"last": 3.0}) == {"fad": 0.3, "last": 3.0}
    assert weights("last+fad", weights={"fad": 3.0}) == {"fad": 3.0, "last": 3.0}
    judge = HeadDiscriminator(networks_[1].classifier[-1], pool=None)
    assert weights("head") == {"head": FeatureAdversarialLoss(4, 4, discriminator=judge).weight}
    paired = FeatureAdversarialLoss(4, 4, discriminator="paired").weight
    assert weights("last") == {"last": paired}
    assert weights("fad", discriminator="paired", balance=False) == {"fad": paired}
    assert weights("head+last", weights={"last": 3.0})["last"] == 3.0
    assert weights("fad", discriminator="match", balance=False)["fad"] < 1
    assert weights("fad", discriminator="paired", balance=True) == {"fad": 0.3}
    assert weights("fad+kd", weights={"fad": 2.0}) == {"fad": 2.0, "kd": best["kd"]}
    assert weights("logit+mse", weights={"mse": 0.5}) == {"logit": best["logit"], "mse": 0.5}
    assert weights("fad", weights={"fad": 0.0}) == {"fad": 0.0}


@pytest.mark.parametrize("discriminator", terms.DISCRIMINATORS)
def test_variants_teach_too(discriminator):
    student, teacher = networks.build("pointnet", 3, 0.1), networks.build("pointnet", 3, 0.2)
    objective = methods.Distilled(student, teacher, "fad", discriminator=discriminator)
    objective(torch.randn(4, 12, 3), torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters())
    assert student.local[0].linear.weight.grad.abs().sum() > 0


def test_the_teachers_last_layer_judges_the_students_penultimate_features():
    student, teacher = networks.build("pointnet", 3, 0.1), networks.build("dgcnn", 3, 0.1)
    objective = methods.Distilled(student.eval(), teacher, "head", weights={"head": 1.0}).eval()
    points, labels = torch.randn(4, 12, 3), torch.tensor([0, 1, 2, 0])
    known = methods.teach(teacher, points)
    torch.testing.assert_close(teacher.classifier[-1](known.penultimate), known.logits)
    loss = objective(points, labels).distillation
    with methods.watch(student) as features:
        student(points)
        judged = objective.terms["head"]
        own = features[student.penultimate]
        # What the loss has seen nothing of yet has the mean 0 and the variance 1, and a little.
        adapted = judged.teacher_units.restore(judged.adapter(own / 1.01**0.5))
    guess = F.log_softmax(teacher.classifier[-1](adapted), dim=-1)
    wanted = F.kl_div(guess, known.logits.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-4)


def test_a_curriculum_moves_from_the_terms_to_the_task():
    student, teacher = networks.build("pointnet", 3, 0.1), networks.build("pointnet", 3, 0.2)
    points, labels = torch.randn(4, 12, 3), torch.tensor([0, 1, 2, 0])

    def loss(curriculum, progress):
        torch.manual_seed(0)
        objective = methods.Distilled(student.eval(), teacher, "fitnet", curriculum=curriculum)
        objective.progress = progress
        return objective(points, labels).loss.item()

    task = methods.Supervised(student)(points, labels).loss.item()
    both = loss(None, 0.5)
    assert both > task
    assert loss("first", 0.0) == pytest.approx(both - task, rel=1e-4)
    assert loss("first", 0.5) == both
    assert loss("fade", 0.0) == both
    assert loss("fade", 0.75) == pytest.approx(task + (both - task) / 4, rel=1e-4)


@pytest.mark.parametrize(
    "method", ["fad", "fad+last", "kd+sp", "crd", "fitnet", "head", "last", "fad+kd+last"]
)
def test_what_the_teacher_said_before_is_as_good_as_asking_again(method):
    student, teacher = networks.build("pointnet", 3, 0.1), networks.build("pointnet", 3, 0.2)
    objective = methods.Distilled(student.eval(), teacher, method).eval()
    points, labels = torch.randn(4, 12, 3), torch.tensor([0, 1, 2, 0])
    asked = objective(points, labels)
    known = objective(points, labels, methods.teach(teacher, points))
    for one, other in zip(known, asked, strict=True):
        torch.testing.assert_close(one, other)


def test_fad_is_the_loss_of_the_readme():
    student, teacher = networks.build("pointnet", 3, 0.1), networks.build("pointnet", 3, 0.2)
    torch.manual_seed(1)
    term = methods.Distilled(student, teacher, "fad").terms["fad"]
    torch.manual_seed(1)
    readme = FeatureAdversarialLoss(student.channels, teacher.channels, balance="auto")
    assert repr(term) == repr(readme)
    assert str(vars(term)["max_points"]) == str(readme.max_points)
    for name, value in readme.state_dict().items():
        assert torch.equal(term.state_dict()[name], value), name


@pytest.mark.parametrize("arch", ["pointnet", "pointnet2"])
def test_views_hold_what_the_teacher_says(tmp_path, arch):
    teacher = networks.build(arch, 3, 0.2)
    split = data.Clouds(torch.randn(10, 24, 3), torch.arange(10) % 3)
    settings = training.Settings(epochs=1, points=16)
    made = views.Views.make(tmp_path, {"a": "b"}, teacher, split, settings, 2)
    assert len(made) == 2
    index = torch.tensor([7, 2])
    points, seen = made.take(3, index)
    expected = methods.teach(teacher, points)
    torch.testing.assert_close(seen.points, expected.points, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(seen.pooled, expected.pooled)
    torch.testing.assert_close(seen.penultimate, expected.penultimate)
    torch.testing.assert_close(seen.logits, expected.logits)
    torch.testing.assert_close(seen.positions, expected.positions)
    assert torch.equal(points, made.take(1, index)[0])  # the views come round again
    assert not torch.equal(points, made.take(0, index)[0])

    def never(_):
        raise AssertionError

    again = views.Views.make(tmp_path, {"a": "b"}, teacher, split, settings, 2, never)
    assert torch.equal(again.take(1, index)[0], points)
    with pytest.raises(AssertionError):
        views.Views.make(tmp_path, {"a": "c"}, teacher, split, settings, 2, never)


# ------------------------------------------------------------------------------------ training


class Silent:
    """Watches, and interrupts after so many epochs."""

    def __init__(self, stop=None):
        self.stop = stop

    def begin(self, name, epochs, steps, history): ...

    def step(self): ...

    def epoch(self, record):
        if record["epoch"] == self.stop:
            raise KeyboardInterrupt

    def end(self): ...


def train(folder, method, watch, discriminator="teacher"):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(24, 20, 3, generator=generator)
    split = data.Clouds(points, torch.arange(24) % 3)
    clouds = data.Dataset("tiny", split, split, ["a", "b", "c"])
    torch.manual_seed(0)
    student, teacher = networks.build("pointnet", 3, 0.1), networks.build("dgcnn", 3, 0.1)
    objective = methods.Supervised(student)
    if method != "none":
        objective = methods.Distilled(student, teacher, method, discriminator=discriminator)
    settings = training.Settings(epochs=3, points=16, batch_size=8, jitter=0.01, rotate=True)
    run = training.Run(folder, method, DESCRIPTION, settings)
    training.fit(student, objective, clouds, run, watch)
    return run


@pytest.mark.parametrize(
    "method, discriminator",
    [("none", "teacher"), ("fad", "teacher"), ("fad", "paired"), ("fad+kd", "cloud")],
)
def test_interrupted_and_resumed_ends_in_the_same_bits(tmp_path, method, discriminator):
    whole = train(tmp_path / "whole", method, Silent(), discriminator)
    for stop in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", method, Silent(stop), discriminator)
    parts = train(tmp_path / "parts", method, Silent(), discriminator)
    first, second = (storage.load_checkpoint(run.path) for run in (whole, parts))
    for part in ("network", "loss"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            same = torch.equal(value, second[part][name]) if torch.is_tensor(value) else True
            assert same, name
    for record, again in zip(first["history"], second["history"], strict=True):
        assert {**record, "seconds": 0} == {**again, "seconds": 0}
    lines = parts.path.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".pt", ".jsonl"}
    assert not list(tmp_path.rglob(".*"))


def saved(folder, method="none"):
    """The run of a training that is over."""
    return train(folder, method, Silent())


def test_runs_in_one_folder_do_not_write_to_the_same_file(tmp_path):
    path = tmp_path / "shared.pt"
    content = [torch.full((20_000,), float(i)) for i in range(4)]

    def many(i):
        for _ in range(25):
            storage.save(path, content[i])
            found = torch.load(path)
            assert (found == found[0]).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, range(4)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_flipped_byte_is_refused_or_does_not_matter(tmp_path):
    path = saved(tmp_path).path
    whole = path.read_bytes()
    wanted = storage.load_checkpoint(path)
    refused = []
    random = np.random.default_rng(0)
    # Anywhere, and in the headers at the end.
    places = [*random.integers(len(whole), size=60), *range(len(whole) - 400, len(whole), 7)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = storage.load_checkpoint(path)
        except data.DataError as error:
            refused.append(str(error))
        else:
            for part in ("network", "loss"):
                for name, value in wanted[part].items():
                    assert torch.equal(found[part][name], value), (place, name)
            assert found["history"] == wanted["history"]
    assert len(refused) > len(places) / 3
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refused)


@pytest.mark.parametrize("missing", ["loss", "optimizer", "network", "history", "description"])
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, missing):
    run = saved(tmp_path)
    state = torch.load(run.path)
    del state[missing]
    storage.save(run.path, state)
    with pytest.raises(data.DataError, match=r"has no|not a checkpoint of this example"):
        saved(tmp_path)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    run = saved(tmp_path)
    state = torch.load(run.path)
    state["network"].popitem()
    storage.save(run.path, state)
    with pytest.raises(data.DataError, match=r"does not fit \(.*\); remove it to train anew"):
        saved(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("when", ["open", "sync", "rename"])
def test_a_full_disk_or_a_read_only_folder_loses_nothing(tmp_path, monkeypatch, number, when):
    path = tmp_path / "kept.pt"
    storage.save(path, {"a": 1})
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    target = {
        "open": (storage.tempfile, "NamedTemporaryFile"),
        "sync": (storage.os, "fsync"),
        "rename": (Path, "replace"),
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(data.DataError) as caught:
            storage.save(path, {"a": 2})
    assert str(caught.value).startswith(f"{path}: cannot be written ({os.strerror(number)}); ")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_stops_with_one_line_on_a_full_disk(clouds, tmp_path, capsys, monkeypatch):
    command = ["--data", str(clouds), "--output", str(tmp_path), *TINY, "--only", "teacher"]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        assert experiment.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill: error: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert experiment.main(command) == 0


def test_checkpoints_are_named_by_what_decides_the_result(tmp_path):
    settings = training.Settings(epochs=1, points=8)
    runs = [
        training.Run(tmp_path, "a", {"data": "x"}, settings),
        training.Run(tmp_path, "a", {"data": "y"}, settings),
        training.Run(tmp_path, "a", {"data": "x"}, training.Settings(epochs=1, points=8, seed=1)),
    ]
    assert len({run.path for run in runs}) == 3
    assert runs[0].path == training.Run(tmp_path, "a", {"data": "x"}, settings).path


def test_learning_rate_warms_up_and_ends_at_zero():
    settings = training.Settings(epochs=10, points=8)
    rates = [settings.rate(progress) for progress in (0, 0.5, 1, 5.5, 10)]
    assert rates == pytest.approx([1e-6, 5e-4, 1e-3, 5e-4, 0], abs=2e-6)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    class Broken(methods.Supervised):
        def forward(self, points, labels, known=None):
            step = super().forward(points, labels, known)
            return step._replace(task=step.task * torch.nan)

    split = data.Clouds(torch.randn(8, 8, 3), torch.arange(8) % 2)
    clouds = data.Dataset("tiny", split, split, ["a", "b"])
    network = networks.build("pointnet", 2, 0.1)
    run = training.Run(tmp_path, "x", {}, training.Settings(epochs=1, points=8, batch_size=4))
    with pytest.raises(data.DataError, match="the loss is nan in epoch 1"):
        training.fit(network, Broken(network), clouds, run, Silent())
    assert not run.path.exists()


# ------------------------------------------------------------------------------------- command


def test_the_whole_job(clouds, tmp_path, capsys):
    command = ["--data", str(clouds), "--output", str(tmp_path), *TINY, "--loss", "fad", "kd"]
    assert experiment.main(command) == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown
    assert "recovered" in shown or "information" in shown
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["teacher", "student alone", "student with FAD", "student with KD"]
    for name, row in rows.items():
        assert 0 <= row["accuracy"] <= 1
        assert Path(row["checkpoint"]).is_file()
        if name != "teacher":
            assert 20 * row["parameters"] <= rows["teacher"]["parameters"]
            assert 0 <= row["information_lost"] <= 1
    logs = [
        json.loads(x)
        for x in next(tmp_path.glob("student-fad-*.jsonl")).read_text().split("\n")[:-1]
    ]
    assert {"loss", "test_accuracy", "fad_real_score", "fad_fake_score"} <= logs[0].keys()
    for log in logs:
        assert log["loss"] == pytest.approx(log["task_loss"] + log["distillation_loss"], rel=1e-4)
    assert "  distillation " in shown

    # Once more: nothing is trained again, and the numbers are the same.
    assert experiment.main(command) == 0
    assert capsys.readouterr().out.count("already trained") == 4
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == written["rows"]


def test_the_whole_job_on_ragged_batches(tmp_path, capsys):
    random, lengths = np.random.default_rng(0), np.tile([5, 30, 12], 20)
    labels = np.arange(60) % 3
    sizes = np.array([[1, 1, 1], [3, 1, 1], [1, 3, 1]])[np.repeat(labels, lengths)]
    points = (random.normal(size=sizes.shape) * sizes).astype(np.float32)
    np.savez(tmp_path / "some.npz", points=points, lengths=lengths, labels=labels)
    losses = ["--loss", "fad", "kd+mse", "--discriminator", "paired"]
    command = ["--data", str(tmp_path / "some.npz"), "--output", str(tmp_path), *TINY, *losses]
    assert experiment.main([*command, "--ragged"]) == 0
    assert "up to 16 points" in capsys.readouterr().out.replace("\n", " ")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 4
    assert experiment.main(command) == 0  # other clouds, so all is trained anew
    assert "already trained" not in capsys.readouterr().out
    dense = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert all(a["checkpoint"] != b["checkpoint"] for a, b in zip(rows, dense, strict=True))


def test_the_teacher_is_asked_once_about_views(clouds, teacher, tmp_path):
    command = ["--data", str(clouds), "--output", str(tmp_path / "run"), *TINY, "--views", "2"]
    command += ["--cache", str(tmp_path / "cache"), "--teacher", str(teacher), "--loss", "fad"]
    assert experiment.main([*command, "--only", "teacher"]) == 0
    (made,) = (tmp_path / "cache").glob("views-*")
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert experiment.main([*command, "--fad", "max_points=8"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student alone", "student with FAD"]
    for row in rows:
        assert row["corrupted"].keys() == data.CORRUPTIONS.keys()


def test_a_given_teacher_of_another_architecture(clouds, teacher, tmp_path, capsys):
    command = ["--data", str(clouds), "--output", str(tmp_path), *TINY, "--student-arch", "dgcnn"]
    command += ["--teacher", str(teacher), "--epochs", "1", "--no-baseline", "--validate"]
    command += ["--discriminator", "cloud", "--fad", "objective='relativistic'", "--compress", "60"]
    assert experiment.main(command) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student with FAD on two layers"]
    assert not list(tmp_path.glob("teacher-*.pt"))
    assert "(validation)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "absent"], "absent: no such file or folder"),
        (["--points", "99"], "clouds have 24 points; --points 99 asks for more"),
        (["--teacher", "absent.pt"], "absent.pt: no such checkpoint"),
        (["--teacher", "{clouds}"], "not a readable checkpoint"),
        (["--teacher", "{other}"], "not a checkpoint of this example"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["--output", "{clouds}/inside"], "--output "),
        (["--fad", "max_points=1", "--teacher", "absent.pt"], "--loss fad: max_points: expected"),
        (
            ["--loss", "kd", "mse", "--weights", "fad=1"],
            "--weights fad: not a part of --loss kd mse",
        ),
        (["--compress", "1e6", "--teacher", "{teacher}"], "has as few as 3 parameters"),
        (["--ragged"], "--ragged: the clouds of {clouds} are of equal size; save an .npz with"),
        (["--ragged", "--teacher-arch", "dgcnn"], "--ragged: the teacher's dgcnn needs clouds of"),
        (["--ragged", "--loss", "fad+fitnet"], "--ragged: fitnet needs clouds of equal size"),
        (["--ragged", "--views", "2"], "--ragged: --views keeps clouds of equal size"),
    ],
)
def test_one_clear_line(clouds, teacher, tmp_path, capsys, options, message):
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(2)}, other)
    places = {"clouds": clouds, "other": other, "teacher": teacher}
    given = [option.format(**places) for option in options]
    command = ["--data", str(clouds), "--output", str(tmp_path), *TINY, "--no-baseline", *given]
    assert experiment.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill: error: ")
    assert message.format(**places) in error
    assert error.count("\n") == 1


def test_a_teacher_of_other_classes(teacher, tmp_path, capsys):
    path = tmp_path / "two.npz"
    np.savez(
        path, points=np.random.default_rng(0).normal(size=(20, 16, 3)), labels=np.arange(20) % 2
    )
    command = ["--data", str(path), "--output", str(tmp_path), "--teacher", str(teacher), *TINY]
    assert experiment.main(command) == 2
    assert "the teacher knows 3 classes, the data has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--loss", "magic"],
        ["--loss", "kd+kd"],
        ["--points", "0"],
        ["--epochs", "two"],
        ["--weights", "magic=1"],
        ["--weights", "kd"],
        ["--weights", "kd=-1"],
        ["--weights", "kd=much"],
        ["--fad", "student_channels=3"],
        ["--fad", "lecam=("],
        ["--compress", "0"],
        ["--temperature", "nan"],
        ["--learning-rate", "fast"],
        ["--weight-decay", "-1"],
        ["--label-smoothing", "1"],
    ],
)
def test_wrong_options(options, capsys):
    with pytest.raises(SystemExit) as caught:
        experiment.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_interruption_by_the_user(clouds, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "fit", interrupt)
    assert experiment.main(["--data", str(clouds), "--output", str(tmp_path), *TINY]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_progress_on_a_terminal(capsys):
    screen = report.Screen(Console(force_terminal=True, width=120))
    record = {
        "epoch": 2.0,
        "loss": 1.0,
        "train_accuracy": 0.5,
        "test_accuracy": 0.4,
        "seconds": 1.0,
    }
    screen.begin("student", 3, 2, [record])
    for _ in range(2):
        screen.step()
    screen.epoch(record)
    screen.end()
    shown = capsys.readouterr().out
    assert "continued after epoch 1" in shown
    assert "test 40.0 %" in shown
