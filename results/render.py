"""Write the figures of README.md and docs/ from the files in results/, or check that they are what the files say.

A figure stands between a comment with a Jinja template over one results file, and a comment that ends it:

    It took <!-- results/demo-cpu.json: {{ training_seconds | fixed }} s -->255 s<!-- end --> to train.

A template of one line is a piece of a sentence; one of several lines is a block, such as a table. Names are those of
the file, `data` is all of it; `fixed(n)` and `signed(n)` round to n digits, `interval` shows `low` and `high`, and
`report` is `seal_peft.report`, which makes tables of metrics, `sites` makes those of benchmarks/sites.py, `picture`
shows what was drawn with the file, `other` is what another file has, for a table over several. Where a file is not
there yet, the page says so.

In the pages of `STRICT` nothing that looks like a measurement, a number with decimals or with a unit, is typed, nor
among the words of a template. What was aimed at is written as code: `0.95`. Contexts, samples, questions and seeds are
no units: typed numbers of them are settings, which nothing tells from a measured one, so that is left to the reader.

    python results/render.py          # make results: write the figures into the pages, copy pictures to docs/images
    python results/render.py --check  # make results-check: change nothing, fail where a page says something else
"""

from __future__ import annotations

import argparse
import filecmp
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError

from seal_peft import report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STRICT = ("README.md", "docs/results.md", "docs/heads.md", "docs/reproduce.md")
QUOTES_PAPER = ("docs/reproduce.md",)

MARK = re.compile(r"<!-- (results/[\w.-]+\.json):(.*?)-->(.*?)<!-- end -->", re.DOTALL)
OTHER = re.compile(r'other\("([^"]+)"\)')
MISSING = "Not measured yet."
EXPRESSION = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
# What is no statement of ours: code, where links lead, comments, what an interval is of, and what the paper has, in a
# paragraph that says so.
NOT_TEXT = re.compile(
    r"^```.*?^```|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|arXiv \d+\.\d+|95% interval", re.DOTALL | re.MULTILINE
)
PAPER = re.compile(r"^(?:Paper(?: \([^)]*\))?:|Reported for\b).*?\n$", re.DOTALL | re.MULTILINE)
UNIT = r"%|x(?! ?\d)|ms|s|seconds?|min|minutes?|h|hours?|days?|[KMGT]i?B|bytes|nats|points?|times|tokens/s"
UNIT += r"|percent|per cent|-?fold|[KMGT]?FLOPs?(?:/s)?|[CG]PU[ -](?:seconds?|minutes?|hours?)|million|billion"
NUMBER = r"(?<![\w.,=<>-])[+-]?(?:\d[\d,]*|(?=\.\d))"
# A number that is part of a name, such as the one of Llama-3.1-8B or of a version, is no figure.
FIGURE = re.compile(
    rf"{NUMBER}(?:(?:\.\d+)*(?:e-?\d+)? ?(?:{UNIT})(?![\w/])|(?:(?:\.\d+)+(?:e-?\d+)?|e-?\d+)(?!\w|-[^\W\d])"
    r"|(?P<tokens> tokens)(?![\w/])|(?:(?: \w+)? out)? of (?:the )?\d)"
)


def sites(own: dict[str, Any]) -> str:
    """Make a table of a setting of benchmarks/sites.py: systems by lengths, mean over seeds and interval."""
    lengths = own["setting"]["test_lengths"]
    rows = [["system", "parameters", "learning rate", *(f"{length:,}" for length in lengths)]]
    for name, system in own["systems"].items():
        trained = [f"{system['runs'][0]['parameters']:,}", f"{system['rate']:g}"] if name != "base" else ["", ""]
        cells = [system["accuracy"][str(length)] for length in lengths]
        rows.append([name, *trained, *(f"{cell['mean']:.2f} {interval(cell)}" for cell in cells)])
    return report.markdown_table(rows)


def interval(value: dict[str, float]) -> str:
    """Show a 95% interval."""
    return f"({value['low']:.2f} to {value['high']:.2f})"


def picture(name: str, text: str, copies: bool) -> str:
    """Show a picture of results/ in a page of docs/, which mkdocs lets show only what is in docs/: a copy."""
    source, copy = ROOT / "results" / name, ROOT / "docs" / "images" / name.replace("/", "-")
    if copies and source.is_file():
        shutil.copyfile(source, copy)
    if not copy.is_file() or (source.is_file() and not filecmp.cmp(source, copy, shallow=False)):
        raise ValueError(
            f"docs/images/{copy.name} is not a copy of results/{name}: where that is, `make results` makes it"
        )
    return f"![{text}](images/{copy.name})"


