"""Distiller: both networks, the layers to compare, and a loss for each pair, in one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from fad_loss._errors import choose, describe, expected, switch
from fad_loss._layouts import (
    along,
    channels,
    follow_points,
    in_layout,
    layout_of,
    one_more_point,
    one_per_cloud,
    shuffled,
)
from fad_loss._places import Place, place_of
from fad_loss._points import LAYOUTS
from fad_loss.capture import CapturedFeatures, capture_features
from fad_loss.loss import FeatureAdversarialLoss

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Distiller"]

_CALLS: Final = {name: name for name in ("last", "error")}
Target: TypeAlias = str | tuple[str, str | nn.Module]
"""The teacher's path; or a pair of it and a loss, or a discriminator."""


class _Pair(NamedTuple):
    """The two layers that one loss compares, and how their features lie.

    Layouts are those of `LAYOUTS`, "ragged", or "global" for one feature per cloud.
    """

    student: str
    teacher: str
    positions: tuple[str, str] | None
    layouts: tuple[str, str] = ("", "")
    found: bool = False  # whether nobody named the positions


def _key(pair: _Pair) -> str:
    """The name of the loss; dots are not allowed there, and methods of ModuleDict are taken."""
    return f"{pair.student}:{pair.teacher}".replace(".", "/")


