"""Read labelled clouds from the layouts that they come in.

=================================================================  ================================
a folder with ``ply_data_train*.h5`` and ``ply_data_test*.h5``     ModelNet40 (hdf5, 2048 points)
a folder with ``training_*.h5`` and ``test_*.h5``, or one of them  ScanObjectNN
an ``.npz`` file                                                   points and labels (`read_npz`)
a folder of class folders, of meshes or clouds                     OFF, OBJ, PLY, STL, XYZ, NPY, ...
=================================================================  ================================

Whatever is wrong with them becomes a `DataError` of one line.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from distill.data import Clouds, DataError, Dataset, held_out, normalize, shuffled

MESHES = {".off", ".obj", ".ply", ".stl", ".glb", ".gltf"}
TEXTS = {".xyz", ".txt", ".pts", ".csv"}


def read(source: Path, *, cache: Path | None = None, points: int = 1024) -> Dataset:
    """Read whatever lies at `source`.

    Args:
        source: a file or a folder, see the module's description.
        cache: a folder to keep clouds in that were sampled from meshes.
        points: how many points to sample from each mesh.

    Raises:
        DataError: there is nothing that can be read.
    """
    if not source.exists():
        message = f"{source}: no such file or folder"
        raise DataError(message)
    if source.is_file():
        if source.suffix == ".npz":
            return read_npz(source)
        if source.suffix in {".h5", ".hdf5"}:
            return read_scanobjectnn(source)
        message = f"{source}: expected a folder, an .npz or an .h5 file"
        raise DataError(message)
    if list(source.glob("ply_data_*.h5")):
        return read_modelnet(source)
    if list(source.glob("training_*.h5")):
        return read_scanobjectnn(source)
    return read_folder(source, cache=cache, points=points)


def dataset(
    source: Path,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    names: list[str] | None = None,
) -> Dataset:
    """Check and normalise two splits of points ``(n, P, >= 3)`` and labels ``(n,)``."""
    most = -1
    splits = []
    for split, (points, given) in (("training", train), ("test", test)):
        labels = np.asarray(given).reshape(-1)
        problem = ""
        if points.ndim != 3 or points.shape[-1] < 3 or 0 in points.shape:
            problem = f"expected {split} points of shape (n, P, 3), got {points.shape}"
        elif len(labels) != len(points):
            problem = f"{len(points)} {split} clouds, but {len(labels)} labels"
        elif not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            problem = f"expected {split} labels 0, 1, ..., got {labels.dtype} from {labels.min()}"
        elif not np.isfinite(points).all():
            problem = f"{split} points hold NaN or infinity"
        elif names is not None and labels.max() >= len(names):
            problem = f"label {labels.max()} in the {split} split, but {len(names)} class names"
        if problem:
            message = f"{source}: {problem}"
            raise DataError(message)
        most = max(most, int(labels.max()))
        clouds = shuffled(normalize(points[..., :3]))
        splits.append(Clouds(torch.from_numpy(clouds), torch.from_numpy(labels.astype(np.int64))))
    names = names or [str(label) for label in range(most + 1)]
    return Dataset(source.stem, splits[0], splits[1], names)


def read_npz(path: Path) -> Dataset:
    """Read points and labels.

    Either ``train_points``, ``train_labels``, ``test_points`` and ``test_labels``; or ``points``
    and ``labels`` (or ``data``/``x`` and ``label``/``y``), with ``n_train`` if the first so many
    are for training, else a fifth of each class is held out. ``deltas`` instead of points are
    clouds coded as differences. ``classes`` names the classes.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        message = f"{path}: not a readable .npz file ({error})"
        raise DataError(message) from error
    names = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    if "train_points" in arrays:
        needed = ("train_points", "train_labels", "test_points", "test_labels")
        missing = [key for key in needed if key not in arrays]
        if missing:
            message = f"{path}: has train_points, but no {', '.join(missing)}"
            raise DataError(message)
        points, labels, test_points, test_labels = (arrays[key] for key in needed)
        return dataset(path, (points, labels), (test_points, test_labels), names)
    labels = next((arrays[key] for key in ("labels", "label", "y") if key in arrays), None)
    points = next((arrays[key] for key in ("points", "data", "x") if key in arrays), None)
    if "deltas" in arrays:
        points = from_deltas(arrays["deltas"])
    if points is None or labels is None:
        found = ", ".join(arrays) or "nothing"
        message = f"{path}: expected arrays named points and labels, found {found}"
        raise DataError(message)
    labels = labels.reshape(-1)
    if len(points) != len(labels):
        message = f"{path}: {len(points)} clouds, but {len(labels)} labels"
        raise DataError(message)
    test = held_out(labels, 0.2)
    if "n_train" in arrays:
        test = np.arange(len(labels)) >= int(arrays["n_train"])
    return dataset(path, (points[~test], labels[~test]), (points[test], labels[test]), names)


def from_deltas(deltas: np.ndarray) -> np.ndarray:
    """Clouds of 16-bit integers, kept as the differences along a curve through their points.

    ``(3, n, P)`` int16 in units of 1 / 1023, to ``(n, P, 3)`` float32.
    """
    integers = np.cumsum(deltas, axis=-1, dtype=np.int16)
    return np.moveaxis(integers, 0, -1).astype(np.float32) / 1023


