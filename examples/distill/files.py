"""One mesh or cloud from one file, of whatever type: so many points of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distill.data import DataError

MESHES = {".off", ".obj", ".ply", ".stl", ".glb", ".gltf"}
TEXTS = {".xyz", ".txt", ".pts", ".csv", ".asc"}
SCANS = {".npy", ".pcd", ".las", ".laz", ".bin"}
KNOWN = MESHES | TEXTS | SCANS
# What may stand before the numbers: a line of names, and one with the number of points.
HEADER = 2


def sample(path: Path, count: int) -> np.ndarray:
    """`count` points of the surface of a mesh, or of a cloud: ``(count, 3)`` float64.

    Raises:
        DataError: the file is not what its name says.
    """
    kind = path.suffix.lower()
    try:
        if kind in MESHES:
            points = _mesh(path, count)
        elif kind in TEXTS:
            points = _text(path)
        else:
            points = READERS[kind](path)
    except ModuleNotFoundError as error:
        message = f"{path}: {kind} files need {error.name}; pip install 'fad-loss[scans]'"
        raise DataError(message) from error
    except DataError:
        raise
    except Exception as error:  # whatever a reader stumbles over is the file's
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        message = f"{path}: cannot be read ({reason}); is it a whole {kind} file? Remove it if not"
        raise DataError(message) from error
    return pick(check(path, points), count, np.random.default_rng(0))


def check(path: Path, points: np.ndarray) -> np.ndarray:
    """Finite coordinates of points, one point a row."""
    problem = ""
    if points.dtype.kind not in "fiu":
        problem = f"expected real numbers, got {points.dtype}; keep the coordinates only"
    elif points.ndim == 2 and points.shape[0] == 3 and points.shape[1] > 3:
        problem = f"expected points (n, 3), got {points.shape}; transpose it, array.T"
    elif points.ndim != 2 or points.shape[1] < 3 or not len(points):
        problem = f"expected points (n, 3), got an array of shape {points.shape}"
    elif not np.isfinite(points[:, :3]).all():
        problem = "expected finite points, got NaN or infinity; leave those points out"
    if problem:
        message = f"{path}: {problem}"
        raise DataError(message)
    return points[:, :3].astype(np.float64)


def pick(points: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` of the points, some several times if there are fewer."""
    index = random.permutation(len(points))[:count]
    if len(index) < count:
        index = np.concatenate([index, random.integers(len(points), size=count - len(index))])
    return points[index]


def _mesh(path: Path, count: int) -> np.ndarray:
    import trimesh  # noqa: PLC0415

    _check_claims(path)
    mesh = trimesh.load(path, process=False)
    if isinstance(mesh, trimesh.Scene):
        mesh = mesh.to_geometry()
    if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
        drawn, _ = trimesh.sample.sample_surface(mesh, count, seed=0)
        return np.asarray(drawn)
    return np.asarray(mesh.vertices)


def _check_claims(path: Path) -> None:
    """A header may claim any number of vertices, and readers make room for them at once."""
    if path.suffix.lower() != ".ply":
        return
    with path.open("rb") as file:
        head = file.read(1 << 16)
    size = path.stat().st_size
    for claimed in re.findall(rb"element\s+\w+\s+(\d+)", head.split(b"end_header")[0]):
        if int(claimed) > size:
            message = (
                f"{path}: the header claims {int(claimed):,} elements, in a file of {size:,} bytes;"
                " the file is damaged or cut off: take a new copy, or remove it"
            )
            raise DataError(message)


def _numbers(line: str) -> list[float] | None:
    """The first three numbers of a line; None if they are not all numbers."""
    if ";" in line:  # then a comma is a decimal point
        fields = line.replace(",", ".").replace(";", " ").split()
    else:
        fields = line.replace(",", " ").split()
    try:
        return [float(field) for field in fields[:3]]
    except ValueError:
        return None


def _text(path: Path) -> np.ndarray:
    """Three numbers a line, whatever is between and after them.

    A byte-order mark, empty lines, comments after # or //, and up to two lines of header are
    passed over.
    """
    rows: list[list[float]] = []
    header = 0
    for number, raw in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        line = re.split(r"#|//", raw)[0].strip()
        if not line:
            continue
        found = _numbers(line)
        if found is None or len(found) < 3:
            if not rows and header < HEADER:
                header += 1
                continue
            message = (
                f"{path}: line {number}: expected three numbers, got {raw.strip()[:40]!r}; "
                "correct the line, or begin it with #"
            )
            raise DataError(message)
        rows.append(found)
    if not rows:
        message = f"{path}: expected lines of three numbers, found none; remove the file"
        raise DataError(message)
    return np.array(rows)


def _las(path: Path) -> np.ndarray:
    import laspy  # noqa: PLC0415

    return np.asarray(laspy.read(path).xyz)


def _pcd(path: Path) -> np.ndarray:
    from pypcd4 import PointCloud  # noqa: PLC0415

    return PointCloud.from_path(path).numpy(("x", "y", "z"))


def _bin(path: Path) -> np.ndarray:
    """KITTI's scans: x, y, z and intensity in float32; nuScenes' ``.pcd.bin`` have a ring too."""
    columns = 5 if path.name.lower().endswith(".pcd.bin") else 4
    values = np.fromfile(path, dtype="<f4")
    if path.stat().st_size % (4 * columns):
        message = (
            f"{path}: expected float32 numbers, {columns} for each point, got "
            f"{path.stat().st_size:,} bytes; save it as .npy, whose shape is known"
        )
        raise DataError(message)
    return values.reshape(-1, columns)


def _npy(path: Path) -> np.ndarray:
    # Mapped: a header that claims more than there is fails at once.
    return np.load(path, allow_pickle=False, mmap_mode="r")


READERS: dict[str, Callable[[Path], np.ndarray]] = {
    ".npy": _npy,
    ".las": _las,
    ".laz": _las,
    ".pcd": _pcd,
    ".bin": _bin,
}


def visible(path: Path, folder: Path) -> bool:
    """Whether a path below a folder is no hidden file, nor what macOS adds to archives."""
    parts = path.relative_to(folder).parts
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def listing(folder: Path) -> tuple[list[Path], int]:
    """All files of known types below a folder, and how many there are of other types."""
    every = sorted(p for p in folder.rglob("*") if p.is_file() and visible(p, folder))
    known = [path for path in every if path.suffix.lower() in KNOWN]
    return known, len(every) - len(known)


def cut(points: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """`count` points of each of several clouds that lie one after the other."""
    ends = itertools.accumulate(int(length) for length in lengths)
    random = np.random.default_rng(0)
    drawn = [
        pick(points[end - int(length) : end], count, random)
        for end, length in zip(ends, lengths, strict=True)
    ]
    return np.stack(drawn)
