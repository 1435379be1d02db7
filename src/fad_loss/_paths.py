"""Paths into a model: the modules on the way, wrappers left out, elements of what they return."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from fad_loss._errors import expected

# What wrappers call the module they wrap. "module" is also a name that people give to layers of
# their own, so it only counts as a wrapper's when the parent holds nothing else.
_WRAPPED: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WITH_ELEMENTS: Final = re.compile(r"(?P<path>.*?)(?P<elements>(\[[^\[\]]+\])+)")


class Layer(NamedTuple):
    """The modules on the way to a layer, what each calls the next, and the elements to take."""

    chain: tuple[nn.Module, ...]
    names: tuple[str, ...]
    elements: tuple[str, ...] = ()

    @property
    def replaced(self) -> bool:
        """Whether the model has another module in the layer's place by now."""
        pairs = zip(self.chain, self.names, self.chain[1:], strict=False)
        return any(parent._modules.get(name) is not child for parent, name, child in pairs)


def paths_of(model: nn.Module) -> dict[str, Layer]:
    """Every path into the model, with the modules on the way.

    Once as it is, and once without the prefixes of wrappers. Where a wrapper and what it wraps
    share a path, the wrapper has it: its hooks run outside compiled code, and not a second time
    when a checkpoint is recomputed.
    """
    exact: dict[str, Layer] = {}
    plain: dict[str, Layer] = {}
    pending: list[tuple[tuple[str, ...], Layer]] = [((), Layer((model,), ()))]
    while pending:
        bare, layer = pending.pop(0)
        chain, names, _ = layer
        exact[".".join(names)] = layer
        plain.setdefault(".".join(bare), layer)
        children = chain[-1]._modules
        for name, child in children.items():
            if child is None or any(child is module for module in chain):
                continue
            wrapper = name in _WRAPPED or (name == "module" and len(children) == 1)
            below = Layer((*chain, child), (*names, name))
            pending.append((bare if wrapper else (*bare, name), below))
    return {**plain, **exact}


def find(path: str, known: Mapping[str, Layer], model: nn.Module) -> Layer:
    if not isinstance(path, str):
        raise expected("layers: every path", "a str", type(path).__name__, error=TypeError)
    elements: tuple[str, ...] = ()
    if path not in known and (match := WITH_ELEMENTS.fullmatch(path)):
        path = match["path"]
        elements = tuple(match["elements"][1:-1].split("]["))
    if path not in known:
        names = [name for name in known if name]
        last = path.rsplit(".", 1)[-1]
        same = [name for name in names if name.rsplit(".", 1)[-1] == last]
        near = list(dict.fromkeys([*get_close_matches(path, names, n=5, cutoff=0.5), *same]))[:6]
        if near:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        else:
            top = [name for name in names if "." not in name]
            hint = f"at the top level there are {', '.join(map(repr, top)) or 'no modules'}"
        message = f"layers: {type(model).__name__} has no module {path!r}; {hint}"
        raise ValueError(message)
    if any(isinstance(module, torch.jit.ScriptModule) for module in known[path].chain):
        message = (
            f"layers: {path!r} lies in a TorchScript module, which runs no Python hooks; capture "
            "from the model before torch.jit.script or torch.jit.trace"
        )
        raise TypeError(message)
    return known[path]._replace(elements=elements)


def element(path: str, value: Any, name: str) -> Any:
    """The element of a tuple or dictionary that ``[name]`` stands for."""
    there: dict[str, Any] = {}
    if isinstance(value, Mapping):
        there = {str(key): element for key, element in value.items()}
    elif isinstance(value, (tuple, list)):
        there = {str(index): element for index, element in enumerate(value)}
        if type(value) not in (tuple, list):
            there.update(zip(getattr(type(value), "_fields", ()), value, strict=False))
    if name not in there:
        elements = ", ".join(f"[{key}]" for key in there) or "no elements"
        message = f"{path!r}: {type(value).__name__} has {elements}, not [{name}]"
        raise ValueError(message)
    return there[name]


def hooks_are_compiled(chain: tuple[nn.Module, ...]) -> bool:
    """Whether the last module's hooks run inside code that `torch.compile` produced."""
    # torch.compile(module) gives a wrapper, whose own hooks run outside; module.compile() compiles
    # the call, hooks included.
    wrappers = chain[:-1]
    return any(hasattr(module, "_torchdynamo_orig_callable") for module in wrappers) or any(
        module._compiled_call_impl is not None for module in chain
    )
