"""What a loss remembers: buffers that keep their precision, versions, the latest step's record."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fad_loss._ragged import cloud_mean, pointwise

if TYPE_CHECKING:
    from typing_extensions import Self

NAMES: Final = (
    "student_loss",
    "discriminator_loss",
    "real_score",
    "fake_score",
    "separability",
    "penalty",
    "weight",
    "non_finite",
    "small_clouds",
)
"""What is recorded."""

VERSION: Final = 2
"""Of what a state dict holds. 1 was that of fad_loss 0.1."""
# Scores this near to the midpoint are neither above nor below it: they are of order 1.
_TIE = 1e-5


def refuse_other_versions(state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Say what another version has written, by name, instead of loading half of it."""
    version = state_dict.get(f"{prefix}state")
    if version is None and f"{prefix}teacher_mean" in state_dict:
        errors.append(
            f"{prefix}state: expected a state of fad_loss 0.2, got one of 0.1, whose adapter took "
            "features as they come; train the loss again (the student's weights still fit)"
        )
    elif isinstance(version, Tensor) and int(version) > VERSION:
        errors.append(
            f"{prefix}state: expected version {VERSION} or older, got {int(version)}; update "
            "fad_loss"
        )


class WideBuffers(nn.Module):
    """A module whose own buffers stay in float32 at least.

    In half precision running statistics would overflow, or stand still.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move parameters, submodules and buffers."""
        given = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in given.items():
            now = getattr(self, name)
            if now.dtype in {torch.float16, torch.bfloat16}:
                setattr(self, name, before.to(now.device, torch.float32))
        return self


class Record(WideBuffers):
    """The latest value of each statistic, on the device that computed it. Not saved."""

    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(len(NAMES)), persistent=False)

    def write(self, **latest: Tensor) -> None:
        """Replace some of the values."""
        for name, value in latest.items():
            self.values[NAMES.index(name)] = value.detach().to(self.values.dtype)

    def read(self) -> dict[str, Tensor]:
        """A copy of all values, as scalar tensors."""
        return dict(zip(NAMES, self.values.clone().unbind(), strict=True))


@torch.no_grad()
def separability(
    real: Tensor, fake: Tensor, mask: tuple[Tensor | None, Tensor | None] = (None, None)
) -> tuple[Tensor, Tensor]:
    """The two means of the scores, and the share on the right side of the midpoint between them.

    Args:
        real: scores of the teacher's features.
        fake: those of the student's.
        mask: which points count, of the student and of the teacher.
    """
    means = torch.stack([cloud_mean(real, mask[1]).mean(), cloud_mean(fake, mask[0]).mean()])
    middle = means.mean()

    def above(scores: Tensor, mask: Tensor | None) -> Tensor:
        share = pointwise(lambda s: (1 + ((s - middle) / _TIE).clamp(-1, 1)) / 2, scores)
        return cloud_mean(share, mask).mean()

    return means, (1 + above(real, mask[1]) - above(fake, mask[0])) / 2
