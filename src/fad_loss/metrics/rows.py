"""What is compared: rows of numbers, checked, in a precision that sums can be trusted in."""

from __future__ import annotations

import torch
from torch import Tensor

from fad_loss._checks import check_finite, check_tensor, look
from fad_loss._errors import describe
from fad_loss._points import as_points
from fad_loss._ragged import (
    cloud_lengths,
    cloud_mean,
    is_ragged,
    pack,
    pointwise,
)

# Features whose deviations are smaller than this, relative to their size, are called constant: it
# is far above float64's rounding of a mean, and far below float32's resolution.
CONSTANT = 1e-12


def accurate(x: Tensor) -> Tensor:
    """To float64, where the device has it."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return x.detach().to(dtype)


def promoted(x: Tensor) -> Tensor:
    """To float32 at least: enough for distances, which are exact in whatever comes in."""
    x = x.detach()
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def _rows(name: str, x: Tensor, paired: bool) -> Tensor:
    """One row per item to compare, ``(n, C)``."""
    check_tensor(name, x)
    check_finite(name, pack(x)[0] if is_ragged(x) else x)
    if not is_ragged(x) and x.dim() == 2:
        rows = x.detach()
    else:
        points = as_points(x, name=name).detach()
        if not paired:
            check_filled(name, points)
            rows = cloud_mean(pointwise(accurate, points))
        elif is_ragged(points):
            rows = pack(points)[0]
        else:
            rows = points.flatten(0, 1)
    if rows.shape[1] == 0:
        message = f"{name}: expected at least one channel, got {describe(x)}"
        raise ValueError(message)
    return accurate(rows)


def check_filled(name: str, points: Tensor) -> None:
    """Refuse ragged clouds without points."""
    if is_ragged(points) and look(pack(points)[1]):
        empty = (cloud_lengths(points) == 0).nonzero().flatten().tolist()
        if empty:
            message = f"{name}: expected no empty clouds, which have no mean, got {empty} empty"
            raise ValueError(message)


def row_pair(
    names: tuple[str, str], x: Tensor, y: Tensor, paired: bool, least: int
) -> tuple[Tensor, Tensor]:
    """The centred rows of both, constant ones exactly zero."""
    first, second = _rows(names[0], x, paired), _rows(names[1], y, paired)
    if first.shape[0] != second.shape[0]:
        what = "points" if paired else "clouds"
        message = (
            f"{names[0]}, {names[1]}: expected the same {what} in both, got {describe(x)} and "
            f"{describe(y)}, that is {first.shape[0]} and {second.shape[0]} {what}"
        )
        raise ValueError(message)
    if first.device != second.device:
        message = (
            f"{names[0]}, {names[1]}: expected the same device, got {describe(x)} and {describe(y)}"
        )
        raise ValueError(message)
    if first.shape[0] < least:
        what = "paired points" if paired else "clouds (rows)"
        message = (
            f"{names[0]}, {names[1]}: expected at least {least} {what} to compare, got "
            f"{first.shape[0]} from {describe(x)}; gather the features of the whole evaluation set"
        )
        raise ValueError(message)
    return centered(first), centered(second)


def centered(rows: Tensor) -> Tensor:
    """Deviations from the mean, scaled to at most 1: fourth powers of 1e100 are no numbers."""
    if rows.numel() == 0:
        return rows
    largest = rows.abs().amax()
    rows = rows / torch.where(largest > 0, largest, 1.0)
    deviation = rows - rows.mean(0)
    spread = deviation.abs().amax()
    constant = deviation.square().sum() <= CONSTANT**2 * rows.square().sum()
    return torch.where(constant, 0.0, deviation / torch.where(spread > 0, spread, 1.0))
