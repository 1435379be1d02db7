"""The documentation, as GitHub renders it, and its code, run from the page.

What is looked at is what GitHub's own renderer (cmark-gfm) makes of each page, so that code hidden
in comments cannot help, and Sphinx's directives and roles, which GitHub would show as text, are
seen. Sphinx checks its own rendering (`make docs`).
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import cmarkgfm
import pytest
from torch import nn

import fad_loss
from fad_loss import FeatureAdversarialLoss, HeadDiscriminator, TeacherDiscriminator
from test_package import public_modules, public_objects

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from study import verdicts  # noqa: E402

PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += [ROOT / name / "README.md" for name in ("benchmarks", "examples")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.rst"))


class Rendered(HTMLParser):
    """What a reader sees of a page: code blocks by language, links, headings, prose."""

    def __init__(self, page):
        super().__init__()
        self.code, self.links, self.headings, self.cells, self.prose = [], [], [], [], ""
        self._open = []
        self.feed(cmarkgfm.github_flavored_markdown_to_html(page.read_text(encoding="utf-8")))

    def handle_starttag(self, tag, attributes):
        if tag in {"br", "hr", "img", "input"}:
            return
        self._open.append(tag)
        given = dict(attributes)
        if tag == "pre":
            self.code.append((given.get("lang", ""), ""))
        elif tag == "a":
            self.links.append(given.get("href", ""))
        elif tag in {"h1", "h2", "h3", "h4"}:
            self.headings.append("")
        elif tag == "tr":
            self.cells.append([])
        elif tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "pre" in self._open:
            language, text = self.code[-1]
            self.code[-1] = (language, text + data)
            return
        if {"h1", "h2", "h3", "h4"} & set(self._open):
            self.headings[-1] += data
        if {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data
        self.prose += "`code`" if "code" in self._open else data

    @property
    def python(self):
        return "\n".join(text for language, text in self.code if language == "python")

    @property
    def anchors(self):
        """As GitHub makes them of headings, and MyST in the same way."""
        return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in self.headings}


RENDERED = {page: Rendered(page) for page in PAGES}


def named(page):
    return str(page.relative_to(ROOT).with_suffix(""))


@pytest.mark.parametrize("page", [p for p in PAGES if RENDERED[p].python], ids=named)
def test_visible_code_runs_from_top_to_bottom_in_a_fresh_interpreter(page, tmp_path):
    copied = tmp_path / f"{page.stem}.py"
    copied.write_text(RENDERED[page].python, encoding="utf-8")
    command = [sys.executable, "-W", "error", copied.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_nothing_but_text_shows_as_text(page):
    shown = RENDERED[page]
    # Directives, roles in front of code, targets, and raw TeX outside of what GitHub renders.
    for odd in (r":::", r"\{[a-z:]+\}`code`", r"^\([\w-]+\)=$", r"\\[\[(]", r"\.\. \w+::"):
        assert not re.search(odd, shown.prose, re.MULTILINE), odd
    assert [language for language, _ in shown.code if not re.fullmatch(r"\w+", language)] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_anchors_lead_somewhere(page):
    for link in RENDERED[page].links:
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in RENDERED[target].anchors, link


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_commands_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    blocks = "\n".join(text for language, text in RENDERED[page].code if language == "bash")
    commands = re.findall(r"`make ([a-z-]+)", page.read_text())
    commands += re.findall(r"^make ([a-z-]+)", blocks, re.MULTILINE)
    assert set(commands) <= targets


def test_defaults_of_the_discriminators_are_those_of_the_table():
    modules = {
        'TeacherDiscriminator(mode="witness")': TeacherDiscriminator(mode="witness"),
        "HeadDiscriminator(...)": HeadDiscriminator(FeatureAdversarialLoss(8, 8).adapter),
    }
    shown = {}
    for cells in RENDERED[ROOT / "docs" / "choosing.md"].cells:
        if len(cells) == 4 and cells[0] not in {"discriminator=", "a module of your own"}:
            name, learns, weight, points = cells
            discriminator = modules.get(name, name.strip('"'))
            fad = FeatureAdversarialLoss(8, 8, discriminator=discriminator)
            shown[name] = float(weight)
            assert fad.weight == float(weight), name
            assert fad.max_points == (None if points == "all" else int(points)), name
            assert fad.discriminator.learns == (learns != "no"), name
    assert len(shown) == 8
    for page in ("choosing.md", "how-it-works.md"):
        steps = FeatureAdversarialLoss(8, 8).warmup_steps
        assert re.search(rf"\b{steps}\b", RENDERED[ROOT / "docs" / page].prose), page


def test_figures_come_from_the_committed_files():
    file = ROOT / "benchmarks" / "results" / "latency-cpu.json"
    measured = json.loads(file.read_text(encoding="utf-8"))["latencies"]
    times = {
        f"{row['parameters']:,}": f"{1e3 * row['median_s']:.1f} ms"
        for row in measured
        if row["arch"] == "pointnet" and row["points"] == 256
    }
    shown = [row for row in RENDERED[ROOT / "README.md"].cells if row[2:] and row[1] in times]
    assert len(shown) == 2
    assert [row[2] for row in shown] == [times[row[1]] for row in shown]
    pulls = re.findall(r"([\d.]+ %)\s+\(`code`\)", RENDERED[ROOT / "docs" / "study.md"].prose)
    results = ROOT / "examples" / "study" / "results"
    shares = (results / "gradients.md").read_text(encoding="utf-8")
    assert len(pulls) == 5
    assert [pull for pull in pulls if pull not in shares] == []


def test_sentences_on_the_paired_study_are_those_of_its_lines():
    """Differences with their standard errors, and accuracies: as the report has them, anew."""
    folder = ROOT / "examples" / "study" / "results" / "paired"
    report = verdicts.report(verdicts.read(folder))
    assert (folder / "report.md").read_text(encoding="utf-8") == report
    report = re.sub(r"([+-][\d.]+) points, standard error ([\d.]+)", r"\1 ± \2", report)
    pattern = r"[+-]\d+\.\d\d ± \d+\.\d\d|\d\d\.\d\d(?: ± \d+\.\d\d)? %"
    report = re.sub(r"interval ([+-][\d.]+) to ([+-][\d.]+)", r"(\1 to \2)", report)
    pattern += r"|\([+-]\d+\.\d\d to [+-]\d+\.\d\d\)"
    for page, least in (("docs/study.md", 20), ("docs/choosing.md", 4), ("README.md", 8)):
        # Tables too, and without the part on 0.1.0.
        text = (ROOT / page).read_text(encoding="utf-8").split("## With 0.1.0")[0]
        figures = re.findall(pattern, " ".join(text.split()))
        assert len(figures) >= least, page
        assert [one for one in figures if one.removesuffix(" %") not in report] == [], page


def test_the_page_of_benchmarks_shows_every_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    import gathered

    page = gathered._benchmarks()
    files = {file.stem for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    # The kernels on paper have a page of their own.
    files = {name for name in files if not name.startswith("kernels-")}
    assert set(re.findall(r"^### (.+)$", page, re.MULTILINE)) == files
    # No table is a head without rows.
    assert len(re.findall(r"^\| ---.*\n\| ", page, re.MULTILINE)) == page.count("\n| ---")
    # Results lie where the repository has them.
    assert "/tmp" not in page


# ------------------------------------------------------------------------------- the reference


def documented():
    """Objects that the reference shows, and the members shown of each."""
    objects = {}
    directive = re.compile(
        r"^\.\. auto(?:class|function):: ([\w.]+)(?:\(\))?\n(?:   :members: (.*)\n)?", re.MULTILINE
    )
    for page in REFERENCE:
        for name, members in directive.findall(page.read_text()):
            module, _, attribute = name.rpartition(".")
            shown = {m.strip() for m in members.split(",")} - {""}
            objects[getattr(importlib.import_module(module), attribute)] = shown
    return objects


def public():
    """Every class and function that a public module lists in ``__all__``."""
    return {value for module in public_modules() for value in public_objects(module).values()}


def test_every_public_name_has_its_place_in_the_reference():
    assert {value.__qualname__ for value in public() - set(documented())} == set()


def test_members_that_are_shown_exist_and_are_documented():
    for value, members in documented().items():
        for member in members:
            assert inspect.getdoc(getattr(value, member)), f"{value.__qualname__}.{member}"


def test_what_is_called_shows_how():
    for value, members in documented().items():
        calls = getattr(value, "forward", nn.Module.forward)
        if calls is not nn.Module.forward:
            assert "forward" in members, value.__qualname__


def test_every_public_name_has_an_example():
    lacking = {v.__qualname__ for v in public() if ">>> " not in inspect.getdoc(v)}
    assert lacking == set()


@pytest.mark.parametrize("module", ["ops", "distances", "metrics", "penalties", "objectives"])
def test_what_is_computed_has_its_formula(module):
    # Interfaces, and what holds a prediction.
    interfaces = {"Kernel", "Objective", "get_objective", "Cost"}
    names = set(getattr(fad_loss, module).__all__) - interfaces
    lacking = {
        n for n in names if ".. math::" not in inspect.getdoc(getattr(getattr(fad_loss, module), n))
    }
    assert lacking == set()
