"""Surfaces to build shapes from, and the synthetic data set: 40 classes of CAD-like objects.

A part is a surface with an area and a way to draw points on it; a shape is a list of parts, drawn
from in proportion to their areas, as if a CAD mesh had been sampled. Everything follows from the
seed: no download, and the same clouds on every machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray
Random: TypeAlias = np.random.Generator


@dataclass(frozen=True)
class Part:
    """A surface: its area, and a function that draws that many points on it."""

    area: float
    draw: Callable[[Random, int], Array]


def frustum(low: float, high: float, bottom: float, top: float) -> Part:
    """The side of a cone around z from radius `low` at `bottom` to `high` at `top`.

    Equal radii make a cylinder, equal heights a ring or (with a radius of 0) a disc.
    """

    def draw(random: Random, count: int) -> Array:
        uniform, angle = random.random(count), random.random(count) * 2 * math.pi
        # The density of the height grows with the radius: invert the integral of the radius.
        squared = low**2 + (high**2 - low**2) * uniform
        radius = np.sqrt(squared)
        share = uniform if math.isclose(low, high) else (radius - low) / (high - low)
        height = bottom + (top - bottom) * share
        return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)

    return Part(math.pi * (low + high) * math.hypot(high - low, top - bottom), draw)


def revolve(profile: Sequence[tuple[float, float]]) -> list[Part]:
    """The surface swept by a polyline of (radius, height) around z."""
    return [
        frustum(low, high, bottom, top)
        for (low, bottom), (high, top) in itertools.pairwise(profile)
        if low + high > 0
    ]


def cylinder(radius: float, bottom: float, top: float) -> list[Part]:
    """A closed cylinder around z."""
    return revolve([(0, bottom), (radius, bottom), (radius, top), (0, top)])


def ball(radius: float, start: float = 0.0, stop: float = 1.0) -> list[Part]:
    """A sphere around the origin, or the zone of it from `start` to `stop` (0 bottom, 1 top)."""
    angles = np.linspace(start, stop, 9) * math.pi
    return revolve([(radius * math.sin(a), -radius * math.cos(a)) for a in angles])


def extrude(outline: Array, bottom: float, top: float, *, caps: bool = True) -> list[Part]:
    """A prism along z over a polygon ``(k, 2)`` that is star-shaped about the origin."""
    corners, following = outline, np.roll(outline, -1, axis=0)
    lengths = np.linalg.norm(following - corners, axis=1)
    doubled = np.abs(corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0])

    def side(random: Random, count: int) -> Array:
        edge = random.choice(len(lengths), count, p=lengths / lengths.sum())
        share = random.random((count, 1))
        flat = corners[edge] * (1 - share) + following[edge] * share
        height = random.uniform(bottom, top, (count, 1))
        return np.concatenate([flat, height], axis=1)

    def cap(random: Random, count: int) -> Array:
        triangle = random.choice(len(doubled), count, p=doubled / doubled.sum())
        outward, across = np.sqrt(random.random((count, 1))), random.random((count, 1))
        flat = outward * (corners[triangle] * (1 - across) + following[triangle] * across)
        height = np.where(random.random((count, 1)) < 0.5, bottom, top)
        return np.concatenate([flat, height], axis=1)

    parts = [Part(float(lengths.sum()) * (top - bottom), side)]
    return [*parts, Part(float(doubled.sum()), cap)] if caps else parts


def box(x: float, y: float, z: float, center: Sequence[float] = (0, 0, 0)) -> list[Part]:
    """A box with edges x, y, z."""
    outline = np.array([(x, y), (-x, y), (-x, -y), (x, -y)]) / 2
    return move(extrude(outline, -z / 2, z / 2), center)


def polygon(corners: int, radius: float, inner: float | None = None) -> Array:
    """A regular polygon; with `inner`, every second corner lies at that radius instead."""
    angle = np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, radius if inner is None else inner, radius)
    return np.stack([radii * np.cos(angle), radii * np.sin(angle)], axis=1)


def tube(curve: Callable[[Array], Array], radius: float) -> list[Part]:
    """A tube around ``curve(t) -> (len(t), 3)`` for t from 0 to 1."""
    knots = curve(np.linspace(0, 1, 65))
    length = float(np.linalg.norm(np.diff(knots, axis=0), axis=1).sum())

    def draw(random: Random, count: int) -> Array:
        t, angle = random.random(count), random.random((count, 1)) * 2 * math.pi
        tangent = curve(t + 1e-4) - curve(t - 1e-4)
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        # Any direction that is not the tangent's gives a frame: take the axis it is furthest from.
        away = np.eye(3)[np.abs(tangent).argmin(axis=1)]
        first = np.cross(tangent, away)
        first /= np.linalg.norm(first, axis=1, keepdims=True)
        second = np.cross(tangent, first)
        return curve(t) + radius * (np.cos(angle) * first + np.sin(angle) * second)

    return [Part(2 * math.pi * radius * length, draw)]


def arc(radius: float, start: float, stop: float) -> Callable[[Array], Array]:
    """A circular arc in the x-z plane, angles in turns."""

    def curve(t: Array) -> Array:
        angle = 2 * math.pi * (start + (stop - start) * t)
        return np.stack([radius * np.cos(angle), np.zeros_like(t), radius * np.sin(angle)], axis=1)

    return curve


def move(
    parts: list[Part], shift: Sequence[float] = (0, 0, 0), *, axis: str = "z", turn: float = 0.0
) -> list[Part]:
    """Parts turned about an axis (by `turn` turns), then shifted."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    cosine, sine = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    matrix = np.eye(3)
    matrix[[i, i, j, j], [i, j, i, j]] = cosine, -sine, sine, cosine
    offset = np.asarray(shift, dtype=np.float64)

    def moved(part: Part) -> Part:
        return Part(part.area, lambda random, n: part.draw(random, n) @ matrix.T + offset)

    return [moved(part) for part in parts]


def draw(parts: list[Part], count: int, random: Random) -> Array:
    """`count` points spread evenly over the surface of all parts, ``(count, 3)``."""
    areas = np.array([part.area for part in parts])
    counts = random.multinomial(count, areas / areas.sum())
    drawn = [part.draw(random, int(n)) for part, n in zip(parts, counts, strict=True) if n]
    return random.permutation(np.concatenate(drawn))