def _read_h5(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Points and labels of several files with ``data`` and ``label``, one after the other."""
    import h5py  # noqa: PLC0415

    def read_one(path: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            with h5py.File(path, "r") as file:
                label = file["label"][:].reshape(-1).astype(np.int64)
                return file["data"][:].astype(np.float32), label
        except (OSError, KeyError, ValueError, AttributeError) as error:
            message = f"{path}: not a readable h5 file with data and label ({error})"
            raise DataError(message) from error

    clouds, labels = zip(*map(read_one, files), strict=True)
    shapes = {cloud.shape[1:] for cloud in clouds}
    if len(shapes) > 1:
        message = f"{files[0].parent}: the h5 files hold clouds of different shapes, {shapes}"
        raise DataError(message)
    return np.concatenate(clouds), np.concatenate(labels)


def read_modelnet(folder: Path) -> Dataset:
    """ModelNet40 as ``modelnet40_ply_hdf5_2048``: several h5 files per split."""
    splits = {}
    for split in ("train", "test"):
        files = sorted(folder.glob(f"ply_data_{split}*.h5"))
        if not files:
            message = f"{folder}: no ply_data_{split}*.h5"
            raise DataError(message)
        splits[split] = _read_h5(files)
    listing = folder / "shape_names.txt"
    names = listing.read_text(encoding="utf-8").split() if listing.is_file() else None
    return dataset(folder, splits["train"], splits["test"], names)


def read_scanobjectnn(source: Path) -> Dataset:
    """ScanObjectNN: a variant's ``training_*.h5`` with its ``test_*.h5`` beside it."""
    if source.is_dir():
        files = sorted(source.glob("training_*.h5"))
        if len(files) > 1:
            listed = ", ".join(path.name for path in files)
            message = f"{source}: several variants; name the file of one of them: {listed}"
            raise DataError(message)
        source = files[0]
    variant = source.name.removeprefix("training_").removeprefix("test_")
    train, test = (source.with_name(f"{split}_{variant}") for split in ("training", "test"))
    for path in (train, test):
        if not path.is_file():
            message = f"{path}: no such file (expected beside {source.name})"
            raise DataError(message)
    return dataset(train, _read_h5([train]), _read_h5([test]))


def _files(folder: Path) -> list[Path]:
    known = MESHES | TEXTS | {".npy"}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in known)


def read_folder(folder: Path, *, cache: Path | None = None, points: int = 1024) -> Dataset:
    """Class folders of meshes or clouds.

    ``class/train/`` and ``class/test/`` (as ModelNet40 comes) or ``train/class/`` and
    ``test/class/`` are the splits; without either, a fifth of each class is held out.
    """
    top = sorted(path for path in folder.iterdir() if path.is_dir())
    by_split = {path.name: path for path in top if path.name in {"train", "test"}}
    if len(by_split) == 2:
        top = [path for split in by_split.values() for path in split.iterdir() if path.is_dir()]
    names = sorted({path.name for path in top})
    files, labels, tested = [], [], []
    for place in sorted(top):
        for path in _files(place):
            files.append(path)
            labels.append(names.index(place.name))
            tested.append({"train": 0, "test": 1}.get(_split_of(path, folder), -1))
    if not files:
        known = ", ".join(sorted(MESHES | TEXTS | {".npy"}))
        message = f"{folder}: no class folders with files of a known type ({known}), and no h5"
        raise DataError(message)
    stamp = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr((points, stamp)).encode()).hexdigest()[:12]
    kept = cache / f"clouds-{digest}.npz" if cache else None
    if kept is not None and kept.is_file():
        with np.load(kept) as file:
            clouds = file["points"]
    else:
        with Progress(transient=True) as progress:
            shown = progress.track(files, description=f"reading {folder.name}")
            clouds = np.stack([_sample(path, points) for path in shown])
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.savez(kept, points=clouds)
    label, split = np.array(labels), np.array(tested)
    test = split == 1 if (split >= 0).all() else held_out(label, 0.2)
    if test.all() or not test.any():
        message = f"{folder}: all files are in one split; expected both train and test"
        raise DataError(message)
    return dataset(folder, (clouds[~test], label[~test]), (clouds[test], label[test]), names)


def _split_of(path: Path, folder: Path) -> str:
    parts = path.relative_to(folder).parts[:-1]
    return next((part for part in parts if part in {"train", "test"}), "")


def _sample(path: Path, count: int) -> np.ndarray:
    """`count` points of the surface of a mesh, or of a cloud."""
    random = np.random.default_rng(0)
    try:
        if path.suffix.lower() == ".npy":
            points = np.load(path, allow_pickle=False)
        elif path.suffix.lower() in TEXTS:
            text = path.read_text(encoding="utf-8").replace(",", " ")
            points = np.array([line.split()[:3] for line in text.splitlines() if line.strip()])
            points = points.astype(np.float32)
        else:
            import trimesh  # noqa: PLC0415

            mesh = trimesh.load(path, process=False)
            if isinstance(mesh, trimesh.Scene):
                mesh = mesh.to_geometry()
            if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
                drawn, _ = trimesh.sample.sample_surface(mesh, count, seed=0)
                points = np.asarray(drawn)
            else:
                points = np.asarray(mesh.vertices)
    except Exception as error:
        message = f"{path}: cannot be read ({type(error).__name__}: {error})"
        raise DataError(message) from error
    if points.ndim != 2 or points.shape[1] < 3 or not len(points) or not np.isfinite(points).all():
        message = f"{path}: expected finite points (n, 3), got an array of shape {points.shape}"
        raise DataError(message)
    index = random.permutation(len(points))[:count]
    if len(index) < count:
        index = np.concatenate([index, random.integers(len(points), size=count - len(index))])
    return points[index, :3].astype(np.float32)
