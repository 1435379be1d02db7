"""The baselines of the study beside those of torchdistill, on the same inputs.

CRD is not among them: torchdistill's remembers features of all clouds of the data, the study's
contrasts the clouds of a batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from distill import terms

pytestmark = pytest.mark.hosts

B = 7


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(B, 5, requires_grad=True), torch.randn(B, 9)


def theirs(kind, features, **options):
    """One of torchdistill's losses, which takes what hooks recorded."""
    from torchdistill.losses import mid_level

    paths = {"student_output_path": "layer", "teacher_output_path": "layer"}
    loss = getattr(mid_level, kind)(**paths, **options)
    return loss(*({"layer": {"output": t}} for t in features))


def agree(ours, others, student):
    torch.testing.assert_close(ours, others)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, others)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_knowledge_distillation(temperature):
    from torchdistill.losses import mid_level

    torch.manual_seed(0)
    student, teacher = torch.randn(B, 6, requires_grad=True), torch.randn(B, 6)
    paths = {f"{who}_module_{what}": value for who in ("student", "teacher")
             for what, value in (("path", "head"), ("io", "output"))}  # fmt: skip
    loss = mid_level.KDLoss(**paths, temperature=temperature, alpha=0.0, beta=1.0)
    ours = terms.METHODS["kd"](6, 6, classes=6, temperature=temperature)
    recorded = ({"head": {"output": t}} for t in (student, teacher))
    # Without a task beside it, torchdistill leaves the square of the temperature out.
    agree(ours(student, teacher), temperature**2 * loss(*recorded), student)


def test_similarity_preserving(features, monkeypatch):
    from torchdistill.losses import mid_level

    # Rows are divided by their Euclidean norms, as the paper has it; torchdistill's by their sums.
    monkeypatch.setattr(mid_level, "normalize", lambda rows, _: F.normalize(rows, dim=1))
    ours = terms.METHODS["sp"](5, 9)
    # Divided by the number of clouds, not by its square.
    agree(ours(*features), B * theirs("SPKDLoss", features, reduction="batchmean"), features[0])


def test_relational(features):
    ours = terms.METHODS["rkd"](5, 9)
    options = {"angle_factor": 0.0, "dist_factor": 1.0, "reduction": "mean"}
    # The mean over pairs; torchdistill's counts every cloud's distance to itself.
    distances = theirs("RKDLoss", features, **options) * B / (B - 1)
    angles = theirs("RKDLoss", features, **(options | {"angle_factor": 2.0, "dist_factor": 0.0}))
    agree(ours(*features), distances + angles, features[0])
