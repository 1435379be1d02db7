"""The discriminator that is the teacher's head."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fad_loss.discriminators.head import HeadDiscriminator

from .cases import CLASSES, C, L, R, build, classifier, clouds, inputs


def test_head_scores_by_hand():
    head = classifier().double().eval()
    z, reference, labels = inputs("head")
    logits = head(z.amax(1)).log_softmax(-1)
    wanted = head(reference.amax(1)).log_softmax(-1)
    expected = -F.kl_div(logits, wanted, reduction="none", log_target=True).sum(-1)
    discriminator = HeadDiscriminator(head)
    assert torch.allclose(discriminator(z, reference), expected, rtol=1e-10)
    assert torch.equal(discriminator(reference, reference), torch.zeros(3, dtype=torch.float64))
    by_label = HeadDiscriminator(head, target="labels")
    cross_entropy = F.cross_entropy(head(z.amax(1)), labels, reduction="none")
    assert torch.allclose(by_label(z, labels=labels), -cross_entropy, rtol=1e-10)
    points = HeadDiscriminator(head, pool=None, target="labels", temperature=2.0)
    rows = (head(z.flatten(0, 1)) / 2).log_softmax(-1).reshape(3, 8, CLASSES)
    chosen = rows.gather(-1, labels[:, None, None].expand(-1, 8, 1)).squeeze(-1)
    assert torch.allclose(points(z, labels=labels), chosen, rtol=1e-10)
    ignored = labels.clone()
    ignored[1] = -1
    assert points(z, labels=ignored)[1].abs().sum() == 0


def test_the_head_is_not_touched():
    head = classifier().train()
    head[0].weight.requires_grad_(False)
    before = (
        [module.training for module in head.modules()],
        [parameter.requires_grad for parameter in head.parameters()],
        copy.deepcopy(head.state_dict()),
    )
    discriminator = HeadDiscriminator(head).train()
    z, reference, _ = inputs("head", dtype=torch.float32)
    z, reference = z.requires_grad_(), reference.requires_grad_()
    scores = discriminator(z, reference)
    # Dropout is off and BatchNorm fixed, whatever train() is called.
    assert torch.equal(scores, discriminator(z, reference))
    scores.sum().backward()
    assert z.grad.abs().sum() > 0
    assert reference.grad is None
    assert all(parameter.grad is None for parameter in head.parameters())
    assert before[0] == [module.training for module in head.modules()]
    assert before[1] == [parameter.requires_grad for parameter in head.parameters()]
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[2][key])


def test_nobody_trains_or_saves_the_copy():
    head = classifier()
    discriminator = HeadDiscriminator(head)
    assert list(discriminator.parameters()) == []
    assert discriminator.state_dict() == {}
    assert not discriminator.head.training
    discriminator.double()
    assert discriminator.head[0].weight.dtype == torch.float64
    z, reference, _ = inputs("head")
    scores = discriminator(z, reference)
    with torch.no_grad():
        head[0].weight.zero_()
    assert torch.equal(scores, discriminator(z, reference))


def test_convolutional_heads_and_tied_weights():
    torch.manual_seed(0)
    linear = nn.Linear(C, C, bias=False)
    tied = nn.Sequential(linear, nn.Tanh(), linear)
    discriminator = HeadDiscriminator(tied, pool=None)
    assert discriminator.head[0].weight is discriminator.head[2].weight
    conv = nn.Sequential(nn.Conv1d(C, C, 1, bias=False), nn.Tanh(), nn.Conv1d(C, C, 1, bias=False))
    for layer in (conv[0], conv[2]):
        layer.weight.data = linear.weight.data[..., None].clone()
    other = HeadDiscriminator(conv, pool=None, layout="bcn")
    z, reference = clouds(2, 8, C).float(), clouds(2, 8, C, seed=1).float()
    assert torch.allclose(discriminator(z, reference), other(z, reference), atol=1e-6)
    compiled = HeadDiscriminator(torch.compile(tied, backend="eager"), pool=None)
    assert torch.equal(compiled(z, reference), discriminator(z, reference))


def test_the_score_is_an_upper_bound_at_the_teacher():
    discriminator = HeadDiscriminator(classifier().double())
    z, reference, _ = inputs("head", B=50)
    assert (discriminator(z, reference) < 0).all()
    assert discriminator(reference, reference).abs().max() == 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"pool": "sum"}, ValueError, "pool: expected one of 'max', 'mean', got 'sum'"),
        ({"target": "label"}, ValueError, "target: .*did you mean 'labels'"),
        ({"layout": "nbc", "pool": None}, ValueError, "layout: expected one of 'bnc', 'bcn'"),
        ({"layout": "bcn"}, ValueError, "layout: 'bcn' is for a head that takes points"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a positive number, got nan"),
    ],
)
def test_bad_head_options(options, error, message):
    with pytest.raises(error, match=message):
        HeadDiscriminator(classifier(), **options)


def test_bad_heads():
    with pytest.raises(TypeError, match=r"head: expected a torch.nn.Module.*got function"):
        HeadDiscriminator(lambda z: z)  # type: ignore[arg-type]
    for head, pool, layout in (
        (nn.Flatten(0), "max", "bnc"),
        (nn.Flatten(0), None, "bcn"),
        (nn.Unflatten(0, (1, -1)), "max", "bnc"),
    ):
        discriminator = HeadDiscriminator(head, pool=pool, layout=layout)
        with pytest.raises(ValueError, match=r"head: expected one row of logits for each of the"):
            discriminator(R, R)


@pytest.mark.parametrize(
    "name, features, reference, labels, message",
    [
        ("head", R[0], R, None, r"features: expected \(B, N, C\).*\(4, 5\)"),
        ("head", R, None, None, "reference: with target='teacher'.*got None; pass reference="),
        ("head", R, R[:1], None, r"reference: .*same clouds as features.*\(1, 4, 5\)"),
        ("head", R, R[0], None, r"reference: expected \(B, N, C\)"),
        ("head of points", R, R[:, :2], None, r"same clouds and points \(pool=None\).*\(2, 2, 5\)"),
        ("head of labels", R, None, None, "labels: with target='labels'.*got None"),
        ("head of labels", R, None, L + 6, "labels: expected classes below 7, .*got 7"),
        ("head of labels", R, None, L[:1], "labels: expected one class per cloud"),
    ],
)
def test_bad_head_input(name, features, reference, labels, message):
    with pytest.raises(ValueError, match=message):
        build(name, torch.float32)(features, reference, labels)


def test_a_class_that_the_head_rules_out_weighs_nothing():
    class Masked(nn.Module):
        """Knows a class that no cloud of this category can have, as part segmentation does."""

        def forward(self, x):
            return torch.cat([x, torch.full_like(x[..., :1], -torch.inf)], -1)

    torch.manual_seed(0)
    z, reference = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    discriminator = HeadDiscriminator(Masked())
    assert torch.equal(discriminator(reference, reference), torch.zeros(2))
    scores = discriminator(z, reference)
    torch.testing.assert_close(scores, HeadDiscriminator(nn.Identity())(z, reference))
    scores.sum().backward()
    assert z.grad.isfinite().all()
