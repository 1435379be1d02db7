# %% [markdown]
# # 2. What the discriminator sees
#
# The default discriminator has no parameters: at any place z it says how much likelier z is under the teacher's features than
# under the student's. That is a field over the space of features, and its gradient is what pulls. Here features are
# two-dimensional, so that it can be drawn; then three-dimensional, on the points of a cloud, during training.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("fad_loss") is None:  # on Colab, say
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "fad-loss"], check=True)

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from fad_loss import FeatureAdversarialLoss, ops

torch.manual_seed(0)
torch.set_num_threads(1)


# %% [markdown]
# ## The score of a place
# The log ratio of two kernel densities, as the documentation has it, written out with `ops.softmin`:
# $-\epsilon \log \frac1M \sum_j e^{-|z - t_j|^2 / \epsilon}$ with $\epsilon = 2 h^2$.


# %%
def score(z, teacher, student, m=0.1):
    """What TeacherDiscriminator says at z, for one bandwidth."""
    spread = 2 * teacher.var(1, correction=0).sum(-1)  # mean squared distance of two points
    epsilon = 2 * m * spread.item()
    return (ops.softmin(z, student, epsilon) - ops.softmin(z, teacher, epsilon)) / epsilon


# %%
angle = torch.rand(300) * 2 * torch.pi
teacher = torch.stack([angle.cos(), angle.sin()], -1)[None] * 2 + 0.1 * torch.randn(1, 300, 2)
student = 0.4 * torch.randn(1, 300, 2) + torch.tensor([1.0, 0.5])


def draw(axis, student, title):
    line = torch.linspace(-3.2, 3.2, 25)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(1, -1, 2)
    places = grid.clone().requires_grad_()
    field = score(places, teacher, student)
    (arrows,) = torch.autograd.grad(field.sum(), places)
    arrows = arrows / arrows.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    axis.contourf(line, line, field.detach().view(25, 25), 21, cmap="RdBu", alpha=0.7)
    axis.quiver(*grid[0].T, *arrows[0].T, scale=40, width=0.003)
    axis.scatter(*teacher[0].T, s=4, color="navy", label="teacher")
    axis.scatter(*student[0].detach().T, s=4, color="darkred", label="student")
    axis.set(title=title, aspect="equal")


figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
draw(axis, student, "scores and where they pull")
_ = axis.legend(loc="lower right")

# %% [markdown]
# It is positive (blue) where the teacher has more points than the student, and the arrows lead there. Where both have as many, it
# is 0 and nothing pulls.
#
# ## The field while the student learns
# The student's points are moved by nothing but the loss. The adapter and the standardisation are left out, so that the plane
# stays what it is.

# %%
fad = FeatureAdversarialLoss(
    2, 2, adapter="identity", normalize=False, weight=1.0, warmup_steps=0, max_points=None
)
points = student.clone().requires_grad_()
optimizer = torch.optim.Adam([points], lr=0.05)
figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
means = []
for step in range(151):
    if step in {0, 20, 60, 150}:
        draw(axes[[0, 20, 60, 150].index(step)], points, f"step {step}")
    loss = fad(points, teacher)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    means.append(fad.statistics()["fake_score"].item())

# %%
figure, axis = plt.subplots(figsize=(6, 2.5), layout="constrained")
axis.plot(means)
axis.set(xlabel="step", ylabel="the student's mean score")
print(f"first {means[0]:.2f}, last {means[-1]:.2f}")

# %% [markdown]
# The score rises to 0, its value where the sets agree, and stays: the game has an end.
#
# ## On a cloud
# A student of 40 parameters or so imitates 3-dimensional features of a wide one, point by point of a torus. Points are
# drawn where they lie, and coloured by the score of the student's feature.

# %%
u, v = torch.rand(2, 500) * 2 * torch.pi
ring = torch.stack([u.cos(), u.sin(), torch.zeros(500)], -1)
cloud = (ring * (1 + 0.4 * v.cos()[:, None]) + torch.tensor([0, 0, 0.4]) * v.sin()[:, None])[None]
wide = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3)).requires_grad_(False)
small = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
known = wide(4 * cloud)
fad = FeatureAdversarialLoss(3, 3, warmup_steps=50, max_points=None)
seen = []
handle = fad.discriminator.register_forward_hook(lambda module, given, scores: seen.append(scores))
optimizer = torch.optim.AdamW([*small.parameters(), *fad.parameters()], lr=1e-2)
figure = plt.figure(figsize=(13, 4), layout="constrained")
for step in range(301):
    loss = fad(small(cloud), known)
    if step in {0, 50, 300}:
        place = [0, 50, 300].index(step) + 1
        axis = figure.add_subplot(1, 3, place, projection="3d")
        colors = seen[-1].student[0].detach()
        drawn = axis.scatter(*cloud[0].T, c=colors, s=8, cmap="RdBu", vmin=-2, vmax=2)
        axis.set(title=f"step {step}: mean score {colors.mean():.2f}")
        axis.set_axis_off()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
_ = figure.colorbar(drawn, ax=figure.axes, shrink=0.6)
handle.remove()
