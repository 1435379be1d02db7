"""Execute the notebooks' scripts and write them with their outputs, as .ipynb beside them.

`python examples/notebooks/build.py` builds all, `... build.py 1_quickstart` one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def scripts() -> list[Path]:
    """Those that are notebooks, in the order of the course."""
    return sorted(HERE.glob("[0-9]_*.py"))


def executed(script: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook of a script, with the outputs of all its cells.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = jupytext.read(script)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):  # not random: the same script, the same file
        cell["id"] = f"cell-{number}"
    NotebookClient(notebook, timeout=timeout, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
    return notebook


if __name__ == "__main__":
    for path in scripts():
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            nbformat.write(executed(path), path.with_suffix(".ipynb"))
            print(path.stem)