def other(file: str) -> dict[str, Any]:
    """Return what another results file has, which is nothing where it is not there yet."""
    path = ROOT / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def environment(copies: bool = False) -> Environment:
    """Make what templates are rendered with; pictures are copied into docs/ if it is asked for."""
    made = Environment(undefined=StrictUndefined, autoescape=False)
    made.filters["fixed"] = lambda value, digits=0: f"{round(value, digits) + 0.0:,.{digits}f}"  # no -0
    made.filters["signed"] = lambda value, digits=0: f"{round(value, digits) + 0.0:+,.{digits}f}"
    made.filters["interval"] = interval
    made.globals["report"] = report
    made.globals["sites"] = sites
    made.globals["other"] = other
    made.globals["picture"] = partial(picture, copies=copies)
    return made


def rendered(page: str, jinja: Environment) -> str:
    """Return a page with its figures as the files have them.

    Raises:
        ValueError: A template or its place is wrong; the message shows the template.
    """

    def replace(mark: re.Match[str]) -> str:
        file, template, _ = mark.groups()
        block = "\n" in template
        before = page[: mark.start()].rpartition("\n")[2].strip()
        # Markdown takes a line that begins with a comment for raw HTML, to its end, and a bar in a table for a cell.
        if not block and (not before or before.startswith("|")):
            raise ValueError(f"A figure may not begin its line or stand in a table that is typed: {mark[0]}")
        try:
            text = MISSING
            if (ROOT / file).is_file():
                data = json.loads((ROOT / file).read_text(encoding="utf-8"))
                text = jinja.from_string(template).render(data, data=data).strip()
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}: {template.strip()}") from error
        return f"<!-- {file}:{template}-->" + (f"\n\n{text}\n\n" if block else text) + "<!-- end -->"

    return MARK.sub(replace, page)


def unmarked(name: str, page: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of everything that looks like a measurement and comes from no file."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    def words(mark: re.Match[str]) -> str:
        return " " + EXPRESSION.sub(blank, mark[2]) + " " + re.sub(r"[^\n]", "", mark[3])

    page = NOT_TEXT.sub(blank, MARK.sub(words, page))
    if name in QUOTES_PAPER:
        page = PAPER.sub(blank, page)
    for number, line in enumerate(page.splitlines(), start=1):
        for figure in FIGURE.finditer(line):
            if not (figure["tokens"] and is_length(int(re.sub(r"\D", "", figure[0])))):
                yield number, line[figure.start() : figure.end() + 8].strip()


def is_length(tokens: int) -> bool:
    """Say whether a number of tokens is one that somebody chose, such as 8,192 or 20,000."""
    return tokens < 10**6 and (tokens % 128 == 0 or tokens % 1000 == 0)


def problems(name: str, page: str, jinja: Environment) -> list[str]:
    """Say what in a page is not what the files have."""
    try:
        right = rendered(page, jinja)
    except ValueError as error:
        return [f"{name}: {error}"]
    found = [
        f"{name}: {mark[1]} has {expected[3].strip()!r}, the page has {mark[3].strip()!r}"
        for mark, expected in zip(MARK.finditer(page), MARK.finditer(right), strict=True)
        if mark[0] != expected[0]
    ]
    if name in STRICT:
        typed = unmarked(name, page)
        found += [f"{name}, line {number}: {text!r} comes from no file in results/" for number, text in typed]
    return found


def main() -> None:
    """Write or check all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    jinja = environment(copies=not options.check)
    found, marks, files = [], 0, set()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if not options.check:
            with suppress(ValueError):  # the page stays, and `problems` says why
                page = rendered(page, jinja)
                path.write_text(page, encoding="utf-8")
        found += problems(path.relative_to(ROOT).as_posix(), page, jinja)
        for mark in MARK.finditer(page):
            marks += 1
            files |= {mark[1], *OTHER.findall(mark[2])}
    if found:
        sys.exit("\n".join(found))
    missing = sorted(file for file in files if not (ROOT / file).is_file())
    print(
        f"{marks} figures and tables are what results/ has.",
        *(f"Not there yet: {file}" for file in missing),
        sep="\n",
    )


if __name__ == "__main__":
    main()
