"""
Scores on a cloud
=================

What does the discriminator say, point by point? A teacher learns four kinds of shapes. A student
of a fortieth of its parameters is then distilled, and the default discriminator scores the
features of one cloud before and after. A point that scores 0 is as likely under the teacher's
features as under the student's; the lower a score, the easier the point is told from the
teacher's.
"""

import sys

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from fad_loss import FeatureAdversarialLoss

# %%
# Four kinds of shapes, turned about the vertical axis: spheres, cubes, tubes and tori.


def clouds(count, points=512):
    kinds = torch.randint(4, (count,))
    x = torch.randn(count, points, 3)
    angle, other = (torch.rand(2, count, points, 1) * 2 * torch.pi).unbind()
    ring = torch.cat([angle.cos(), angle.sin()], -1)
    tube = torch.cat([0.6 * ring, 2 * torch.rand(count, points, 1) - 1], -1)
    torus = torch.cat([(0.7 + 0.3 * other.cos()) * ring, 0.3 * other.sin()], -1)
    shapes = [x / x.norm(dim=-1, keepdim=True), x / x.abs().amax(-1, keepdim=True), tube, torus]
    chosen = torch.stack(shapes, 1)[torch.arange(count), kinds]
    turn = torch.rand(count) * 2 * torch.pi
    zero, one = torch.zeros(count), torch.ones(count)
    rows = [turn.cos(), -turn.sin(), zero, turn.sin(), turn.cos(), zero, zero, zero, one]
    return chosen @ torch.stack(rows, -1).view(-1, 3, 3), kinds


# %%
# A PointNet without its transforms; its features of points are what is compared.


class PointNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, points):
        features = self.encoder(points)
        return self.head(features.amax(1)), features


torch.manual_seed(0)
teacher, student = PointNet(256), PointNet(38)
sizes = [sum(p.numel() for p in net.parameters()) for net in (teacher, student)]
print(f"{sizes[0]:,} parameters teach {sizes[1]:,}")

optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
for _ in range(60):
    points, kinds = clouds(16)
    optimizer.zero_grad()
    F.cross_entropy(teacher(points)[0], kinds).backward()
    optimizer.step()
teacher.eval()

# %%
# All points are compared here, so that every one of them has a score. A forward hook of the
# discriminator reads the scores of both sides on their way.

fad = FeatureAdversarialLoss(38, 256, max_points=None)
seen = []
fad.discriminator.register_forward_hook(lambda *call: seen.append(call[-1]))
shown, _ = clouds(32)
shown = shown[torch.randperm(32)]


def scores_now():
    with torch.no_grad():
        known = teacher(shown)[1]
    fad(student(shown)[1], known)
    return seen[-1].student.detach(), seen[-1].teacher.detach()


optimizer = torch.optim.AdamW([*student.parameters(), *fad.parameters()], lr=2e-3)
history = []
for step in range(151):
    points, kinds = clouds(16, 256)
    with torch.no_grad():
        known = teacher(points)[1]
    logits, features = student(points)
    loss = F.cross_entropy(logits, kinds) + fad(features, known)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(float(fad.statistics()["fake_score"]))
    if step in {0, 150}:
        of_student, of_teacher = scores_now()
        if step == 0:
            before = of_student
        after = of_student

# %%
# The same cloud, and on one scale of colours: the teacher's points, the student's at first, and
# the student's after 150 steps.

plt.rcParams.update({"savefig.transparent": True, "font.size": 11})
for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
    plt.rcParams[name] = "#808080"

one = 0
panels = {
    "teacher": of_teacher,
    "student, untrained": before,
    "student, after 150 steps": after,
}
figure = plt.figure(figsize=(10, 3.4), layout="constrained")
low = float(before[one].quantile(0.02))
for place, (title, scores) in enumerate(panels.items(), 1):
    axes = figure.add_subplot(1, 3, place, projection="3d")
    drawn = axes.scatter(
        *shown[one].T,
        c=scores[one],
        cmap="RdBu",
        vmin=low,
        vmax=-low,
        s=14,
        edgecolors="#808080",
        linewidths=0.4,
        depthshade=False,
    )
    axes.set_title(f"{title}\nmean score {float(scores[one].mean()):+.2f}", fontsize=11)
    axes.set_axis_off()
    axes.set_box_aspect((1, 1, 1), zoom=1.5)
figure.colorbar(drawn, ax=figure.axes, label="score", shrink=0.8)
if len(sys.argv) > 1:
    figure.savefig(sys.argv[1], dpi=110)
plt.show()

# %%
# The mean score of the student's features, on its way to 0.

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(history, color="#2166ac")
axes.axhline(0, color="#808080", linewidth=0.8)
axes.set(xlabel="step", ylabel="fake_score")
axes.patch.set_alpha(0)
plt.show()
