"""Figures in README and docs are those of the files in results/, to the last digit."""

import re
from pathlib import Path

import pytest

from pages import render

ROOT = Path(__file__).parents[1]
JINJA = render.environment()
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in render.PAGES}


def test_every_page_says_what_the_files_have():
    assert [problem for name, text in TEXTS.items() for problem in render.problems(name, text, JINJA)] == []


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_one_changed_digit_of_a_figure_is_found(name):
    page = TEXTS[name]
    marks = [mark for mark in render.MARK.finditer(page) if re.search(r"\d", mark[3])]
    assert len(marks) >= 3
    for mark in marks:
        last = mark.start(3) + [digit.start() for digit in re.finditer(r"\d", mark[3])][-1]
        changed = page[:last] + str((int(page[last]) + 1) % 10) + page[last + 1 :]
        (problem,) = render.problems(name, changed, JINJA)
        assert problem.startswith(f"{name}: {mark[1]} has")


FIGURES = ["0.93", "+2%", "17 ms", "1,204 tokens/s", "5.8e-7", "+0.5%", "3.6x", "5 x faster", "3.6s", "24.1GB"]
FIGURES += ["690 TFLOP/s", "12 hours", "1.5 h", "0.95-0.99", "98 of 100", "98 of the 100"]
FIGURES += ["7 seeds out of 9", "9 out of the 12", ".97", "+.02", "61 GPU minutes", "2 GPU-hours", "3 million tokens"]
FIGURES += ["13 percent", "12 per cent", "12-fold", "1e-5", "12,345 tokens", "1,234,567 tokens", "9,000,000 tokens"]


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_that_comes_from_no_file_is_found(figure):
    text = f"A page.\n\nIt takes {figure} now."
    (problem,) = render.problems("docs/results.md", text, JINJA)
    assert problem.startswith(f"docs/results.md, line 3: '{figure[:8]}")


NO_FIGURES = ["Llama-3.1-8B", "Phi 3.5-mini", "270 x 16", "[arXiv 2501.15225](https://x.org/1.5)", "`lr=0.02`"]
NO_FIGURES += ["`0.95`", "a 95% interval", "8,192 tokens", "31,744 tokens", "20,000 tokens"]
NO_FIGURES += ["100 samples of 1K to 4K tokens"]


@pytest.mark.parametrize("text", NO_FIGURES)
def test_names_settings_and_code_are_no_figures(text):
    assert render.problems("docs/results.md", f"It is {text}.", JINJA) == []


def test_an_open_quotation_of_code_hides_no_figure():
    (problem,) = render.problems("README.md", "A `page.\nIt took 99.9 s.\nThe `end.", JINJA)
    assert problem.startswith("README.md, line 2: '99.9 s")


def test_what_the_paper_has_is_told_apart_by_its_paragraph_on_the_page_that_quotes_it():
    page = "A page.\n\nPaper: from 0.32\nto 0.88.\n\nHere it is 0.93.\n"
    (problem,) = render.problems("docs/reproduce.md", page, JINJA)
    assert problem.startswith("docs/reproduce.md, line 6: '0.93")
    assert len(render.problems("README.md", page, JINJA)) == 3
    assert len(render.problems("docs/reproduce.md", page.replace("Paper:", "Papers and we:"), JINJA)) == 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ seconds | fixed }} s, first 99.9 s",
        "\n| system |\n| --- |\n{%- for _ in [1] %}\n| took 99.9 s |\n{%- endfor %}\n",
    ],
)
def test_a_figure_that_is_typed_into_a_template_is_found(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "own.json").write_text('{"seconds": 41}')

    def problems(words: str) -> list[str]:
        page = render.rendered(f"A page.\n\nIt took <!-- results/own.json: {words} -->?<!-- end -->.\n", JINJA)
        return render.problems("docs/results.md", page, JINJA)

    (problem,) = problems(template)
    assert problem.startswith(f"docs/results.md, line {3 + template.partition('99.9')[0].count(chr(10))}: '99.9 s")
    assert problems(template.replace("99.9 s", "`99.9 s`")) == []


