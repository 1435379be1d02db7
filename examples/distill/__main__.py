"""Run by ``python examples/distill``, or ``python -m distill`` in the folder above."""

import sys
from pathlib import Path

if not __package__:  # the folder itself is on the path then, and not the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from distill.experiment import main

if __name__ == "__main__":
    sys.exit(main())
