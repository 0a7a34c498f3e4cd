"""The benchmarks of heads and of context extension run at a tiny size, where there is no GPU, too."""

import json
import runpy
from pathlib import Path

import pytest

from pages import filled
from seal_peft.data import write_samples
from stages import run_script, save_model

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def words_of(settings: dict[str, object]) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def test_every_part_of_the_benchmark_of_heads_writes_what_it_found(tmp_path: Path) -> None:
    sizes = {"lengths": [300, 330], "num_samples": 2, "contexts": 1, "check_heads": 2, "generate_heads": 0}
    sizes |= {"train_lengths": [300], "num_train_samples": 1, "num_test_samples": 1, "dtype": "float32"}
    words = words_of({"model": save_model(tmp_path / "model"), "output_dir": tmp_path, **sizes})
    run_script(SCRIPTS / "heads.py", *words)
    maps, speed, quadrants = (
        json.loads((tmp_path / f"heads-{part}.json").read_text())["results"] for part in ("maps", "speed", "quadrants")
    )
    assert len(maps["channel"]["heads"]) == 8
    for own in speed.values():
        assert own["pruning, 1 contexts"]["share_of_naive"] > 0
        took = own["gradient_output"]["seconds"] / own["samples"]
        assert own["gradient_output"]["forward_backwards_per_sample"] == pytest.approx(took / own["forward_backward"])
        for values in own["equality"]["float32"].values():
            assert values["mean"] <= values["sample"] < 1e-4
            assert values["noise"]["same"] == 1.0
    pieces = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "speed").iterdir()}
    assert len(pieces) == 2 * 3  # times, and two kinds of contexts, at each length
    run_script(SCRIPTS / "heads.py", *words, "--parts", "speed")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "speed").iterdir()} == pieces
    with pytest.raises(SystemExit, match="was measured with .*'check_heads': 2"):
        run_script(SCRIPTS / "heads.py", *words, "--parts", "speed", "--check_heads", 3)
    # Pages show the file that was measured, so what is written now has the same rows.
    measured = json.loads((SCRIPTS.parent / "results" / "heads-quadrants.json").read_text())["results"]
    for part, rows in quadrants.items():
        assert {row["system"] for row in rows} == {row["system"] for row in measured[part]}
        assert {name for row in rows for name in row} == {name for row in measured[part] for name in row}


def test_prompts_are_asked_together_as_far_as_tokens_and_rope_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    together = runpy.run_path(str(SCRIPTS / "context.py"))["asked_together"]
    prompts = [[0] * length for length in (400, 900, 300)]
    assert together("ntk", prompts, 10, 1800) == [[1], [0, 2]]
    assert together("ntk", prompts, 10, 5000) == [[1, 0, 2]]
    for system in ("dynamic", "dynamic+seal-c"):
        assert sorted(together(system, prompts, 10, 5000)) == [[0], [1], [2]]


def test_the_benchmark_of_context_extension_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", max_position_embeddings=8192)  # as SmolLM2, beyond all windows
    monkeypatch.syspath_prepend(SCRIPTS)
    context = runpy.run_path(str(SCRIPTS / "context.py"))
    for split, (count, questions) in {"train": (1, 2), "test": (2, 1)}.items():
        made = [s for n in (300, 330) for s in context["_samples"](str(model), "lines", split, n, count, questions)]
        write_samples(tmp_path / f"lines-{split}.jsonl", made)
    systems = ["base", "self-extend+seal-c", "self-extend"]
    settings = {"folder": tmp_path, "model": model, "tasks": "lines", "systems": systems, "batch_tokens": 700}
    settings["rates"] = [1e-2, 1e-1]
    run_script(SCRIPTS / "context.py", "work", *words_of(settings))
    folders = {system: tmp_path / "lines" / system for system in systems}
    whole = {system: json.loads((folder / "answers.json").read_text()) for system, folder in folders.items()}
    weights = (folders[systems[1]] / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    # As after a kill between two batches.
    (folders["base"] / "answers.json").write_text(json.dumps(dict(list(whole["base"].items())[:2])))
    for folder in folders.values():
        (folder / "asked.json").unlink()
    run_script(SCRIPTS / "context.py", "work", *words_of(settings))
    assert {system: json.loads((f / "answers.json").read_text()) for system, f in folders.items()} == whole
    assert (folders[systems[1]] / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == weights
    first = next(iter(whole["base"]))  # the longest
    right = {**whole["base"], first: {**whole["base"][first], "score": 1.0}}
    (folders["base"] / "answers.json").write_text(json.dumps(right))
    run_script(SCRIPTS / "context.py", "merge", *words_of({**settings, "output": tmp_path / "out.json"}))
    result = json.loads((tmp_path / "out.json").read_text())
    assert [cell["n"] for cell in result["tasks"]["lines"]["cells"] if cell["depth"] is None] == [2] * 6
    assert result["training"][f"lines, {systems[1]}"]["samples"] == 2
    assert "| base | 0.00 | 0.50 |" in capsys.readouterr().out
    result["training"][f"lines, {systems[1]}"]["peak_memory_bytes"] = 2e9  # of a GPU
    pages = filled("results/context-smollm2.json", result)
    assert any("| base | 0.00 (0.00 to 0.66) | 0.50 (0.09 to 0.91) |" in shown for shown in pages)
    # All are trained at the rate whose training ended best; its contexts were new to it.
    losses = {rate: json.loads((tmp_path / "search" / rate / "run.json").read_text()) for rate in ("0.01", "0.1")}
    assert result["search"] == {rate: run["loss_curve"][-1]["loss"] for rate, run in losses.items()}
    best = min(result["search"], key=result["search"].get)
    assert result["training"][f"lines, {systems[1]}"]["learning_rate"] == float(best)
    assert best in [shown.strip() for shown in pages]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_long_training_texts_are_fewer_so_that_no_length_has_more_tokens_than_12k(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    context = runpy.run_path(str(SCRIPTS / "context.py"))
    options = type("Options", (), {"contexts": 32, "questions": 8, "num_samples": 50})
    assert [context["counts"](options, "train", n)[0] for n in (1024, 12288, 16384, 24576, 31744)] == [
        32,
        32,
        24,
        16,
        12,
    ]
    assert context["counts"](options, "test", 32768) == (50, 1)
