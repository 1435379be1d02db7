"""Intermediate features of models that are not yours, without editing them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from fad_loss._errors import choose, expected, switch
from fad_loss._paths import Layer, element, find, hooks_are_compiled, paths_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CapturedFeatures", "capture_features"]

_CALLS: Final = {name: name for name in ("last", "all", "error")}


class _Call(NamedTuple):
    """What a layer returned, and how often its tensors had been changed in place by then."""

    value: Any
    versions: list[int] | None


@dataclass
class _Recording:
    """The records of all layers, and how they are made."""

    inputs: bool = False
    detach: bool = False
    calls: str = "last"
    clone: bool = False
    alive: bool = True
    # What the rest of the model sees in place of a layer's output, where copies are recorded.
    beside: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    made: dict[str, tuple[_Call, ...]] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled model takes its hooks along. The copy of this one records nothing:
        # nobody could read the records, they would only hold on to memory, and tensors with a
        # graph cannot be deep-copied at all.
        return (_Recording, (False, False, "last", False, False))

    @property
    def watching(self) -> bool:
        """Whether this run of the model is one whose features somebody may read."""
        if not self.alive or torch.compiler.is_dynamo_compiling():
            return self.alive
        # Not one that is exported or traced, nor the second one of a checkpoint, in the backward.
        return not (
            torch.compiler.is_compiling()
            or torch._C._is_tracing()
            or torch._C._current_graph_task_id() != -1
        )

    def keep(self, layer: str, value: Any) -> None:
        """Record what a layer returned."""
        earlier = self.made.get(layer, ())
        if earlier and self.calls == "error":
            message = (
                f"{layer!r}: called a second time in one run of the model; capture with "
                "calls='last' or calls='all', or another layer"
            )
            raise RuntimeError(message)
        if self.detach:
            value = tree_map_only(Tensor, Tensor.detach, value)
        elif not torch.compiler.is_dynamo_compiling() and _loses_its_graph(value):
            message = (
                f"{layer!r}: lies in a reentrant checkpoint, which runs it without a graph, and no "
                "loss on its features would reach the model; checkpoint with use_reentrant=False"
            )
            raise RuntimeError(message)
        versions = None
        # Where versions are not counted, a change in place would go unnoticed.
        if self.clone or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            value = tree_map_only(Tensor, Tensor.clone, value)
        else:
            versions = _versions(value)
        call = _Call(value, versions)
        self.made[layer] = (*earlier, call) if self.calls == "all" else (call,)

    def end(self, handles: list[RemovableHandle]) -> None:
        """Take the hooks off and release the features."""
        for handle in handles:
            handle.remove()
        self.alive = False
        self.made.clear()


@dataclass
class _Hook:
    """What the hooks have in common."""

    recording: _Recording

    @property
    def __name__(self) -> str:
        # torch.jit.script compiles the hooks too, and asks for their names first.
        message = (
            "torch.jit.script cannot compile a model while its features are captured; call "
            "remove() on them first"
        )
        raise AttributeError(message)


@dataclass
class _Forget(_Hook):
    """The model's forward pre-hook: no record of an earlier run passes for one of this run."""

    def __call__(self, *_: Any) -> None:
        if self.recording.watching:
            self.recording.made.clear()


