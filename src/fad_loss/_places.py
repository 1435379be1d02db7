"""Where the points of a layer lie, if the module returns that beside their features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor, nn

from fad_loss import ops
from fad_loss._layouts import points_axis
from fad_loss._paths import WITH_ELEMENTS, element
from fad_loss._points import LAYOUTS
from fad_loss._ragged import is_ragged
from fad_loss.capture import capture_features


class Place(NamedTuple):
    """The path of the positions of a layer's points, and how its features lie, if that shows."""

    path: str
    layout: str | None


def place_of(network: nn.Module, path: str, example: object, calls: str) -> Place | None:
    """What a layer with the path ``"sa1[1]"`` returns beside its features, if it is their places.

    That is sure where each of them is a point of the example. Whatever the network raises is no
    business of this function's; it is in evaluation mode, and nobody asks for gradients.
    """
    matched, axis = WITH_ELEMENTS.fullmatch(path), points_axis(example)
    if matched is None or axis is None or not isinstance(example, Tensor):
        return None
    points = example if axis == 1 else example.mT
    *outer, own = matched["elements"][1:-1].split("][")
    with capture_features(network, [matched["path"]], calls=calls) as captured:
        network(example)
        value: Any = captured[matched["path"]]
        for name in outer:
            value = element(path, value, name)
        features = element(path, value, own)
        names = value if isinstance(value, Mapping) else range(len(value))
        for name in map(str, names):
            found = element(path, value, name)
            layouts = [] if name == own else _layouts_beside(features, found, points)
            if layouts:
                # Not where there are as many channels as points: places may lie the other way.
                layout = layouts[0] if len(layouts) == 1 else None
                return Place(path.removesuffix(f"[{own}]") + f"[{name}]", layout)
    return None


def _layouts_beside(features: object, places: object, points: Tensor) -> list[str]:
    """Which layouts features may have whose places these are; none, if these are no places."""
    if not (_is_dense(features) and _is_dense(places)):
        return []
    if places.dtype != points.dtype or len(places) != len(points):
        return []
    for last in (False, True):
        rows = places.mT if last else places
        count, size = rows.shape[1:]
        fits = [name for name, at in LAYOUTS.items() if features.shape[1 + at] == count]
        known = points[..., :size]
        if count < 2 or size not in {2, 3} or known.shape[2] < size or not fits:
            continue
        distance, _ = ops.nearest(rows.contiguous(), known.contiguous())
        apart = (rows != rows[:, :1]).any(-1).any(-1).all()
        if bool(apart) and not bool((distance > 0).any()):
            return fits
    return []


def _is_dense(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 3 and not is_ragged(value)
