"""What tests start in processes of their own is not collected, nor searched for doctests."""

from __future__ import annotations

import os

collect_ignore = ["compiled.py", "sanitized.py"]
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore += ["interpreted.py", "interpreted_near.py"]