class Distiller(nn.Module):
    r"""A student, the frozen teacher that it learns from, and the losses between their layers.

    .. math::
        L = \sum_l \mathrm{FAD}_l\bigl(s_l(x),\, t_{m(l)}(x)\bigr)

    where :math:`s_l` is what layer l of the student returns for the points x, and
    :math:`t_{m(l)}` what the layer of the teacher does that the mapping `layers` names for it. Both
    are taken by forward hooks (`fad_loss.capture_features`): neither network is changed::

        distiller = Distiller(student, teacher, {"conv5": "conv5"}, example=points)
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
        for points, labels in loader:
            logits, loss = distiller(points)
            loss = loss + F.cross_entropy(logits, labels)

    The number of channels and the layout of each layer's features are read off runs of `example`
    (in evaluation, without a graph; both networks are as before afterwards).

    **The teacher** is in evaluation mode and stays there, runs without a graph, and is not part of
    ``parameters()`` or ``state_dict()``; it moves with ``to()``, and a copy or a pickle of the
    distiller has its own. **To save** the student alone, save ``distiller.student``; to go on
    later, the distiller's ``state_dict()`` has the student and the losses. **One module**:
    `DistributedDataParallel`, FSDP2's ``fully_shard`` and `torch.compile` take the distiller whole.

    Args:
        student: the network that learns.
        teacher: the network that it learns from.
        layers: from a path in the student (as in ``student.named_modules()``; ``"encoder[1]"`` is
            an element of what a layer returns) to a path in the teacher; or to
            ``(path, loss)``, a `FeatureAdversarialLoss` of your own; or to
            ``(path, discriminator)``, what `FeatureAdversarialLoss` takes as one.
        example: points such as both networks take, of two clouds or more.
        layout: of features with an axis of points: "bnc" or "bcn", or a pair of the student's and
            the teacher's. None looks which axis grows if the clouds of `example`, a tensor
            ``(B, N, 3)`` or ``(B, 3, N)``, get one point more; or, of networks that take no other
            number of points, which one is as long as they have points; or, of networks that choose
            points, as long as the positions beside the features.
        positions: for networks that choose points: from a path in the student, one of `layers`, to
            the paths where both networks return the positions of those points,
            ``{"sa1[1]": ("sa1[0]", "sa1[0]")}``. None looks for them in what both modules return
            beside the features: they are positions if each of them is a point of `example`, a
            tensor. They are used by the discriminator that is chosen here, and by "paired"; an
            empty mapping names none.
        calls: of a layer that is called several times in one run, use the "last" call, or raise an
            "error".
        clone: use copies of what the layers return, where an operation in place follows.
        options: of each `FeatureAdversarialLoss` that is made here: `total_steps`, `weight`, ...
            Without `weight` and `balance` it is ``balance="auto"``: each loss pulls at its layer
            with a share of the task's pull, whatever the networks and the task are.
            A `discriminator` that is not given is "paired" where what the layers return can be told
            to correspond: feature i is of the same point in both, or of the same cloud, or
            `positions` say where each belongs. Elsewhere it is "teacher". Whether points correspond
            shows the example: its points are shuffled, and the features of both have to follow.

    Shape:
        Features of points ``(B, N, C)`` or ``(B, C, N)``, ragged ones, or one per cloud,
        ``(B, C)``, ``(B, C, 1)`` or ``(B, 1, C)``. Student and teacher may differ in layout, C and
        N.

    Raises:
        TypeError: not modules, or a layer that returns something other than a tensor.
        ValueError: a path that is not there (those that are, are listed), a layout that the
            example does not show, networks that share modules, or options that do not fit.

    Source: the loss is that of Lee and Wu, see `FeatureAdversarialLoss`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> student = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> teacher = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> points = torch.randn(2, 32, 3)
        >>> distiller = Distiller(student, teacher, {"1": "1"}, example=points)
        >>> output, loss = distiller(points)
        >>> loss.backward()
        >>> output.shape, loss.shape, student[0].weight.grad.shape
        (torch.Size([2, 32, 4]), torch.Size([]), torch.Size([8, 3]))
        >>> sorted(distiller.state_dict())[-2:]
        ['student.2.bias', 'student.2.weight']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, Target],
        *,
        example: Any,
        layout: str | tuple[str, str] | None = None,
        positions: Mapping[str, tuple[str, str]] | None = None,
        calls: str = "error",
        clone: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_networks(student, teacher)
        targets = _checked_layers(layers, positions)
        given = options.pop("discriminator", None)
        if options.get("weight") is None:
            options.setdefault("balance", "auto")
        self.student, self.losses = student, nn.ModuleDict()
        # In a tuple, so that it is no submodule: see the class.
        self._teacher = (teacher,)
        self._calls, self._clone = choose("calls", calls, _CALLS), switch("clone", clone)
        beside = self._places(targets, example) if positions is None else {}
        chosen = {path: given if own is None else own for path, (_, own) in targets.items()}
        positions = {
            path: (mine.path, its.path)
            for path, (mine, its) in beside.items()
            if chosen[path] in (None, "paired")
        } or positions
        self._pairs = tuple(
            _Pair(path, its_path, (positions or {}).get(path))
            for path, (its_path, _) in targets.items()
        )
        self._capture()
        seen = self._look_at(example)
        larger = self._try_at(one_more_point(example) if layout is None else None)
        others, order = shuffled(example)
        again = self._try_at(others)
        pairs = []
        for pair, (mine, its), more, new in zip(self._pairs, seen, larger, again, strict=True):
            layouts = _both_layouts(layout)
            if layout is None and pair.student in beside:
                layouts = beside[pair.student][0].layout, beside[pair.student][1].layout
            found = (
                layout_of(f"student layer {pair.student!r}", mine, layouts[0], example, more[0]),
                layout_of(f"teacher layer {pair.teacher!r}", its, layouts[1], example, more[1]),
            )
            for kind in ("global", "ragged"):
                if (found[0] == kind) != (found[1] == kind):
                    both = f"{describe(mine)} and {describe(its)}"
                    wanted = "two layers of features of points, or two of one per cloud"
                    raise expected(f"layers[{pair.student!r}]", wanted, both)
            sides = zip((mine, its), new, found, strict=True)
            follow = all(follow_points(*side, order) for side in sides)
            # Where point i is point i, there is nothing to look for.
            needed = None if follow and pair.student in beside else pair.positions
            seen_beside = pair.student in beside
            pairs.append(pair._replace(layouts=found, positions=needed, found=seen_beside))
            own = chosen[pair.student]
            if own is None:
                corresponds = follow or needed is not None or "global" in found
                own = "paired" if corresponds else "teacher"
            sizes = channels(mine, found[0]), channels(its, found[1])
            self.losses[_key(pair)] = _make_loss(pair, own, sizes, options, mine)
        self._pairs = tuple(pairs)
        self._capture()  # without the positions that are not needed
        teacher.eval()

    _of_student: CapturedFeatures
    _of_teacher: CapturedFeatures

    def _look_at(self, example: Any) -> list[tuple[Any, Any]]:
        """What the layers of each pair return for an example."""
        try:
            with _watched(self.student), _watched(self.teacher), torch.no_grad():
                self.student(example)
                self.teacher(example)
            return [(self._of_student[p.student], self._of_teacher[p.teacher]) for p in self._pairs]
        finally:
            self._forget()

    def _places(self, targets: Mapping[str, Any], example: Any) -> dict[str, tuple[Place, Place]]:
        """The positions that both modules of a pair return beside their features."""
        found = {}
        for path, (its_path, _) in targets.items():
            with suppress(Exception), torch.no_grad():
                with _watched(self.student):
                    mine = place_of(self.student, path, example, self._calls)
                with _watched(self.teacher):
                    its = mine and place_of(self.teacher, its_path, example, self._calls)
                if mine and its:
                    found[path] = mine, its
        return found

    def _try_at(self, example: Tensor | None) -> list[tuple[Any, Any]]:
        """The same, or pairs of None; a network that does not take it may raise what it likes."""
        if example is not None:
            with suppress(Exception):
                return self._look_at(example)
        return [(None, None)] * len(self._pairs)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(
        self,
        points: Any,
        labels: Tensor | None = None,
        mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Any, Tensor]:
        """Run both networks, and compare their layers.

        Args:
            points: what both networks take.
            labels: class of each cloud, ``(B,)``, for discriminators that are conditioned on it.
            mask: which points count, ``(B, N)``, or a pair of the student's and the teacher's, for
                all pairs of layers with an axis of points.
            positions: a pair of where the student's and the teacher's points lie, for all pairs of
                layers whose discriminator uses it and that name no positions of their own; they
                go before those that were found.

        Returns:
            What the student returned, and the sum of the losses, a scalar.
        """
        both = self._of_student, self._of_teacher
        if not torch.compiler.is_compiling() and any(one.replaced for one in both):
            self._capture()
        output = self.student(points)
        with torch.no_grad():
            self.teacher(points)
        if positions is not None and not any(map(self._uses_positions, self._pairs)):
            wanted = "a pair of layers whose discriminator uses them"
            remedy = 'leave them out, or take discriminator="teacher" or "paired"'
            raise expected("positions", wanted, "none", remedy)
        losses = [self._compare(pair, labels, mask, positions) for pair in self._pairs]
        self._forget()
        return output, sum(losses[1:], losses[0])

    def statistics(self) -> dict[str, Tensor]:
        """What to log of each loss, see `FeatureAdversarialLoss.statistics`.

        Keys begin with the student's path and a slash.
        """
        return {
            f"{pair.student}/{name}": value
            for pair in self._pairs
            for name, value in self._loss(pair).statistics().items()
        }

    def _loss(self, pair: _Pair) -> FeatureAdversarialLoss:
        return cast("FeatureAdversarialLoss", self.losses[_key(pair)])

    def _uses_positions(self, pair: _Pair) -> bool:
        several = (pair.positions is None or pair.found) and "global" not in pair.layouts
        return several and self._loss(pair).discriminator.positional

    def _compare(
        self,
        pair: _Pair,
        labels: Tensor | None,
        mask: Tensor | tuple[Tensor | None, Tensor | None] | None,
        positions: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        loss = self._loss(pair)
        features = self._of_student[pair.student], self._of_teacher[pair.teacher]
        places = positions if self._uses_positions(pair) else None
        if places is None and pair.positions is not None:
            places = self._of_student[pair.positions[0]], self._of_teacher[pair.positions[1]]
        if "global" in pair.layouts:
            of_student, of_teacher = (
                one_per_cloud(one, loss.discriminator, loss.layout) for one in features
            )
            return cast("Tensor", loss(of_student, of_teacher, labels))
        of_student, of_teacher = (
            in_layout(one, layout, loss.layout)
            for one, layout in zip(features, pair.layouts, strict=True)
        )
        if places is not None:
            places = (
                along(places[0], of_student, loss.layout),
                along(places[1], of_teacher, loss.layout),
            )
        return cast("Tensor", loss(of_student, of_teacher, labels, mask, places))

    # ------------------------------------------------------------------------------- capturing

    def _capture(self) -> None:
        """Hook the layers of both networks; the hooks go with this object, or when called again."""
        named = [pair.positions or () for pair in self._pairs]
        mine = [pair.student for pair in self._pairs] + [paths[0] for paths in named if paths]
        its = [pair.teacher for pair in self._pairs] + [paths[1] for paths in named if paths]
        self._of_student, self._of_teacher = (
            capture_features(network, paths, calls=self._calls, clone=self._clone)
            for network, paths in ((self.student, mine), (self.teacher, its))
        )
        for pair in self._pairs if self.losses else ():
            if (balance := self._loss(pair).balance) is not None:
                self._of_student._recording.beside[pair.student] = balance.attach()

    def _forget(self) -> None:
        """Let go of the features, and with them of the graph."""
        self._of_student.clear()
        self._of_teacher.clear()

    # ------------------------------------------------------------- what nn.Module has to be told

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the student and the losses; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the teacher along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the hooks: those of a copy must write into records of its own."""
        return {k: v for k, v in self.__dict__.items() if k not in {"_of_student", "_of_teacher"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._capture()

    def extra_repr(self) -> str:
        """Shown by ``print(distiller)``."""
        pairs = ", ".join(
            f"{pair.student!r}: {pair.teacher!r}"
            + (f" at {pair.positions[0]!r} and {pair.positions[1]!r}" if pair.positions else "")
            for pair in self._pairs
        )
        return f"layers={{{pairs}}}, teacher={type(self.teacher).__name__}"


# ------------------------------------------------------------------------------------ arguments


def _check_networks(student: object, teacher: object) -> None:
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise expected(name, "a torch.nn.Module", type(network).__name__, error=TypeError)
    mine = {id(module): name for name, module in student.named_modules()}  # type: ignore[attr-defined]
    for name, module in teacher.named_modules():  # type: ignore[attr-defined]
        if id(module) in mine:
            shared = f"{name or type(module).__name__!r} in both"
            remedy = "the teacher is frozen; give it layers of its own, with copy.deepcopy(teacher)"
            raise expected("teacher", "no module that the student has too", shared, remedy)


def _checked_layers(layers: object, positions: object) -> dict[str, tuple[str, Any]]:
    """From the student's path to the teacher's, and to what was given for the loss, or None."""
    wanted = 'a mapping from paths in the student to paths in the teacher, {"conv5": "conv5"}'
    if not isinstance(layers, Mapping):
        raise expected("layers", wanted, layers, error=TypeError)
    if not layers:
        raise expected("layers", wanted, "an empty one")
    targets: dict[str, tuple[str, Any]] = {}
    for path, target in layers.items():
        pair = (target, None) if isinstance(target, str) else target
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            wanted = "a path in the teacher, or a pair of one and a loss or discriminator"
            raise expected(f"layers[{path!r}]", wanted, target, error=TypeError)
        targets[path] = pair
    given = [id(own) for _, own in targets.values() if isinstance(own, nn.Module)]
    if len(set(given)) < len(given):
        remedy = "each follows statistics of its own features; make one per pair of layers"
        raise expected("layers", "one loss for each pair", "the same for several", remedy)
    for path in {} if positions is None else positions:  # type: ignore[attr-defined]
        if path not in targets:
            raise expected(
                "positions", f"paths of layers, {', '.join(map(repr, targets))}", repr(path)
            )
    return targets


def _both_layouts(layout: Any) -> tuple[str | None, str | None]:
    mine, its = layout if isinstance(layout, tuple) and len(layout) == 2 else (layout, layout)
    for one in (mine, its):
        if one is not None:
            choose("layout", one, LAYOUTS)
    return mine, its


def _make_loss(
    pair: _Pair, own: Any, sizes: tuple[int, int], options: dict[str, Any], features: Tensor
) -> FeatureAdversarialLoss:
    """The user's own loss for the pair, if it fits; or one with a discriminator of that kind."""
    if not isinstance(own, FeatureAdversarialLoss):
        dtype = torch.float64 if features.dtype == torch.float64 else None
        chosen = {**options, "discriminator": own}
        return FeatureAdversarialLoss(*sizes, **chosen).to(features.device, dtype)
    if (own.student_channels, own.teacher_channels) != sizes:
        made = f"{own.student_channels} and {own.teacher_channels} channels, as the loss is made"
        remedy = f"make it with FeatureAdversarialLoss{sizes}"
        raise expected(f"layers[{pair.student!r}]", made, f"{sizes[0]} and {sizes[1]}", remedy)
    return own


@contextmanager
def _watched(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, and each of its modules in its own again afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
