"""``python -m fad_loss``: what runs on this machine, and whether it is right.

Prints versions, devices, the backend that each operation uses on each device with the reason
against the others, and the outcome of a self-check: every operation, dtype and backend that can run
here, values and gradients, against the float64 reference. The last line is the verdict; checks that
fail are listed before it, and with ``--verbose`` all of them are. The exit status is 1 if one of
them fails. ``--json`` prints everything as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from fad_loss._measure import measure
from fad_loss._selfcheck import Outcome, devices, environment, self_check
from fad_loss.ops._cost import name_of, remember


def _print_environment(found: dict[str, Any]) -> None:
    for title in ("versions", "devices"):
        print(title)
        for name, value in found[title].items():
            print(f"  {name:<9} {value}")
        print()
    print('backends (backend="auto")')
    for device, operations in found["backends"].items():
        # Operations that are served alike share their lines.
        alike: dict[str, list[str]] = {}
        for operation, choice in operations.items():
            alike.setdefault(json.dumps(choice), []).append(operation)
        for serialized, names in alike.items():
            choice = json.loads(serialized)
            print(f"  {device}: {', '.join(names)}: {choice['uses']}")
            for backend, reason in choice["not"].items():
                print(f"    not {backend}: {reason}")
    print()


def _print_outcome(outcome: Outcome) -> None:
    errors = (
        f"{outcome.error:.1e} <= {outcome.bound:.0e}   "
        f"{outcome.gradient_error:.1e} <= {outcome.gradient_bound:.0e}"
    )
    verdict = "ok" if outcome.passed else "FAILED"
    print(
        f"  {outcome.operation:<33}{outcome.device:<8}{outcome.backend:<8}{outcome.dtype:<10}"
        f"{outcome.failure or errors}   {verdict}",
        flush=True,
    )


def _print_summary(outcomes: Sequence[Outcome]) -> None:
    """A line for each backend on each device, and the verdict."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.device, outcome.backend), []).append(outcome)
    for (device, backend), group in groups.items():
        passed = sum(outcome.passed for outcome in group)
        nearest = max(
            max(o.error / o.bound, o.gradient_error / o.gradient_bound) if o.passed else 0.0
            for o in group
        )
        dtypes = ", ".join(dict.fromkeys(outcome.dtype for outcome in group))
        print(
            f"  {device:<8}{backend:<8}{passed} of {len(group)} passed, the nearest at "
            f"{nearest:.0%} of its bound ({dtypes})"
        )
    passed = sum(outcome.passed for outcome in outcomes)
    verdict = "everything is right" if passed == len(outcomes) else "SOMETHING IS WRONG"
    print()
    print(f"{passed} of {len(outcomes)} checks passed: {verdict}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch itself says on the way: about tracing, of ragged tensors."""
    logger = logging.getLogger("torch.fx._symbolic_trace")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nested tensors is in prototype")
            # The reason is among the backends' lines already.
            warnings.filterwarnings("ignore", message="fad_loss: operations on .* run as tiles")
            yield
    finally:
        logger.setLevel(before)


def _measure() -> int:
    """Measure every device, and say where the constants are."""
    for device in devices():
        machine = measure(device)
        print(f"{name_of(device)}: {json.dumps(asdict(machine))}")
        path = remember(device, machine)
        print(f"kept in {path}" if path else "not kept: set FAD_LOSS_CACHE to a folder")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Report on this machine, check the operations, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fad_loss", description="What runs on this machine, and whether it is right."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--verbose", action="store_true", help="print every check, not a summary")
    parser.add_argument(
        "--measure", action="store_true", help="measure the constants of ops.cost, and keep them"
    )
    arguments = parser.parse_args(argv)
    if arguments.measure:
        return _measure()

    outcomes = []
    with _quiet():
        found = environment()
        if not arguments.json:
            _print_environment(found)
            print("self-check: error <= bound against float64, of the values and of the gradients")
        for device in devices():
            for outcome in self_check(device):
                outcomes.append(outcome)
                if not arguments.json and (arguments.verbose or not outcome.passed):
                    _print_outcome(outcome)
    passed = all(outcome.passed for outcome in outcomes)
    if arguments.json:
        checks = [{**asdict(outcome), "passed": outcome.passed} for outcome in outcomes]
        print(json.dumps({**found, "self_check": checks, "passed": passed}, indent=2))
    else:
        _print_summary(outcomes)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
