"""Augmented views of the training clouds, chosen once, and what the teacher says about each.

Most of a distillation's time on a CPU is the teacher's, who says the same whenever it is shown the
same. With ``--views 8`` it is shown eight views of every cloud, once, and all students learn from
those: consistent teaching, which is what makes long schedules pay (Beyer et al., 2022).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data import Clouds, augment
from distill.methods import Seen, teach
from distill.networks import Network
from distill.training import Settings

# Features are kept of so many points of a view; the logits and the pooled features are of all.
KEPT = 64
BATCH = 64
ARRAYS = ("clouds", *Seen._fields)


def _cut(seen: Seen, kept: int) -> Seen:
    return seen._replace(points=seen.points[:, :kept], positions=seen.positions[:, :kept])


class Views:
    """Arrays on disk, mapped into memory, that several processes share.

    Args:
        folder: of `Views.make`.
        device: where batches go.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        self.device = device

    def __len__(self) -> int:
        return len(self._arrays["clouds"])

    def take(self, epoch: int, index: Tensor) -> tuple[Tensor, Seen]:
        """One view of some clouds, another one in the next epoch: points, and the teacher's say."""
        view, rows = epoch % len(self), index.cpu().numpy()

        def read(name: str) -> Tensor:
            taken = torch.from_numpy(self._arrays[name][view, rows])
            return taken.to(self.device, torch.float32)

        return read("clouds"), Seen(*map(read, Seen._fields))

    @classmethod
    def make(
        cls,
        cache: Path,
        key: Mapping[str, str],
        teacher: Network,
        clouds: Clouds,
        settings: Settings,
        count: int,
        progress: Callable[[range], Iterable[int]] = iter,
        *,
        prepare: Callable[[Tensor], Tensor] = lambda points: points,
        most: int = KEPT,
    ) -> Views:
        """Those in `cache` if they are there, else new ones; `key` says what they depend on.

        `prepare` is the last thing that happens to clouds; features of `most` points are kept.
        """
        teacher.eval()
        example = prepare(clouds.points[:2, : settings.points])
        seen = teach(teacher, example)
        kept = min(most, seen.points.shape[1])
        augmented = {"jitter": settings.jitter, "rotate": settings.rotate}
        sizes = {"points": settings.points, "views": count, "kept": kept}
        everything = {**key, **augmented, **sizes, "arrays": ARRAYS}
        text = json.dumps(everything, sort_keys=True)
        folder = cache / f"views-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        device = clouds.labels.device
        if not folder.exists():
            partial = cache / f".{folder.name}-{os.getpid()}"
            partial.mkdir(parents=True, exist_ok=True)
            arrays = {}
            for name, found in zip(ARRAYS, (example, *_cut(seen, kept)), strict=True):
                shape = count, len(clouds), *found.shape[1:]
                dtype = np.float16 if name == "points" else np.float32
                arrays[name] = np.lib.format.open_memmap(
                    partial / f"{name}.npy", "w+", dtype, shape
                )
            for view in progress(range(count)):
                generator = torch.Generator(device).manual_seed(view)
                for start in range(0, len(clouds), BATCH):
                    part = slice(start, start + BATCH)
                    drawn = clouds.select(part)
                    if drawn.labels.dim() == 1:  # labels of points stay in their order
                        drawn = drawn.draw(settings.points, generator)
                    points = prepare(augment(drawn.points, generator, **augmented))
                    known = _cut(teach(teacher, points), kept)
                    for name, found in zip(ARRAYS, (points, *known), strict=True):
                        arrays[name][view, part] = found.cpu()
            for array in arrays.values():
                array.flush()
            (partial / "key.json").write_text(text + "\n", encoding="utf-8")
            try:
                partial.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(partial)
        return cls(folder, device)
