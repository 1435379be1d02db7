"""
From the distiller to the robot
===============================

What is deployed is the student alone. The teacher, the adapter and the discriminator belong to
training; the hooks that took the features go with the distiller, and the student's code was never
changed.
"""

import io

import torch
from torch import nn
from torch.nn import functional as F

from fad_loss import Distiller


class PointNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 40)

    def forward(self, points):
        return self.head(self.encoder(points).amax(1))


torch.manual_seed(0)
student, teacher = PointNet(32), PointNet(512)
points, labels = torch.randn(16, 256, 3), torch.randint(40, (16,))
distiller = Distiller(student, teacher, {"encoder": "encoder"}, example=points)
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
for _ in range(20):
    logits, loss = distiller(points)
    optimizer.zero_grad()
    (loss + F.cross_entropy(logits, labels)).backward()
    optimizer.step()

# %%
# Two files come out of a training. The checkpoint to go on from has the student, the losses and
# the optimizer; the teacher's weights are not in it.

checkpoint = io.BytesIO()
torch.save({"distiller": distiller.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
print(f"checkpoint: {len(checkpoint.getvalue()):,} bytes")

# %%
# What is deployed is exported from the student, with any number of clouds and points.

student.eval()
shapes = {"points": {0: torch.export.Dim("clouds"), 1: torch.export.Dim("count", min=2)}}
program = torch.export.export(student, (points,), dynamic_shapes=shapes)
file = io.BytesIO()
torch.export.save(program, file)
print(f"student: {len(file.getvalue()):,} bytes")

# %%
# It computes what the student computed.

file.seek(0)
loaded = torch.export.load(file).module()
other = torch.randn(3, 1000, 3)
with torch.no_grad():
    difference = (loaded(other) - student(other)).abs().max()
print(f"largest difference: {float(difference):.1e}")
