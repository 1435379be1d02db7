# %% [markdown]
# # 3. Choosing layers, discriminator and weight
#
# Which layers to compare, by whom, and how strongly? `statistics()` says what happens; TensorBoard shows it over time.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("fad_loss") is None:  # on Colab, say
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "fad-loss", "tensorboard"], check=True)

# %%
import math
import tempfile

import matplotlib.pyplot as plt
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from fad_loss import Distiller, HeadDiscriminator

torch.set_num_threads(1)


# %% [markdown]
# The clouds and the networks of the first notebook.


# %%
def clouds(count, points=40, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 9
    upper = torch.arange(points) % 2
    kind = torch.where(upper == 1, labels[:, None] // 3, labels[:, None] % 3)
    u, v = torch.rand(2, count, points, generator=random)
    angle, z = 2 * math.pi * u, 2 * v - 1
    radius = torch.stack([(1 - z**2).sqrt(), (1 - z) / 2, torch.full_like(z, 0.8)])
    radius = radius.gather(0, kind[None])[0]
    cloud = torch.stack([radius * angle.cos(), radius * angle.sin(), z], -1)
    cloud = cloud * (0.4 + 0.4 * torch.rand(count, 2, 3, generator=random))[:, upper]
    cloud[..., 2] += 1.2 * upper - 0.6
    return cloud + 0.03 * torch.randn(cloud.shape, generator=random), labels


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


train, test = clouds(576), clouds(900, seed=1)
folder = tempfile.mkdtemp()


def fit(network, name=None, epochs=24):
    writer = SummaryWriter(f"{folder}/{name}") if name else None
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    decay, step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), 0
    for epoch in range(epochs):
        network.train()
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(32):
            output = network(train[0][index])
            logits, extra = output if isinstance(output, tuple) else (output, 0)
            loss = F.cross_entropy(logits, train[1][index]) + extra
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if writer and step % 10 == 0:
                for key, value in network.statistics().items():
                    writer.add_scalar(key, value, step)
        decay.step()
    if writer:
        writer.close()
    return network.eval()


@torch.no_grad()
def accuracy(network):
    return 100 * (network(test[0]).argmax(-1) == test[1]).float().mean().item()


torch.manual_seed(0)
teacher = fit(PointNet(24))


def students(name, layers=None, seeds=2, **options):
    """Train students from several seeds, alone or with a distiller, and say how good they are."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        student = PointNet(8)
        if layers:
            options = {"warmup_steps": 100, "example": train[0][:2], **options}
            fit(Distiller(student, teacher, layers, **options), f"{name} {seed}")
        else:
            fit(student)
        found.append(accuracy(student))
    print(f"{name:12} {sum(found) / seeds:.1f} %   ({' '.join(f'{value:.1f}' for value in found)})")


print(f"teacher      {accuracy(teacher):.1f} %")
students("alone")

# %% [markdown]
# ## Which layers are there?
# A path that is not there is answered with those that are.

# %%
try:
    Distiller(PointNet(8), teacher, {"encodr": "encoder"}, example=train[0][:2])
except ValueError as error:
    print(error)

# %% [markdown]
# ## Candidates
# - `encoder`, the last layer with one feature per point. Point i is point i in both networks; the distiller sees that in the
#   example and takes `"paired"`. Where networks choose their points, it takes `"teacher"`, which compares sets.
# - the same layer, judged by the teacher's own head (`HeadDiscriminator`)
# - two layers
#
# This compares layers and not strengths: a distiller measures how strongly the task pulls, and pulls a third as strongly.

# %%
candidates = {
    "points": {"encoder": "encoder"},
    "head": {"encoder": ("encoder", HeadDiscriminator(teacher.head))},
    "two layers": {"encoder.1": "encoder.1", "encoder": "encoder"},
}
for name, layers in candidates.items():
    students(name, layers)

# %% [markdown]
# Two seeds each: the sixth notebook says how to compare in earnest.
#
# ## The weight
# It multiplies the gradient at the student's features, so what is right depends on how strongly the task pulls there: which
# is why that is measured. A weight that you name is not a share, but the factor itself.

# %%
for weight in (3.0, 30.0):
    students(f"weight {weight:g}", {"encoder": "encoder"}, weight=weight)

# %% [markdown]
# ## In TensorBoard
# `%load_ext tensorboard` and `%tensorboard --logdir ...` show the runs in a notebook. Drawn from the same event files:

# %%
shown = ("encoder/fake_score", "encoder/separability", "encoder/weight")
figure, axes = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
for run in ("points", "weight 3", "weight 30"):
    events = EventAccumulator(f"{folder}/{run} 0")
    events.Reload()
    for axis, key in zip(axes, shown, strict=True):
        scalars = events.Scalars(key)
        axis.plot([s.step for s in scalars], [s.value for s in scalars], label=run)
        axis.set(title=key, xlabel="step")
_ = axes[0].legend()

# %% [markdown]
# What to look for: `fake_score` rises towards 0. If it does not move, the weight is too small or the loss's parameters are
# in no optimizer (`untrained_parameters` says so). If the task's loss rises as it moves, the weight is too large.
