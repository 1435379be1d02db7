"""Files that are written whole or not at all, and checkpoints that are known to be whole."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from distill.data import DataError


def write(path: Path, content: bytes) -> None:
    """Write a file such that an interruption or a full disk leaves the old one or the new behind.

    Several runs may write the same file: each has a temporary one of its own.

    Raises:
        DataError: it cannot be written; what was there before is as it was.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        message = (
            f"{path}: cannot be written ({error.strerror}); make room for it, or name another "
            "--output; what was written before is whole, and the same command continues"
        )
        raise DataError(message) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def save(path: Path, content: Any) -> None:
    """What ``torch.save`` makes of it, by `write`; the file holds a checksum of each part."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def load_checkpoint(path: Path, *needed: str) -> dict[str, Any]:
    """Read a checkpoint that this example wrote.

    ``torch.load`` does not look at the checksums in the file: what was damaged on the way would be
    other weights.

    Args:
        path: the file.
        needed: what it must hold, beside its description, its weights and its history.

    Raises:
        DataError: there is none, it was damaged, or it is something else.
    """
    if not path.is_file():
        message = f"{path}: no such checkpoint"
        raise DataError(message)
    failures = (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError)
    remedy = "remove it to train anew, or take a copy"
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            damaged = parts.testzip()
        state = None
        if damaged is None:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (*failures, zipfile.BadZipFile, NotImplementedError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        message = f"{path}: not a readable checkpoint ({reason[0]}); {remedy}"
        raise DataError(message) from error
    if damaged is not None:
        message = f"{path}: damaged (the checksum of {damaged} does not fit); {remedy}"
        raise DataError(message)
    known = isinstance(state, dict) and {"description", "network", "history"} <= state.keys()
    if not known or not {"arch", "width", "classes"} <= dict(state["description"]).keys():
        message = f"{path}: not a checkpoint of this example (expected description and network)"
        raise DataError(message)
    missing = [name for name in needed if name not in state]
    if missing:
        message = f"{path}: has no {', '.join(missing)}, as a training needs that goes on; {remedy}"
        raise DataError(message)
    return state
