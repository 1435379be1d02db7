"""Which entry of the table is taken: by the heuristic, or by timing, remembered in a file."""

from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from fad_loss.ops._triton import configurations
from fad_loss.ops._triton.configurations import TABLE, Tile
from fad_loss.ops._triton.tuning import cache_file, fastest, remember, tuned

TILES = (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 2))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FAD_LOSS_CACHE", str(tmp_path / "cache"))
    tuned.cache_clear()
    yield
    tuned.cache_clear()


def timer(seconds):
    """A timer that gives each tile its time, and a list of what it timed."""
    timed = []

    def measure(tile):
        timed.append(tile)
        return seconds[TILES.index(tile)]

    return measure, timed


def test_without_timing_nothing_is_known_nor_written():
    assert fastest("bucket", TILES, None) is None
    assert not cache_file().exists()


def test_the_fastest_is_timed_once_and_kept():
    measure, timed = timer([3.0, 2.0, 1.0])
    assert fastest("bucket", TILES, measure) == 2
    assert timed == list(TILES)
    assert fastest("bucket", TILES, measure) == 2
    assert timed == list(TILES)
    assert json.loads(cache_file().read_text()) == {"bucket": 2}
    # Another process reads the file, whether it times or not.
    tuned.cache_clear()
    assert fastest("bucket", TILES, None) == 2
    # Another bucket has a choice of its own, and does not lose the first.
    measure, timed = timer([1.0, 2.0, 3.0])
    assert fastest("other", TILES, measure) == 0
    assert json.loads(cache_file().read_text()) == {"bucket": 2, "other": 0}


def test_what_another_process_found_meanwhile_is_kept():
    assert tuned() == {}
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text('{"theirs": 1}')
    remember("ours", 2)
    assert json.loads(cache_file().read_text()) == {"ours": 2, "theirs": 1}


def test_one_process_writes_at_a_time():
    cache_file().parent.mkdir(parents=True)
    with cache_file().with_name("tiles.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = threading.Thread(target=remember, args=("bucket", 1))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        assert not cache_file().exists()
    writer.join(10)
    assert json.loads(cache_file().read_text()) == {"bucket": 1}


def test_one_entry_is_not_timed():
    measure, timed = timer([1.0])
    assert fastest("bucket", TILES[:1], measure) is None
    assert timed == []


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", '{"bucket": 7}', '{"bucket": -1}', '{"bucket": "fast"}', "{broken"]
)
def test_a_file_that_makes_no_sense(content):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert fastest("bucket", TILES, None) is None


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAD_LOSS_CACHE", str(tmp_path / "file"))
    measure, _ = timer([3.0, 1.0, 2.0])
    assert fastest("bucket", TILES, measure) == 1
    assert "not kept" in caplog.text


def test_a_user_without_a_home(monkeypatch, caplog):
    def no_home():
        message = "Could not determine home directory."
        raise RuntimeError(message)

    monkeypatch.delenv("FAD_LOSS_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    measure, _ = timer([3.0, 1.0, 2.0])
    assert fastest("bucket", TILES, None) is None
    assert fastest("bucket", TILES, measure) == 1
    assert "set FAD_LOSS_CACHE" in caplog.text


def test_timing_has_to_be_asked_for_and_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("FAD_LOSS_TUNE", "1")
    assert not configurations.may_time(torch.device("cpu"))


def test_at_most_eight_entries():
    assert max(map(len, TABLE.values())) <= 8
