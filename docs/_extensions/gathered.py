"""What was measured, the scripts of the hosts and the notebooks, where the pages speak of them.

On GitHub those pages name the files; here their contents follow. Nothing is copied by hand.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.application import Sphinx

if TYPE_CHECKING:
    from sphinx.util.typing import ExtensionMetadata

ROOT = Path(__file__).parents[2]
STUDY = Path("examples/study/results")
BENCHMARKS = Path("benchmarks/results")
HOSTS = Path("examples/hosts")
NOTEBOOKS = Path("examples/notebooks")


def _table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, row)) for row in rows]
    head = list(heads)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _seconds(row: dict[str, Any]) -> str:
    seconds = row["median_s"]
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


STEPS = {"student alone": "the student alone", "without": "both networks, without a loss"}


def _steps(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("step", "clouds × points", "median", "of that of both networks"),
        (
            (
                STEPS.get(r["step"], f"with the loss, `{r['step']}`"),
                f"{r['batch']} × {r['points']}",
                _seconds(r),
                f"{r['ratio_to_without']:.2f}",
            )
            for r in rows
        ),
    )


def _cases(rows: list[dict[str, Any]]) -> str:
    return _against(rows) if "new" in rows[0] else _pairwise(rows)


def _against(rows: list[dict[str, Any]]) -> str:
    """Two codes and cdist in turn on one machine."""
    return _table(
        ("operation", "points", "B, N, M, C", "this code", "of the older", "of cdist"),
        (
            (
                f"`{r['op']}`, {r['pass']}",
                r["data"],
                f"{r['B']}, {r['N']}, {r['M']}, {r['C']}",
                _seconds(r["new"]),
                f"{r['new_over_old']:.2f}",
                f"{r['new_over_cdist']:.2f}" if "new_over_cdist" in r else "",
            )
            for r in rows
        ),
    )


def _pairwise(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("operation", "B, N, M, C", "implementation", "median", "of the product", "memory"),
        (
            (
                f"`{r['op']}`, {r['pass']}, {r['dtype']}",
                f"{r['B']}, {r['N']}, {r['M']}, {r['C']}",
                r["implementation"],
                _seconds(r),
                f"{r['ratio_to_gemm']:.2f}" if "ratio_to_gemm" in r else "",
                f"{r['extra_bytes'] / 2**20:.0f} MiB" if "extra_bytes" in r else "",
            )
            for r in rows
            if "median_s" in r
        ),
    )


def _accuracy(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("operation", "N, C", "implementation", "largest relative error"),
        (
            (
                f"`{r['op']}`, {r['dtype']}",
                f"{r['N']}, {r['C']}",
                r["implementation"],
                f"{r['largest_relative_error']:.1e}",
            )
            for r in rows
        ),
    )


def _rows(rows: list[dict[str, Any]]) -> str:
    return _loops(rows) if "optimizer" in rows[0] else _scenes(rows)


def _loops(rows: list[dict[str, Any]]) -> str:
    """One line for each optimizer, clipping and discriminator, over all scales and precisions."""
    keys = "optimizer", "clipping", "discriminator"
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["discriminator"]:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    heads = (*keys, "loops", "not finite", "least ahead, points", "mean ahead, points")
    lines = []
    for group, those in sorted(groups.items()):
        ahead = [100 * row["ahead"] for row in those]
        broken = sum(not row["finite"] for row in those)
        numbers = f"{min(ahead):+.1f}", f"{sum(ahead) / len(ahead):+.1f}"
        lines.append((*group, len(those), broken, *numbers))
    return _table(heads, lines)


def _scenes(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("what", "scenes", "median", "of dense"),
        ((r["what"], r["scenes"], _seconds(r), f"{r['times_dense']:.2f}") for r in rows),
    )


def _latencies(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("network", "parameters", "points", "one cloud", "of the teacher's"),
        (
            (
                f"{r['network']}, {r['arch']}",
                f"{r['parameters']:,}",
                r["points"],
                _seconds(r),
                f"{r['of_teacher']:.2f}",
            )
            for r in rows
        ),
    )


SECTIONS = {
    "latencies": _latencies,
    "steps": _steps,
    "cases": _cases,
    "accuracy": _accuracy,
    "rows": _rows,
}
# By the beginnings of their names, in the order in which they are shown.
TITLES = {
    "latency": "What a network forty times smaller buys",
    "step": "What the loss adds to a training step",
    "scenes": "Scenes",
    "loops": "Loops that nobody tuned for it",
    "pairwise": "The operations beside others",
    "against": "The operations beside their older selves",
}


def _benchmarks() -> str:
    parts = []
    files = [
        (title, file)
        for kind, title in TITLES.items()
        for file in sorted((ROOT / BENCHMARKS).glob(f"{kind}-*.json"))
    ]
    for title, file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        tables = [make(found[name]) for name, make in SECTIONS.items() if found.get(name)]
        if tables:
            context = found["context"]
            where = context.get("gpu") or f"{context['cpu']}, {context['threads']} threads"
            commit = (context["commit"] or "unknown")[:12]
            packages = f"torch {context['packages']['torch']}, commit {commit}"
            command = f"`python benchmarks/{context['command']}`"
            if f"## {title}" not in parts:
                parts.append(f"## {title}")
            parts += [f"### {file.stem}", f"{command}: {where}; {packages}.", *tables]
    return "\n\n".join(parts)


def _study() -> str:
    report = (ROOT / STUDY / "report.md").read_text(encoding="utf-8")
    # Its images lie beside it, and are on white ground.
    first = re.sub(
        r"!\[(\w+)\]\((.*?)\)",
        rf"![\1](../{STUDY}/\2){{.white}}",
        report.split("<!-- report -->")[1],
    )
    # The headings of a page of its own are a level below this page's.
    second = (ROOT / STUDY / "paired" / "report.md").read_text(encoding="utf-8")
    return re.sub(r"^#", "##", second, flags=re.MULTILINE) + "\n" + first


def _hosts() -> str:
    """Each script under the first words of its docstring; the lines marked with its name stand out.

    What the scripts share says nothing about a host.
    """
    parts = []
    for file in sorted((ROOT / HOSTS).glob("*.py")):
        source = file.read_text(encoding="utf-8")
        module = ast.parse(source)
        title, _, text = (ast.get_docstring(module) or "").partition(": ")
        if file.name == "toy.py" or not text:
            continue
        code = "".join(source.splitlines(keepends=True)[module.body[0].end_lineno :]).strip()
        lines = enumerate(code.splitlines(), 1)
        marked = ",".join(str(number) for number, line in lines if line.endswith("# fad_loss"))
        options = f":emphasize-lines: {marked}\n" if marked else ""
        text = text[:1].upper() + text[1:]
        code = re.sub(r" +# fad_loss$", "", code, flags=re.MULTILINE)
        parts += [f"## {title}", text, f"```{{code-block}} python\n{options}\n{code}\n```"]
    return "\n\n".join(parts)


GATHERED = {"benchmarks": _benchmarks, "hosts": _hosts, "study-results": _study}
FILES = (STUDY / "report.md", STUDY / "paired" / "report.md", BENCHMARKS / "*.json", HOSTS / "*.py")


def _append(app: Sphinx, page: str, source: list[str]) -> None:
    if page in GATHERED:
        for pattern in FILES:
            for file in ROOT.glob(str(pattern)):
                app.env.note_dependency(str(file))
        source[0] += "\n" + GATHERED[page]()


def _copy_notebooks(app: Sphinx) -> None:
    """Bring the notebooks where Sphinx looks for pages, those that have changed alone."""
    folder = Path(app.srcdir) / "_notebooks"
    folder.mkdir(exist_ok=True)
    found = {file.name: file for file in (ROOT / NOTEBOOKS).glob("*.ipynb")}
    for old in folder.glob("*.ipynb"):
        if old.name not in found:
            old.unlink()
    for name, file in found.items():
        page = folder / name
        if not page.exists() or page.read_bytes() != file.read_bytes():
            shutil.copyfile(file, page)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Follow the reading of pages."""
    app.connect("builder-inited", _copy_notebooks)
    app.connect("source-read", _append)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
