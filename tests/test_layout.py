"""The house: what may import what, and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "fad_loss"
# From the ground up. A module imports from its own floor and those below it.
FLOORS = [
    ("_errors", "_checks", "_ragged", "_snapshot"),
    ("ops",),
    ("_points", "_game", "_paths", "_state", "ragged", "correspondence", "standardize"),
    ("distances", "metrics", "objectives", "penalties", "discriminators"),
    ("_fingerprints", "_advice", "gradients", "capture", "_layouts", "_places"),
    ("_entrance", "loss"),
    ("distiller",),
    ("__init__",),
    ("_selfcheck", "_measure", "__main__"),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
OPS = [
    ("kernels", "_dense", "_precision", "_backends", "_inputs", "_operators", "_cost"),
    ("_tiled", "_library"),
    ("_triton",),
    ("__init__",),
]
FLOOR_OF_OPS = {room: number for number, rooms in enumerate(OPS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of this library that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        # What only a type checker reads is no dependency.
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in NAMES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "fad_loss"}


def room_of(name: str, level: int = 1) -> str:
    parts = name.split(".")
    return parts[level] if len(parts) > level else "__init__"


def test_every_room_has_a_floor():
    assert {room_of(name) for name in NAMES} == set(FLOOR)
    inside = {room_of(name, 2) for name in NAMES if room_of(name) == "ops"}
    assert inside == set(FLOOR_OF_OPS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_from_a_floor_above(path):
    own = name_of(path)
    for other in imported(path):
        assert FLOOR[room_of(other)] <= FLOOR[room_of(own)], f"{own} imports {other}"
        if room_of(own) == room_of(other) == "ops":
            below, here = FLOOR_OF_OPS[room_of(other, 2)], FLOOR_OF_OPS[room_of(own, 2)]
            assert below <= here, f"{own} imports {other}"


def test_no_module_imports_itself_around_corners():
    graph = {name_of(path): imported(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name in done:
            return
        for other in graph[name]:
            # A package's own front page is not a step of the way from inside it.
            if not name.startswith(f"{other}."):
                visit(other, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_a_reader(path):
    assert len(path.read_text().splitlines()) <= 450
