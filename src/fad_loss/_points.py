"""Clouds of points, in the one form that everything below the loss computes on.

`Points` is made once, at the door: dense clouds ``(B, N, C)``, with a mask or without; clouds of
unequal size, packed one after the other, with offsets; and where the points lie, if that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fad_loss._checks import check_finite, check_tensor, look
from fad_loss._errors import choose, describe, expected
from fad_loss._ragged import is_ragged, pack, wrap

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
            wanted = "a ragged cloud (B, j, C) with at least one cloud, point and channel"
            packed = f"with packed values of shape {tuple(values.shape)}"
            raise expected(name, wanted, f"{describe(features)} {packed}")
        return features
    if features.dim() not in {2, 3}:
        shape = "(B, C, N)" if points_last else "(B, N, C)"
        remedy = (
            "flatten the trailing axes first, for example features.flatten(2) with layout='bcn'"
            if features.dim() > 3
            else ""
        )
        wanted = (
            f"{shape} features for layout {layout!r}, global features (B, C), or a ragged cloud"
        )
        raise expected(name, wanted, features, remedy)
    if 0 in features.shape:
        wanted = "at least one cloud, one point and one channel"
        raise expected(name, wanted, features, "leave empty batches out")
    if features.dim() == 2:
        return features.unsqueeze(0)
    return features.transpose(1, 2) if points_last else features


@dataclass(eq=False)
class Points:
    """The points of a batch of clouds.

    Attributes:
        features: ``(B, N, C)``, or those of all clouds one after the other, ``(P, C)``.
        offsets: for packed clouds, where each begins, ``(B + 1,)``; None for dense ones.
        mask: for dense clouds, which points count, ``(B, N)``; None if all do. What does not count
            is 0 in `features`.
        positions: where the points lie, ``(B, N, D)`` or ``(P, D)``, or None.
        bounds: the least and the largest number of points of a packed cloud, where known.
        is_global: whether these were global features ``(B, C)``, one of each cloud: the batch is
            the set.

    Example:
        >>> points = Points.of(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]) > 0)
        >>> points.lengths(), points.mean(points.features)
        (tensor([2]), tensor([[2.]]))
    """

    features: Tensor
    offsets: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    bounds: tuple[int | None, int | None] = (None, None)
    is_global: bool = False

    @staticmethod
    def of(
        features: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        layout: str = "bnc",
        name: str = "features",
    ) -> Points:
        """Check and bring together; see `as_points` for the layouts.

        Of ragged clouds, points that a mask says do not count are left out, which on a GPU waits
        for the device. Of those that count, features that are NaN or infinite are refused, where
        they may be looked at.
        """
        points = Points.unfilled(features, mask, positions, layout=layout, name=name).filled()
        points.check_finite(name)
        return points

    @staticmethod
    def unfilled(
        features: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        *,
        layout: str,
        name: str,
    ) -> Points:
        """The same as `of`, but what does not count is still as it came: to be drawn from.

        Of a large scene only a few points are drawn, and nothing else need be touched.
        """
        points = as_points(features, layout, name)
        if mask is not None:
            mask = _as_mask(mask, points, f"mask of the {name}")
        if positions is not None:
            positions = _as_positions(positions, points, layout, f"positions of the {name}")
        if is_ragged(points):
            values, offsets = pack(points)
            bounds = points._maybe_min_seqlen, points._maybe_max_seqlen  # type: ignore[attr-defined]
            ragged = Points(values, offsets, positions=positions, bounds=bounds)
            return ragged if mask is None else ragged.only(mask)
        return Points(points, None, mask, positions, is_global=features.dim() == 2)

    def check_finite(self, name: str) -> None:
        """Refuse features that are NaN or infinite, where they may be looked at."""
        check_finite(name, self.features)

    # ------------------------------------------------------------------------- what they are

    @property
    def batch(self) -> int:
        """The number of clouds."""
        return self.features.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def channels(self) -> int:
        """The number of channels C."""
        return self.features.shape[-1]

    @property
    def uneven(self) -> bool:
        """Whether the clouds may differ in how many points count."""
        return self.offsets is not None or self.mask is not None

    def lengths(self) -> Tensor:
        """How many points of each cloud count, ``(B,)`` int64."""
        if self.offsets is not None:
            return self.offsets.diff()
        if self.mask is not None:
            return self.mask.sum(1)
        B, N = self.features.shape[:2]
        return torch.full((B,), N, dtype=torch.int64, device=self.features.device)

    def index(self) -> Tensor:
        """Of packed points, the number of each one's cloud."""
        offsets = self._offsets()
        clouds = torch.arange(len(offsets) - 1, device=offsets.device)
        return torch.repeat_interleave(clouds, offsets.diff(), output_size=self.features.shape[0])

    def like(self, values: Tensor) -> Tensor:
        """Numbers per point as the public form has them: dense, or packed ones made ragged."""
        return values if self.offsets is None else wrap(values, self.offsets, *self.bounds)

    def tensor(self) -> Tensor:
        """The features in the public form: ``(B, N, C)``, or ragged ``(B, j, C)``."""
        return self.like(self.features)

    # ------------------------------------------------------------------- others made of them

    def with_features(self, features: Tensor) -> Points:
        """The same points with other features."""
        # PyTorch 2.6 cannot compile dataclasses.replace.
        return Points(
            features, self.offsets, self.mask, self.positions, self.bounds, self.is_global
        )

    def without_positions(self) -> Points:
        """The same points, of which nobody knows where they lie."""
        return Points(self.features, self.offsets, self.mask, None, self.bounds, self.is_global)

    def map(self, function: Callable[[Tensor], Tensor]) -> Points:
        """The same points with a function of each one's features."""
        return self.with_features(function(self.features))

    def filled(self) -> Points:
        """The same points, with features of 0 where they do not count."""
        return self if self.mask is None else self.map(lambda values: self.fill(values, 0))

    def detach(self) -> Points:
        """The same points, without a graph."""
        return self.map(torch.Tensor.detach)

    def only(self, mask: Tensor) -> Points:
        """Those points that a mask, ``(B, N)`` or packed, says count."""
        if self.offsets is None:
            mask = mask if self.mask is None else mask & self.mask
            features = torch.where(mask.unsqueeze(-1), self.features, 0)
            return Points(features, None, mask, self.positions, self.bounds, self.is_global)
        ends = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        positions = None if self.positions is None else self.positions[mask]
        return Points(self.features[mask], ends[self.offsets], positions=positions)

    def draw(self, count: int, chance: Tensor) -> Points:
        """At most `count` points of each cloud, as dense clouds; all of those that have no more.

        A cloud of n points is cut into `count` pieces, in the order of its points and from a
        random place on, and gives one of each: no point twice, each as likely as any other, and
        nothing to sort. Clouds of as many points give the same ones for the same `chance`.

        Args:
            count: how many.
            chance: ``(B, count + 1)`` numbers in [0, 1).
        """
        if not self.uneven and self.features.shape[1] <= count:
            return self
        lengths = self.lengths().unsqueeze(1)
        taken = lengths.clamp(max=count)
        piece = torch.arange(count, device=lengths.device)
        pieces = taken.clamp_min(1)
        low, high = piece * lengths // pieces, (piece + 1) * lengths // pieces
        within = (chance[:, :count] * (high - low)).long().minimum((high - low - 1).clamp_min(0))
        turn = (chance[:, count:] * lengths).long()
        rank = (low + within + turn) % lengths.clamp_min(1)
        mask = (piece < taken) if self.uneven else None
        if self.offsets is not None:
            rows = (self.offsets[:-1].unsqueeze(1) + rank).clamp(max=self.features.shape[0] - 1)
            features = self.features[rows]
            positions = None if self.positions is None else self.positions[rows]
        else:
            if self.mask is not None:  # the rank-th of those that count
                rank = torch.searchsorted(self.mask.cumsum(1), rank + 1)
                rank = rank.clamp(max=self.features.shape[1] - 1)
            features = _gather(self.features, rank)
            positions = None if self.positions is None else _gather(self.positions, rank)
        if mask is not None:
            features = torch.where(mask.unsqueeze(-1), features, 0)
        return Points(features, None, mask, positions)

    def padded(self) -> Points:
        """All points, as dense clouds; how many the largest has, a GPU may have to be asked."""
        if self.offsets is None:
            return self
        most = self.bounds[1]
        count = max(1, int(self.lengths().max()) if most is None else most)
        return self.draw(count, self.features.new_zeros(self.batch, count + 1, dtype=torch.float64))

    # ------------------------------------------------------------------------- cloud by cloud

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the points of each cloud of numbers per point, ``(B, N, ...)`` or packed."""
        if self.offsets is None:
            return self.fill(values, 0).sum(1)
        total = values.new_zeros((self.batch, *values.shape[1:]))
        # Accumulating index_put adds in a fixed order on every device, and is differentiable twice;
        # index_add is not the first on a GPU, segment_reduce not the second.
        return total.index_put((self.index(),), values, accumulate=True)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the points of each cloud; 0 where there are none."""
        count = self.lengths().clamp_min(1).to(values.dtype)
        total = self.sum(values)
        return total / count.reshape(-1, *[1] * (total.dim() - 1))

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the points of each cloud, ``(B, C)``; 0 where there are none.

        The gradient goes to one point per channel, the first that attains the maximum, and can be
        differentiated again.
        """
        if self.offsets is None:
            fixed = self.fill(values.detach(), -torch.inf)
            highest = values.gather(1, fixed.argmax(1, keepdim=True)).squeeze(1)
            return highest if self.mask is None else highest * self.mask.any(1, keepdim=True)
        total = values.shape[0]
        cloud = self.index().unsqueeze(1).expand_as(values)
        fixed = values.detach()
        highest = fixed.new_full((self.batch, values.shape[1]), -torch.inf)
        highest = highest.scatter_reduce(0, cloud, fixed, "amax")
        position = torch.arange(total, device=values.device).unsqueeze(1).expand_as(values)
        candidates = torch.where(fixed == highest.gather(0, cloud), position, total)
        first = torch.full(highest.shape, total, device=values.device)
        first = first.scatter_reduce(0, cloud, candidates, "amin")
        # Of an empty cloud nobody is first.
        return values.gather(0, first.clamp(max=total - 1)) * (first < total)

    def softmax(self, logits: Tensor) -> Tensor:
        """Softmax over the points of each cloud of ``(B, N, H)`` or packed ``(P, H)``."""
        if self.offsets is None:
            if self.mask is None:
                return logits.softmax(1)
            return self.fill(self.fill(logits, torch.finfo(logits.dtype).min).softmax(1), 0)
        index = self.index()
        fixed = logits.detach()
        highest = fixed.new_full((self.batch, logits.shape[1]), -torch.inf)
        highest = highest.scatter_reduce(0, index.unsqueeze(1).expand_as(fixed), fixed, "amax")
        weights = (logits - highest[index]).exp()
        return weights / self.sum(weights)[index]

    def fill(self, values: Tensor, number: float | Tensor) -> Tensor:
        """Dense `values` with `number` in place of those of points that do not count."""
        if self.mask is None:
            return values
        mask = self.mask.reshape(*self.mask.shape, *[1] * (values.dim() - 2))
        return torch.where(mask, values, number)

    def spread(self, per_cloud: Tensor) -> Tensor:
        """A value of each cloud, ``(B, ...)``, broadcastable to its points."""
        return per_cloud.unsqueeze(1) if self.offsets is None else per_cloud[self.index()]

    def _offsets(self) -> Tensor:
        if self.offsets is None:
            message = "dense clouds have no offsets"
            raise RuntimeError(message)
        return self.offsets


def _gather(values: Tensor, rank: Tensor) -> Tensor:
    return values.gather(1, rank.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _as_mask(mask: object, points: Tensor, name: str) -> Tensor:
    """``(B, N)`` for dense `points`, packed ``(P,)`` for ragged ones."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        remedy = "True marks the points that count; compare first, as in labels != 255"
        raise expected(name, "a boolean torch.Tensor", mask, remedy, error=TypeError)
    flat = pack(mask)[0] if is_ragged(mask) else mask
    rows = pack(points)[0].shape[:1] if is_ragged(points) else points.shape[:2]
    if flat.dim() == 1 and len(rows) == 2 and rows[0] == 1:
        flat = flat.unsqueeze(0)  # global features: the batch is the set
    if flat.shape != rows:
        wanted = f"one value per point, {_shape(rows)}"
        raise expected(name, wanted, mask)
    if flat.device != points.device:
        raise expected(name, f"the device of the features, {points.device}", mask)
    return flat


