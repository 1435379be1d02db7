"""Bad input: each a clear error that names the argument, says what came, and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fad_loss import FeatureAdversarialLoss, PointDiscriminator, ragged

S, T = torch.randn(2, 5, 4), torch.randn(2, 7, 6)
LABELS = torch.tensor([0, 1])


def make(*channels, **options):
    return FeatureAdversarialLoss(*(channels or (4, 6)), **options)


class Returns(nn.Module):
    """A discriminator that returns something of its choice."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features):
        return self.function(features)


def ragged_points(channels, lengths):
    return ragged(torch.randn(sum(lengths), channels), lengths=lengths)


def broken(tensor, value):
    tensor = tensor.clone()
    tensor[0, 0, 0] = value
    return tensor


# name: (what is called, the error, what its message matches)
CONSTRUCTION = {
    "no channels": (lambda: make(0, 6), ValueError, "student_channels: expected at least 1, got 0"),
    "channels as a float": (
        lambda: make(4, 6.0),
        TypeError,
        "teacher_channels: expected an int, got float 6.0",
    ),
    "channels as a bool": (lambda: make(True, 6), TypeError, "student_channels: .* bool True"),
    "discriminator": (
        lambda: make(discriminator="techer"),
        ValueError,
        "discriminator: expected one of 'teacher', .* got 'techer'; did you mean 'teacher'",
    ),
    "discriminator of no kind": (
        lambda: make(discriminator=3),
        TypeError,
        "discriminator: expected .* or a torch.nn.Module, got int 3",
    ),
    "discriminator as a class": (
        lambda: make(discriminator=PointDiscriminator),
        TypeError,
        r"discriminator: .* pass an instance, PointDiscriminator\(",
    ),
    "head by name": (
        lambda: make(discriminator="head"),
        ValueError,
        r'discriminator: "head" needs .*HeadDiscriminator\(teacher.classifier\)',
    ),
    "objective": (
        lambda: make(objective="hinges"),
        ValueError,
        "objective: expected one of 'hinge', .* got 'hinges'; did you mean 'hinge'",
    ),
    "objective of no kind": (lambda: make(objective=None), TypeError, "objective: .* got None"),
    "negative weight": (
        lambda: make(weight=-1.0),
        ValueError,
        "weight: expected a finite number of at least 0, got -1.0",
    ),
    "weight that is no number": (lambda: make(weight="1"), TypeError, "weight: .* got str '1'"),
    "NaN weight": (lambda: make(weight=float("nan")), ValueError, "weight: .* got nan"),
    "infinite penalty": (
        lambda: make(discriminator="point", gradient_penalty=float("inf")),
        ValueError,
        "gradient_penalty: expected a finite number",
    ),
    "penalty that is never computed": (
        lambda: make(discriminator="point", penalty_every=0),
        ValueError,
        "penalty_every: expected at least 1, got 0",
    ),
    "penalty of what does not learn": (
        lambda: make(gradient_penalty=1.0),
        ValueError,
        "gradient_penalty: TeacherDiscriminator has no trainable parameters .*gradient_penalty=0",
    ),
    "lecam of what does not learn": (
        lambda: make(lecam=1.0),
        ValueError,
        "lecam: Teacher.*lecam=0",
    ),
    "warm-up": (lambda: make(warmup_steps=-1), ValueError, "warmup_steps: .* at least 0, got -1"),
    "warm-up as a share": (lambda: make(warmup_steps=0.1), TypeError, "warmup_steps: .* float 0.1"),
    "no steps": (lambda: make(total_steps=0), ValueError, "total_steps: .* at least 1, got 0"),
    "steps as a share": (lambda: make(total_steps=2.5), TypeError, "total_steps: .* float 2.5"),
    "layout": (
        lambda: make(layout="ncb"),
        ValueError,
        "layout: expected one of 'bnc', 'bcn', got 'ncb'",
    ),
    "normalize": (
        lambda: make(normalize="teacher"),
        TypeError,
        "normalize: expected True or False, got str 'teacher'",
    ),
    "adapter": (
        lambda: make(adapter="mlp"),
        ValueError,
        "adapter: expected one of 'linear', 'identity', got 'mlp'",
    ),
    "adapter of no kind": (
        lambda: make(adapter=None),
        TypeError,
        "adapter: expected .* or a torch.nn.Module, got NoneType None",
    ),
    "identity between different channels": (
        lambda: make(adapter="identity"),
        ValueError,
        'adapter: "identity" needs as many .* got 4 and 6; use "linear"',
    ),
}
CALLS = {
    "not a tensor": (
        lambda: make()([[1.0]], T),
        TypeError,
        "student: expected a torch.Tensor, got list",
    ),
    "no teacher": (
        lambda: make()(S, None),
        TypeError,
        "teacher: expected a torch.Tensor, got NoneType",
    ),
    "integers": (
        lambda: make()(S, T.long()),
        TypeError,
        r"teacher: expected float32, .* got int64 of shape \(2, 7, 6\) on cpu.*teacher.float\(\)",
    ),
    "complex": (lambda: make()(S.to(torch.complex64), T), TypeError, "student: expected float32"),
    "rank 1": (
        lambda: make()(S[0, 0], T),
        ValueError,
        r"student: expected \(B, N, C\) .* got float32 of shape \(4\)",
    ),
    "an image": (
        lambda: make(layout="bcn")(torch.randn(2, 4, 5, 5), T),
        ValueError,
        r"student: expected \(B, C, N\).* \(2, 4, 5, 5\).*features.flatten\(2\)",
    ),
    "no clouds": (lambda: make()(S[:0], T[:0]), ValueError, r"student: .* \(0, 5, 4\)"),
    "no points": (lambda: make()(S, T[:, :0]), ValueError, r"teacher: .*\(2, 0, 6\)"),
    "one point for a density": (
        lambda: make()(S[:, :1], T),
        ValueError,
        r"student: TeacherDiscriminator .* at least 2, got .*\(2, 1, 4\)",
    ),
    "channels of another layer": (
        lambda: make()(torch.randn(2, 5, 9), T),
        ValueError,
        r"student: expected 4 channels .*\(2, 5, 9\).*student_channels=9, or .*another layer",
    ),
    "channels of the teacher": (
        lambda: make()(S, T[..., :3]),
        ValueError,
        r"teacher: expected 6 channels \(teacher_channels\).*\(2, 7, 3\).*teacher_channels=3",
    ),
    "channels in the other place": (
        lambda: make()(S.transpose(1, 2), T),
        ValueError,
        r"student: expected 4 channels .*layout 'bnc'.*\(2, 4, 5\).*layout='bcn'",
    ),
    "points last, given first": (
        lambda: make(layout="bcn")(S, T),
        ValueError,
        r"student: .*layout 'bcn'.*layout='bnc'",
    ),
    "another batch": (
        lambda: make()(S[:1], T),
        ValueError,
        r"same number of clouds B.*\(1, 5, 4\).*\(2, 7, 6\).*same batch",
    ),
    "another batch of global features": (
        lambda: make()(S[0], T[0]),
        ValueError,
        r"global features \(B, C\) of the same clouds.*\(5, 4\).*\(7, 6\)",
    ),
    "global student, teacher of points": (
        lambda: make()(S[0], T[:1]),
        ValueError,
        "both to be features of points or both global",
    ),
    "one ragged, one not": (
        lambda: make()(ragged_points(4, [3, 4]), T),
        ValueError,
        "both ragged or both not.*fad_loss.ragged",
    ),
    "another ragged batch": (
        lambda: make()(ragged_points(4, [3, 4]), ragged_points(6, [3, 4, 2])),
        ValueError,
        "same number of clouds B",
    ),
    "NaN": (
        lambda: make()(broken(S, torch.nan), T),
        ValueError,
        r"student: 1 of 40 values are NaN or infinite .*\(2, 5, 4\).*what produced them",
    ),
    "infinity": (lambda: make()(S, broken(T, torch.inf)), ValueError, "teacher: 1 of 84 values"),
    "overflow in half precision": (
        lambda: make()(S.half() * 65504 * 2, T),
        ValueError,
        "student: .* NaN or infinite .*overflow in half precision",
    ),
    "labels that are missing": (
        lambda: make(discriminator=PointDiscriminator(6, num_classes=3))(S, T),
        ValueError,
        "labels: .* num_classes=3 .* got None",
    ),
    "labels as a list": (
        lambda: make(discriminator=PointDiscriminator(6, num_classes=3))(S, T, [0, 1]),
        TypeError,
        "labels: expected a torch.Tensor of classes, got list",
    ),
    "labels as floats": (
        lambda: make(discriminator=PointDiscriminator(6, num_classes=3))(S, T, LABELS.float()),
        TypeError,
        "labels: expected an integer tensor",
    ),
    "labels of another batch": (
        lambda: make(discriminator=PointDiscriminator(6, num_classes=3))(S, T, LABELS[:1]),
        ValueError,
        r"labels: expected one class per cloud, \(2,\).* got int64 of shape \(1\)",
    ),
    "labels out of range": (
        lambda: make(discriminator=PointDiscriminator(6, num_classes=3))(S, T, LABELS + 2),
        ValueError,
        "labels: expected classes below 3.* got 3",
    ),
    "scores with a trailing axis": (
        lambda: make(discriminator=Returns(lambda z: z[..., :1]))(S, T),
        ValueError,
        r"discriminator: expected Returns to return one score per point.*\(2, 5, 1\).*squeeze",
    ),
    "a single score": (
        lambda: make(discriminator=Returns(lambda z: z.mean()))(S, T),
        ValueError,
        r"discriminator: .* got float32 of shape \(\)",
    ),
    "scores that are not finite": (
        lambda: make(discriminator=Returns(lambda z: z.sum(-1).log() * torch.inf))(S, T),
        ValueError,
        "discriminator: scores: .* of 10 values are NaN or infinite",
    ),
    "scores in a tuple": (
        lambda: make(discriminator=Returns(lambda z: (z, z)))(S, T),
        ValueError,
        "discriminator: .* got tuple",
    ),
    "dense scores of ragged clouds": (
        lambda: make(discriminator=Returns(lambda z: z.values().sum(-1)))(
            ragged_points(4, [3, 4]), ragged_points(6, [5, 2])
        ),
        ValueError,
        "discriminator: expected Returns",
    ),
    "adapter's output": (
        lambda: make(adapter=nn.Linear(4, 5))(S, T),
        ValueError,
        r"adapter: expected .* teacher's 6 channels, got float32 of shape \(2, 5, 5\)",
    ),
    "a loss elsewhere": (
        lambda: make().to("meta")(S, T),
        ValueError,
        r"student: expected the device of the loss, meta.*fad.to\('cpu'\)",
    ),
    "a teacher elsewhere": (
        lambda: make()(S, T.to("meta")),
        ValueError,
        r"student and teacher: expected one device, .* on cpu .* on meta; .*\.to\(device\)",
    ),
    "labels elsewhere": (
        lambda: make(discriminator="point")(S, T, LABELS.to("meta")),
        ValueError,
        "labels: expected the device of the features, cpu",
    ),
}


@pytest.mark.parametrize("case", [*CONSTRUCTION, *CALLS])
def test_errors(case):
    call, error, message = (CONSTRUCTION | CALLS)[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("term", ["student_loss", "discriminator_loss"])
def test_the_terms_alone_check_the_same(term):
    with pytest.raises(ValueError, match="same number of clouds"):
        getattr(make(), term)(S[:1], T)


def test_an_error_changes_no_state():
    fad = make(discriminator="point", warmup_steps=3)
    before = {k: v.clone() for k, v in fad.state_dict().items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match="NaN"):
        fad(broken(S, torch.nan), T)
    after = fad.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_loading_the_state_of_another_loss_says_so():
    with pytest.raises(RuntimeError, match="teacher_units"):
        make().load_state_dict(make(4, 8).state_dict())