@dataclass
class _Record(_Hook):
    """The forward hook of one layer."""

    path: str
    elements: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self.recording.watching:
            return None
        if getattr(module, "_is_replica", False):
            message = (
                f"{self.path!r}: torch.nn.DataParallel runs a copy of it on each GPU, with a part "
                "of the batch, and the features of one are not those of the batch; use "
                "DistributedDataParallel, or one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
            raise RuntimeError(message)
        value = output
        if self.recording.inputs:
            received = (*args, *kwargs.values())
            value = received[0] if len(received) == 1 else received
        for name in self.elements:
            value = element(self.path, value, name)
        self.recording.keep(self.path, value)
        beside = self.recording.beside.get(self.path)
        copied = self.recording.clone or torch.compiler.is_dynamo_compiling()
        if beside is None or not copied or not module.training:
            return None
        return tree_map_only(Tensor, lambda t: beside(t) if t is value else t, output)


def _loses_its_graph(value: Any) -> bool:
    """Whether a reentrant checkpoint computes `value` of something that requires a gradient."""
    if torch.is_grad_enabled():
        return False
    if any(leaf.requires_grad for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
        return False
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.forward.__code__:
            return any(frame.f_locals["ctx"].needs_input_grad)
    return False


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class CapturedFeatures(Mapping[str, Any]):
    """What `capture_features` returns: the layers' outputs in the latest run, by path.

    A mapping of the layers that have been called since the model's latest run began, a context
    manager, and a handle with `remove`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
        >>> features = capture_features(model, "0")
        >>> _ = model(torch.zeros(4, 3))
        >>> features["0"].shape
        torch.Size([4, 8])
        >>> features.remove()
    """

    def __init__(
        self, recording: _Recording, found: dict[str, Layer], handles: list[RemovableHandle]
    ) -> None:
        self._recording = recording
        self._found = found
        # Runs on remove(), or when nobody holds this object any more: a forgotten handle leaves no
        # hook behind either.
        self._finalizer = weakref.finalize(self, recording.end, handles)

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths that are captured."""
        return tuple(self._found)

    @property
    def replaced(self) -> tuple[str, ...]:
        """The paths where the model has another module since (after `convert_sync_batchnorm`)."""
        return tuple(path for path, layer in self._found.items() if layer.replaced)

    def __getitem__(self, layer: str) -> Any:
        if layer not in self._recording.made:
            raise KeyError(self._why_not(layer))
        calls = self._recording.made[layer]
        for call in calls:
            if call.versions is not None and call.versions != _versions(call.value):
                message = (
                    f"{layer!r}: changed in place after the layer returned it (by an activation "
                    "with inplace=True, say); capture with clone=True for what the layer returned, "
                    "or capture the layer that changed it"
                )
                raise RuntimeError(message)
        return tuple(c.value for c in calls) if self._recording.calls == "all" else calls[0].value

    def _why_not(self, layer: str) -> str:
        if layer not in self._found:
            near = get_close_matches(str(layer), self.layers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return (
                f"{layer!r} is not being captured, only {', '.join(map(repr, self.layers))}{hint}"
            )
        if not self._recording.alive:
            return (
                f"{layer!r}: the capture has ended and its features are released; read them "
                "inside the with block, or before remove()"
            )
        if self._found[layer].replaced:
            return (
                f"{layer!r}: nothing captured, because the model has had another module in this "
                "place since the capture began; change layers first (convert_sync_batchnorm, say), "
                "then capture"
            )
        return (
            f"{layer!r}: nothing captured yet, because the layer has not been called since the "
            "capture began or was cleared, or in the model's latest run. Run the model first. If "
            "you did: its forward may use the layer's parameters without calling the layer; or a "
            "function that was compiled with torch.compile ran the model before the capture began, "
            "and compiled code does not see hooks that come later: begin the capture before the "
            "first run, or call torch.compiler.reset() after it"
        )

    def __contains__(self, layer: object) -> bool:
        return layer in self._recording.made

    def __iter__(self) -> Iterator[str]:
        return iter([layer for layer in self._found if layer in self._recording.made])

    def __len__(self) -> int:
        return len(self._recording.made)

    def __repr__(self) -> str:
        state = "" if self._recording.alive else ", removed"
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
        self._recording.made.clear()

    def remove(self) -> None:
        """Take the hooks off the model and forget the features. Harmless if repeated."""
        self._finalizer()


def capture_features(
    model: nn.Module,
    layers: str | Iterable[str],
    *,
    inputs: bool = False,
    detach: bool = False,
    calls: str = "last",
    clone: bool = False,
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

    Each entry is exactly what the layer returned in the latest run of `model`: the same tensor,
    with its graph, or the tuple or dictionary of them if that is what the layer returns;
    ``"path[1]"`` and ``"path[name]"`` take one element (or field) of it. The model's mode, its
    parameters and their ``requires_grad`` stay as they are. The hooks go when the block ends (also
    by an exception), on ``remove()``, or with the last reference to the handle. Runs that are
    exported (`torch.export`), traced, or computed again for a checkpoint in the backward are not
    recorded.

    **Wrapped models.** Paths are those of the plain model: ``module.`` (`DistributedDataParallel`),
    ``_orig_mod.`` (`torch.compile`) and FSDP's and checkpointing's prefixes may be left out.
    **Compiled models.** Code that `torch.compile` produced ignores hooks that come later
    (pytorch#117758). So, where a layer lies inside a compiled module, this calls
    ``torch.compiler.reset()``: the next run compiles anew, with the hooks; begin once, before the
    first run, and nothing is compiled twice. What cannot be seen from here is a *function* that
    calls the model and was compiled and run before; then the entry stays empty, and reading it says
    so. Compiled code, and `torch.inference_mode`, record copies.

    Args:
        model: any `torch.nn.Module`; TorchScript modules cannot be hooked.
        layers: paths as in ``model.named_modules()``: one, or several. ``""`` is the model itself.
        inputs: record what the layers receive instead: the argument, or a tuple if there are
            several. Useful before a classifier.
        detach: record detached tensors, so that they keep no graph alive. A teacher that runs
            under `torch.no_grad` has none anyway, and `FeatureAdversarialLoss` detaches the teacher
            itself.
        calls: of a layer that is called several times in one run of the model, the ``"last"`` call,
            a tuple of ``"all"``, or an ``"error"``. (Where parts of the model are called by
            themselves, a run lasts until `clear`.)
        clone: record copies, which an operation in place that follows (``nn.ReLU(inplace=True)``)
            does not reach.

    Returns:
        A mapping from path to features, see `CapturedFeatures`.

    Raises:
        TypeError: `model` is no module, or is TorchScript; or `layers` are not paths.
        ValueError: no layers, or a path that the model does not have; similar ones are listed. In
            the model's run: an element that the layer did not return.
        RuntimeError: in the model's run, a second call with ``calls="error"``, a reentrant
            checkpoint (whose layers run without a graph), or a replica of `torch.nn.DataParallel`
            (which has a part of the batch); in reading, features that were changed in place.
        KeyError: in reading, a layer that was not called; the message says why.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with capture_features(model, ["0", "1"]) as features:
        ...     _ = model(torch.zeros(4, 3))
        ...     features["1"].shape
        torch.Size([4, 8])
    """
    if not isinstance(model, nn.Module):
        raise expected("model", "a torch.nn.Module", type(model).__name__, error=TypeError)
    if isinstance(layers, nn.Module) or not isinstance(layers, Iterable):
        wanted = "a path as in model.named_modules(), or several"
        raise expected("layers", wanted, type(layers).__name__, error=TypeError)
    paths = tuple(dict.fromkeys([layers] if isinstance(layers, str) else layers))
    if not paths:
        raise expected("layers", "at least one path", "none")
    recording = _Recording(
        switch("inputs", inputs),
        switch("detach", detach),
        choose("calls", calls, _CALLS),
        switch("clone", clone),
    )
    known = paths_of(model)
    found = {path: find(path, known, model) for path in paths}
    handles = [model.register_forward_pre_hook(_Forget(recording))]
    for path, layer in found.items():
        record = _Record(recording, path, layer.elements)
        handles.append(layer.chain[-1].register_forward_hook(record, with_kwargs=True))
    if any(hooks_are_compiled(layer.chain) for layer in found.values()):
        torch.compiler.reset()
    return CapturedFeatures(recording, found, handles)
