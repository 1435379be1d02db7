"""The notebooks: committed with the outputs of the cells of their scripts, without errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("[0-9]_*.py"))


def cells(script):
    """The source of every cell of a script, as kind and text."""
    found = []
    for part in re.split(r"^# %%", script.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        found.append((kind, body.strip()))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebooks_are_those_of_their_scripts_executed(script):
    notebook = json.loads(script.with_suffix(".ipynb").read_text("utf-8"))
    written = [(c["cell_type"], "".join(c["source"]).strip()) for c in notebook["cells"]]
    assert written == cells(script)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.hosts
@pytest.mark.long  # and part of building the documentation, which executes them too
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebooks_run(script, monkeypatch):
    monkeypatch.syspath_prepend(str(NOTEBOOKS))
    from build import executed

    for cell in executed(script).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
