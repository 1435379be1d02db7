"""Clouds that stay on the device, and networks that sample by taking the first points.

Farthest-point sampling is a loop of small kernels, and a GPU would spend most of a step on
launching them. So the clouds of a whole epoch are drawn, augmented and put in the order of their
farthest points at once, before it begins: any first so many points are then the farthest from each
other, and the sample of a sample is again the first ones. Student and teacher sample for
themselves, each from a point of its own: a cloud is ``(N, 6)``, the same points in the student's
order and, beside it, in the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.data import Clouds, augment
from distill.networks import PointNet2, SetAbstraction, farthest_points, gather
from distill.training import Settings

# No network samples more than this share of the points.
SAMPLED = 0.5
# The share of the points that the first sample of each side keeps; the second is half of it.
STUDENT, TEACHER = 0.375, 0.5


class FirstPoints(nn.Module):
    """A layer of PointNet++ for ordered points: the sample is the first ones.

    Args:
        layer: where the layers of its small PointNet are from.
        share: of the points that come in, so many are kept.
    """

    def __init__(self, layer: SetAbstraction, share: float) -> None:
        super().__init__()
        self.layers, self.neighbors, self.share = layer.layers, layer.neighbors, share

    def forward(self, positions: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        size = positions.shape[1]
        centers = positions[:, : max(1, round(size * self.share))]
        with torch.no_grad():
            # By differences: one kernel, and no rounding that depends on where the cloud lies.
            exact = "donot_use_mm_for_euclid_dist"
            distance = torch.cdist(centers, positions, compute_mode=exact)
            nearest = distance.topk(min(self.neighbors, size), largest=False, sorted=False)
        groups = gather(positions, nearest.indices) - centers.unsqueeze(2)
        if features is not None:
            groups = torch.cat([groups, gather(features, nearest.indices)], dim=-1)
        return centers, self.layers(groups).amax(dim=2)


class Sampled(PointNet2):
    """PointNet++ for ordered clouds ``(B, N, 6)``, of which it sees its own side.

    Args:
        classes: number of classes.
        width: multiplies every channel count.
        teacher: see the teacher's order, and sample as many points as a teacher does.
    """

    def __init__(self, classes: int, width: float = 1.0, *, teacher: bool = False) -> None:
        super().__init__(classes, width)
        self.first = FirstPoints(self.first, TEACHER if teacher else STUDENT)
        self.local = FirstPoints(self.local, 0.5)
        self.columns = slice(3, 6) if teacher else slice(3)

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points[..., self.columns])


def in_order(points: Tensor, *, random: bool) -> Tensor:
    """The same points ``(B, N, 3)``, each of the first half the farthest from all before it.

    The first is any (`random`, by the global generator), or the one farthest from the mean.
    """
    count = max(1, int(points.shape[1] * SAMPLED))
    chosen = farthest_points(points, count, random)
    rank = torch.full(points.shape[:2], count, device=points.device)
    rank.scatter_(1, chosen, torch.arange(count, device=points.device).expand_as(chosen))
    return gather(points, rank.argsort(dim=1))


def both_orders(points: Tensor, *, random: bool) -> Tensor:
    """Points in the student's order and in the teacher's, ``(B, N, 6)``."""
    mine = in_order(points, random=random)
    its = in_order(points, random=True) if random else mine
    return torch.cat([mine, its], dim=-1)


class Epochs:
    """The training clouds of an epoch, all at once on the device: `distill.training.Views`."""

    def __init__(self, clouds: Clouds, settings: Settings, *, sampled: bool) -> None:
        self.clouds, self.settings, self.sampled = clouds, settings, sampled
        self._epoch, self._points = -1, clouds.points

    def take(self, epoch: int, index: Tensor) -> tuple[Tensor, None]:
        """Some clouds of an epoch; that follows from the seed and the number of the epoch alone."""
        if epoch != self._epoch:
            self._epoch, self._points = epoch, self._prepare(epoch)
        return self._points[index], None

    def _prepare(self, epoch: int) -> Tensor:
        seed = self.settings.epoch_seed(epoch) + 1
        # Where the samples begin is drawn by the global generator.
        torch.manual_seed(seed)
        generator = torch.Generator(self.clouds.labels.device).manual_seed(seed)
        drawn = self.clouds
        if drawn.labels.dim() == 1:  # labels of points stay in their order
            drawn = drawn.draw(self.settings.points, generator)
        points = augment(drawn.points, generator)
        return both_orders(points, random=True) if self.sampled else points


def parts(clouds: Clouds, points: int, *, sampled: bool) -> list[Clouds]:
    """Each cloud's points in disjoint parts of so many: as many test sets of the same objects.

    Points with labels of their own stay together.
    """
    if clouds.labels.dim() > 1:
        return [clouds]
    starts = range(0, clouds.points.shape[1] - points + 1, points)
    cut = [clouds.points[:, start : start + points].contiguous() for start in starts]
    if sampled:
        cut = [both_orders(part, random=False) for part in cut]
    return [Clouds(part, clouds.labels) for part in cut]
