# %% [markdown]
# # 6. Will it help me?
#
# On your data, with your student, the answer is a small experiment: no distillation, knowledge distillation
# (Hinton et al., 2015), the loss, and the loss without its adversarial part (squared error between the
# standardised features), over seeds, from the same first weights, with an interval. Replace the next cell by your own
# clouds and networks; the rest stays as it is.

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
import statistics

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from fad_loss import FeatureAdversarialLoss

torch.set_num_threads(1)

# %% [markdown]
# ## Your data and your networks
# `train` and `test` are pairs of points `(count, N, 3)` and labels. A network has `encoder`, features per point, and
# `head`, from pooled features to logits.

# %%
CLASSES, TEACHER, STUDENT = 9, 24, 5


def clouds(count, points=48, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
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
        self.head = nn.Sequential(Layer(4 * width, 2 * width), nn.Linear(2 * width, CLASSES))

    def forward(self, points):
        return self.head(self.encoder(points).amax(1))


train, test = clouds(720), clouds(900, seed=1)

# %% [markdown]
# ## Four methods
# Each is a module that gives what is added to the task's loss.


# %%
class Nothing(nn.Module):
    def forward(self, logits, features, its_logits, its_features):
        return 0.0


class KnowledgeDistillation(nn.Module):
    def __init__(self, temperature=4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, logits, features, its_logits, its_features):
        T = self.temperature
        soft = (its_logits / T).softmax(-1)
        return T**2 * F.kl_div((logits / T).log_softmax(-1), soft, reduction="batchmean")


class SquaredError(nn.Module):
    """The adapter and the standardised features of the loss, and nothing adversarial."""

    def __init__(self):
        super().__init__()
        self.mine = nn.BatchNorm1d(4 * STUDENT, affine=False)
        self.its = nn.BatchNorm1d(4 * TEACHER, affine=False)
        self.adapter = nn.Linear(4 * STUDENT, 4 * TEACHER)

    def forward(self, logits, features, its_logits, its_features):
        mine = self.adapter(self.mine(features.flatten(0, 1)))
        return F.mse_loss(mine, self.its(its_features.flatten(0, 1)))


class Adversarial(nn.Module):
    def __init__(self):
        super().__init__()
        self.fad = FeatureAdversarialLoss(
            4 * STUDENT, 4 * TEACHER, discriminator="paired", warmup_steps=100
        )

    def forward(self, logits, features, its_logits, its_features):
        return self.fad(features, its_features)


METHODS = {
    "no distillation": Nothing,
    "knowledge distillation": KnowledgeDistillation,
    "squared error": SquaredError,
    "the loss": Adversarial,
}


# %%
def fit(network, method, teacher=None, epochs=12):
    parameters = [*network.parameters(), *method.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        network.train()
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(32):
            points, labels = train[0][index], train[1][index]
            features = network.encoder(points)
            logits = network.head(features.amax(1))
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    its = teacher.encoder(points)
                    its_logits = teacher.head(its.amax(1))
                loss = loss + method(logits, features, its_logits, its)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return network.eval()


@torch.no_grad()
def accuracy(network):
    return 100 * (network(test[0]).argmax(-1) == test[1]).float().mean().item()


torch.manual_seed(0)
teacher = fit(PointNet(TEACHER), Nothing())
print(f"teacher: {accuracy(teacher):.1f} %")

# %% [markdown]
# ## The experiment
# What is compared is the *difference* from no distillation of the same seed: what the first weights have to do with it
# cancels. The interval is Student's, at 95 %.

# %%
SEEDS, T95 = 4, 3.182  # the 97.5 % point of Student's t with SEEDS - 1 degrees of freedom
results = {name: [] for name in METHODS}
for seed in range(SEEDS):
    torch.manual_seed(seed)
    start = PointNet(STUDENT)
    for name, method in METHODS.items():
        torch.manual_seed(seed)
        results[name].append(accuracy(fit(copy.deepcopy(start), method(), teacher)))

gains = {}
for name, values in results.items():
    differences = [a - b for a, b in zip(values, results["no distillation"], strict=True)]
    error = T95 * statistics.stdev(differences) / SEEDS**0.5
    gains[name] = statistics.mean(differences), error
    print(
        f"{name:24} {statistics.mean(values):5.1f} %   "
        f"gain {gains[name][0]:+5.1f} ± {error:4.1f} points"
    )

# %%
figure, axis = plt.subplots(figsize=(7, 2.5), layout="constrained")
names = [name for name in METHODS if name != "no distillation"]
axis.errorbar([gains[n][0] for n in names], names, xerr=[gains[n][1] for n in names], fmt="o")
axis.axvline(0, color="gray", linewidth=1)
axis.set(xlabel="gain over no distillation, points of accuracy")
axis.invert_yaxis()

# %% [markdown]
# ## Reading it
# An interval that lies right of 0 says: it helps. One that contains 0 says: more seeds, or it does not matter here. Two methods
# whose intervals overlap are not told apart by this experiment. Where points correspond, as here, squared error is a
# strong competitor; where they do not, it is not even defined, and the loss takes sets.
