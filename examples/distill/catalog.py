"""The 40 classes of the synthetic data set: a function each, from random numbers to parts.

z points up. Sizes vary within a class about as much as they do in furniture or machine parts, so
some members of neighbouring classes (desk and table, bottle and vase) come close to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from distill.shapes import (
    Part,
    Random,
    arc,
    ball,
    box,
    cylinder,
    extrude,
    frustum,
    move,
    polygon,
    revolve,
    tube,
)

Shape = Callable[[Random], list[Part]]


def between(random: Random, low: float, high: float) -> float:
    return float(random.uniform(low, high))


def corners(x: float, y: float) -> list[tuple[float, float]]:
    return [(x, y), (-x, y), (-x, -y), (x, -y)]


def legs(random: Random, x: float, y: float, height: float) -> list[Part]:
    """Four legs, square or round, under the corners of a rectangle."""
    thick = between(random, 0.03, 0.08)
    x, y = x / 2 - thick, y / 2 - thick
    if random.random() < 0.5:
        return [p for a, b in corners(x, y) for p in box(thick, thick, height, (a, b, height / 2))]
    round_leg = cylinder(thick / 2, 0, height)
    return [part for a, b in corners(x, y) for part in move(round_leg, (a, b, 0))]


def table(random: Random) -> list[Part]:
    x, y, z = between(random, 0.8, 2), between(random, 0.6, 1), between(random, 0.4, 0.9)
    return [*box(x, y, 0.06, (0, 0, z)), *legs(random, x, y, z)]


def round_table(random: Random) -> list[Part]:
    radius, height = between(random, 0.35, 0.8), between(random, 0.5, 1.1)
    pole, foot = between(random, 0.03, 0.1), radius * between(random, 0.4, 0.8)
    top = cylinder(radius, height, height + between(random, 0.02, 0.08))
    return [*top, *cylinder(pole, 0, height), *cylinder(foot, 0, between(random, 0.02, 0.08))]


def stool(random: Random) -> list[Part]:
    radius, height = between(random, 0.15, 0.3), between(random, 0.4, 0.9)
    count, thick = int(random.integers(3, 5)), between(random, 0.015, 0.04)
    leg = move(cylinder(thick, 0, height), (radius * 0.8, 0, 0))
    feet = [part for i in range(count) for part in move(leg, turn=i / count)]
    return [*cylinder(radius, height, height + 0.05), *feet]


def chair(random: Random) -> list[Part]:
    x, y, z = (between(random, 0.4, 0.6) for _ in range(3))
    back, tilt = between(random, 0.3, 0.8), between(random, 0.0, 0.05)
    rest = move(box(x, 0.05, back, (0, 0, back / 2)), (0, y / 2, z), axis="x", turn=-tilt)
    return [*box(x, y, 0.06, (0, 0, z)), *rest, *legs(random, x, y, z)]


def bench(random: Random) -> list[Part]:
    x, y, z = between(random, 1.1, 2), between(random, 0.3, 0.5), between(random, 0.35, 0.5)
    sides = [p for a in (-x / 2.3, x / 2.3) for p in box(0.08, y, z, (a, 0, z / 2))]
    rest = box(x, 0.05, 0.3, (0, y / 2, z + 0.2)) if random.random() < 0.4 else []
    return [*box(x, y, 0.07, (0, 0, z)), *sides, *rest]


def sofa(random: Random) -> list[Part]:
    x, y, z = between(random, 0.9, 2.2), between(random, 0.6, 0.9), between(random, 0.3, 0.45)
    arm, back = between(random, 0.1, 0.25), between(random, 0.3, 0.6)
    high = z + between(random, 0.05, 0.25)
    arms = [p for s in (-1, 1) for p in box(arm, y, high, (s * (x + arm) / 2, 0, high / 2))]
    return [*box(x, y, z, (0, 0, z / 2)), *arms, *box(x, 0.2, back, (0, y / 2, z + back / 2))]


def bed(random: Random) -> list[Part]:
    x, y, z = between(random, 0.9, 1.8), between(random, 1.9, 2.2), between(random, 0.3, 0.6)
    head = between(random, 0.3, 0.8)
    pillow = box(x * 0.7, 0.35, 0.12, (0, y / 2 - 0.3, z + 0.06))
    board = box(x, 0.07, head, (0, y / 2, z + head / 2))
    foot = box(x, 0.07, head / 2, (0, -y / 2, z + head / 4)) if random.random() < 0.4 else []
    return [*box(x, y, z, (0, 0, z / 2)), *board, *pillow, *foot]


def bookshelf(random: Random) -> list[Part]:
    x, y, z = between(random, 0.5, 1.2), between(random, 0.25, 0.4), between(random, 0.9, 2.1)
    heights = np.linspace(0, z, int(random.integers(4, 8)))
    shelves = [part for h in heights for part in box(x, y, 0.03, (0, 0, float(h)))]
    sides = [part for s in (-x / 2, x / 2) for part in box(0.03, y, z, (s, 0, z / 2))]
    return [
        *shelves,
        *sides,
        *(box(x, 0.02, z, (0, y / 2, z / 2)) if random.random() < 0.5 else []),
    ]


def dresser(random: Random) -> list[Part]:
    x, y, z = between(random, 0.5, 1.4), between(random, 0.4, 0.6), between(random, 0.6, 1.5)
    rows = int(random.integers(2, 6))
    fronts = [
        part
        for h in (np.arange(rows) + 0.5) * z / rows
        for part in (*box(x * 0.9, 0.04, z / rows * 0.8, (0, -y / 2 - 0.03, float(h))),
                     *move(ball(0.04), (0, -y / 2 - 0.08, float(h))))
    ]  # fmt: skip
    return [*box(x, y, z, (0, 0, z / 2)), *fronts]


def desk(random: Random) -> list[Part]:
    x, y, z = between(random, 1, 1.8), between(random, 0.6, 0.9), between(random, 0.65, 0.8)
    width = between(random, 0.25, 0.5)
    drawers = box(width, y * 0.9, z * 0.9, ((x - width) / 2, 0, z * 0.5))
    other = box(0.05, y * 0.9, z, (-x / 2 + 0.03, 0, z / 2))
    return [*box(x, y, 0.05, (0, 0, z)), *drawers, *other]


def monitor(random: Random) -> list[Part]:
    x, z = between(random, 0.5, 0.9), between(random, 0.3, 0.5)
    neck = between(random, 0.1, 0.25)
    panel = box(x, between(random, 0.03, 0.1), z, (0, 0, neck + z / 2))
    foot = box(x * between(random, 0.3, 0.6), 0.2, 0.02)
    return [*panel, *box(0.06, 0.04, neck, (0, 0.03, neck / 2)), *foot]


def laptop(random: Random) -> list[Part]:
    x, y = between(random, 0.6, 0.9), between(random, 0.4, 0.6)
    lid = move(
        box(x, 0.02, y, (0, 0, y / 2)), (0, y / 2, 0), axis="x", turn=-between(random, 0, 0.12)
    )
    return [*box(x, y, 0.04), *lid]


def lamp(random: Random) -> list[Part]:
    height, shade = between(random, 0.5, 1.6), between(random, 0.15, 0.35)
    top, foot = shade * between(random, 0.3, 1.0), between(random, 0.12, 0.25)
    cover = frustum(shade, top, height - shade, height + shade * 0.5)
    return [cover, *cylinder(0.02, 0, height), *cylinder(foot, 0, between(random, 0.02, 0.06))]


def mug(random: Random) -> list[Part]:
    radius, height = between(random, 0.3, 0.5), between(random, 0.6, 1.2)
    size = height * between(random, 0.2, 0.35)
    handle = move(
        tube(arc(size, -0.25, 0.25), between(random, 0.03, 0.07)), (radius, 0, height / 2)
    )
    return [*revolve([(0, 0), (radius, 0), (radius, height)]), *handle]


def bowl(random: Random) -> list[Part]:
    stop = between(random, 0.35, 0.6)
    foot = between(random, 0.2, 0.5)
    rim = frustum(foot, foot, -1.1, -0.9)
    return [*ball(1.0, 0.0, stop), *ball(0.94, 0.0, stop), rim]


def vase(random: Random) -> list[Part]:
    heights = np.linspace(0, between(random, 1.2, 2.4), 9)
    phase, swing = between(random, 0.3, 0.8), between(random, 0.15, 0.35)
    radii = 0.45 + swing * np.sin(heights * 2.6 + phase)
    return revolve([(0.0, 0.0), *zip(radii.tolist(), heights.tolist(), strict=True)])


def bottle(random: Random) -> list[Part]:
    radius, neck = between(random, 0.2, 0.4), between(random, 0.06, 0.14)
    body, shoulder, length = (between(random, *r) for r in ((0.5, 1), (0.1, 0.4), (0.15, 0.5)))
    total = body + shoulder + length
    profile = [
        (0, 0),
        (radius, 0),
        (radius, body),
        (neck, body + shoulder),
        (neck, total),
        (0, total),
    ]
    return revolve(profile)


def goblet(random: Random) -> list[Part]:
    radius, stem, foot = (between(random, *r) for r in ((0.25, 0.5), (0.3, 0.8), (0.2, 0.4)))
    cup = move(ball(radius, 0.0, between(random, 0.5, 0.75)), (0, 0, stem + radius))
    return [*cup, *cylinder(0.03, 0, stem), frustum(foot, 0.03, 0, 0.06)]


def airplane(random: Random) -> list[Part]:
    length, radius = between(random, 1.6, 2.4), between(random, 0.1, 0.2)
    span, chord = between(random, 0.8, 1.2), between(random, 0.25, 0.45)
    sweep = between(random, 0, 0.1)
    nose = [(0.0, 0.0), (radius, 0.25), (radius, length * 0.7), (radius * 0.3, length)]
    body = move(revolve(nose), axis="y", turn=0.25)
    wing = box(chord, span, 0.03, (0, span / 2, 0))
    wings = [*move(wing, (length * 0.45, 0, 0), turn=sweep / 2),
             *move(wing, (length * 0.45, 0, 0), turn=0.5 - sweep / 2)]  # fmt: skip
    tail = box(0.2, span * 0.6, 0.02, (length * 0.95, 0, radius * 0.3))
    return [*body, *wings, *tail, *box(0.25, 0.02, 0.4, (length * 0.95, 0, 0.2))]


def rocket(random: Random) -> list[Part]:
    radius, height = between(random, 0.12, 0.3), between(random, 1, 2)
    count, fin = int(random.integers(3, 5)), between(random, 0.2, 0.4)
    hull = revolve(
        [(0, 0), (radius, 0), (radius, height), (radius * 0.6, height + 0.3), (0, height + 0.5)]
    )
    blade = box(fin, 0.02, fin * 1.5, (radius + fin / 2, 0, fin * 0.75))
    return [*hull, *(part for i in range(count) for part in move(blade, turn=i / count))]


def wheels(x: float, y: float, radius: float) -> list[Part]:
    wheel = move(cylinder(radius, -0.06, 0.06), axis="x", turn=0.25)
    return [part for a, b in corners(x, y) for part in move(wheel, (a, b, radius))]


def car(random: Random) -> list[Part]:
    x, y, z = between(random, 1.6, 2.2), between(random, 0.7, 0.9), between(random, 0.25, 0.4)
    wheel, cabin = between(random, 0.14, 0.22), between(random, 0.4, 0.6) * x
    body = box(x, y, z, (0, 0, wheel + z / 2))
    roof = box(cabin, y * 0.9, 0.3, (between(random, -0.1, 0.2), 0, wheel + z + 0.15))
    return [*body, *roof, *wheels(x * 0.32, y / 2, wheel)]


def truck(random: Random) -> list[Part]:
    x, y, z = between(random, 1.2, 2.2), between(random, 0.6, 0.8), between(random, 0.6, 1)
    cab, wheel = between(random, 0.4, 0.6), between(random, 0.14, 0.2)
    load = box(x, y, z, (0, 0, wheel + z / 2))
    front = box(cab, y, z * 0.7, (x / 2 + cab / 2 + 0.08, 0, wheel + z * 0.35))
    return [*load, *front, *wheels(x * 0.4, y / 2, wheel)]


def stairs(random: Random) -> list[Part]:
    count, width = int(random.integers(3, 8)), between(random, 0.4, 1)
    run, rise = between(random, 0.15, 0.3), between(random, 0.12, 0.25)
    return [
        part
        for i in range(count)
        for part in box(run, width, rise * (i + 1), (run * i, 0, rise * (i + 1) / 2))
    ]


def tent(random: Random) -> list[Part]:
    length, half, height = (
        between(random, 0.8, 2),
        between(random, 0.4, 0.8),
        between(random, 0.5, 1),
    )
    return roof(length, half, height)


def roof(length: float, half: float, height: float, base: float = 0.0) -> list[Part]:
    """A triangular prism along y, its ridge up."""
    outline = np.array([(half, -height / 3), (0, height * 2 / 3), (-half, -height / 3)])
    prism = extrude(outline, -length / 2, length / 2)
    return move(prism, (0, 0, base + height / 3), axis="x", turn=0.25)


def house(random: Random) -> list[Part]:
    half, length, wall = (
        between(random, 0.4, 0.7),
        between(random, 0.8, 1.6),
        between(random, 0.4, 0.9),
    )
    chimney = box(0.15, 0.15, 0.5, (half * 0.5, length * 0.25, wall + 0.3))
    walls = box(2 * half, length, wall, (0, 0, wall / 2))
    return [*walls, *roof(length, half * 1.1, between(random, 0.3, 0.6), wall), *chimney]


def hammer(random: Random) -> list[Part]:
    length, head = between(random, 0.8, 1.5), between(random, 0.3, 0.6)
    thick = between(random, 0.06, 0.14)
    shape = (
        cylinder(thick, -head / 2, head / 2)
        if random.random() < 0.5
        else box(thick * 2, thick * 2, head)
    )
    return [*move(shape, (0, 0, length), axis="y", turn=0.25), *cylinder(thick * 0.5, 0, length)]


def bolt(random: Random) -> list[Part]:
    radius, length = between(random, 0.1, 0.2), between(random, 0.6, 1.4)
    size, thick = radius * between(random, 1.6, 2.2), between(random, 0.1, 0.2)
    return [*extrude(polygon(6, size), length, length + thick), *cylinder(radius, 0, length)]


def nut(random: Random) -> list[Part]:
    size, hole, height = 1.0, between(random, 0.45, 0.65), between(random, 0.3, 0.9)
    hexagon = extrude(polygon(6, size), 0, height, caps=False)
    faces = [frustum(hole, size * 0.9, z, z) for z in (0.0, height)]
    return [*hexagon, *faces, frustum(hole, hole, 0, height)]


def gear(random: Random) -> list[Part]:
    teeth, inner = int(random.integers(7, 15)), between(random, 0.7, 0.85)
    height, hole = between(random, 0.15, 0.6), between(random, 0.1, 0.3)
    outline = np.repeat(polygon(2 * teeth, 1.0, inner), 1, axis=0)
    return [*extrude(outline, 0, height), frustum(hole, hole, 0, height * 1.5)]


def elbow(random: Random) -> list[Part]:
    bend, radius = between(random, 0.4, 0.8), between(random, 0.12, 0.3)
    length = between(random, 0.1, 0.5)
    straight = move([frustum(radius, radius, -length, 0)], (bend, 0, 0))
    other = move([frustum(radius, radius, 0, length)], (0, 0, bend), axis="y", turn=-0.25)
    return [*tube(arc(bend, 0, 0.25), radius), *straight, *other]


def tee(random: Random) -> list[Part]:
    radius, length, branch = (
        between(random, 0.15, 0.3),
        between(random, 1, 2),
        between(random, 0.4, 0.9),
    )
    run = move([frustum(radius, radius, -length / 2, length / 2)], axis="y", turn=0.25)
    return [*run, frustum(radius * 0.9, radius * 0.9, radius * 0.5, branch)]


def flange(random: Random) -> list[Part]:
    bore, outer, height = (between(random, *r) for r in ((0.25, 0.45), (0.8, 1.0), (0.3, 0.9)))
    count, thick = int(random.integers(4, 9)), between(random, 0.08, 0.2)
    plate = revolve([(bore, 0), (outer, 0), (outer, thick), (bore, thick)])
    stud = move(cylinder(0.07, thick, thick * 2.5), ((outer + bore) / 2 + 0.1, 0, 0))
    studs = [part for i in range(count) for part in move(stud, turn=i / count)]
    return [*plate, frustum(bore, bore, 0, height), *studs]


def spring(random: Random) -> list[Part]:
    turns, height = between(random, 3, 8), between(random, 1, 2.4)

    def helix(t: np.ndarray) -> np.ndarray:
        angle = 2 * math.pi * turns * t
        return np.stack([0.5 * np.cos(angle), 0.5 * np.sin(angle), height * t], axis=1)

    return tube(helix, between(random, 0.04, 0.09))


def bracket(random: Random) -> list[Part]:
    x, y, z = (between(random, 0.5, 1.1) for _ in range(3))
    thick = between(random, 0.06, 0.15)
    rib = box(x * 0.6, 0.05, z * 0.3, (x * 0.35, 0, z * 0.15)) if random.random() < 0.5 else []
    return [*box(x, y, thick, (x / 2, 0, 0)), *box(thick, y, z, (0, 0, z / 2)), *rib]


def beam(random: Random) -> list[Part]:
    length, width, height = (
        between(random, 1.2, 2.5),
        between(random, 0.3, 0.6),
        between(random, 0.4, 0.7),
    )
    thick = between(random, 0.04, 0.1)
    flanges = [part for s in (-1, 1) for part in box(length, width, thick, (0, 0, s * height / 2))]
    return [*flanges, *box(length, thick, height)]


def dumbbell(random: Random) -> list[Part]:
    length, size = between(random, 0.6, 1.4), between(random, 0.2, 0.4)
    weight = ball(size) if random.random() < 0.5 else cylinder(size, -0.12, 0.12)
    ends = [part for s in (-0.5, 0.5) for part in move(weight, (0, 0, s * length))]
    whole = [*ends, *cylinder(between(random, 0.04, 0.08), -length / 2, length / 2)]
    return move(whole, axis="y", turn=0.25)


def umbrella(random: Random) -> list[Part]:
    height, start = between(random, 0.8, 1.6), between(random, 0.55, 0.75)
    cover = move(ball(1.0, start, 1.0), (0, 0, height - 1.0))
    hook = move(tube(arc(0.12, 0.5, 1.0), 0.03), (0.12, 0, 0))
    return [*cover, *cylinder(0.03, 0, height), *hook]


def traffic_cone(random: Random) -> list[Part]:
    radius, height, plate = (
        between(random, 0.2, 0.45),
        between(random, 0.6, 1.3),
        between(random, 0.5, 0.9),
    )
    return [*box(plate, plate, 0.05), frustum(radius, between(random, 0.03, 0.1), 0, height)]


def ladder(random: Random) -> list[Part]:
    width, height, count = (
        between(random, 0.3, 0.6),
        between(random, 1.2, 2.5),
        int(random.integers(4, 10)),
    )
    lean = between(random, 0, 0.06)
    rails = [
        part for s in (-0.5, 0.5) for part in box(0.05, 0.05, height, (s * width, 0, height / 2))
    ]
    levels = (np.arange(count) + 0.5) * height / count
    rungs = [part for h in levels for part in box(width, 0.04, 0.04, (0, 0, float(h)))]
    return move([*rails, *rungs], axis="x", turn=lean)


def bathtub(random: Random) -> list[Part]:
    x, y, z = between(random, 1.3, 2), between(random, 0.6, 0.9), between(random, 0.4, 0.6)
    walls = [part for a in (-x / 2, x / 2) for part in box(0.06, y, z, (a, 0, z / 2))]
    sides = [part for b in (-y / 2, y / 2) for part in box(x, 0.06, z, (0, b, z / 2))]
    tap = cylinder(0.04, z, z + 0.2) if random.random() < 0.5 else []
    return [*box(x, y, 0.06), *walls, *sides, *move(tap, (x / 2, 0, 0))]


CLASSES: dict[str, Shape] = {
    shape.__name__: shape
    for shape in (
        airplane, bathtub, beam, bed, bench, bolt, bookshelf, bottle, bowl, bracket, car, chair,
        desk, dresser, dumbbell, elbow, flange, gear, goblet, hammer, house, ladder, lamp, laptop,
        monitor, mug, nut, rocket, round_table, sofa, spring, stairs, stool, table, tee, tent,
        traffic_cone, truck, umbrella, vase,
    )
}  # fmt: skip
