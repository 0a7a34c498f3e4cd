"""The benchmarks of evaluation and generation run at a tiny size, where there is no GPU, too."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import nvidia_ruler as nvidia
import tokenizers_for_tests as tokenizers_
from seal_peft.data import write_samples
from seal_peft.predictions import fingerprint
from seal_peft.reproduce.parts import PARTS
from seal_peft.tasks import get_task, ruler
from stages import run_script, save_model

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run a benchmark; return what it writes, and what it prints."""

    def run(script: str, *words: object) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        run_script(SCRIPTS / script, *words, "--output", tmp_path / "out.json")
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return run


def test_it_measures_two_systems_and_writes_what_it_prints(run, tmp_path: Path) -> None:
    model = ["--model_name_or_path", save_model(tmp_path / "model")]
    sizes = ["--lengths", 300, 400, "--num_samples", 2, "--max_new_tokens", 4]
    result, printed = run("evaluate_lines.py", *model, *sizes)
    assert f"4 samples x 2 systems: {result['seconds']:.1f} s" in printed
    assert result["peak_bytes"] > 0
    assert [(name, system["n"]) for name, system in result["systems"].items()] == [("base", 4), ("adapter", 4)]
    assert result["versions"]["torch"]


@nvidia.needs_nvidia
def test_it_generates_all_of_ruler_and_writes_seconds_and_fill(run, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", weights=False)
    tokenizers_.words(tokenizers_.CHATML).save_pretrained(folder)
    sizes = ["--lengths", 1500, "--num_samples", 1, "--processes", 1]
    result, printed = run("generate_ruler.py", "--model_name_or_path", folder, *sizes)
    assert list(result["tasks"]) == [row[0] for row in ruler.ROWS]
    assert {task["samples"] for task in result["tasks"].values()} == {1}
    assert min(task["smallest_fill"] for task in result["tasks"].values()) >= 0.97
    assert f"{result['seconds']:.1f} s" in printed
    assert result["versions"]["transformers"]


def test_answers_of_reproduce_are_compared_by_pairs_by_what_they_hold_and_by_the_wording_of_the_needle(
    run, tmp_path: Path
) -> None:
    made = [get_task("needle_noise").make(seed=seed, size=1, depth=0.5, split="test") for seed in range(60)]
    samples = [replace(sample, id=f"needle-{number:02}") for number, sample in enumerate(made)]
    write_samples(tmp_path / "data" / f"{PARTS['needle'].test.name}-test-0.jsonl", samples)

    def answer(folder: Path, rows: list[dict[str, Any]]) -> Path:
        folder.mkdir(parents=True)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "metrics.json").write_text(json.dumps({"date": "today", "commit": "c", "device": folder.parts[-3]}))
        return folder.parent

    def part(name: str) -> Path:
        return tmp_path / name / fingerprint(asdict(PARTS[name]))[:8] / "all"

    texts = {"base": ["It was not Newton.", "Nobody knows it.", "No, it is not."], "qa_single": ["Newton", "42", ""]}
    asked = [("qa_single", ["Isaac Newton", "newton"]), ("qa_multi", ["420"]), ("qa_multi", ["no"])]
    rows = [
        {"system": system, "id": str(number), "task": task, "answer": text, "answers": answers, "score": 0.1}
        for system, own in texts.items()
        for number, (text, (task, answers)) in enumerate(zip(own, asked, strict=True))
    ]
    answer(part("qa"), rows)
    essays = [{"system": system, "id": "guard", "losses": [3.5]} for system in texts]
    answer(part("guard"), [*essays, *({**row, "task": "guard_qa"} for row in rows)])
    for name in ("samples", "grid", "extension"):
        systems, lengths = PARTS[name].trainings, PARTS[name].test.lengths
        rows = [
            {"system": system, "id": f"{length}-{number}", "length": length, "score": float(number <= place)}
            for place, system in enumerate(systems)
            for length in lengths
            for number in range(len(systems))
        ]
        answer(part(name), rows)
    answer(part("heads"), [])
    (part("heads").parent / "heads").mkdir()
    maps = {"1024": [[0.5, -0.1, -0.3], [-0.1, -0.5, 0.0]], "4096": [[0.3, 0.3, -0.3], [-0.3, -0.3, 0.0]]}
    errors = [[0.1] * 3, [0.1, 0.1, 0.0]]
    pruning = {length: {"mean": own, "standard_error": errors} for length, own in maps.items()}
    (part("heads").parent / "heads" / "pruning.json").write_text(json.dumps({"maps": {"pruning_zero": pruning}}))
    rows = [
        {"system": system, "id": sample.id, "length": 1, "score": float(system != "lora")}
        for system in ("base", *PARTS["needle"].trainings)
        for sample in samples
    ]
    answer(part("needle"), rows)
    before = answer(tmp_path / "before" / "needle" / "all", [{**row, "score": 0.25} for row in rows[::-1]])
    result, _ = run("reproduce_answers.py", "--work", tmp_path, "--before", before)
    assert {task: {name: own["held"] for name, own in found.items()} for task, found in result["qa"].items()} == {
        "qa_single": {"base": 1, "qa_single": 1},
        "qa_multi": {"base": 1, "qa_single": 0},
    }
    single = result["qa"]["qa_single"]["base"]
    assert [single[key] for key in ("words", "empty", "f1", "f1_cut")] == [4, 0, 0.1, 1]
    assert {name: (own["n"], own["held"]) for name, own in result["qa_multi_open"].items()} == {
        "base": (1, 0),
        "qa_single": (1, 0),
    }
    assert {name: (own["n"], own["empty"]) for name, own in result["guard_qa"].items()} == {
        "base": (3, 0),
        "qa_single": (3, 1),
    }
    assert result["pruned"] == {"better": 1, "worse": 2}
    differences = result["differences"]
    # Each system of six has one more right than the one before it.
    assert differences["samples: seal-c 10 - seal-c 50, 8192"]["mean"] == pytest.approx(-2 / 6)
    assert differences["samples: seal-c 10 - seal-c 50, 8192"]["p_value"] == 0.5
    assert differences["needle: lora - dora"]["mean"] == -1
    assert result["needle"]["difference"]["base"]["mean"] == 0.75
    wordings = result["needle"]["wordings"].values()
    assert sum(own["n"] for own in wordings) == len(samples)
    assert all(
        own["before"]["base"] == 0.25 and own["now"] == {**own["now"], "base": 1, "lora": 0} for own in wordings
    )
    assert result["answers"]["needle before"]["device"] == "before"
