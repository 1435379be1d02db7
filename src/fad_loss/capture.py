"""Intermediate features of models that are not yours, without editing them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CapturedFeatures", "capture_features"]

# What wrappers call the module they wrap. "module" is also a name that people give to layers of
# their own, so it only counts as a wrapper's when the parent holds nothing else.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class _Recorder:
    """The forward hook of one layer: writes what the layer returned into the shared records."""

    def __init__(
        self, records: dict[str, Any] | None, layer: str, inputs: bool, detach: bool
    ) -> None:
        self.records = records
        self.layer = layer
        self.inputs = inputs
        self.detach = detach

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.records is None:
            return
        value = output
        if self.inputs:
            received = (*args, *kwargs.values())
            value = received[0] if len(received) == 1 else received
        if self.detach:
            value = tree_map(_detached, value)
        self.records[self.layer] = value

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled model takes its hooks along. The copy of this one records nothing:
        # nobody could read the records, they would only hold on to memory, and tensors with a
        # graph cannot be deep-copied at all.
        return (_Recorder, (None, self.layer, self.inputs, self.detach))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _remove_all(handles: list[RemovableHandle], records: dict[str, Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    records.clear()


class CapturedFeatures(Mapping[str, Any]):
    """What `capture_features` returns: the layers' latest outputs, by path.

    A mapping of the layers that have run since the last `clear`, a context manager, and a handle
    with `remove`.
    """

    def __init__(
        self,
        records: dict[str, Any],
        layers: tuple[str, ...],
        handles: list[RemovableHandle],
    ) -> None:
        self._records = records
        self.layers = layers
        # Runs on remove(), or when nobody holds this object any more: a forgotten handle leaves no
        # hook behind either.
        self._finalizer = weakref.finalize(self, _remove_all, handles, records)

    def __getitem__(self, layer: str) -> Any:
        try:
            return self._records[layer]
        except KeyError:
            pass
        if layer not in self.layers:
            near = get_close_matches(str(layer), self.layers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            message = (
                f"{layer!r} is not being captured, only {', '.join(map(repr, self.layers))}{hint}"
            )
        elif not self._finalizer.alive:
            message = (
                f"{layer!r}: the capture has ended and its features are released; read them "
                "inside the with block, or before remove()"
            )
        else:
            message = (
                f"{layer!r}: nothing captured yet, because the layer has not been called since the "
                "capture began or was cleared. Run the model first. If you did: its forward may "
                "use the layer's parameters without calling the layer; or a function that was "
                "compiled with torch.compile ran the model before the capture began, and compiled "
                "code does not see hooks that come later: begin the capture before the first run, "
                "or call torch.compiler.reset() after it"
            )
        raise KeyError(message)

    def __iter__(self) -> Iterator[str]:
        return iter([layer for layer in self.layers if layer in self._records])

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        state = "" if self._finalizer.alive else ", removed"
        return f"{type(self).__name__}({', '.join(map(repr, self.layers))}{state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def clear(self) -> None:
        """Forget the features captured so far (and release their memory); go on capturing."""
        self._records.clear()

    def remove(self) -> None:
        """Take the hooks off the model and forget the features. Harmless if repeated."""
        self._finalizer()


def capture_features(
    model: nn.Module,
    layers: str | Iterable[str],
    *,
    inputs: bool = False,
    detach: bool = False,
) -> CapturedFeatures:
    r"""Record what layers inside a model return, without touching the model's code.

    As a context manager, the features are there until the block ends::

        with capture_features(teacher, ["encoder.conv5"]) as features:
            logits = teacher(points)
            loss = fad(student_features, features["encoder.conv5"])

    As a handle, install it once and use it for the whole training::

        features = capture_features(student, ["encoder.conv5"])
        for points, labels in loader:
            logits = student(points)
            loss = F.cross_entropy(logits, labels) + fad(features["encoder.conv5"], ...)
        features.remove()

    Each entry is exactly what the layer returned in its **last call**: the same tensor, with its
    graph, or the tuple or dictionary of them if that is what the layer returns. Nothing is copied.
    Hence, if the next operation works in place (``nn.ReLU(inplace=True)``), the entry holds what it
    left; and a layer under reentrant activation checkpointing gives features without a graph. The
    model's mode, its parameters and their ``requires_grad`` stay as they are. The hooks go when the
    block ends (also by an exception), on ``remove()``, or with the last reference to the handle.

    **Wrapped models.** Paths are those of the plain model: ``module.`` (`DistributedDataParallel`,
    `DataParallel`), ``_orig_mod.`` (`torch.compile`) and FSDP's and checkpointing's prefixes may be
    left out. **Compiled models.** Code that `torch.compile` produced ignores hooks that come later
    (pytorch#117758). So, where a layer lies inside a compiled module, this calls
    ``torch.compiler.reset()``: the next run compiles anew, with the hooks; begin once, before the
    first run, and nothing is compiled twice. What cannot be seen from here is a *function* that
    calls the model and was compiled and run before; then the entry stays empty, and reading it says
    so.

    Args:
        model: any `torch.nn.Module`; TorchScript modules cannot be hooked.
        layers: paths as in ``model.named_modules()``: one, or several. ``""`` is the model itself.
        inputs: record what the layers receive instead: the argument, or a tuple if there are
            several. Useful before a classifier.
        detach: record detached tensors, so that they keep no graph alive. A teacher that runs
            under `torch.no_grad` has none anyway, and `FeatureAdversarialLoss` detaches the teacher
            itself.

    Returns:
        A mapping from path to features, see `CapturedFeatures`.

    Raises:
        TypeError: `model` is no module, or is TorchScript; or `layers` are not paths.
        ValueError: no layers, or a path that the model does not have; similar ones are listed.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with capture_features(model, ["0", "1"]) as features:
        ...     _ = model(torch.zeros(4, 3))
        ...     features["1"].shape
        torch.Size([4, 8])
    """
    _check_type("model", model, nn.Module)
    if isinstance(layers, nn.Module) or not isinstance(layers, Iterable):
        message = (
            f"layers: expected a path as in model.named_modules(), or several, got "
            f"{type(layers).__name__}"
        )
        raise TypeError(message)
    paths = tuple(dict.fromkeys([layers] if isinstance(layers, str) else layers))
    if not paths:
        message = "layers: expected at least one path, got none"
        raise ValueError(message)
    known = _paths(model)
    found = {path: _find(path, known, model) for path in paths}
    records: dict[str, Any] = {}
    handles = [
        chain[-1].register_forward_hook(_Recorder(records, path, inputs, detach), with_kwargs=True)
        for path, chain in found.items()
    ]
    if any(_hooks_are_compiled(chain) for chain in found.values()):
        torch.compiler.reset()
    return CapturedFeatures(records, paths, handles)


def _paths(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Every path into the model, with the modules on the way.

    Once as it is, and once without the prefixes of wrappers. Where a wrapper and what it wraps
    share a path, the wrapper has it: its hooks run outside compiled code, and not a second time
    when a checkpoint is recomputed.
    """
    exact: dict[str, tuple[nn.Module, ...]] = {}
    plain: dict[str, tuple[nn.Module, ...]] = {}
    pending: list[tuple[tuple[str, ...], tuple[str, ...], tuple[nn.Module, ...]]] = [
        ((), (), (model,))
    ]
    while pending:
        names, bare, chain = pending.pop(0)
        exact[".".join(names)] = chain
        plain.setdefault(".".join(bare), chain)
        children = chain[-1]._modules
        for name, child in children.items():
            if child is None or any(child is module for module in chain):
                continue
            wrapper = name in _WRAPPED or (name == "module" and len(children) == 1)
            pending.append(((*names, name), bare if wrapper else (*bare, name), (*chain, child)))
    return {**plain, **exact}


def _find(
    path: str, known: Mapping[str, tuple[nn.Module, ...]], model: nn.Module
) -> tuple[nn.Module, ...]:
    _check_type("layers: every path", path, str)
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
    chain = known[path]
    if any(isinstance(module, torch.jit.ScriptModule) for module in chain):
        message = (
            f"layers: {path!r} lies in a TorchScript module, which runs no Python hooks; capture "
            "from the model before torch.jit.script or torch.jit.trace"
        )
        raise TypeError(message)
    return chain


def _hooks_are_compiled(chain: tuple[nn.Module, ...]) -> bool:
    """Whether the last module's hooks run inside code that `torch.compile` produced."""
    # torch.compile(module) gives a wrapper, whose own hooks run outside; module.compile() compiles
    # the call, hooks included.
    wrappers = chain[:-1]
    return any(hasattr(module, "_torchdynamo_orig_callable") for module in wrappers) or any(
        module._compiled_call_impl is not None for module in chain
    )


def _check_type(name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        kind = {Tensor: "torch.Tensor", nn.Module: "torch.nn.Module"}.get(expected, "str")
        message = f"{name}: expected a {kind}, got {type(value).__name__}"
        raise TypeError(message)
