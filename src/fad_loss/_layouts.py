"""How the features of a layer lie, read off an example, and how to bring them to a layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fad_loss._errors import describe, expected
from fad_loss._points import LAYOUTS
from fad_loss._ragged import is_ragged
from fad_loss.discriminators import HeadDiscriminator


def layout_of(
    name: str, features: object, layout: str | None, example: object, larger: object = None
) -> str:
    """How the features of a layer lie: "ragged", "global", "bnc" or "bcn".

    The axis of the points is the one that grows with the example: `larger` are the features of
    `one_more_point`. Without them, of a network that takes no other number of points, it is the one
    that is as long as the example's.
    """
    if not isinstance(features, Tensor):
        remedy = "name an element of what it returns, as in 'encoder[1]'"
        got = type(features).__name__
        raise expected(name, "a layer that returns a tensor", got, remedy, error=TypeError)
    if is_ragged(features):
        return "ragged"
    wanted = "features of points, (B, N, C) or (B, C, N), or one per cloud, (B, C)"
    if features.dim() not in {2, 3}:
        raise expected(name, wanted, features, "take a layer behind the pooling over neighbours")
    clouds = _number_of_clouds(example)
    if clouds is not None and features.shape[0] != clouds:
        remedy = "packed points have to be made ragged first, see capture_features and ragged"
        raise expected(name, f"{wanted} for B = {clouds} clouds", features, remedy)
    if features.dim() == 2 or 1 in features.shape[1:]:
        return "global"
    if layout is not None:
        return layout
    points = _number_of_points(example)
    got = f"{describe(features)} for {points or 'an unknown number of'} points"
    sizes = {name: features.shape[1 + last] for name, last in LAYOUTS.items()}
    fits = [name for name, size in sizes.items() if size == points]
    if isinstance(larger, Tensor) and larger.dim() == 3:
        fits = [name for name, last in LAYOUTS.items() if larger.shape[1 + last] != sizes[name]]
        got += f", and {tuple(larger.shape)} for one more"
    if len(fits) == 1:
        return fits[0]
    remedy = 'say layout="bnc" or layout="bcn" (or a pair, the student\'s and the teacher\'s)'
    raise expected(name, "one axis for the points of the example", got, remedy)


def _number_of_clouds(example: object) -> int | None:
    """B of ``(B, N, 3)``, of a batch of PyTorch Geometric, or of Pointcept's dictionary."""
    if isinstance(example, Tensor):
        return example.shape[0] if example.dim() == 3 else None
    ends = example.get("offset") if isinstance(example, Mapping) else None
    if isinstance(ends, Tensor):
        return len(ends)
    graphs = getattr(example, "num_graphs", None)
    return graphs if isinstance(graphs, int) else None


def points_axis(example: object) -> int | None:
    """Which axis of an example ``(B, N, 3)`` or ``(B, 3, N)`` has the points."""
    points = _number_of_points(example)
    if not isinstance(example, Tensor) or not points:
        return None
    return 1 if example.shape[1] == points else 2


def one_more_point(example: object) -> Tensor | None:
    """The example with its last point twice, by which layers show which axis has the points."""
    axis = points_axis(example)
    if not isinstance(example, Tensor) or axis is None:
        return None
    points = example.shape[axis]
    return torch.cat([example, example.narrow(axis, points - 1, 1)], axis)


def shuffled(example: object) -> tuple[Tensor | None, Tensor]:
    """The example with its points in another order, if it shows them; and which comes where."""
    axis = points_axis(example)
    if not isinstance(example, Tensor) or axis is None:
        return None, torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(example.shape[axis], generator=generator).to(example.device)
    return example.index_select(axis, order), order


def follow_points(features: Tensor, again: object, layout: str, order: Tensor) -> bool:
    """Whether feature i of a layer is of point i of the example.

    Then the features of the shuffled example, `again`, are its features, shuffled: of nearly all
    points, for the choice of neighbours may hang on a rounding. Features that are the same at all
    points show nothing.
    """
    if layout not in LAYOUTS or not isinstance(again, Tensor) or again.shape != features.shape:
        return False
    axis = 1 + LAYOUTS[layout]
    if features.shape[axis] != len(order) or not features.is_floating_point():
        return False
    near = max(1e-3, 8 * torch.finfo(features.dtype).eps) * features.abs().amax()

    def unchanged(one: Tensor) -> Tensor:
        return ((again - one).abs().amax(3 - axis) <= near).double().mean()

    moved = features.index_select(axis, order)
    return bool((unchanged(moved) > 0.9) & (unchanged(features) < 0.5))


def _number_of_points(example: object) -> int | None:
    """N of ``(B, N, 3)`` or ``(B, 3, N)``: the longer one, for there are few coordinates."""
    if not isinstance(example, Tensor) or is_ragged(example) or example.dim() != 3:
        return None
    first, last = example.shape[1:]
    return None if first == last else max(first, last)


def channels(features: Tensor, layout: str) -> int:
    """The number of channels."""
    if layout == "global":
        return features[0].numel()
    return features.shape[1] if LAYOUTS.get(layout, False) else features.shape[-1]


def one_per_cloud(features: Tensor, discriminator: nn.Module, layout: str) -> Tensor:
    """One feature per cloud, ``(B, C)``; for a discriminator that pools, a cloud of one point."""
    features = features.flatten(1)
    if isinstance(discriminator, HeadDiscriminator) and discriminator.pool is not None:
        return features.unsqueeze(2 if LAYOUTS[layout] else 1)
    return features


def in_layout(features: Tensor, layout: str, wanted: str) -> Tensor:
    """Features of points in the layout that is wanted."""
    return features if layout in {"ragged", wanted} else features.transpose(1, 2)


def along(positions: Tensor, features: Tensor, layout: str) -> Tensor:
    """Positions ``(B, N, D)`` or ``(B, D, N)`` in the layout of the features."""
    axis = 1 + LAYOUTS[layout]
    if not isinstance(positions, Tensor) or positions.dim() != 3 or is_ragged(positions):
        return positions  # The loss says what it expects.
    other = positions.shape[3 - axis] == features.shape[axis] != positions.shape[axis]
    return positions.transpose(1, 2) if other else positions
