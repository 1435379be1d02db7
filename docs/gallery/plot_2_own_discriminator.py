"""
A discriminator of your own
===========================

Derive from ``Discriminator`` and say how the points of one side score: the higher, the more they
are taken for the teacher's. This one knows a normal distribution for each cloud, fitted to the
teacher's points, instead of a density that has a bump at each of them: a log ratio of two normal
densities with the same spread in all channels. It has nothing to learn.
"""

import matplotlib.pyplot as plt
import torch

from fad_loss import FeatureAdversarialLoss
from fad_loss.discriminators import Discriminator

# %%
# A ``Game`` has the points of both players, in one space. ``Points`` knows means over the points
# that count, whether the clouds are dense, masked or ragged; ``like`` gives the scores the form
# that the features came in.


class Normal(Discriminator):
    default_weight = 3.0

    def score(self, game, side):
        points = game.points(side)
        return points.like(
            self.log_density(points, game.teacher) - self.log_density(points, game.student)
        )

    @staticmethod
    def log_density(points, known):
        """Of `points`, under the normal distribution of `known`, which stands still."""
        features = known.features.detach()
        mean = known.mean(features)
        variance = known.mean((features - known.spread(mean)).square()).mean(-1)
        distance = (points.features - points.spread(mean)).square().mean(-1)
        variance = points.spread(variance)
        return -0.5 * (distance / variance + variance.log())


# %%
# The student's points begin as one blob, the teacher's are a ring. What is optimised here are the
# points themselves, so that one can see where each discriminator takes them. Their normal
# distributions have the same mean and spread, which is all that ``Normal`` can see; the default
# discriminator sees the ring.

torch.manual_seed(0)
angle = torch.rand(1, 200) * 2 * torch.pi
teacher = torch.stack([angle.cos(), angle.sin()], -1) + 0.05 * torch.randn(1, 200, 2)
start = 0.3 * torch.randn(1, 200, 2) + torch.tensor([1.5, 0.0])


def moved(discriminator, steps=400):
    student = start.clone().requires_grad_()
    fad = FeatureAdversarialLoss(
        2, 2, discriminator=discriminator, adapter="identity", normalize=False, max_points=None
    )
    optimizer = torch.optim.Adam([student], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        fad(student, teacher).backward()
        optimizer.step()
    return student.detach()


results = {"at first": start, "Normal": moved(Normal()), "default": moved("teacher")}
for name in ("text.color", "xtick.color", "ytick.color", "axes.edgecolor"):
    plt.rcParams[name] = "#808080"
plt.rcParams["savefig.transparent"] = True
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")
for axis, (title, points) in zip(axes, results.items(), strict=True):
    axis.scatter(*teacher[0].T, s=6, color="#808080", label="teacher")
    axis.scatter(*points[0].T, s=6, color="#d6604d", label="student")
    axis.set(title=title, aspect="equal")
    axis.patch.set_alpha(0)
axes[0].legend(framealpha=0)
plt.show()
