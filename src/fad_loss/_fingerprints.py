"""Whether somebody trains a module's parameters: the optimizer that forgot them says nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def fingerprints(module: nn.Module) -> dict[str, Tensor]:
    """A number for each trainable parameter, which changes when it is trained.

    Not for those that other tensors stand for: a DTensor's values are on all ranks, and asking for
    them would wait for a rank that does not ask.
    """
    return {
        name: _fingerprint(parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and not is_lazy(parameter)
        and not is_traceable_wrapper_subclass(parameter)
    }


def untrained(module: nn.Module, made_with: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whether the trainable parameters hold the values that they were made or loaded with."""
    return {
        name: now == made_with[name].to(now.device)
        for name, now in fingerprints(module).items()
        if name in made_with
    }


def converted(
    module: nn.Module, made_with: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The fingerprints after a change of device or dtype: `untrained` stays as it was `before`."""
    result = {**made_with}
    for name, now in fingerprints(module).items():
        still = before.get(name)
        if still is None or still.is_meta or now.is_meta:
            result[name] = now
        else:
            result[name] = torch.where(still.to(now.device), now, made_with[name].to(now.device))
    return result


@torch.no_grad()
def _fingerprint(parameter: Tensor) -> Tensor:
    # Of the bits, weighted by position, modulo 2^64: the same in any order, so on any device.
    bits = parameter.detach().double().flatten().view(torch.int64)
    odd = torch.arange(1, 2 * bits.numel() + 1, 2, device=bits.device)
    return (bits * odd).sum()
