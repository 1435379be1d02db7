"""Labelled point clouds, one tensor per split in memory; the synthetic set; augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distill import shapes
from distill.catalog import CLASSES
from fad_loss import ragged


class DataError(Exception):
    """The input cannot be used: one line that says which file, and what is wrong with it."""


@dataclass(frozen=True)
class Clouds:
    """Clouds: points ``(n, P, 3)`` float32, labels ``(n,)``, or of every point ``(n, P)``, int64.

    Of equal size, or, with lengths ``(n,)`` int64, the first so many points of each.
    """

    points: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Clouds:
        lengths = None if self.lengths is None else change(self.lengths)
        return Clouds(change(self.points), change(self.labels), lengths)

    def to(self, device: torch.device) -> Clouds:
        return self._map(lambda values: values.to(device))

    def select(self, index: Tensor | slice) -> Clouds:
        return self._map(lambda values: values[index])

    def first(self, points: int) -> Tensor:
        """The first points of every cloud, as networks take them: dense, or ragged."""
        return packed(self.points[:, :points], self.lengths)

    def draw(self, points: int, generator: torch.Generator) -> Clouds:
        """So many points of every cloud at random, in random order; all of one with fewer."""
        noise = torch.rand(self.points.shape[:2], generator=generator, device=self.points.device)
        lengths = self.lengths
        if lengths is not None:
            noise = noise.masked_fill(~within(lengths, noise.shape[1]), -1)
            lengths = lengths.clamp(max=points)
        index = noise.topk(points, dim=1).indices
        labels = self.labels if self.labels.dim() == 1 else self.labels.gather(1, index)
        index = index.unsqueeze(-1).expand(-1, -1, 3)
        return Clouds(self.points.gather(1, index), labels, lengths)


def within(lengths: Tensor, points: int) -> Tensor:
    """Which of so many points are the cloud's: ``(B, points)``."""
    return torch.arange(points, device=lengths.device) < lengths.unsqueeze(1)


def packed(points: Tensor, lengths: Tensor | None) -> Tensor:
    """Dense points as they are; of clouds of unequal size, ragged ones (`fad_loss.ragged`)."""
    if lengths is None:
        return points
    return ragged(points, mask=within(lengths, points.shape[1]))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with the names of the classes."""

    name: str
    train: Clouds
    test: Clouds
    classes: list[str]
    notes: tuple[str, ...] = ()
    """What was left out, to be shown."""

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def validation(self, share: float = 0.1) -> Dataset:
        """The training split alone, a share of every class held out in place of the test split.

        For choosing options: what was chosen on the test split says nothing about other data.
        """
        held = held_out(self.train.labels.numpy(), share)
        index = torch.from_numpy(held)
        name = f"{self.name} (validation)"
        train, test = self.train.select(~index), self.train.select(index)
        return replace(self, name=name, train=train, test=test)

    def fingerprint(self) -> str:
        """A digest of every point and label: results are cached under it."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            lengths = () if split.lengths is None else (split.lengths,)
            for tensor in (split.points, split.labels, *lengths):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:12]