@pytest.mark.parametrize("name", render.STRICT)
def test_a_figure_at_the_end_of_a_page_is_found(name: str) -> None:
    """No quotation or comment further up, that is not closed, hides the rest of the page."""
    (problem,) = render.problems(name, f"{TEXTS[name]}\nIt took 99.9 s.\n", JINJA)
    assert "'99.9 s.' comes from no file" in problem


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        ("is <!-- results/demo-cpu.json: {{ acuracy }} -->0.95<!-- end -->", "'acuracy' is undefined"),
        ("is <!-- results/nothing.json: {{ accuracy }} -->0.95<!-- end -->", "has 'Not measured yet.', the page"),
        ("<!-- results/demo-cpu.json: {{ seconds | fixed }} -->473<!-- end -->", "may not begin its line"),
        ("| <!-- results/demo-cpu.json: {{ seconds | fixed }} -->473<!-- end --> |", "or stand in a table"),
    ],
)
def test_a_wrong_template_or_place_is_named(mark, complaint):
    (problem,) = render.problems("docs/cli.md", f"A page.\n\n{mark}", JINJA)
    assert complaint in problem


def test_a_picture_is_a_copy_in_docs_of_the_one_that_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "ROOT", tmp_path)
    template = '<!-- results/own.json:\n{{ picture("reproduce-own/map.png", "A map") }}\n-->'
    page = f"A page.\n\n{template}\n\nNot measured yet.\n\n<!-- end -->"
    assert render.problems("docs/own.md", page, JINJA) == []
    drawn, copy = tmp_path / "results/reproduce-own/map.png", tmp_path / "docs/images/reproduce-own-map.png"
    drawn.parent.mkdir(parents=True)
    copy.parent.mkdir(parents=True)
    (tmp_path / "results" / "own.json").write_text("{}")
    complaint = "docs/images/reproduce-own-map.png is not a copy of results/reproduce-own/map.png"
    writing = render.environment(copies=True)
    assert complaint in render.problems("docs/own.md", page, writing)[0]  # it is nowhere
    drawn.write_bytes(b"drawn")
    assert complaint in render.problems("docs/own.md", page, JINJA)[0]
    page = render.rendered(page, writing)
    assert page == f"A page.\n\n{template}\n\n![A map](images/reproduce-own-map.png)\n\n<!-- end -->"
    assert copy.read_bytes() == b"drawn"
    assert render.problems("docs/own.md", page, JINJA) == []
    drawn.write_bytes(b"drawn anew")
    assert complaint in render.problems("docs/own.md", page, JINJA)[0]
    drawn.unlink()
    assert render.problems("docs/own.md", page, JINJA) == []


def test_a_table_over_several_files_is_checked_against_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "own.json").write_text('{"accuracy": 0.9}')
    cost = '{% for seconds in other("results/cost.json").values() %}, {{ seconds }} s{% endfor %}'
    template = f"<!-- results/own.json:\n{{{{ accuracy }}}}{cost}\n-->"
    page = f"A page.\n\n{template}\n\n0.9\n\n<!-- end -->"
    assert render.problems("docs/own.md", page, JINJA) == []  # the other one is not there yet
    (tmp_path / "results" / "cost.json").write_text('{"seconds": 41}')
    assert render.problems("docs/own.md", page, JINJA) == [
        "docs/own.md: results/own.json has '0.9, 41 s', the page has '0.9'"
    ]


def test_a_file_that_a_table_misses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt name would else leave out a column in silence."""
    monkeypatch.setattr(render, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "own.json").write_text('{"accuracy": 0.9}')
    page = tmp_path / "own.md"
    template = '{{ accuracy }}{{ other("results/cots.json").seconds | default("") }}'
    page.write_text(f"It finds <!-- results/own.json: {template} -->0.9<!-- end -->.")
    monkeypatch.setattr(render, "PAGES", [page])
    monkeypatch.setattr("sys.argv", ["render.py", "--check"])
    render.main()
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["1 figures and tables are what results/ has.", "Not there yet: results/cots.json"]


def test_a_figure_that_is_rounded_to_nothing_has_no_minus():
    assert JINJA.from_string("{{ v | fixed(1) }} {{ v | signed(1) }} {{ v | fixed(3) }}").render(v=-0.003) == (
        "0.0 +0.0 -0.003"
    )
