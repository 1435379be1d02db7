"""`balance`: the student's term pulls as strongly as its weight says, relative to the task."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fad_loss import Distiller, FeatureAdversarialLoss, ragged
from fad_loss.gradients import GradientBalance


def problem(seed=0, **options):
    torch.manual_seed(seed)
    encoder = nn.Linear(3, 4)
    fad = FeatureAdversarialLoss(4, 6, balance=True, **{"weight": 1, "warmup_steps": 0, **options})
    points, teacher = torch.randn(5, 12, 3), torch.randn(5, 12, 6)
    return encoder, fad, points, teacher


def task(features):
    return 0.1 * features.square().sum(-1).amax(-1).mean()


def norms(encoder, fad, points, teacher):
    """Of the gradients that the two losses send to the features."""
    features = encoder(points)
    of_task = torch.autograd.grad(task(features), features, retain_graph=True)[0]
    of_fad = torch.autograd.grad(fad.student_loss(features, teacher), features)[0]
    return of_task.norm(), of_fad.norm()


@pytest.mark.parametrize("weight", [1.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.25])
def test_the_weight_is_a_share_whatever_the_whole_loss_is_scaled_by(weight, scale):
    encoder, fad, points, teacher = problem(weight=weight)
    features = encoder(points)
    (scale * (task(features) + fad(features, teacher))).backward()
    of_task, of_fad = norms(encoder, fad, points, teacher)
    torch.testing.assert_close(of_fad, weight * of_task, rtol=1e-4, atol=0)
    assert fad.statistics()["weight"] == pytest.approx(weight * float(fad.balance.factor()))


def test_the_factor_is_a_constant_to_the_gradients():
    encoder, fad, points, teacher = problem()
    for _ in range(3):
        features = encoder(points)
        (task(features) + fad(features, teacher)).backward()
    plain = FeatureAdversarialLoss(4, 6, weight=float(fad.balance.factor()), warmup_steps=0)
    plain.load_state_dict(
        {name: value for name, value in fad.state_dict().items() if "balance" not in name}
    )
    got, wanted = (
        torch.autograd.grad(loss.student_loss(encoder(points), teacher), [*encoder.parameters()])
        for loss in (fad, plain)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_running_averages_follow():
    balance = GradientBalance()
    features = torch.ones(2, 3, requires_grad=True)
    for step in range(200):
        own = balance.tap(features, torch.tensor(0.5))
        strength = 10.0 if step < 50 else 3.0
        (strength * features.sum() + 0.5 * own.sum()).backward()
    assert float(balance.factor()) == pytest.approx(3, rel=0.01)
    assert int(balance.measured) == 200
    assert not features._backward_hooks


def test_what_cannot_be_compared_is_not_counted():
    balance = GradientBalance()
    for of_task, of_own in ((0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))):
        features = torch.ones(2, 3, requires_grad=True)
        own = balance.tap(features, torch.tensor(1.0))
        (of_task * features.sum() + of_own * own.sum()).backward()
    # Nor a backward pass that the term has no part in, nor features without a gradient.
    features = torch.ones(2, 3, requires_grad=True)
    balance.tap(features, torch.tensor(1.0))
    features.sum().backward()
    assert not balance.tap(torch.ones(2), torch.tensor(1.0)).requires_grad
    assert int(balance.measured) == 0
    assert float(balance.factor()) == 1


@pytest.mark.parametrize("strength, factor", [(1e9, 1e3), (1e-5, 1e-3)])
def test_the_factor_is_bounded(strength, factor):
    balance = GradientBalance()
    features = torch.ones(2, 3, requires_grad=True)
    own = balance.tap(features, torch.tensor(1.0))
    (strength * features.sum() + own.sum()).backward()
    assert float(balance.factor()) == pytest.approx(factor)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, converted):
    balance = GradientBalance().to(dtype if converted and dtype == torch.float64 else torch.float32)
    features = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    own = balance.tap(features, torch.tensor(1.0))
    (6 * features.sum() + 0.5 * own.sum()).backward()
    assert float(balance.factor()) == pytest.approx(12)


def test_ragged_clouds():
    balance = GradientBalance()
    values = torch.randn(9, 4, requires_grad=True)
    clouds = ragged(values, lengths=[2, 7])
    own = balance.tap(clouds, torch.tensor(1.0))
    (6 * clouds.values().sum() + own.values().sum()).backward()
    assert float(balance.factor()) == pytest.approx(6)

    fad = FeatureAdversarialLoss(4, 6, balance=True)
    clouds = ragged(torch.randn(9, 4, requires_grad=True), lengths=[2, 7])
    teacher = ragged(torch.randn(8, 6), lengths=[5, 3])
    (clouds.values().square().sum() + fad(clouds, teacher)).backward()
    assert float(fad.balance.factor()) != 1
    assert int(fad.balance.measured) == 1


def test_warm_up_ends_at_the_share():
    encoder, fad, points, teacher = problem(warmup_steps=4, weight=0.5)
    for _ in range(4):
        features = encoder(points)
        (task(features) + fad(features, teacher)).backward()
    of_task, of_fad = norms(encoder, fad, points, teacher)
    torch.testing.assert_close(of_fad, 0.5 * of_task, rtol=0.2, atol=0)


def test_nothing_is_measured_in_evaluation():
    encoder, fad, points, teacher = problem()
    fad.eval()
    features = encoder(points)
    (task(features) + fad(features, teacher)).backward()
    with torch.no_grad():
        fad.train()(encoder(points), teacher)
    assert int(fad.balance.measured) == 0


def test_the_state_goes_on():
    encoder, fad, points, teacher = problem()
    features = encoder(points)
    (task(features) + fad(features, teacher)).backward()
    again = FeatureAdversarialLoss(4, 6, balance=True)
    again.load_state_dict(copy.deepcopy(fad.state_dict()))
    assert torch.equal(again.balance.factor(), fad.balance.factor())
    assert not any("balance" in name for name in FeatureAdversarialLoss(4, 6).state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_with_graph_breaks_but_not_without():
    encoder, fad, points, teacher = problem()

    def step(points, teacher):
        features = encoder(points)
        return task(features) + fad(features, teacher)

    torch.compile(step, backend="aot_eager")(points, teacher).backward()
    assert float(fad.balance.factor()) != 1
    assert int(fad.balance.measured) == 1
    torch.compiler.reset()
    # PyTorch 2.6 does not say what was raised.
    said = "Observed exception" if torch.__version__ < "2.7" else "leave the loss outside"
    with pytest.raises(Exception, match=said):
        torch.compile(step, backend="aot_eager", fullgraph=True)(points, teacher)


def test_asking_for_the_discriminators_loss_before_the_backward_pass_forgets_nothing():
    encoder, fad, points, teacher = problem(discriminator="point")
    for _ in range(3):
        features = encoder(points)
        losses = fad.student_loss(features, teacher), fad.discriminator_loss(features, teacher)
        (task(features) + sum(losses)).backward()
    of_task, of_fad = norms(encoder, fad, points, teacher)
    assert int(fad.balance.measured) == 3
    torch.testing.assert_close(of_fad, of_task, rtol=0.5, atol=0)


def test_auto_is_the_fixed_weight_until_something_was_measured():
    torch.manual_seed(0)
    encoder, points, teacher = nn.Linear(3, 4), torch.randn(5, 12, 3), torch.randn(5, 12, 6)
    options = {"discriminator": "paired", "warmup_steps": 0, "max_points": None}
    auto = FeatureAdversarialLoss(4, 6, balance="auto", **options)
    share, fixed = (copy.deepcopy(auto) for _ in range(2))
    share.balance.otherwise = fixed.balance = None
    fixed.weight = 30.0
    assert auto.weight == 0.3

    def step(fad, with_task):
        features = encoder(points)
        loss = fad(features, teacher) + (task(features) if with_task else 0)
        return torch.autograd.grad(loss, [*encoder.parameters()])

    # Without another loss there is nothing to measure, and nothing to warn of.
    for _ in range(12):
        torch.testing.assert_close(step(auto, with_task=False), step(fixed, with_task=False))
    for with_task in (True, False):
        step(auto, with_task)
        step(share, with_task)
    assert auto.balance.measured == share.balance.measured == 1
    assert float(auto.balance.factor()) == pytest.approx(float(share.balance.factor()), rel=0.1)
    # Nothing is divided by a weight of 0.
    still = FeatureAdversarialLoss(4, 6, balance="auto", weight=0.0, **options)
    for _ in range(12):
        assert all(not gradient.any() for gradient in step(still, with_task=False))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_auto_compiles_in_one_graph_with_the_fixed_weight():
    torch.manual_seed(0)
    encoder, points, teacher = nn.Linear(3, 4), torch.randn(5, 12, 3), torch.randn(5, 12, 6)
    options = {"discriminator": "paired", "warmup_steps": 4, "max_points": None}
    auto = FeatureAdversarialLoss(4, 6, balance="auto", total_steps=10, **options)
    fixed = copy.deepcopy(auto)
    fixed.balance, fixed.weight = None, 30.0

    def step(fad):
        features = encoder(points)
        return fad(features, teacher) + task(features)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        got, wanted = (
            torch.autograd.grad(loss, [*encoder.parameters()])
            for loss in (compiled(auto), step(fixed))
        )
        torch.testing.assert_close(got, wanted)
    assert auto.balance.measured == 0
    torch.testing.assert_close(auto.statistics()["weight"], fixed.statistics()["weight"])
    torch.compiler.reset()


def test_balance_is_a_switch():
    with pytest.raises(
        TypeError, match=r'balance: expected True or False or "auto", got float 0\.5'
    ):
        FeatureAdversarialLoss(4, 6, balance=0.5)


# How loops run their backward passes. Each returns nothing and leaves gradients.


def in_one(task_loss, own, features):
    (task_loss + own).backward()


def own_after_task(task_loss, own, features):
    task_loss.backward(retain_graph=True)
    own.backward()


def task_after_own(task_loss, own, features):
    own.backward(retain_graph=True)
    task_loss.backward()


def after_probes(task_loss, own, features):
    # What a loop does that looks at its gradients, PCGrad and GradNorm among them.
    torch.autograd.grad(task_loss, features, retain_graph=True)
    torch.autograd.grad(own, features, retain_graph=True)
    (task_loss + own).backward()


def after_a_probe_of_the_own(task_loss, own, features):
    torch.autograd.grad(own, features, retain_graph=True)
    (task_loss + own).backward()


def scaled(task_loss, own, features):
    (65536 * (task_loss + own)).backward()


def accumulated(task_loss, own, features):
    ((task_loss + own) / 4).backward()


@pytest.mark.parametrize(
    "backward",
    [
        in_one,
        own_after_task,
        task_after_own,
        after_probes,
        after_a_probe_of_the_own,
        scaled,
        accumulated,
    ],
)
def test_whatever_backward_passes_a_loop_has(backward):
    encoder, fad, points, teacher = problem()
    for _ in range(2):
        features = encoder(points)
        backward(task(features), fad(features, teacher), features)
    assert int(fad.balance._count() or fad.balance.measured) == 2
    of_task, of_fad = norms(encoder, fad, points, teacher)
    torch.testing.assert_close(of_fad, of_task, rtol=1e-3, atol=0)


def test_evaluation_between_two_steps_measures_nothing():
    encoder, fad, points, teacher = problem()
    features = encoder(points)
    (task(features) + fad(features, teacher)).backward()
    factor = fad.balance.factor().clone()
    fad.eval()
    features = encoder(points)
    (5 * task(features) + fad(features, teacher)).backward()
    fad.train()
    assert torch.equal(fad.balance.factor(), factor)
    assert int(fad.balance.measured) == 1


def test_a_step_that_overflowed_is_forgotten():
    encoder, fad, points, teacher = problem()
    for scale in (1.0, float("inf"), 1.0):
        features = encoder(points)
        (scale * (task(features) + fad(features, teacher))).backward()
    fad.balance.factor()
    assert int(fad.balance.measured) == 2
    assert fad.balance.task.isfinite()
    assert fad.balance.own.isfinite()


@pytest.mark.parametrize(
    "to_base, view",
    [
        (lambda t: t.transpose(1, 2).contiguous(), lambda base: base.transpose(1, 2)),
        (lambda t: t.flatten(0, 1), lambda base: base.view(5, 12, 4)),
        (lambda t: torch.cat([t.new_zeros(5, 3, 4), t], 1), lambda base: base[:, 3:]),
        (lambda t: torch.cat([t, t], 2).mT.contiguous(), lambda base: base[:, :4].mT),
    ],
)
def test_a_view_of_the_features_that_the_task_sees(to_base, view):
    """A network puts out (B, C, N), the loss gets (B, N, C): the share is the same either way."""
    encoder, fad, points, teacher = problem(weight=0.5)
    other = copy.deepcopy(fad)
    for _ in range(3):
        features = encoder(points)
        (task(features) + fad(features, teacher)).backward()
        base = to_base(encoder(points)) * 1
        elsewhere = base.sum() - view(base).sum()
        (task(view(base)) + elsewhere + other(view(base), teacher)).backward()
    fad.balance.factor(), other.balance.factor()  # counts the last pass
    assert int(other.balance.measured) == 3
    for name in ("task", "own"):
        torch.testing.assert_close(getattr(other.balance, name), getattr(fad.balance, name))


@pytest.mark.parametrize("flat", [False, True])
def test_ragged_features_balance_with_what_arrives_at_the_packed_ones(flat):
    """The criterion of a segmentation network sees packed features, the loss ragged ones."""
    encoder, fad, points, teacher = problem()
    other = copy.deepcopy(fad)
    whole = ragged(teacher.flatten(0, 1), lengths=[12] * 5)
    for _ in range(3):
        features = encoder(points)
        (task(features) + fad(features, teacher)).backward()
        packed = encoder(points.flatten(0, 1)) if flat else encoder(points)
        dense, values = (
            (packed.unflatten(0, (5, 12)), packed) if flat else (packed, packed.flatten(0, 1))
        )
        (task(dense) + other(ragged(values, lengths=[12] * 5), whole)).backward()
    fad.balance.factor(), other.balance.factor()  # counts the last pass
    assert int(other.balance.measured) == 3
    for name in ("task", "own"):
        torch.testing.assert_close(getattr(other.balance, name), getattr(fad.balance, name))


def test_says_once_that_nothing_else_arrives():
    encoder, fad, points, teacher = problem()

    def train(steps):
        for _ in range(steps):
            features = encoder(points)
            (task(features) + fad(features.clone(), teacher)).backward()

    with pytest.warns(UserWarning, match="balance: in 10 steps no gradient of another") as said:
        train(15)
    assert len([w for w in said if "balance" in str(w.message)]) == 1
    assert int(fad.balance.measured) == 0


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_backward_pass_that_is_differentiated_again_is_measured_too():
    balance = GradientBalance()
    passes = balance.attach()
    for _ in range(2):
        layer = torch.ones(2, 3, requires_grad=True) * 1
        own = balance.tap(layer.clone(), torch.tensor(1.0))
        loss = 10 * passes(layer).square().sum() + own.square().sum()
        loss.backward(create_graph=True)
        assert float(balance.factor()) == pytest.approx(10)


def reloaded(distiller):
    state = copy.deepcopy(distiller.state_dict())
    distiller.load_state_dict(state, assign=True)
    return distiller


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d)), reloaded, lambda d: d.float()],
    ids=["copied", "pickled", "reloaded", "converted"],
)
def test_where_copies_are_compared_the_share_is_the_same(again):
    torch.manual_seed(0)
    points = torch.randn(5, 12, 3)
    students = [
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=changed), nn.Linear(4, 2))
        for changed in (True, False)
    ]
    students[1].load_state_dict(students[0].state_dict())
    distillers = []
    for student, clone in zip(students, (True, False), strict=True):
        torch.manual_seed(1)
        teacher = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
        made = Distiller(student, teacher, {"0": "0"}, example=points, clone=clone)
        distillers.append(again(made.double()).float())
    for _ in range(3):
        for distiller in distillers:
            output, loss = distiller(points)
            (loss + output.square().mean()).backward()
    for distiller in distillers:
        assert distiller.losses["0:0"].balance.measured == 2
    torch.testing.assert_close(*(one.statistics() for one in distillers))
    grads = [[p.grad for p in one.parameters()] for one in distillers]
    torch.testing.assert_close(*grads)
