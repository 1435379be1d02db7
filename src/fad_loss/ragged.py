"""Clouds of unequal size, from a PyG batch vector, a Pointcept offset or lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fad_loss._checks import look
from fad_loss._errors import describe, expected
from fad_loss._ragged import wrap

__all__ = ["ragged"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def ragged(
    values: Tensor,
    *,
    batch: Tensor | Sequence[int] | None = None,
    offset: Tensor | Sequence[int] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    r"""Clouds of unequal size, as one jagged nested tensor.

    The points of all clouds come one after the other in `values`; exactly one of `batch`, `offset`
    and `lengths` says where one cloud ends and the next begins. The result shares the memory of
    `values` and passes gradients to it.

    ============  ============================  =====================  =====================
    argument      clouds of 2, 1 and 3 points   used by                an empty cloud is
    ============  ============================  =====================  =====================
    ``batch``     ``[0, 0, 1, 2, 2, 2]``        PyTorch Geometric      a number left out
    ``offset``    ``[2, 3, 6]``                 Pointcept, Pointops    a repeated end
    ``lengths``   ``[2, 1, 3]``                 pack_padded_sequence   a zero
    ============  ============================  =====================  =====================

    Args:
        values: ``(N_1 + ... + N_B, C)`` packed features, or packed numbers without channels.
        batch: the cloud of every point, ascending, as long as `values`.
        offset: ``(B,)``, where each cloud ends. There is no leading zero, and the last entry is
            ``len(values)``.
        lengths: ``(B,)``, the number of points of each cloud.
        batch_size: with `batch` only, the number of clouds. Without it the clouds are counted by
            looking at the last entry of `batch`, so empty clouds at the end go unnoticed, and on a
            GPU the look waits for the device: the only thing here that does.

    Returns:
        A nested tensor ``(B, j, C)`` of layout `torch.jagged`.

    Raises:
        TypeError: `values` is no tensor, or the partition does not consist of integers.
        ValueError: not exactly one of the three was given, or they do not add up. On a GPU the
            numbers inside are looked at with ``fad_loss.debug(True)`` only.

    Example:
        >>> cloud = ragged(torch.arange(6.0).reshape(6, 1), lengths=[2, 1, 3])
        >>> [points.flatten().tolist() for points in cloud.unbind()]
        [[0.0, 1.0], [2.0], [3.0, 4.0, 5.0]]
    """
    if not isinstance(values, Tensor):
        raise expected("values", "a torch.Tensor", type(values).__name__, error=TypeError)
    if values.is_nested or values.dim() == 0:
        message = (
            "values: expected the packed points of all clouds, (N_1 + ... + N_B, C), got "
            f"{describe(values)}"
        )
        raise ValueError(message)
    given = {
        name: value
        for name, value in (("batch", batch), ("offset", offset), ("lengths", lengths))
        if value is not None
    }
    if len(given) != 1:
        message = (
            "ragged: expected exactly one of batch, offset and lengths, got "
            f"{' and '.join(given) or 'none of them'}"
        )
        raise ValueError(message)
    name, partition = next(iter(given.items()))
    index = _partition(name, partition)
    if batch_size is not None and name != "batch":
        message = f"batch_size: only goes with batch, got {name}, which knows the number of clouds"
        raise ValueError(message)
    total = values.shape[0]
    if name == "batch":
        clouds = _clouds(index, batch_size, total)
        if look(index):
            _check_batch(index, clouds)
        # On a sorted vector the start of cloud b is a search, which needs no look at the result.
        offsets = torch.searchsorted(
            index.contiguous(), torch.arange(clouds + 1, device=index.device)
        )
    else:
        if look(index):
            check = _check_offset if name == "offset" else _check_lengths
            check(index, total)
        ends = index if name == "offset" else index.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
    return wrap(values, offsets.to(values.device), None, None)


def _partition(name: str, partition: Tensor | Sequence[int]) -> Tensor:
    """The partition as a one-dimensional int64 tensor."""
    index = partition if isinstance(partition, Tensor) else torch.tensor(partition)
    if index.numel() == 0:
        message = f"{name}: expected at least one cloud, got an empty {name}"
        raise ValueError(message)
    if index.dtype not in _INTEGERS:
        message = f"{name}: expected integers, got {describe(index)}"
        raise TypeError(message)
    if index.dim() != 1:
        message = f"{name}: expected one dimension, got {describe(index)}"
        raise ValueError(message)
    return index.to(torch.int64)


def _clouds(batch: Tensor, batch_size: int | None, total: int) -> int:
    """The number of clouds of a batch vector."""
    if batch.shape[0] != total:
        message = (
            f"batch: expected one number per point, {total} as values has rows, got "
            f"{batch.shape[0]}"
        )
        raise ValueError(message)
    if batch_size is None:
        return int(batch[-1]) + 1
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        message = f"batch_size: expected an int, got {type(batch_size).__name__} {batch_size!r}"
        raise TypeError(message)
    if batch_size < 1:
        message = f"batch_size: expected at least 1, got {batch_size}"
        raise ValueError(message)
    return batch_size


def _check_batch(batch: Tensor, clouds: int) -> None:
    if bool((batch.diff() < 0).any()):
        where = int((batch.diff() < 0).nonzero()[0]) + 1
        message = (
            f"batch: expected ascending numbers, got {int(batch[where])} after "
            f"{int(batch[where - 1])} at position {where}; sort first: order = "
            "batch.argsort(stable=True); ragged(values[order], batch=batch[order])"
        )
        raise ValueError(message)
    if int(batch[0]) < 0 or int(batch[-1]) >= clouds:
        message = (
            f"batch: expected numbers from 0 to {clouds - 1} for {clouds} clouds, got "
            f"{int(batch[0])} to {int(batch[-1])}"
        )
        raise ValueError(message)


def _check_offset(offset: Tensor, total: int) -> None:
    if int(offset[0]) == 0 and total > 0:
        message = (
            "offset: expected where each cloud ends, without a leading zero, got 0 first; pass "
            "offset[1:], or lengths= if the first cloud really is empty"
        )
        raise ValueError(message)
    if bool((offset.diff() < 0).any()):
        message = (
            f"offset: expected ascending ends of the clouds, got {_numbers(offset)}; if these are "
            "sizes, pass them as lengths="
        )
        raise ValueError(message)
    if int(offset[-1]) != total:
        message = (
            f"offset: expected the last entry to be the number of points, {total} as values has "
            f"rows, got {int(offset[-1])} ({_numbers(offset)})"
        )
        raise ValueError(message)


def _check_lengths(lengths: Tensor, total: int) -> None:
    if int(lengths.min()) < 0:
        message = f"lengths: expected no negative length, got {_numbers(lengths)}"
        raise ValueError(message)
    if int(lengths.sum()) != total:
        message = (
            f"lengths: expected a sum of {total} as values has rows, got {int(lengths.sum())} "
            f"({_numbers(lengths)})"
        )
        raise ValueError(message)


def _numbers(index: Tensor) -> str:
    """The first few entries, for error messages."""
    head = ", ".join(str(number) for number in index[:8].tolist())
    return f"[{head}{', ...' if len(index) > 8 else ''}]"
