"""Tiles chosen by timing, and kept in a file for every process after this one.

The file is tiles.json in FAD_LOSS_CACHE, or in ~/.cache/fad_loss: for each bucket (device, kernel,
format, channels, few or many rows) the number of the fastest entry of the table. Processes that
time at the same moment take turns to write, and each keeps what the others have found.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

Entry = TypeVar("Entry")


def fastest(
    bucket: str, entries: Sequence[Entry], timer: Callable[[Entry], float] | None
) -> int | None:
    """The number of the entry that was the fastest when timed; None if nobody has timed it."""
    choices = tuned()
    if timer is not None and len(entries) > 1 and bucket not in choices:
        times = [timer(entry) for entry in entries]
        remember(bucket, times.index(min(times)))
    number = choices.get(bucket, -1)
    # A file of another version of the table may name an entry that is not there.
    return number if 0 <= number < len(entries) else None


def cache_file() -> Path | None:
    """Where choices are kept; nowhere for a user without a home."""
    folder = os.environ.get("FAD_LOSS_CACHE")
    if folder:
        return Path(folder) / "tiles.json"
    try:
        return Path.home() / ".cache" / "fad_loss" / "tiles.json"
    except RuntimeError:
        return None


@cache
def tuned() -> dict[str, int]:
    """Choices by bucket; none if the file is missing or unreadable."""
    path = cache_file()
    return {} if path is None else _read(path)


def _read(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text())
        return {str(bucket): int(number) for bucket, number in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def remember(bucket: str, number: int) -> None:
    """Keep a choice, for this process and, where the file can be written, for the next."""
    choices = tuned()
    choices[bucket] = number
    path = cache_file()
    if path is None:
        _log("there is no home directory; set FAD_LOSS_CACHE to a folder")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            merged = {**_read(path), bucket: number}
            # A reader, who does not wait, sees the old file or the new one.
            part = path.with_name(f"{path.name}.{os.getpid()}")
            part.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
            part.replace(path)
    except OSError as error:
        _log(error)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Until the end of the block, whoever else wants to write the file waits."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _log(reason: object) -> None:
    logging.getLogger(__name__).warning("tuned tiles are not kept: %s", reason)
