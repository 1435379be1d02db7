"""The example's data: what it generates, what it reads, and what it says about broken input."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

h5py = pytest.importorskip("h5py")
trimesh = pytest.importorskip("trimesh")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from distill import catalog, data, files, readers, shapes  # noqa: E402


def clouds(count=10, points=16, seed=0):
    return np.random.default_rng(seed).normal(size=(count, points, 3)).astype(np.float32)


def labels(count=10, classes=2):
    return np.arange(count) % classes


# ----------------------------------------------------------------------------------- generated


def test_synthetic_follows_from_the_seed():
    first, again = (data.synthetic(train=2, test=1, points=32) for _ in range(2))
    other = data.synthetic(train=2, test=1, points=32, seed=1)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len(first.classes) == 40
    assert first.train.points.shape == (80, 32, 3)
    assert first.train.points.dtype == torch.float32
    assert first.test.labels.tolist() == list(range(40))


def test_synthetic_clouds_do_not_depend_on_how_many_there_are():
    few, more = (data.synthetic(train=n, test=1, points=16) for n in (1, 2))
    assert torch.equal(few.train.points, more.train.points[::2])


def test_synthetic_members_of_a_class_differ():
    points = data.synthetic(train=2, test=1, points=64).train.points
    spread = points.std(dim=1)  # of each cloud along each axis
    assert ((spread[::2] - spread[1::2]).abs().amax(dim=1) > 0.005).sum() > 30


@pytest.mark.parametrize("name", catalog.CLASSES)
def test_every_class_makes_surfaces(name):
    for seed in range(3):
        random = np.random.default_rng(seed)
        points = shapes.draw(catalog.CLASSES[name](random), 200, random)
        assert points.shape == (200, 3)
        assert np.isfinite(points).all()
        assert np.ptp(points, axis=0).max() > 0.3


def test_parts_are_sampled_evenly_and_know_their_area():
    random = np.random.default_rng(0)
    disc = shapes.frustum(0, 2, 0, 0)
    assert disc.area == pytest.approx(4 * np.pi)
    radius = np.linalg.norm(disc.draw(random, 20_000), axis=1)
    assert (radius < 1).mean() == pytest.approx(1 / 4, abs=0.01)
    assert sum(p.area for p in shapes.box(1, 2, 3)) == pytest.approx(22)
    assert sum(p.area for p in shapes.ball(1.0)) == pytest.approx(4 * np.pi, rel=0.02)
    ring = shapes.tube(shapes.arc(1.0, 0, 1), 0.1)
    assert ring[0].area == pytest.approx(4 * np.pi**2 * 0.1, rel=0.01)
    points = ring[0].draw(random, 1000)
    axis = np.stack([points[:, 0], points[:, 2]]) / np.hypot(points[:, 0], points[:, 2])
    nearest = np.stack([axis[0], np.zeros(1000), axis[1]], axis=1)
    assert np.linalg.norm(points - nearest, axis=1) == pytest.approx(0.1, abs=1e-4)


def test_move_turns_then_shifts():
    point = [shapes.Part(1.0, lambda random, n: np.array([[1.0, 0.0, 0.0]]))]
    moved = shapes.move(point, (0, 0, 5), turn=0.25)[0].draw(np.random.default_rng(0), 1)
    assert moved == pytest.approx(np.array([[0.0, 1.0, 5.0]]))


# ------------------------------------------------------------------------------------ prepared


def test_normalize_centres_and_fits_the_unit_ball():
    points = data.normalize(clouds() * [1, 2, 3] + 7)
    assert np.linalg.norm(points, axis=-1).max(axis=1) == pytest.approx(1)
    assert points.min(axis=1) == pytest.approx(-points.max(axis=1), abs=1e-6)
    assert np.isfinite(data.normalize(np.zeros((1, 4, 3)))).all()


def test_held_out_takes_a_share_of_every_class():
    marked = data.held_out(np.repeat([0, 1, 2], [10, 20, 2]), 0.2)
    assert [marked[:10].sum(), marked[10:30].sum(), marked[30:].sum()] == [2, 4, 1]


def test_validation_leaves_the_test_split_out():
    full = data.synthetic(train=10, test=1, points=8)
    part = full.validation()
    assert len(part.train) == 360
    assert len(part.test) == 40
    rows = {tuple(cloud.flatten().tolist()) for cloud in part.test.points}
    assert not rows & {tuple(cloud.flatten().tolist()) for cloud in full.test.points}


def test_augmentation_stays_in_range_and_follows_the_generator():
    points = torch.from_numpy(clouds(50))

    def run(**options):
        generator = torch.Generator().manual_seed(3)
        return data.augment(points, generator, **options)

    plain = run()
    assert torch.equal(plain, run())
    scale = (plain[:, 1:] - plain[:, :1]) / (points[:, 1:] - points[:, :1])
    assert 2 / 3 - 1e-3 < scale.quantile(0.05) < scale.quantile(0.95) < 3 / 2 + 1e-3
    assert run(jitter=0.01).sub(plain).abs().max() <= 0.0501
    turned = run(rotate=True)
    assert not torch.allclose(turned, plain)


def test_clouds_draw_points_of_the_same_cloud():
    points = torch.arange(60.0).reshape(2, 10, 3)
    drawn = data.Clouds(points, torch.arange(2)).draw(4, torch.Generator().manual_seed(0)).points
    assert drawn.shape == (2, 4, 3)
    for cloud, full in zip(drawn, points, strict=True):
        rows = {tuple(row) for row in full.tolist()}
        assert len({tuple(row) for row in cloud.tolist()} & rows) == 4


def test_ragged_clouds_draw_their_own_points_alone():
    points = torch.arange(60.0).reshape(2, 10, 3)
    clouds = data.Clouds(points, torch.arange(2), torch.tensor([3, 9]))
    drawn = clouds.draw(5, torch.Generator().manual_seed(0))
    assert drawn.lengths.tolist() == [3, 5]
    few, many = data.packed(drawn.points, drawn.lengths).unbind()
    assert {tuple(row) for row in few.tolist()} == {tuple(row) for row in points[0, :3].tolist()}
    assert len({tuple(row) for row in many.tolist()}) == 5
    assert {tuple(row) for row in many.tolist()} < {tuple(row) for row in points[1, :9].tolist()}
    assert [len(cloud) for cloud in clouds.first(4).unbind()] == [3, 4]
    # Corrupted each for itself: of a cloud of 3, two are kept and one comes twice.
    corrupted = data.corrupted(clouds, "missing region", 8)
    assert corrupted.lengths.tolist() == [3, 8]
    assert torch.equal(corrupted.points[0, 3:], points[0, 3:8])


def test_npz_of_clouds_of_unequal_size_keeps_them(tmp_path):
    lengths = np.array([5, 40, 7, 12] * 5)
    points = np.random.default_rng(0).normal(size=(lengths.sum(), 3)).astype(np.float32)
    path = tmp_path / "some.npz"
    np.savez(path, points=points, lengths=lengths, labels=np.arange(20) % 4)
    kept = readers.read(path, points=16, ragged=True)
    assert kept.train.points.shape[1:] == (16, 3)
    for split in (kept.train, kept.test):
        sizes = torch.tensor([5, 16, 7, 12])  # one for each class; at most as many as asked for
        assert torch.equal(split.lengths, sizes[split.labels])
        for cloud in split.first(16).unbind():
            assert len(cloud.unique(dim=0)) == len(cloud)
    assert kept.fingerprint() != readers.read(path, points=16).fingerprint()
    assert len(kept.validation().test.lengths) == len(kept.validation().test)


# ---------------------------------------------------------------------------------------- npz


def test_npz_of_points_and_labels_is_split(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, points=clouds(20), labels=labels(20), classes=["cup", "jar"])
    read = readers.read(path)
    assert (len(read.train), len(read.test), read.classes) == (16, 4, ["cup", "jar"])
    assert readers.read(path).fingerprint() == read.fingerprint()


def test_npz_with_given_splits(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, data=clouds(), label=labels()[:, None], n_train=7)
    assert len(readers.read(path).test) == 3
    np.savez(
        path,
        train_points=clouds(6, 8),
        train_labels=labels(6),
        test_points=clouds(4, 12),
        test_labels=labels(4),
    )
    read = readers.read(path)
    assert read.train.points.shape[1] == 8
    assert read.test.points.shape[1] == 12


def test_npz_of_differences(tmp_path):
    path = tmp_path / "coded.npz"
    whole = np.random.default_rng(0).integers(-600, 600, size=(5, 16, 3)).astype(np.int16)
    coded = np.moveaxis(np.diff(whole, axis=1, prepend=np.int16(0)), -1, 0)
    names = ["a", "b"]
    np.savez(path, deltas=coded, labels=labels(5), n_train=4, classes=names, test_in_train=[False])
    assert readers.from_deltas(coded) == pytest.approx(whole / 1023)
    read = readers.read(path)
    assert (len(read.train), len(read.test), read.classes) == (4, 1, names)
    expected = np.sort(data.normalize(whole / 1023)[4], axis=0)
    assert np.sort(read.test.points[0].numpy(), axis=0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"points": clouds()}, "expected arrays named points and labels, found points"),
        ({"points": clouds(), "labels": labels(9)}, "10 clouds, but 9 labels"),
        ({"points": clouds()[..., :2], "labels": labels()}, "expected training points of shape"),
        ({"points": clouds() * np.nan, "labels": labels()}, "NaN or infinity"),
        ({"points": clouds(), "labels": labels() - 1}, "expected training labels 0, 1"),
        ({"points": clouds(), "labels": labels() * 0.5}, "expected training labels 0, 1"),
        ({"points": clouds(), "labels": labels(), "classes": ["one"]}, "but 1 class names"),
        ({"train_points": clouds(), "train_labels": labels()}, "no test_points, test_labels"),
        ({"points": clouds(), "labels": labels(), "n_train": 10}, "expected test points of shape"),
    ],
)
def test_npz_that_does_not_fit(tmp_path, arrays, message):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    with pytest.raises(data.DataError, match=message) as caught:
        readers.read(path)
    assert str(path) in str(caught.value)


# ----------------------------------------------------------------------------------------- h5


def write_h5(path, count=4, points=16, classes=2, seed=0):
    with h5py.File(path, "w") as file:
        file["data"] = clouds(count, points, seed)
        file["label"] = labels(count, classes).astype(np.uint8)[:, None]


def test_modelnet_folder(tmp_path):
    for number in range(2):
        write_h5(tmp_path / f"ply_data_train{number}.h5", seed=number)
    write_h5(tmp_path / "ply_data_test0.h5")
    (tmp_path / "shape_names.txt").write_text("airplane\nbathtub\n")
    read = readers.read(tmp_path)
    assert (len(read.train), len(read.test)) == (8, 4)
    assert read.classes == ["airplane", "bathtub"]


def test_scanobjectnn_by_folder_and_by_file(tmp_path):
    write_h5(tmp_path / "training_objectdataset.h5", 6)
    write_h5(tmp_path / "test_objectdataset.h5", 3)
    read = readers.read(tmp_path)
    assert (len(read.train), len(read.test), read.classes) == (6, 3, ["0", "1"])
    write_h5(tmp_path / "training_objectdataset_augmented25_norot.h5", 8)
    with pytest.raises(data.DataError, match="several variants; name the file of one of them"):
        readers.read(tmp_path)
    assert len(readers.read(tmp_path / "training_objectdataset.h5").train) == 6
    with pytest.raises(data.DataError, match=r"test_objectdataset_augmented25_norot.h5: no such"):
        readers.read(tmp_path / "training_objectdataset_augmented25_norot.h5")


def test_broken_h5(tmp_path):
    write_h5(tmp_path / "ply_data_train0.h5")
    with pytest.raises(data.DataError, match="no ply_data_test"):
        readers.read(tmp_path)
    broken = tmp_path / "ply_data_test0.h5"
    broken.write_bytes(b"not h5")
    with pytest.raises(data.DataError, match=r"ply_data_test0\.h5: not a readable h5 file"):
        readers.read(tmp_path)
    with h5py.File(broken, "w") as file:
        file["data"] = clouds()
    with pytest.raises(data.DataError, match="not a readable h5 file with data and label"):
        readers.read(tmp_path)
    write_h5(broken)
    write_h5(tmp_path / "ply_data_test1.h5", points=8)
    with pytest.raises(data.DataError, match="different shapes"):
        readers.read(tmp_path)


# ------------------------------------------------------------------------------------ folders


def write_mesh(path, size=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.creation.box((size, 1, 1)).export(path)


def write_cloud(path, count=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.PointCloud(clouds(1, count)[0]).export(path)


def test_folder_in_the_layout_of_modelnet(tmp_path):
    for name in ("box", "brick"):
        write_mesh(tmp_path / name / "train" / "1.off")
        write_mesh(tmp_path / name / "train" / "2.off", 2.0)
        write_mesh(tmp_path / name / "test" / "3.off")
    read = readers.read(tmp_path, points=64)
    assert (len(read.train), len(read.test), read.classes) == (4, 2, ["box", "brick"])
    assert read.train.points.shape == (4, 64, 3)
    again = readers.read(tmp_path, points=64)
    assert read.fingerprint() == again.fingerprint()


def test_folder_with_splits_on_top(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_cloud(tmp_path / split / name / "1.ply")
    read = readers.read(tmp_path, points=32)
    assert (len(read.train), len(read.test), read.classes) == (2, 2, ["a", "b"])


def test_folder_of_several_formats_without_splits(tmp_path):
    write_mesh(tmp_path / "a" / "1.obj")
    write_cloud(tmp_path / "a" / "2.ply")
    for name, delimiter in (("3.txt", ","), ("4.xyz", " ")):
        np.savetxt(tmp_path / "a" / name, clouds(1, 20)[0], delimiter=delimiter)
    np.save(tmp_path / "a" / "5.npy", clouds(1, 500)[0])
    cache = tmp_path / "cache"
    read = readers.read(tmp_path, points=32, cache=cache)
    assert (len(read.train), len(read.test)) == (4, 1)
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    assert readers.read(tmp_path, points=32, cache=cache).fingerprint() == read.fingerprint()
    assert kept.stat().st_mtime_ns == before


def test_header_without_a_line_break(tmp_path):
    write_mesh(tmp_path / "a" / "1.off")
    write_mesh(tmp_path / "a" / "2.off")
    path = tmp_path / "a" / "2.off"
    path.write_text(path.read_text().replace("OFF\n", "OFF", 1))  # as some of ModelNet40's are
    assert len(readers.read(tmp_path, points=8).train) == 1


@pytest.mark.parametrize(
    "name, content",
    [
        ("1.off", "OFF\n3 1 0\n0 0"),
        ("1.ply", "nonsense"),
        ("1.txt", "one two three\n"),
        ("1.xyz", "1 2\n"),
        ("1.xyz", "1 2 nan\n"),
        ("1.npy", ""),
    ],
)
def test_broken_mesh_or_cloud(tmp_path, name, content):
    write_cloud(tmp_path / "a" / "0.ply")
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(data.DataError) as caught:
        readers.read(tmp_path, points=8)
    assert str(tmp_path / "a" / name) in str(caught.value)


def test_folder_without_anything(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(data.DataError, match="no class folders with files of a known type"):
        readers.read(tmp_path)
    write_cloud(tmp_path / "a" / "train" / "0.ply")
    with pytest.raises(data.DataError, match="all files are in one split"):
        readers.read(tmp_path, points=8)


def test_paths_that_are_not_data(tmp_path):
    with pytest.raises(data.DataError, match="no such file or folder"):
        readers.read(tmp_path / "absent")
    other = tmp_path / "notes.md"
    other.write_text("hello")
    with pytest.raises(data.DataError, match=r"expected a folder, an .npz or an .h5 file"):
        readers.read(other)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(data.DataError, match=r"not a readable .npz file"):
        readers.read(broken)


# ------------------------------------------------------------- what was read as something else


def refused(path, *parts, **options):
    """The one line that says why."""
    with pytest.raises(data.DataError) as caught:
        readers.read(path, points=8, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def resampled(folder):
    """In the layout of modelnet40_normal_resampled: coordinates and normals, split by lists."""
    names = {"train": [], "test": []}
    for kind in ("bed", "night_stand"):
        (folder / kind).mkdir()
        for number in range(1, 6):
            name = f"{kind}_{number:04d}"
            cloud = np.random.default_rng(number).normal(size=(20, 6))
            np.savetxt(folder / kind / f"{name}.txt", cloud, delimiter=",")
            names["test" if number < 4 else "train"].append(name)
    for split, listed in names.items():
        (folder / f"modelnet40_{split}.txt").write_text("\n".join(listed) + "\n")
        (folder / f"modelnet10_{split}.txt").write_text(listed[0] + "\n")
    (folder / "modelnet40_shape_names.txt").write_text("bed\nnight_stand\n")


def test_lists_are_the_splits(tmp_path):
    resampled(tmp_path)
    read = readers.read(tmp_path, points=20)
    assert read.classes == ["bed", "night_stand"]
    # Whichever file: the first three of each class are for testing, as the lists say.
    assert (read.train.labels.tolist(), read.test.labels.tolist()) == (
        [0, 0, 1, 1],
        [0] * 3 + [1] * 3,
    )
    cloud = np.loadtxt(tmp_path / "bed" / "bed_0001.txt", delimiter=",")[:, :3]
    wanted = np.sort(data.normalize(cloud), axis=0)
    assert np.sort(read.test.points[0].numpy(), axis=0) == pytest.approx(wanted, abs=1e-6)
    assert read.notes == ()
    np.savetxt(tmp_path / "bed" / "bed_0009.txt", cloud)
    assert readers.read(tmp_path, points=20).notes == (f"{tmp_path}: 1 files in no list left out",)
    (tmp_path / "bed" / "bed_0002.txt").unlink()
    refused(tmp_path, str(tmp_path), "1 names of the lists have no file, bed_0002")


@pytest.mark.parametrize("kind", ["npy", "xyz", "npz", "h5"])
def test_georeferenced_coordinates_are_centred_before_they_are_rounded(tmp_path, kind):
    small = 0.125 * clouds(4, 64).astype(np.float64)
    utm = small + np.array([512_345.678, 5_432_109.876, 312.5])
    path = tmp_path / f"all.{kind}"
    if kind == "npz":
        np.savez(path, points=utm, labels=labels(4), n_train=2)
    elif kind == "h5":
        for split, part in (("training", utm[:2]), ("test", utm[2:])):
            path = tmp_path / f"{split}_all.h5"
            with h5py.File(path, "w") as file:
                file["data"], file["label"] = part, labels(2)
    else:
        for split, part in (("train", utm[:2]), ("test", utm[2:])):
            for number, cloud in enumerate(part):
                folder = tmp_path / split / "ab"[number]
                folder.mkdir(parents=True, exist_ok=True)
                if kind == "npy":
                    np.save(folder / "1.npy", cloud)
                else:
                    np.savetxt(folder / "1.xyz", cloud, fmt="%.9f")
        path = tmp_path
    read = readers.read(path, points=64)
    found = np.sort(torch.cat([read.train.points, read.test.points]).numpy(), axis=1)
    assert found == pytest.approx(np.sort(data.normalize(small), axis=1), abs=1e-6)


@pytest.mark.parametrize(
    "array, parts",
    [
        (np.zeros((3, 50)), ["(3, 50)", "transpose"]),
        (np.ones((9, 3), dtype=complex), ["complex128", "real numbers"]),
        (np.array([["a", "b", "c"]]), ["real numbers"]),
        (np.float64(1), ["shape ()"]),
        (np.ones((9, 2)), ["(9, 2)"]),
        (np.full((9, 3), np.inf), ["NaN or infinity"]),
    ],
)
def test_npy_that_does_not_fit(tmp_path, array, parts):
    write_cloud(tmp_path / "a" / "0.ply")
    np.save(tmp_path / "a" / "1.npy", array)
    refused(tmp_path, str(tmp_path / "a" / "1.npy"), *parts)


def header(shape, descr="<f4"):
    """A .npy file of a header alone, which claims what is not there."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


