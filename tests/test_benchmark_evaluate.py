"""The benchmarks of evaluation and generation run at a tiny size, where there is no GPU, too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nvidia_ruler as nvidia
import tokenizers_for_tests as tokenizers_
from seal_peft.tasks import ruler
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
