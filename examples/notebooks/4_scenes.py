# %% [markdown]
# # 4. Scenes: ragged, masked, segmented
#
# Scenes have unequal numbers of points, and some of their labels are to be ignored. This notebook makes such scenes, says
# what `ragged` and `mask=` do, and distils a segmentation network.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("fad_loss") is None:  # on Colab, say
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "fad-loss"], check=True)

# %%
import logging
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from fad_loss import FeatureAdversarialLoss, HeadDiscriminator, ragged

torch.manual_seed(0)
torch.set_num_threads(1)
# Some versions of PyTorch log a note to their own developers when the first nested tensor is made.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
IGNORED = 255

# %% [markdown]
# ## Scenes
# Two objects, one on the other, each a ball, a cone or a tube, of 30 to 60 points together; and 16 points of floor, whose
# label is ignored. The label of a point says what it is on. A batch is packed: all points one after the
# other, and `offset` says where each scene ends.


# %%
def scene(random):
    count = int(torch.randint(30, 61, (), generator=random))
    upper = torch.arange(count) % 2
    labels = torch.randint(3, (2,), generator=random)[upper]
    u, v = torch.rand(2, count, generator=random)
    angle, z = 2 * math.pi * u, 2 * v - 1
    radius = torch.stack([(1 - z**2).sqrt(), (1 - z) / 2, torch.full_like(z, 0.8)])
    radius = radius.gather(0, labels[None])[0]
    points = torch.stack([radius * angle.cos(), radius * angle.sin(), z], -1)
    points = points * (0.4 + 0.4 * torch.rand(2, 3, generator=random))[upper]
    points[:, 2] += 1.2 * upper - 0.6
    floor = 3 * torch.rand(16, 3, generator=random) - 1.5
    floor[:, 2] = -1.5
    points = torch.cat([points + 0.03 * torch.randn(count, 3, generator=random), floor])
    return points, torch.cat([labels, torch.full((16,), IGNORED)])


def scenes(count, seed):
    random = torch.Generator().manual_seed(seed)
    return [scene(random) for _ in range(count)]


def collate(chosen):
    points, labels = zip(*chosen, strict=True)
    return torch.cat(points), torch.cat(labels), torch.tensor([*map(len, labels)]).cumsum(0)


train, test = scenes(640, 0), scenes(640, 1)
points, labels, offset = collate(train[:3])
print(tuple(points.shape), tuple(labels.shape), offset)

# %% [markdown]
# `ragged` makes them one nested tensor, which the loss takes like any other. It shares memory with what was packed.

# %%
clouds = ragged(points, offset=offset)
print([tuple(cloud.shape) for cloud in clouds.unbind()])


# %% [markdown]
# ## A segmentation network on packed points
# Every point is seen beside the maximum over its scene. What is distilled is what the head takes, one feature per point.


# %%
class Layer(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


class Segmenter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Sequential(
            Layer(3, width), Layer(width, 2 * width), Layer(2 * width, 4 * width)
        )
        self.decoder = nn.Sequential(Layer(8 * width, 4 * width), Layer(4 * width, 2 * width))
        self.head = nn.Linear(2 * width, 3)

    def features(self, points, offset):
        encoded, lengths = self.encoder(points), offset.diff(prepend=offset.new_zeros(1))
        pooled = torch.segment_reduce(encoded, "max", lengths=lengths)
        return self.decoder(torch.cat([encoded, pooled.repeat_interleave(lengths, 0)], -1))

    def forward(self, points, offset):
        return self.head(self.features(points, offset))


def fit(network, fad=None, teacher=None, epochs=16):
    parameters = [*network.parameters(), *(fad.parameters() if fad else ())]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        network.train()
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(32):
            points, labels, offset = collate([train[i] for i in index])
            features = network.features(points, offset)
            loss = F.cross_entropy(network.head(features), labels, ignore_index=IGNORED)
            if fad:
                with torch.no_grad():
                    its = teacher.features(points, offset)
                mine, its = ragged(features, offset=offset), ragged(its, offset=offset)
                loss = loss + fad(mine, its, mask=labels != IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return network.eval()


@torch.no_grad()
def miou(network):
    points, labels, offset = collate(test)
    guess, valid = network(points, offset).argmax(-1), labels != IGNORED
    shares = [
        ((guess == k) & (labels == k)).sum() / (((guess == k) | (labels == k)) & valid).sum()
        for k in range(3)
    ]
    return 100 * torch.stack(shares).mean().item()


# %% [markdown]
# ## With and without
# Here each point has a label, and the teacher's own head can judge what it would make of each of the student's points. Or
# the features are compared point by point. There the default weight, for one label per cloud, is too large; a tenth of the
# task's pull is not.

# %%
teacher = fit(Segmenter(16))
print(f"teacher: {miou(teacher):.1f} % mIoU")
ways = {
    "alone": None,
    "teacher's head": {"discriminator": HeadDiscriminator(teacher.head, pool=None)},
    "point by point": {"discriminator": "paired", "balance": True, "weight": 0.1},
}
for name, options in ways.items():
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        student, fad = Segmenter(6), None
        if options:
            fad = FeatureAdversarialLoss(12, 32, warmup_steps=100, **options)
        found.append(miou(fit(student, fad, teacher)))
    print(f"{name:14} {sum(found) / 3:.1f} %   ({' '.join(f'{value:.1f}' for value in found)})")

# %% [markdown]
# ## What the mask does
# The points of the floor are in no density, no statistics and no mean: their features may be anything.

# %%
points, labels, offset = collate(test[:4])
with torch.no_grad():
    mine, its = student.features(points, offset), teacher.features(points, offset)
    fad.eval()
    valid = labels != IGNORED
    value = fad(ragged(mine, offset=offset), ragged(its, offset=offset), mask=valid)
    mine[~valid] += 1000
    again = fad(ragged(mine, offset=offset), ragged(its, offset=offset), mask=valid)
print(value.item(), again.item())

# %%
figure = plt.figure(figsize=(10, 3.5), layout="constrained")
points, labels, offset = collate(test[:1])
with torch.no_grad():
    panels = {
        "truth": labels.where(labels != IGNORED, 3),
        "teacher": teacher(points, offset).argmax(-1),
        "student with the loss": student(points, offset).argmax(-1),
    }
for place, (title, colors) in enumerate(panels.items(), 1):
    axis = figure.add_subplot(1, 3, place, projection="3d")
    axis.scatter(*points.T, c=colors, cmap="tab10", vmin=0, vmax=9, s=15)
    axis.set(title=title)
    axis.set_axis_off()
