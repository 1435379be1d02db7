"""Read labelled clouds from the layouts that they come in.

=================================================================  ================================
a folder with ``ply_data_train*.h5`` and ``ply_data_test*.h5``     ModelNet40 (hdf5, 2048 points)
a folder with ``training_*.h5`` and ``test_*.h5``, or one of them  ScanObjectNN
a folder with ``modelnet40_train.txt`` and ``modelnet40_test.txt`` ModelNet40 (normal, resampled)
an ``.npz`` file                                                   points and labels (`read_npz`)
a folder of class folders, of meshes or clouds                     types: `distill.files.KNOWN`
=================================================================  ================================

The folder above one of the first two will do as well. Whatever is wrong with them becomes a
`DataError` of one line.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from distill.data import Clouds, DataError, Dataset, held_out, normalize, shuffled
from distill.files import KNOWN, cut, listing, sample, visible
from distill.storage import write


def read(
    source: Path, *, cache: Path | None = None, points: int = 1024, ragged: bool = False
) -> Dataset:
    """Read whatever lies at `source`.

    Args:
        source: a file or a folder, see the module's description.
        cache: a folder to keep clouds in that were sampled from meshes.
        points: how many points to sample from each mesh, or to draw of clouds of unequal size.
        ragged: keep those of them with fewer points as they are.

    Raises:
        DataError: there is nothing that can be read.
    """
    if not source.exists():
        message = f"{source}: no such file or folder"
        raise DataError(message)
    if source.is_file():
        if source.suffix == ".npz":
            return read_npz(source, points=points, ragged=ragged)
        if source.suffix in {".h5", ".hdf5"}:
            return read_scanobjectnn(source)
        message = f"{source}: expected a folder, an .npz or an .h5 file"
        raise DataError(message)
    for pattern, reader in (
        ("ply_data_*.h5", read_modelnet),
        ("training_*.h5", read_scanobjectnn),
    ):
        found = [path for path in source.rglob(pattern) if visible(path, source)]
        places = sorted({path.parent for path in found})
        if source in places:
            return reader(source)
        if len(places) > 1:
            listed = ", ".join(str(place.relative_to(source)) for place in places)
            message = f"{source}: several data sets below it; name one of {listed}"
            raise DataError(message)
        if places:
            return reader(places[0])
    return read_folder(source, cache=cache, points=points)


def dataset(
    source: Path,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    names: list[str] | None = None,
    notes: tuple[str, ...] = (),
    lengths: tuple[np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    """Check and normalise two splits of points ``(n, P, >= 3)`` and labels ``(n,)``.

    With `lengths`, the first so many points are the cloud, in random order already, and what
    follows repeats them.
    """
    most, total = -1, len(train[0]) + len(test[0]) if train[0].ndim and test[0].ndim else 0
    splits = []
    sizes = (None, None) if lengths is None else lengths
    for split, (points, given), size in zip(
        ("training", "test"), (train, test), sizes, strict=True
    ):
        labels = np.asarray(given).reshape(-1)
        problem = ""
        if points.ndim == 3 and points.shape[1] == 3 < points.shape[2]:
            problem = (
                f"expected {split} points of shape (n, P, 3), got {points.shape}; transpose them, "
                "points.transpose(0, 2, 1)"
            )
        elif points.ndim != 3 or points.shape[-1] < 3 or 0 in points.shape:
            problem = f"expected {split} points of shape (n, P, 3), got {points.shape}"
        elif points.dtype.kind not in "fiu":
            problem = f"expected {split} points of real numbers, got {points.dtype}; convert them"
        elif len(labels) != len(points):
            problem = f"{len(points)} {split} clouds, but {len(labels)} labels"
        elif labels.dtype.kind not in "iu":
            problem = (
                f"expected {split} labels 0, 1, ..., got {labels.dtype}; number the classes, and "
                "name them in classes"
            )
        elif labels.min() < 0:
            problem = f"expected {split} labels 0, 1, ..., got {labels.dtype} from {labels.min()}"
        elif not np.isfinite(points).all():
            problem = f"{split} points hold NaN or infinity; leave those points out"
        elif names is not None and labels.max() >= len(names):
            problem = f"label {labels.max()} in the {split} split, but {len(names)} class names"
        elif labels.max() >= total:
            problem = (
                f"label {labels.max()} in the {split} split of {total} clouds; number the classes "
                "0, 1, ... without gaps"
            )
        if problem:
            message = f"{source}: {problem}"
            raise DataError(message)
        most = max(most, int(labels.max()))
        clouds = normalize(points[..., :3])
        made = (clouds if size is not None else shuffled(clouds), labels.astype(np.int64), size)
        splits.append(Clouds(*(torch.from_numpy(part) for part in made if part is not None)))
    names = names or [str(label) for label in range(most + 1)]
    return Dataset(source.stem, splits[0], splits[1], names, notes)


def read_npz(path: Path, *, points: int = 1024, ragged: bool = False) -> Dataset:
    """Read points and labels.

    Either ``train_points``, ``train_labels``, ``test_points`` and ``test_labels``; or ``points``
    and ``labels`` (or ``data``/``x`` and ``label``/``y``), with ``n_train`` if the first so many
    are for training, else a fifth of each class is held out. With ``lengths``, the points
    ``(sum of the lengths, 3)`` are clouds of unequal size one after the other, of which `points`
    each are drawn, or, for `ragged` batches, at most so many. ``deltas`` instead of points are
    clouds coded as differences. ``classes`` names the classes.
    """
    failures = (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, NotImplementedError)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (*failures, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        message = f"{path}: not a readable .npz file ({reason}); save it again with numpy.savez"
        raise DataError(message) from error
    flat = [key for key, array in arrays.items() if key != "n_train" and not array.ndim]
    if flat:
        message = f"{path}: expected {flat[0]} to be an array, got a single value; save the arrays"
        raise DataError(message)
    names = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    if "train_points" in arrays:
        needed = ("train_points", "train_labels", "test_points", "test_labels")
        missing = [key for key in needed if key not in arrays]
        if missing:
            message = f"{path}: has train_points, but no {', '.join(missing)}"
            raise DataError(message)
        train, labels, test_points, test_labels = (arrays[key] for key in needed)
        return dataset(path, (train, labels), (test_points, test_labels), names)
    labels = next((arrays[key] for key in ("labels", "label", "y") if key in arrays), None)
    clouds = next((arrays[key] for key in ("points", "data", "x") if key in arrays), None)
    if "deltas" in arrays:
        clouds = from_deltas(arrays["deltas"])
    if clouds is None or labels is None:
        found = ", ".join(arrays) or "nothing"
        message = f"{path}: expected arrays named points and labels, found {found}"
        raise DataError(message)
    labels = labels.reshape(-1)
    lengths = None
    if "lengths" in arrays:
        clouds = _ragged(path, clouds, arrays["lengths"], points)
        lengths = np.minimum(arrays["lengths"].astype(np.int64), points) if ragged else None
    if len(clouds) != len(labels):
        message = f"{path}: {len(clouds)} clouds, but {len(labels)} labels"
        raise DataError(message)
    test = held_out(labels, 0.2)
    if "n_train" in arrays:
        count = arrays["n_train"]
        if count.size != 1 or count.dtype.kind not in "iu":
            message = f"{path}: expected n_train to be one integer, got {count.dtype} {count.shape}"
            raise DataError(message)
        test = np.arange(len(labels)) >= int(count.reshape(()))
    splits = (~test, test)
    train_split, test_split = ((clouds[split], labels[split]) for split in splits)
    sizes = None if lengths is None else (lengths[~test], lengths[test])
    return dataset(path, train_split, test_split, names, lengths=sizes)


def _ragged(path: Path, points: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """Clouds of equal size from clouds of unequal size."""
    problem = ""
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind not in "fiu":
        problem = f"expected points (sum of the lengths, 3), got {points.dtype} {points.shape}"
    elif lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not (lengths > 0).all():
        problem = f"expected lengths (n,) of at least 1, got {lengths.dtype} {lengths.shape}"
    elif sum(lengths.tolist()) != len(points):
        problem = f"the lengths sum to {sum(lengths.tolist())}, but there are {len(points)} points"
    if problem:
        message = f"{path}: {problem}; save points, lengths and labels of the same clouds"
        raise DataError(message)
    return cut(points, lengths, count)


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
                return np.asarray(file["data"]), label
        except (OSError, KeyError, ValueError, AttributeError, TypeError, MemoryError) as error:
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


def _lists(folder: Path) -> dict[str, bool]:
    """Of the names in ``*_train.txt`` and ``*_test.txt``, whether each is for testing.

    ModelNet's release has lists for 10 and for 40 classes: those of most names are taken.
    """
    found: list[dict[str, bool]] = []
    for train in sorted(folder.glob("*_train.txt")):
        test = train.with_name(train.name.replace("_train.txt", "_test.txt"))
        if test.is_file() and visible(train, folder):
            texts = [file.read_text(encoding="utf-8-sig").split() for file in (train, test)]
            found.append({n: bool(tested) for tested, names in enumerate(texts) for n in names})
    return max(found, key=len, default={})


def read_folder(folder: Path, *, cache: Path | None = None, points: int = 1024) -> Dataset:
    """Class folders of meshes or clouds.

    ``class/train/`` and ``class/test/`` (as ModelNet40 comes), ``train/class/`` and ``test/class/``
    or lists of names (``modelnet40_train.txt`` and ``modelnet40_test.txt``) are the splits; without
    any, a fifth of each class is held out.
    """
    top = sorted(path for path in folder.iterdir() if path.is_dir() and visible(path, folder))
    by_split = {path.name: path for path in top if path.name in {"train", "test"}}
    if len(by_split) == 2:
        top = [path for split in by_split.values() for path in split.iterdir() if path.is_dir()]
        top = [path for path in top if visible(path, folder)]
    lists = _lists(folder)
    files: list[Path] = []
    owners, tested, unknown, unlisted = [], [], 0, 0
    for place in sorted(top):
        known, others = listing(place)
        unknown += others
        for path in known:
            if lists and path.stem not in lists:
                unlisted += 1
                continue
            files.append(path)
            owners.append(place.name)
            split = {"train": 0, "test": 1}.get(_split_of(path, folder), -1)
            tested.append(int(lists[path.stem]) if lists else split)
    if not files:
        message = (
            f"{folder}: no class folders with files of a known type ({', '.join(sorted(KNOWN))}), "
            "and no h5; expected folder/class/file"
        )
        raise DataError(message)
    absent = sorted(lists.keys() - {path.stem for path in files})
    if absent:
        message = (
            f"{folder}: {len(absent)} names of the lists have no file, {absent[0]} for one; take a "
            "whole copy, or take the names out"
        )
        raise DataError(message)
    names = sorted(set(owners))
    label, split = np.array([names.index(owner) for owner in owners]), np.array(tested)
    test = split == 1 if (split >= 0).all() else held_out(label, 0.2)
    if test.all() or not test.any():
        message = f"{folder}: all files are in one split; expected both train and test"
        raise DataError(message)
    clouds = _sampled(files, folder.name, cache, points)
    notes = [
        f"{folder}: {count} {kind} left out"
        for count, kind in ((unknown, "files of unknown type"), (unlisted, "files in no list"))
        if count
    ]
    train, rest = (clouds[~test], label[~test]), (clouds[test], label[test])
    return dataset(folder, train, rest, names, tuple(notes))


def _sampled(files: list[Path], name: str, cache: Path | None, points: int) -> np.ndarray:
    """So many points of every file; kept in the cache, for meshes take minutes."""
    stamp = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr(("float64", points, stamp)).encode()).hexdigest()[:12]
    kept = cache / f"clouds-{digest}.npz" if cache else None
    if kept is not None and kept.is_file():
        with np.load(kept) as file:
            return file["points"]
    with Progress(transient=True) as progress:
        shown = progress.track(files, description=f"reading {name}")
        # Centred before they are rounded.
        clouds = np.stack([normalize(sample(path, points)) for path in shown])
    if kept is not None:
        buffer = io.BytesIO()
        np.savez(buffer, points=clouds)
        write(kept, buffer.getvalue())
    return clouds


def _split_of(path: Path, folder: Path) -> str:
    parts = path.relative_to(folder).parts[:-1]
    return next((part for part in parts if part in {"train", "test"}), "")
