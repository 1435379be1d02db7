# %% [markdown]
# # 1. Distil in five minutes
#
# A teacher, a student a fifteenth of its size, and three lines more in the training loop. At the end, the
# picture of what the discriminator says about the points of one cloud.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("fad_loss") is None:  # on Colab, say
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "fad-loss"], check=True)

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from fad_loss import FeatureAdversarialLoss

_ = torch.manual_seed(0)
torch.set_num_threads(1)


# %% [markdown]
# ## Clouds
# Nine classes: one of three primitives stands on another. Everything is stretched at random and noisy.


# %%
def clouds(count, points=48, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 9
    upper = torch.arange(points) % 2
    kind = torch.where(upper == 1, labels[:, None] // 3, labels[:, None] % 3)
    u, v = torch.rand(2, count, points, generator=random)
    angle, z = 2 * math.pi * u, 2 * v - 1
    radius = torch.stack([(1 - z**2).sqrt(), (1 - z) / 2, torch.full_like(z, 0.8)])
    radius = radius.gather(0, kind[None])[0]
    cloud = torch.stack([radius * angle.cos(), radius * angle.sin(), z], -1)
    size = 0.4 + 0.4 * torch.rand(count, 2, 3, generator=random)
    cloud = cloud * size[:, upper]
    cloud[..., 2] += 1.2 * upper - 0.6
    return cloud + 0.03 * torch.randn(cloud.shape, generator=random), labels


train, test = clouds(720), clouds(900, seed=1)
figure, axes = plt.subplots(1, 9, figsize=(14, 2), subplot_kw={"projection": "3d"})
for axis, cloud in zip(axes, clouds(9, 400, seed=2)[0], strict=True):
    axis.scatter(*cloud.T, s=1)
    axis.set_axis_off()


# %% [markdown]
# ## Networks and the loop you have
# A small PointNet. `encoder` puts out one feature per point: that is what will be compared.


# %%
class Layer(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, points):
        features = self.linear(points)
        return self.norm(features.flatten(0, -2)).relu().view(features.shape)


class PointNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Sequential(
            Layer(3, width), Layer(width, 2 * width), Layer(2 * width, 4 * width)
        )
        self.head = nn.Sequential(Layer(4 * width, 2 * width), nn.Linear(2 * width, 9))

    def forward(self, points):
        return self.head(self.encoder(points).amax(1))


def fit(network, epochs=15, fad=None, teacher=None):
    parameters = [*network.parameters(), *(fad.parameters() if fad else ())]  # the loss's too
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        network.train()
        for index in torch.randperm(len(train[0])).split(32):
            points, labels = train[0][index], train[1][index]
            features = network.encoder(points)
            loss = F.cross_entropy(network.head(features.amax(1)), labels)
            if fad:
                with torch.no_grad():
                    its = teacher.encoder(points)
                loss = loss + fad(features, its)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return network.eval()


@torch.no_grad()
def accuracy(network):
    return 100 * (network(test[0]).argmax(-1) == test[1]).float().mean().item()


def size(network):
    return sum(p.numel() for p in network.parameters())


# %%
teacher = fit(PointNet(24))
print(f"teacher: {size(teacher):6,} parameters, {accuracy(teacher):.1f} %")

# %% [markdown]
# ## With and without
# Three students, each trained twice from the same weights: alone, and with the loss. No layer of these networks samples, so
# point i of the student is point i of the teacher, and `"paired"` uses that. The run is short, so the
# weight is reached sooner than by default.

# %%
alone, distilled = [], []
for seed in range(3):
    torch.manual_seed(seed)
    start = PointNet(5)
    alone.append(accuracy(fit(copy.deepcopy(start))))
    fad = FeatureAdversarialLoss(20, 96, discriminator="paired", warmup_steps=100)
    student = fit(copy.deepcopy(start), fad=fad, teacher=teacher)
    distilled.append(accuracy(student))
    print(f"seed {seed}: alone {alone[-1]:.1f} %, with the loss {distilled[-1]:.1f} %")
print(f"student: {size(start):,} parameters, {sum(alone) / 3:.1f} % -> {sum(distilled) / 3:.1f} %")

# %% [markdown]
# `fad.statistics()` says how the game stands. Both scores near 0 mean that the student's features are hard to
# tell from the teacher's.

# %%
for name, value in fad.statistics().items():
    print(f"{name:22} {value.item():.3f}")

# %% [markdown]
# ## What the discriminator sees
# The default discriminator scores every point of the student by how much likelier its feature is under the
# teacher's features than under the student's own. Before and after, on one cloud: dark points give the student away.


# %%
def scores(network, loss):
    """Of each of the student's points, as the loss itself sees them."""
    judge = FeatureAdversarialLoss(20, 96, max_points=None).eval()
    judge.adapter.load_state_dict(loss.adapter.state_dict())
    judge.student_units.load_state_dict(loss.student_units.state_dict())
    judge.teacher_units.load_state_dict(loss.teacher_units.state_dict())
    seen = []
    judge.discriminator.register_forward_hook(lambda module, given, found: seen.append(found))
    with torch.no_grad():
        judge(network.encoder(shown), teacher.encoder(shown))
    found = seen[0]
    return (found if isinstance(found, torch.Tensor) else found.student)[0]


shown = clouds(9, 400, seed=2)[0][4:5]
torch.manual_seed(2)
panels = {"untrained": PointNet(5).eval(), "trained with the loss": student}
figure = plt.figure(figsize=(9, 4), layout="constrained")
for place, (title, network) in enumerate(panels.items(), 1):
    axis = figure.add_subplot(1, 2, place, projection="3d")
    drawn = axis.scatter(*shown[0].T, c=scores(network, fad), s=8, cmap="viridis")
    axis.set(title=title)
    axis.set_axis_off()
    figure.colorbar(drawn, ax=axis, shrink=0.6)