@pytest.mark.parametrize("claimed", [10**6, 10**12])
def test_headers_that_claim_more_than_there_is(tmp_path, claimed):
    write_cloud(tmp_path / "a" / "0.ply")
    ply = tmp_path / "a" / "1.ply"
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    for layout in ("ascii", "binary_little_endian"):
        text = (
            f"ply\nformat {layout} 1.0\nelement vertex {claimed}\n{properties}end_header\n0 0 0\n"
        )
        ply.write_text(text)
        refused(tmp_path, str(ply), f"claims {claimed:,} elements")
    ply.unlink()
    npy = tmp_path / "a" / "1.npy"
    npy.write_bytes(header((claimed, 3)))
    refused(tmp_path, str(npy), "cannot be read")
    npz = tmp_path / "big.npz"
    with zipfile.ZipFile(npz, "w") as file:
        file.writestr("points.npy", header((claimed, 16, 3)))
        file.writestr("labels.npy", header((claimed,), "<i8"))
    refused(npz, str(npz), "not a readable .npz file", "save it again")


@pytest.mark.parametrize(
    "arrays, parts",
    [
        ({"points": clouds() + 0j, "labels": labels()}, ["complex64", "convert"]),
        ({"points": clouds().astype(str), "labels": labels()}, ["real numbers"]),
        ({"points": clouds(), "labels": labels().astype(str)}, ["number the classes"]),
        ({"points": clouds(), "labels": np.where(labels() > 0, 10**8, 0)}, ["label 100000000"]),
        ({"points": clouds(), "labels": np.int64(3)}, ["expected labels to be an array"]),
        ({"points": np.float32(3), "labels": labels()}, ["expected points to be an array"]),
        ({"points": clouds().swapaxes(1, 2), "labels": labels()}, ["(8, 3, 16)", "transpose"]),
        ({"points": clouds(), "labels": labels(), "n_train": "two"}, ["n_train", "one integer"]),
        ({"points": np.array([{}], dtype=object), "labels": labels(1)}, ["not a readable .npz"]),
        (
            {"points": clouds()[0], "labels": labels(2), "lengths": [8, 9]},
            ["sum to 17"],
        ),
        ({"points": clouds()[0], "labels": labels(2), "lengths": [16, 0]}, ["at least 1"]),
        ({"points": clouds()[0], "labels": labels(2), "lengths": [8.0, 8]}, ["float64"]),
        (
            {"points": clouds(), "labels": labels(), "lengths": [16] * 10},
            ["(sum of the"],
        ),
    ],
)
def test_npz_of_other_things(tmp_path, arrays, parts):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    refused(path, str(path), *parts)


