"""How a function becomes an operator of PyTorch, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fad_loss.ops._precision import full_precision

# What each operator does.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def call(op: Any, x: Tensor, y: Tensor, *others: Any) -> Any:
    """Call an operator; past the dispatcher, which takes its time, where nobody needs it."""
    return (op if _watched(x, y) else _FUNCTIONS[op])(x, y, *others)


def _watched(x: Tensor, y: Tensor) -> bool:
    """Whether anybody differentiates, traces, maps, profiles or replaces what happens to these."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or type(y) is not Tensor
        or (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        or functorch.is_functorch_wrapped_tensor(x)
        or functorch.is_functorch_wrapped_tensor(y)
        or _get_current_dispatch_mode() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def register(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the operator ``fad_loss::name``."""

    def decorate(function: Callable[..., Any]) -> Any:
        def run(*args: Any) -> Any:
            # Autocast would reach the matrix products in here and round distances to bfloat16:
            # wrong neighbors. Each operator chooses its precision itself, by the dtype of x.
            device = args[0].device
            with full_precision(device):
                if not torch.is_autocast_enabled(device.type):
                    return function(*args)
                with torch.autocast(device.type, enabled=False):
                    return function(*args)

        op = torch.library.custom_op(f"fad_loss::{name}", run, mutates_args=(), schema=schema)
        op.register_vmap(_over_batch(op))
        _FUNCTIONS[op] = run
        return op

    return decorate


def _over_batch(op: Any) -> Callable[..., Any]:
    """A vmap rule: the mapped axis joins the batch of clouds, which is what the batch is for."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        flat = []
        for arg, dim in zip(args, in_dims, strict=True):
            if not isinstance(arg, Tensor):
                flat.append(arg)
                continue
            whole = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            # Gradients that nobody asked for are empty and have no batch.
            flat.append(whole.flatten(0, 1) if whole.dim() > 2 else whole)
        if any(isinstance(arg, Tensor) and arg.dtype == torch.int64 for arg in args):
            message = (
                "vmap over ragged clouds is not possible: put all clouds into one ragged batch"
            )
            raise NotImplementedError(message)
        out = op(*flat)

        def split(t: Tensor) -> Tensor:
            return torch.unflatten(t, 0, (size, -1)) if t.dim() > 1 else t

        if isinstance(out, Tensor):
            return split(out), 0
        return tuple(split(t) for t in out), tuple(0 if t.dim() > 1 else None for t in out)

    return rule
