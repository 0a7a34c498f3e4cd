"""Reports: tables of what metrics.json says, pictures of what an adapter learned, numbers beside each picture."""

import itertools
import json
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from seal_peft import cli, scales
from seal_peft.files import write_json
from seal_peft.guard import summarise_guard
from seal_peft.plots import plot_depths, plot_lengths, plot_scales
from seal_peft.report import ReportArguments, length_rows, report
from seal_peft.statistics import summarise
from seal_peft.tasks import Sample
from stages import error_of, seal

TURNS = [{"role": "user", "content": "?"}]


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    lengths = [1024, 512, 512, 512]
    samples = [Sample(str(i), "lines", length, None, TURNS, "1", ["1"], 0) for i, length in enumerate(lengths)]
    scores = {"base": [0.0, 0.0, 1.0, 0.0], "adapter": [1.0, 1.0, 1.0, 0.0]}
    facts = {"device": "CPU", "versions": {"torch": "2.13.0", "gguf": None}, "commit": "abc", "date": "2026-11-23"}
    write_json(tmp_path / "eval" / "metrics.json", {**summarise(samples, scores, "base"), **facts})
    return tmp_path / "eval" / "metrics.json"


def save_adapter(folder: Path, granularity: str = "channel") -> Path:
    models.adapted(granularity=granularity, task_type="CAUSAL_LM").save_pretrained(str(folder))
    return folder


