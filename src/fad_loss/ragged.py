"""Clouds of unequal size: from a PyG batch vector, a Pointcept offset, lengths, or a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fad_loss._checks import look
from fad_loss._errors import count, expected
from fad_loss._ragged import wrap

__all__ = ["ragged"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def ragged(
    values: Tensor,
    *,
    batch: Tensor | Sequence[int] | None = None,
    offset: Tensor | Sequence[int] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    r"""Clouds of unequal size, as one jagged nested tensor.

    The points of all clouds come one after the other in `values`; exactly one of `batch`, `offset`
    and `lengths` says where one cloud ends and the next begins. Or the clouds are padded to one
    length, and `mask` says which points are there. The result passes gradients to `values`, and
    shares its memory unless there is a mask.

    ============  ============================  =====================  =====================
    argument      clouds of 2, 1 and 3 points   used by                an empty cloud is
    ============  ============================  =====================  =====================
    ``batch``     ``[0, 0, 1, 2, 2, 2]``        PyTorch Geometric      a number left out
    ``offset``    ``[2, 3, 6]``                 Pointcept, Pointops    a repeated end
    ``lengths``   ``[2, 1, 3]``                 pack_padded_sequence   a zero
    ``mask``      ``[[1, 1, 0], [1, 0, 0],      padded batches         a row without True
                  [1, 1, 1]]``
    ============  ============================  =====================  =====================

    Args:
        values: ``(N_1 + ... + N_B, C)`` packed features, or packed numbers without channels; with
            `mask`, ``(B, N, C)`` padded features, or ``(B, N)`` numbers.
        batch: the cloud of every point, ascending, as long as `values`.
        offset: ``(B,)``, where each cloud ends. There is no leading zero, and the last entry is
            ``len(values)``.
        lengths: ``(B,)``, the number of points of each cloud.
        mask: ``(B, N)``, True where a point counts (`~key_padding_mask`), at any place. How many
            there are is read from the device, which on a GPU waits for it.
        batch_size: with `batch` only, the number of clouds. Without it the clouds are counted by
            looking at the last entry of `batch`, so empty clouds at the end go unnoticed, and on a
            GPU the look waits for the device.

    Returns:
        A nested tensor ``(B, j, C)`` of layout `torch.jagged`.

    Raises:
        TypeError: `values` is no tensor, the partition does not consist of integers, or the mask
            of booleans.
        ValueError: not exactly one of the four was given, or they do not add up. On a GPU the
            numbers inside are looked at with ``fad_loss.debug(True)`` only.

    Example:
        >>> cloud = ragged(torch.arange(6.0).reshape(6, 1), lengths=[2, 1, 3])
        >>> [points.flatten().tolist() for points in cloud.unbind()]
        [[0.0, 1.0], [2.0], [3.0, 4.0, 5.0]]
        >>> padded = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
        >>> [points.tolist() for points in ragged(padded, mask=padded > 0).unbind()]
        [[1.0, 2.0], [3.0]]
    """
    if not isinstance(values, Tensor):
        raise expected("values", "a torch.Tensor", type(values).__name__, error=TypeError)
    if values.is_nested or values.dim() == 0:
        raise expected("values", "the packed points of all clouds, (N_1 + ... + N_B, C)", values)
    ways = {"batch": batch, "offset": offset, "lengths": lengths, "mask": mask}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise expected("ragged", "exactly one of batch, offset, lengths and mask", got)
    if batch_size is not None and batch is None:
        message = (
            f"batch_size: only goes with batch, got {given[0]}, which knows the number of clouds"
        )
        raise ValueError(message)
    if mask is not None:
        _check_mask(mask, values)
        values, lengths = values[mask], mask.sum(1)
    total = values.shape[0]
    if batch is not None:
        index = _partition("batch", batch)
        clouds = _clouds(index, batch_size, total)
        if look(index):
            _check_batch(index, clouds)
        # On a sorted vector the start of cloud b is a search, which needs no look at the result.
        offsets = torch.searchsorted(
            index.contiguous(), torch.arange(clouds + 1, device=index.device)
        )
        return wrap(values, offsets.to(values.device), None, None)
    if offset is not None:
        ends = _partition("offset", offset)
        if look(ends):
            _check_offset(ends, total)
    else:
        sizes = _partition("lengths", lengths)
        if look(sizes):
            _check_lengths(sizes, total)
        ends = sizes.cumsum(0)
    return wrap(values, torch.cat([ends.new_zeros(1), ends]).to(values.device), None, None)


def _check_mask(mask: object, values: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        remedy = "pass mask.bool() if 1 means that a point is there"
        raise expected("mask", "a torch.Tensor of booleans", mask, remedy, error=TypeError)
    if mask.dim() != 2 or mask.shape != values.shape[:2] or len(mask) == 0:
        wanted = f"one boolean per point of values, {tuple(values.shape[:2])}"
        raise expected("mask", wanted, mask, "pass padded features (B, N, C) with a mask (B, N)")
    if mask.device != values.device:
        remedy = f"move it with .to({str(values.device)!r})"
        raise expected("mask", f"the device of values, {values.device}", mask, remedy)


def _partition(name: str, partition: Tensor | Sequence[int] | None) -> Tensor:
    """The partition as a one-dimensional int64 tensor."""
    index = partition if isinstance(partition, Tensor) else torch.tensor(partition)
    if index.numel() == 0:
        raise expected(name, "at least one cloud", f"an empty {name}")
    if index.dtype not in _INTEGERS:
        raise expected(name, "integers", index, error=TypeError)
    if index.dim() != 1:
        raise expected(name, "one dimension", index)
    return index.to(torch.int64)


def _clouds(batch: Tensor, batch_size: int | None, total: int) -> int:
    """The number of clouds of a batch vector."""
    if batch.shape[0] != total:
        wanted = f"one number per point, {total} as values has rows"
        raise expected("batch", wanted, str(batch.shape[0]))
    if batch_size is None:
        return int(batch[-1]) + 1
    return count("batch_size", batch_size, 1)


def _check_batch(batch: Tensor, clouds: int) -> None:
    steps = batch.diff()
    if bool((steps < 0).any()):
        where = int((steps < 0).to(torch.uint8).argmax()) + 1
        remedy = (
            "sort first: order = batch.argsort(stable=True); ragged(values[order], "
            "batch=batch[order])"
        )
        got = f"{int(batch[where])} after {int(batch[where - 1])} at position {where}"
        raise expected("batch", "ascending numbers", got, remedy)
    if int(batch[0]) < 0 or int(batch[-1]) >= clouds:
        got = f"{int(batch[0])} to {int(batch[-1])}"
        raise expected("batch", f"numbers from 0 to {clouds - 1} for {clouds} clouds", got)


def _check_offset(offset: Tensor, total: int) -> None:
    if int(offset[0]) == 0 and total > 0:
        remedy = "pass offset[1:], or lengths= if the first cloud really is empty"
        raise expected("offset", "where each cloud ends, without a leading zero", "0 first", remedy)
    if int(offset[0]) < 0 or bool((offset.diff() < 0).any()):
        remedy = "if these are sizes, pass them as lengths="
        raise expected("offset", "ascending ends of the clouds", _numbers(offset), remedy)
    if int(offset[-1]) != total:
        wanted = f"the last entry to be the number of points, {total} as values has rows"
        raise expected("offset", wanted, f"{int(offset[-1])} ({_numbers(offset)})")


def _check_lengths(lengths: Tensor, total: int) -> None:
    if int(lengths.min()) < 0:
        raise expected("lengths", "no negative length", _numbers(lengths))
    if int(lengths.sum()) != total:
        wanted = f"a sum of {total} as values has rows"
        raise expected("lengths", wanted, f"{int(lengths.sum())} ({_numbers(lengths)})")


def _numbers(index: Tensor) -> str:
    """The first few entries, for error messages."""
    head = ", ".join(str(number) for number in index[:8].tolist())
    return f"[{head}{', ...' if len(index) > 8 else ''}]"
