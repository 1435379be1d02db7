"""Features of a teacher that is asked once: recorded as safetensors, replayed if they fit.

They depend on the clouds, on the teacher and on the augmentation; the file says which those were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

VIEWS = 4


def view(points: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Augmented points of all clouds, ``(P, 3)``, and how many of each were kept."""
    random = torch.Generator().manual_seed(number)
    mask = torch.rand(points.shape[:2], generator=random) < 0.8
    scale = 0.9 + 0.2 * torch.rand(len(points), 1, 3, generator=random)
    return (points * scale)[mask], mask.sum(1)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """What tells one set of tensors from another."""
    data = hashlib.sha256()
    for name in sorted(tensors):
        data.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return data.hexdigest()


def origin(points: Tensor, teacher: nn.Module) -> dict[str, str]:
    """What features depend on: the clouds, the teacher, and the augmentation of the last view."""
    last = dict(zip(("points", "lengths"), view(points, VIEWS - 1), strict=True))
    made = {"clouds": {"points": points}, "teachers": teacher.state_dict(), "augmentations": last}
    return {name: digest(tensors) for name, tensors in made.items()}


@torch.no_grad()
def record(path: Path, points: Tensor, teacher: nn.Module) -> None:
    """Ask the teacher for its features of all views, and write them: float16, packed."""
    views = {str(n): teacher.encoder(view(points, n)[0]).half() for n in range(VIEWS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    save_file(views, new, metadata=origin(points, teacher))
    new.replace(path)


def replay(path: Path, points: Tensor, teacher: nn.Module) -> list[Tensor]:
    """The features of every view, if they fit.

    Raises:
        ValueError: they are of other clouds, another teacher, or other augmentations.
    """
    with safe_open(path, "pt") as file:
        kept = file.metadata() or {}
        for name, wanted in origin(points, teacher).items():
            if kept.get(name) != wanted:
                message = f"{path}: recorded of other {name}; record again"
                raise ValueError(message)
        return [file.get_tensor(str(n)) for n in range(VIEWS)]
