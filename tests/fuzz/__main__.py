"""Run random cases for some minutes: python -m tests.fuzz --minutes 30.

Rounds of every property, each with another seed, until the time is over. A failure is shrunk,
printed and counted, and the rest goes on. The last line is JSON: cases, failures, seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .properties import PROPERTIES, SLOW

MOST_FAILURES = 50


def one_round(name: str, start: int, examples: int, cases: dict[str, int]) -> bool:
    """Run a property on random cases, and count them; a failure is printed."""

    @seed(start)
    @settings(
        max_examples=max(1, examples // SLOW.get(name, 1)),
        deadline=None,
        derandomize=False,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        cases[name] += 1
        PROPERTIES[name](data)

    try:
        run()
    except Exception:  # noqa: BLE001 - reported, and the other properties go on
        sys.stderr.write(f"{name} with seed {start}\n{traceback.format_exc(limit=-2)}\n")
        return False
    return True


def main() -> int:
    """Exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--examples", type=int, default=100, help="of a property in a round")
    parser.add_argument("--only", nargs="*", choices=list(PROPERTIES), default=list(PROPERTIES))
    parser.add_argument("--output", type=Path, help="where the JSON goes, too")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    cases = dict.fromkeys(arguments.only, 0)
    failures: list[str] = []
    start, turn = time.monotonic(), 0
    end = start + 60 * arguments.minutes
    while time.monotonic() < end and len(failures) < MOST_FAILURES:
        failures += [
            f"{name} with seed {arguments.seed + turn}"
            for name in arguments.only
            if time.monotonic() < end
            and not one_round(name, arguments.seed + turn, arguments.examples, cases)
        ]
        turn += 1
    report = {
        "cases": sum(cases.values()),
        "by_property": cases,
        "failures": failures,
        "seed": arguments.seed,
        "rounds": turn,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "torch": torch.__version__,
    }
    text = json.dumps(report)
    sys.stdout.write(text + "\n")
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
