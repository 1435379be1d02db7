"""What is probably not meant, said once: no error, because there may be a reason for it."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from fad_loss._checks import look
from fad_loss._fingerprints import untrained

# So many updates of the student, and the loss's own parameters should have moved too.
_UPDATES = 10
# Scores of standardised features are of order 1 to 100.
_UNREASONABLE = 1e4
# Steps of the graph that are looked at on the way to a parameter of the student.
_NODES = 10_000


class Advice:
    """Watches one loss while it trains, without waiting for any device."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.scored = False
        self.student: ReferenceType[Tensor] | None = None
        self.version = -1
        self.updates = 0
        self.versions: dict[str, int] | None = None
        self.balanced = 0
        self.steps = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Advice:
        return Advice()

    def __reduce__(self) -> tuple[Any, ...]:
        return Advice, ()

    def on_step(self, total_steps: int | None) -> None:
        """Training ends with the schedule of the weight."""
        self.steps += 1
        if total_steps is not None and self.steps > total_steps:
            self._say(
                "steps",
                f"total_steps: the training goes on after {total_steps} steps, from where the "
                "weight is 0 and the student learns nothing from this loss; count every call in "
                "training, total_steps=epochs * len(loader)",
            )

    def on_features(self, student: Tensor, teacher: Tensor) -> None:
        """In training, the student's features have a graph, and the teacher's have not."""
        if student.requires_grad:
            return
        text = (
            "carry no graph (requires_grad is False), so the student learns nothing from this loss"
        )
        if teacher.requires_grad:
            text += ", but the teacher's do: are they swapped? It is fad(student, teacher)"
        else:
            text += (
                "; do not detach them, and do not compute them under no_grad, or call fad.eval() "
                "where nothing is to be learnt"
            )
        self._say("graph", f"student: the features {text}")

    def on_parameters(self, loss: nn.Module, made_with: dict[str, Tensor], student: Tensor) -> None:
        """While the student is updated, so are the loss's own parameters."""
        if "parameters" in self.given or self.updates >= _UPDATES:
            return
        weight = None if self.student is None else self.student()
        if weight is None:
            weight = _a_parameter(student)
            if weight is None:
                return
            self.student, self.version = ref(weight), weight._version
            self.versions = {n: p._version for n, p in loss.named_parameters() if p.requires_grad}
            return
        if weight._version == self.version:
            return
        self.version = weight._version
        self.updates += 1
        if self.updates < _UPDATES or not self.versions:
            return
        now = dict(loss.named_parameters())
        if any(n not in now or now[n]._version != v for n, v in self.versions.items()):
            return
        # Optimizers that go around the version counter leave other bits.
        if all(bool(still) for still in untrained(loss, made_with).values()):
            self._say(
                "parameters",
                f"fad.parameters(): the student was updated {_UPDATES} times, and none of the "
                f"loss's {len(self.versions)} trainable parameters ({', '.join(self.versions)}) "
                "has moved; give them to the optimizer: "
                "torch.optim.AdamW([*student.parameters(), *fad.parameters()])",
            )

    def on_balance(self, measured: Tensor) -> None:
        """With `balance`, other losses' gradients arrive at the features that the loss got."""
        self.balanced += 1
        if self.balanced == _UPDATES + 1 and not bool(measured > 0):
            self._say(
                "balance",
                f"balance: in {_UPDATES} steps no gradient of another loss arrived at the "
                "student's features, so there is nothing to balance with; give this loss the "
                "tensor that the task's loss is computed from, or ragged(...) of it, but no copy, "
                "or set balance=False",
            )

    def on_scores(self, scores: Tensor) -> None:
        """The first scores of the student are of a reasonable size."""
        if self.scored or not look(scores):
            return
        self.scored = True
        size = float(scores.detach().abs().mean())
        if size > _UNREASONABLE:
            self._say(
                "scores",
                f"the student's first scores are {size:.2g} in the mean, where up to 100 is usual; "
                "look at the scale of what reaches the discriminator (normalize=True standardises "
                "it), and whether student and teacher saw the same clouds",
            )

    def _say(self, kind: str, text: str) -> None:
        if kind not in self.given:
            self.given.add(kind)
            warnings.warn(f"FeatureAdversarialLoss: {text}", UserWarning, stacklevel=4)


def _a_parameter(features: Tensor) -> Tensor | None:
    """A leaf that `features` were computed from: one of the student's parameters."""
    todo: list[Any] = [features.grad_fn]
    seen: set[Any] = set()
    while todo and len(seen) < _NODES:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            return leaf
        todo.extend(next_node for next_node, _ in node.next_functions)
    return None
