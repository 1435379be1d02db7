"""The example's data: what it generates, what it reads, and what it says about broken input."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

h5py = pytest.importorskip("h5py")
trimesh = pytest.importorskip("trimesh")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from distill import catalog, data, readers, shapes  # noqa: E402


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


def test_subsample_draws_points_of_the_same_cloud():
    points = torch.arange(60.0).reshape(2, 10, 3)
    drawn = data.subsample(points, 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 4, 3)
    for cloud, full in zip(drawn, points, strict=True):
        rows = {tuple(row) for row in full.tolist()}
        assert len({tuple(row) for row in cloud.tolist()} & rows) == 4


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