def test_files_of_unknown_type_are_counted(tmp_path):
    for name in ("a", "b"):
        for number in range(2):
            write_cloud(tmp_path / name / f"{number}.ply")
    (tmp_path / "a" / "view.jpg").write_bytes(b"")
    (tmp_path / "b" / "notes.md").write_text("hello")
    read = readers.read(tmp_path, points=8)
    assert read.notes == (f"{tmp_path}: 2 files of unknown type left out",)
    assert read.validation(0.5).notes == read.to("cpu").notes == read.notes


def test_clouds_of_unequal_size(tmp_path):
    lengths = np.array([3, 40, 8, 100, 16, 5, 9, 30, 50, 7])
    parts = [clouds(1, n, seed=n)[0] + n for n in lengths]
    path = tmp_path / "scans.npz"
    np.savez(path, points=np.concatenate(parts), lengths=lengths, labels=labels(), n_train=4)
    read = readers.read(path, points=16)
    assert (read.train.points.shape, read.test.points.shape) == ((4, 16, 3), (6, 16, 3))
    # The eighth cloud of all: what is drawn of it is of it, up to what normalising does.
    drawn, whole = read.test.points[3].double(), torch.from_numpy(parts[7]).double()
    distances = torch.cdist(drawn, drawn) / torch.cdist(drawn, drawn).max()
    near = torch.cdist(whole, whole)
    ratios = (distances[0, 1:] / distances[0, 1]).sort().values
    assert any(
        all((row / row[j] - r).abs().min() < 1e-4 for r in ratios)
        for row in near
        for j in row.nonzero()
    )