def _as_positions(positions: Tensor, points: Tensor, layout: str, name: str) -> Tensor:
    """``(B, N, D)`` for dense `points`, packed ``(P, D)`` for ragged ones; without a graph."""
    check_tensor(name, positions)
    given = positions
    if is_ragged(positions):
        flat = pack(positions)[0]
    else:
        flat = positions.transpose(1, 2) if LAYOUTS[layout] and positions.dim() == 3 else positions
    rows = pack(points)[0].shape[:1] if is_ragged(points) else points.shape[:2]
    if flat.shape[:-1] != rows or flat.dim() != len(rows) + 1 or flat.shape[-1] == 0:
        wanted = f"one position per point, {_shape((*rows, 'D'))}"
        remedy = "in the layout of the features" if LAYOUTS[layout] else ""
        raise expected(name, wanted, given, remedy)
    if flat.device != points.device:
        raise expected(name, f"the device of the features, {points.device}", given)
    flat = flat.detach()
    flat = flat if flat.dtype == torch.float64 else flat.float()
    if look(flat) and not torch.isfinite(flat).all():
        raise expected(name, "finite coordinates", f"NaN or infinity in {tuple(flat.shape)}")
    return flat


def _shape(sizes: tuple[object, ...]) -> str:
    return "(" + ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "") + ")"
