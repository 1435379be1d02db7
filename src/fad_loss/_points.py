"""The one layout of dense features that everything below computes on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fad_loss._checks import check_tensor
from fad_loss._errors import choose, describe
from fad_loss._ragged import is_ragged, pack

LAYOUTS: Mapping[str, bool] = {"bnc": False, "bcn": True}
"""Names of the layouts of dense features, and whether the points come last."""


def as_points(features: Tensor, layout: str = "bnc", name: str = "features") -> Tensor:
    r"""Bring features in any supported layout to ``(B, N, C)``.

    Args:
        features: ``(B, N, C)`` if `layout` is ``"bnc"``, ``(B, C, N)`` if it is ``"bcn"``; or
            global features ``(B, C)`` in either, which become ``(1, B, C)``: the batch is the set;
            or a ragged cloud ``(B, j, C)``, returned as it is. float32, float64, bfloat16, float16.
        layout: ``"bnc"`` or ``"bcn"``.
        name: what to call the argument in error messages.

    Returns:
        A view ``(B, N, C)``, or the ragged cloud.

    Raises:
        TypeError: not a tensor, or not of a supported dtype.
        ValueError: an unknown layout, a wrong rank, or no clouds, points or channels at all.

    Example:
        >>> as_points(torch.zeros(2, 64, 1024), layout="bcn").shape
        torch.Size([2, 1024, 64])
        >>> as_points(torch.zeros(8, 64)).shape
        torch.Size([1, 8, 64])
    """
    points_last = choose("layout", layout, LAYOUTS)
    check_tensor(name, features)
    if is_ragged(features):
        values, _ = pack(features)
        if values.dim() != 2 or features.shape[0] == 0 or 0 in values.shape:
            message = (
                f"{name}: expected a ragged cloud (B, j, C) with at least one cloud, point and "
                f"channel, got {describe(features)} with packed values of shape "
                f"{tuple(values.shape)}"
            )
            raise ValueError(message)
        return features
    if features.dim() not in {2, 3}:
        shape = "(B, C, N)" if points_last else "(B, N, C)"
        hint = (
            "; flatten the trailing axes first, for example features.flatten(2) with layout='bcn'"
            if features.dim() > 3
            else ""
        )
        message = (
            f"{name}: expected {shape} features for layout {layout!r}, global features (B, C), or "
            f"a ragged cloud, got {describe(features)}{hint}"
        )
        raise ValueError(message)
    if 0 in features.shape:
        message = (
            f"{name}: expected at least one cloud, one point and one channel, got "
            f"{describe(features)}; leave empty batches out"
        )
        raise ValueError(message)
    if features.dim() == 2:
        return features.unsqueeze(0)
    return features.transpose(1, 2) if points_last else features