# ------------------------------------------------------------------- what was refused needlessly


ROWS = "1 2 3\n4 5 6\n7 8 10\n"


@pytest.mark.parametrize(
    "text",
    [
        ROWS,
        "x y z\n" + ROWS,
        "3\n" + ROWS,  # .pts files begin with the number of points
        "3\nx y z\n" + ROWS,
        "# a comment\n// another\n" + ROWS,
        ROWS.replace("6\n", "6 # the second\n").replace("10\n", "10 // last\n"),
        "\ufeff" + ROWS,
        "\ufeffx,y,z\n" + ROWS.replace(" ", ","),
        ROWS.replace(" ", ";"),
        ROWS.replace(" ", ",0;").replace("\n", ",0\n"),  # decimal commas
        ROWS.replace(" ", " , ").replace("\n", "\r\n\r\n"),
        ROWS.replace("\n", " 255 255 255 red\n"),
    ],
)
def test_text_clouds(tmp_path, text):
    path = tmp_path / "1.xyz"
    path.write_bytes(text.encode())
    found = files.sample(path, 3)
    assert found[found[:, 0].argsort()].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 10]]
    assert found.dtype == np.float64


@pytest.mark.parametrize(
    "text, part",
    [
        ("a\nb\nc\n" + ROWS, "line 3"),
        (ROWS + "total 3\n", "line 4: expected three numbers, got 'total 3'"),
        ("# nothing\n", "found none"),
        (ROWS + "1 2\n", "line 4"),
    ],
)
def test_text_that_is_no_cloud(tmp_path, text, part):
    path = tmp_path / "1.txt"
    path.write_text(text)
    with pytest.raises(data.DataError, match=part) as caught:
        files.sample(path, 3)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_folder_above_will_do(tmp_path):
    place = tmp_path / "h5_files" / "main_split"
    place.mkdir(parents=True)
    write_h5(place / "training_objectdataset.h5", 6)
    write_h5(place / "test_objectdataset.h5", 3)
    (tmp_path / "__MACOSX" / "main_split").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "main_split" / "training_objectdataset.h5").write_bytes(b"")
    for source in (place, place.parent, tmp_path):
        assert len(readers.read(source).train) == 6
    other = tmp_path / "h5_files" / "main_split_nobg"
    other.mkdir()
    write_h5(other / "training_objectdataset.h5", 6)
    refused(tmp_path, "several data sets below it", "main_split, ", "main_split_nobg")


