"""The package as its users meet it: its names, its version, and the cost of importing it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fad_loss

ROOT = Path(__file__).parents[1]


def _run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def public_modules():
    names = (module.name for module in pkgutil.walk_packages(fad_loss.__path__, "fad_loss."))
    public = (name for name in names if not any(p.startswith("_") for p in name.split(".")))
    return [fad_loss, *map(importlib.import_module, public)]


def public_objects(module):
    """Classes and functions that a module lists in ``__all__``, by name."""
    values = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    return {k: v for k, v in values.items() if inspect.isclass(v) or inspect.isfunction(v)}


@pytest.mark.parametrize("module", public_modules(), ids=lambda m: m.__name__)
def test_public_names_exist_and_are_documented(module):
    assert inspect.getdoc(module), f"{module.__name__} does not say what it is for"
    if module.__name__.count(".") < 2:
        assert module.__all__, f"{module.__name__} does not say which of its names are public"
    for name, value in public_objects(module).items():
        assert inspect.getdoc(value), f"{module.__name__}.{name} has no docstring"


def test_importing_brings_nothing_but_torch():
    # What torch itself imports is not ours to forbid; numpy it takes where it finds it.
    listing = "import sys; print(*{m.split('.')[0] for m in sys.modules})"
    bare = set(_run("-c", f"import torch; {listing}").split())
    ours = set(_run("-c", f"import fad_loss; {listing}").split())
    assert not {name for name in ours - bare if name not in sys.stdlib_module_names} - {"fad_loss"}
    assert "triton" not in ours - bare


def test_version_is_the_same_everywhere():
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert citation[1] == fad_loss.__version__
    assert f"\n## [{fad_loss.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_leaves_the_random_state_and_the_threads_alone():
    state = "torch.get_rng_state().sum().item(), torch.get_num_threads(), torch.get_default_dtype()"
    before, after = _run(
        "-c", f"import torch; print({state}); import fad_loss; print({state})"
    ).splitlines()
    assert before == after


def test_actions_are_pinned_and_may_only_read():
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = workflow.read_text()
        used = re.findall(r"uses: (.*)", text)
        assert used
        for action in used:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
        assert re.search(r"^permissions:\n  contents: read\n\n", text, re.MULTILINE), workflow


def test_versions_of_the_tools_are_pinned():
    required = metadata.requires("fad-loss") or []
    wanted = {re.match(r"[\w-]+", requirement)[0] for requirement in required}
    # torch brings its own, in the versions that it was built with.
    wanted -= {"triton", "numpy", "expecttest"}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert wanted - pinned == set()
