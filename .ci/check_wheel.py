"""Run by `make wheel` with the interpreter of an empty environment, from outside the checkout."""

from __future__ import annotations

import sys
from importlib import metadata, resources
from pathlib import Path

import torch

import fad_loss

package = Path(fad_loss.__file__).resolve().parent
environment = Path(sys.prefix).resolve()
assert environment in package.parents, f"imported {package}, which is not in {environment}"
assert fad_loss.__version__ == metadata.version("fad-loss")
assert resources.files("fad_loss").joinpath("py.typed").is_file()

# What the wheel declares: torch, and nothing else that is not behind an extra.
required = [r for r in metadata.requires("fad-loss") or [] if "extra ==" not in r]
assert [r.split(">")[0] for r in required] == ["torch"], required

# What importing costs: no kernel compiler, and none of the examples' packages.
assert not {"triton", "numpy", "scipy", "h5py", "matplotlib"} & {
    m.split(".")[0] for m in sys.modules
}

fad = fad_loss.FeatureAdversarialLoss(student_channels=8, teacher_channels=16)
student = torch.randn(2, 32, 8, requires_grad=True)
fad(student, torch.randn(2, 48, 16)).backward()
assert student.grad is not None
assert student.grad.isfinite().all()

print(f"fad_loss {fad_loss.__version__} works from {package} with torch {torch.__version__} alone")