def test_hidden_files_and_those_of_macos_are_not_data(tmp_path):
    for name in ("a", "b"):
        for number in range(2):
            write_cloud(tmp_path / name / f"{number}.ply")
            (tmp_path / name / f"._{number}.ply").write_bytes(b"\0")
            extra = tmp_path / "__MACOSX" / name
            extra.mkdir(parents=True, exist_ok=True)
            (extra / f"._{number}.ply").write_bytes(b"\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\0")
    read = readers.read(tmp_path, points=8)
    assert (read.classes, read.notes) == (["a", "b"], ())
    assert len(read.train) + len(read.test) == 4


@pytest.mark.parametrize("suffix", [".las", ".laz", ".pcd", ".bin", ".pcd.bin"])
def test_scans(tmp_path, suffix):
    cloud = np.round(clouds(1, 30)[0].astype(np.float64), 3)
    path = tmp_path / f"1{suffix}"
    if suffix in {".las", ".laz"}:
        import laspy

        cloud = cloud + np.array([512_345, 5_432_109, 300])
        made = laspy.create()
        made.header.scales, made.header.offsets = [0.001] * 3, [512_000, 5_432_000, 0]
        made.x, made.y, made.z = cloud.T
        made.write(path)
    elif suffix == ".pcd":
        from pypcd4 import PointCloud

        PointCloud.from_xyz_points(cloud.astype(np.float32)).save(path)
    else:
        columns = np.ones((30, 1 if suffix == ".bin" else 2))
        np.hstack([cloud, columns]).astype("<f4").tofile(path)
    found = files.sample(path, 30)
    order, wanted = found[:, 0].argsort(), cloud[:, 0].argsort()
    assert found[order] == pytest.approx(cloud[wanted], abs=1e-6)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(data.DataError) as caught:
        files.sample(path, 30)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_reader_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "laspy", None)
    path = tmp_path / "1.las"
    path.write_bytes(b"LASF")
    with pytest.raises(data.DataError, match=r"need laspy; pip install 'fad-loss\[scans\]'"):
        files.sample(path, 3)