def table(text: str, header: str) -> list[list[str]]:
    """Cells of the table that begins with a header cell."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def test_the_tables_hold_the_numbers_of_the_metrics(metrics_file: Path, tmp_path: Path) -> None:
    text = report(ReportArguments(str(tmp_path / "out"), metrics_file=str(metrics_file))).read_text()
    systems = json.loads(metrics_file.read_text())["systems"]
    header, _, base, adapter = table(text, "system")
    assert header == ["system", "score", "95% interval", "samples", "difference to base (95% interval)", "p"]
    assert base == ["base", "0.250", f"{systems['base']['low']:.3f} to {systems['base']['high']:.3f}", "4", "", ""]
    assert adapter[:2] == ["adapter", "0.750"]
    assert adapter[4].startswith("+0.500 (")
    assert adapter[5] == "0.5"
    assert table(text, "task")[2:4] == [
        ["lines", "512", "3", "0.333 (0.06 to 0.79)", "0.667 (0.21 to 0.94)"],
        ["lines", "1024", "1", "0.000 (0.00 to 0.79)", "1.000 (0.21 to 1.00)"],
    ]
    assert "- `lines`: LongEval line retrieval" in text
    assert "CPU; torch 2.13.0; commit abc; 2026-11-23." in text


def grid_metrics(**more) -> dict:
    """Two lengths and two depths, the adapter better at the start only; the base has two samples in every field."""
    places = [(length, depth) for length in (512, 1024) for depth in (0.0, 1.0) for _ in range(2)]
    samples = [Sample(str(i), "needle", *place, TURNS, "1", ["1"], 0) for i, place in enumerate(places)]
    scores = {"base": [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0], "adapter": [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]}
    facts = {"device": "CPU", "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-11-23"}
    return {**summarise(samples, scores, "base"), **facts, **more}


def share_of_grey(path: Path) -> float:
    """Share of a picture that has the grey of the hatched fields."""
    colours = matplotlib.image.imread(path)[..., :3]
    return float((abs(colours - 0xDD / 255) < 1e-3).all(-1).mean())


def test_maps_show_every_system_and_its_difference_to_the_base(tmp_path: Path) -> None:
    metrics = grid_metrics(windows={"base": 512, "adapter": None})
    assert plot_depths(metrics, "needle", tmp_path / "map.png") == tmp_path / "map.png"
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "map.json").read_text()) == {
        "task": "needle",
        "lengths": [512, 1024],
        "depths": [0.0, 1.0],
        "windows": {"base": 512},
        "scores": {"base": [[0.5, 0.0], [1.0, 0.5]], "adapter": [[1.0, 1.0], [0.5, 0.5]]},
        "differences": {"adapter": [[0.5, 1.0], [-0.5, 0.0]]},
    }


def test_a_map_has_no_difference_without_a_base_and_no_number_where_nothing_was_asked(tmp_path: Path) -> None:
    metrics = grid_metrics()
    metrics["cells"] = [
        c for c in metrics["cells"] if (c["length"], c["depth"]) != (512, 1.0) and c["system"] != "base"
    ]
    del metrics["systems"]["base"]
    plot_depths(metrics, "needle", tmp_path / "map.png")
    numbers = json.loads((tmp_path / "map.json").read_text())
    assert numbers["scores"] == {"adapter": [[1.0, 1.0], [None, 0.5]]}
    assert numbers["differences"] == {}
    # White is a difference of 0, so what was not asked has a colour that no score has.
    plot_depths(grid_metrics(), "needle", tmp_path / "full.png")
    assert share_of_grey(tmp_path / "map.png") > 0.02 > share_of_grey(tmp_path / "full.png")


def test_lines_have_the_intervals_of_the_metrics(tmp_path: Path) -> None:
    metrics = grid_metrics(windows={"base": 512, "adapter": None})
    plot_lengths(metrics, "needle", tmp_path / "line.png")
    numbers = json.loads((tmp_path / "line.json").read_text())
    assert numbers["windows"] == {"base": 512}
    assert numbers["cells"] == [cell for cell in metrics["cells"] if cell["depth"] is None]
    assert numbers["threshold"] == 0.856


def test_the_report_shows_pictures_effective_lengths_guard_and_wording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, essays = {"base": [2.0, 3.0], "adapter": [2.1, 3.1]}, {"base": [[1, 2]] * 2, "adapter": [[1, 2]] * 2}
    short = [Sample(str(i), "guard_instructions", 0, None, TURNS, "1", ["1"], 0) for i in range(4)]
    scores = {"base": [1.0, 1.0, 1.0, 0.0], "adapter": [1.0, 0.0, 0.0, 0.0]}
    metrics = grid_metrics(
        guard=summarise_guard(losses, essays, short, scores, "base"),
        wording={"needle": ["own"]},
        haystack={"needle": ["nvidia", "own"]},
        windows={"base": 512, "adapter": None},
        arguments={
            "model_name_or_path": "my/model",
            "test_file": "test.jsonl",
            "adapters": ["a=x", "y"],
            "models": [],
        },
    )
    write_json(tmp_path / "metrics.json", metrics)
    text = report(ReportArguments(str(tmp_path / "out"), metrics_file=str(tmp_path / "metrics.json"))).read_text()
    for name in ("needle-lengths", "needle-depths"):
        assert f"({name}.png)" in text
        assert {path.suffix for path in (tmp_path / "out").glob(f"{name}.*")} == {".png", ".json"}
    assert "Model: `my/model`\n\nAdapters: `a=x`, `y`\n\nSamples: `test.jsonl`" in text
    assert table(text, "task")[2:] == [
        ["needle (own wording)", "512", "4", "0.750 (0.30 to 0.95)", "0.750 (0.30 to 0.95)"],
        ["needle (own wording)", "1024", "4", "0.250\\* (0.05 to 0.70)", "0.750 (0.30 to 0.95)"],
    ]
    assert "\\* longer than what the system reaches: base 512 tokens." in text
    assert ["needle (own wording)", "none", "none"] in table(text.partition("## Effective length")[2], "task")
    base, adapter = table(text.partition("## Short contexts")[2], "system")[2:]
    assert base == ["base", "12.18", "2.500", "2.000 to 3.000", ""]
    assert adapter[-1] == "+0.1000 (+0.1000 to +0.1000)"
    base, adapter = table(text.partition("`guard_instructions`: ")[2], "system")[2:]
    assert base[:2] == ["base", "0.750"]
    assert adapter[:2] == ["adapter", "0.250"]
    assert adapter[4].startswith("-0.500 (")
    own = "In a wording of our own, so not comparable with published scores: needle."
    assert own in text.partition("## Scores")[0]
    assert "Hidden in plain sentences of ours, not in essays: needle." in text
    for name in ("needle-lengths", "needle-depths"):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["task"] == "needle (own wording)"
    cli._show(metrics)  # what `evaluate` prints
    assert own in capsys.readouterr().out.splitlines()


def test_a_terminal_gets_a_drawn_table_and_a_pipe_gets_markdown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [["system", "accuracy"], ["base", "0.5"]]
    cli._show_table(rows)
    assert capsys.readouterr().out == "| system | accuracy |\n| --- | --- |\n| base | 0.5 |\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli._show_table(rows)
    drawn = capsys.readouterr().out
    assert "━" in drawn
    assert "base" in drawn
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    cli._show_table(rows)
    assert capsys.readouterr().out.startswith("| system |")


def test_a_terminal_gets_the_whole_report_and_a_pipe_its_path(
    metrics_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["report", "--metrics_file", metrics_file, "--output_dir", tmp_path / "out"]
    assert seal(*words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.md'}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert seal(*words) == 0
    drawn = capsys.readouterr().out
    assert "━" in drawn or "─" in drawn
    assert "0.667 (0.21 to 0.94)" in drawn
    assert drawn.endswith(f"{tmp_path / 'out' / 'report.md'}\n")


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_a_picture_comes_with_its_numbers(tmp_path: Path, granularity: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", granularity)
    text = report(ReportArguments(str(tmp_path / "out"), adapter=str(adapter))).read_text()
    assert "(scales.png)" in text
    assert (tmp_path / "out" / "scales.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "out" / "scales.json").read_text())
    learned = scales(adapter)
    assert numbers["layers"] == list(learned)
    stacked = torch.stack(list(learned.values()))
    if granularity == "head":
        torch.testing.assert_close(torch.tensor(numbers["maps"]["scale"]), stacked)
    else:
        means, spread = map(torch.tensor, numbers["maps"].values())
        torch.testing.assert_close(means, stacked.mean(-1))
        torch.testing.assert_close(spread, ((stacked - 1) ** 2).mean(-1) ** 0.5)


def test_an_untrained_adapter_has_a_picture_too(tmp_path: Path) -> None:
    plot_scales({"layer": torch.ones(4)}, tmp_path / "ones.png")
    assert json.loads((tmp_path / "ones.json").read_text())["maps"] == {"scale": [[1.0] * 4]}


def test_layers_with_fewer_heads_are_filled_up_as_unchanged(tmp_path: Path) -> None:
    scales = {"0.o_proj": torch.tensor([0.5, 2.0, 1.5]), "1.o_proj": torch.tensor([3.0])}
    plot_scales(scales, tmp_path / "map.png")
    assert json.loads((tmp_path / "map.json").read_text())["maps"]["scale"] == [[0.5, 2.0, 1.5], [3.0, 1.0, 1.0]]


def test_every_site_has_a_map_of_its_own(tmp_path: Path) -> None:
    scales = {"0.o_proj": torch.full((2, 3), 2.0), "0.q_proj": torch.tensor([0.5, 1.5])}
    plot_scales(scales, tmp_path / "map.png")
    assert json.loads((tmp_path / "map.json").read_text())["maps"] == {
        "scale, mean over channels": [[2.0, 2.0]],
        "spread of channels around 1": [[1.0, 1.0]],
        "scale of the query": [[0.5, 1.5]],
    }


def test_several_tasks_have_their_mean_at_the_lengths_of_all(tmp_path: Path) -> None:
    places = [("lines", 512), ("lines", 1024), ("needle", 512), ("needle", 512)]
    samples = [Sample(str(i), *place, None, TURNS, "1", ["1"], 0) for i, place in enumerate(places)]
    metrics = {**summarise(samples, {"base": [1.0, 0.0, 0.0, 1.0]}, "base"), "windows": {"base": None}}
    assert length_rows(metrics)[4:] == [["mean of tasks", "512", "3", "0.750"]]


def test_without_matplotlib_tables_and_numbers_are_written_and_the_way_to_pictures_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    write_json(tmp_path / "metrics.json", grid_metrics())
    words = ["--metrics_file", tmp_path / "metrics.json", "--adapter", adapter]
    assert seal("report", *words, "--output_dir", tmp_path / "with") == 0
    for name in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert seal("report", *words, "--output_dir", tmp_path / "without") == 0
    names = {"needle-lengths", "needle-depths", "scales"}
    assert {path.name for path in (tmp_path / "without").iterdir()} == {"report.md", *(f"{n}.json" for n in names)}
    text, full = ((tmp_path / folder / "report.md").read_text() for folder in ("without", "with"))
    for name in names:
        without, drawn = ((tmp_path / folder / f"{name}.json").read_bytes() for folder in ("without", "with"))
        assert without == drawn
        assert f"the numbers are in [{name}.json]({name}.json). Pictures need matplotlib: pip install" in text
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        line for line in full.splitlines() if line.startswith("|")
    ]
    assert caplog.text.count('pip install "seal-peft[plot]"') == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "is not JSON"), ("[]", "is not a metrics.json"), ('{"systems": {}}', "it has no cells")],
)
def test_a_file_that_is_no_metrics_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, complaint: str
) -> None:
    (tmp_path / "metrics.json").write_text(content)
    assert seal("report", "--metrics_file", tmp_path / "metrics.json", "--output_dir", tmp_path / "out") == 1
    assert complaint in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_nothing_to_report_is_an_error_that_names_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert seal("report", "--output_dir", tmp_path / "out") == 1
    assert "give --metrics_file, --adapter or both" in error_of(capsys)


def test_scales_that_are_not_finite_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    assert seal("report", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "out") == 1
    assert "holds NaN or infinite scales (model.layers.0.self_attn.o_proj); do not use it" in error_of(capsys)
    assert not (tmp_path / "out").exists()