def held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Mark about `share` of every class, the same ones each time: bool ``(n,)``.

    Of a class with two members or more, at least one is marked and at least one is not.
    """
    marked = np.zeros(len(labels), dtype=bool)
    random = np.random.default_rng(0)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        marked[members[:count]] = True
    return marked


def normalize(points: np.ndarray) -> np.ndarray:
    """Centre clouds ``(..., P, 3)`` on their bounding boxes and scale them into the unit ball.

    In float64: in float32, an object at georeferenced coordinates is a single point.
    """
    points = points.astype(np.float64)
    low, high = points.min(axis=-2, keepdims=True), points.max(axis=-2, keepdims=True)
    centered = points - (low + high) / 2
    radius = np.sqrt((centered**2).sum(axis=-1).max(axis=-1))[..., None, None]
    return (centered / np.where(radius > 0, radius, 1)).astype(np.float32)


def shuffled(points: np.ndarray) -> np.ndarray:
    """Shuffle the points of every cloud, the same way each time.

    Files often store points along a curve or part by part; networks are tested on the first few.
    """
    count, size, _ = points.shape
    order = np.random.default_rng(0).random((count, size), dtype=np.float32).argsort(axis=1)
    return np.take_along_axis(points, order[..., None], axis=1)


def synthetic(train: int = 30, test: int = 12, points: int = 512, seed: int = 0) -> Dataset:
    """Shapes of the 40 classes of `catalog`, so many of each for training and for testing.

    As a scanner would see them: turned by up to 15 degrees, part of the surface missing, noise of
    1 % of the size. Every cloud follows from the seed, its split, class and number alone.
    """

    def cloud(split: int, label: int, number: int) -> np.ndarray:
        random = np.random.default_rng([seed, split, label, number])
        shape = shapes.move(list(CLASSES.values())[label](random), turn=random.uniform(-1, 1) / 24)
        full = normalize(shapes.draw(shape, 2 * points, random))
        # Hide the far end as seen from a random direction: up to half of the points.
        direction = random.normal(size=3)
        visible = np.argsort(full @ direction)[: int(points * random.uniform(1, 2))]
        kept = full[random.permutation(visible)[:points]]
        return normalize(kept + random.normal(scale=0.01, size=kept.shape))

    def clouds(split: int, count: int) -> Clouds:
        labels = np.repeat(np.arange(len(CLASSES)), count)
        drawn = [
            cloud(split, label, number) for label in range(len(CLASSES)) for number in range(count)
        ]
        return Clouds(torch.from_numpy(np.stack(drawn)), torch.from_numpy(labels))

    return Dataset("synthetic", clouds(0, train), clouds(1, test), list(CLASSES))


def augment(
    points: Tensor, generator: torch.Generator, *, jitter: float = 0.0, rotate: bool = False
) -> Tensor:
    """Scale every axis by 2/3 to 3/2 and shift by up to 0.2, as DGCNN and its successors do.

    Args:
        points: ``(B, N, 3)``.
        generator: of random numbers, on the device of the points.
        jitter: standard deviation of noise added to every point, clipped at five of them.
        rotate: turn every cloud about z by a random angle.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=generator, device=points.device)
        return drawn * (high - low) + low

    batch = len(points)
    if rotate:
        angle = uniform(0, 2 * torch.pi, batch, 1)
        x, y = points[..., 0], points[..., 1]
        turned = (angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y)
        points = torch.stack([*turned, points[..., 2]], dim=-1)
    scale, shift = uniform(2 / 3, 3 / 2, batch, 1, 3), uniform(-0.2, 0.2, batch, 1, 3)
    points = torch.addcmul(shift, points, scale)
    if jitter:
        noise = torch.randn(points.shape, generator=generator, device=points.device)
        points = points + jitter * noise.clamp(-5, 5)
    return points


def _region(points: Tensor, generator: torch.Generator) -> Tensor:
    batch, count, _ = points.shape
    chosen = torch.randint(count, (batch, 1, 1), generator=generator, device=points.device)
    center = points.gather(1, chosen.expand(-1, -1, 3))
    order = (points - center).square().sum(-1).argsort(dim=1, descending=True)
    kept = order[:, : count - count // 4]
    index = kept.repeat(1, 2)[:, :count]
    return points.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))


def _turned(points: Tensor, generator: torch.Generator) -> Tensor:
    shape = (len(points), 1)
    turn = torch.rand(shape, generator=generator, device=points.device) * 2 - 1
    cosine, sine = (turn * torch.pi / 6).cos(), (turn * torch.pi / 6).sin()
    x, y = points[..., 0], points[..., 1]
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y, points[..., 2]], dim=-1)


def _noisy(points: Tensor, generator: torch.Generator) -> Tensor:
    return points + 0.03 * torch.randn(points.shape, generator=generator, device=points.device)


def _stretched(points: Tensor, generator: torch.Generator) -> Tensor:
    shape = (len(points), 1, 3)
    power = torch.rand(shape, generator=generator, device=points.device) * 2 - 1
    return points * 2**power


# What real scans do to a cloud: noise of 3 % of the radius on every point; a quarter of the points
# missing, around one of them (others twice); turned about z by up to 30 degrees; every axis scaled
# by 1/2 to 2, which is more than in training.
CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": _noisy,
    "missing region": _region,
    "rotation": _turned,
    "scale": _stretched,
}


def corrupted(clouds: Clouds, name: str, points: int) -> Clouds:
    """The first `points` points of every cloud, corrupted, the same way each time."""
    generator = torch.Generator(clouds.points.device).manual_seed(0)
    corrupt, changed = CORRUPTIONS[name], clouds.points[:, :points].clone()
    if clouds.lengths is None:
        return Clouds(corrupt(changed, generator), clouds.labels)
    lengths = clouds.lengths.clamp(max=points)
    for cloud, length in zip(changed, lengths.tolist(), strict=True):
        cloud[:length] = corrupt(cloud[None, :length], generator)[0]
    return Clouds(changed, clouds.labels, lengths)