# --------------------------------------------------------------------------------- corruptions


@pytest.mark.parametrize("name", data.CORRUPTIONS)
def test_corruptions_change_clouds_the_same_way_each_time(name):
    clouds = data.Clouds(torch.randn(5, 40, 3), torch.arange(5))
    before = clouds.points.clone()
    first, again = (data.corrupted(clouds, name, 32) for _ in range(2))
    assert torch.equal(clouds.points, before)
    assert first.points.shape == (5, 32, 3)
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.labels, clouds.labels)
    assert not torch.equal(first.points, before[:, :32])


def test_corruptions_do_what_they_say():
    points = torch.randn(3, 40, 3)
    clouds = data.Clouds(points, torch.arange(3))
    kept = data.corrupted(clouds, "missing region", 40).points
    for cloud, original in zip(kept, points, strict=True):
        missing = [p for p in original if not (cloud == p).all(-1).any()]
        assert len(missing) == 10
        # They lie around one of them: no point that was kept is nearer to it.
        radius = torch.cdist(torch.stack(missing), torch.stack(missing)).amax(1)
        nearest = torch.cdist(torch.stack(missing), cloud).amin(1)
        assert (nearest >= radius).any()
    turned = data.corrupted(clouds, "rotation", 40).points
    torch.testing.assert_close(turned.norm(dim=-1), points.norm(dim=-1))
    assert torch.equal(turned[..., 2], points[..., 2])
    stretched = data.corrupted(clouds, "scale", 40).points / points
    assert stretched.min() >= 0.5
    assert stretched.max() <= 2
    assert stretched.std(dim=1).max() < 1e-4
    noise = data.corrupted(clouds, "noise", 40).points - points
    assert 0.02 < noise.std() < 0.04
