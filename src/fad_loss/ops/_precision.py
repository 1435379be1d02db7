"""How precisely float32 is multiplied, whichever of PyTorch's two settings the user has chosen."""

from __future__ import annotations

import torch


def float32_matmul_precision() -> str:
    """`"highest"`, `"high"` (tf32) or `"medium"` (bfloat16).

    `torch.get_float32_matmul_precision()` raises once a backend was set by the newer
    ``torch.backends.cuda.matmul.fp32_precision`` (torch 2.9); that is asked then.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        chosen = torch.backends.cuda.matmul.fp32_precision
    return {"tf32": "high", "bf16": "medium"}.get(chosen, "highest")
