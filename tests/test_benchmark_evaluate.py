"""The benchmarks of evaluation and generation run at a tiny size, where there is no GPU, too."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvidia_ruler as nvidia
import tokenizers_for_tests as tokenizers_
from seal_peft.tasks import ruler
from stages import save_model

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, output: Path, *words: object) -> tuple[dict[str, Any], str]:
    """What a benchmark writes, and what it prints."""
    command = [sys.executable, SCRIPTS / script, *words, "--output", output]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(SCRIPTS.parent)}
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    return json.loads(output.read_text()), ended.stdout


def test_it_measures_two_systems_and_writes_what_it_prints(tmp_path: Path) -> None:
    model = ["--model_name_or_path", save_model(tmp_path / "model")]
    sizes = ["--lengths", 300, 400, "--num_samples", 2, "--max_new_tokens", 4]
    result, printed = run("evaluate_lines.py", tmp_path / "out.json", *model, *sizes)
    assert f"4 samples x 2 systems: {result['seconds']:.1f} s" in printed
    assert result["peak_bytes"] > 0
    assert [(name, system["n"]) for name, system in result["systems"].items()] == [("base", 4), ("adapter", 4)]
    assert result["versions"]["torch"]


@nvidia.needs_nvidia
def test_it_generates_all_of_ruler_and_writes_seconds_and_fill(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", weights=False)
    tokenizers_.words(tokenizers_.CHATML).save_pretrained(folder)
    sizes = ["--lengths", 1500, "--num_samples", 1, "--processes", 1]
    result, printed = run("generate_ruler.py", tmp_path / "out.json", "--model_name_or_path", folder, *sizes)
    assert list(result["tasks"]) == [row[0] for row in ruler.ROWS]
    assert {task["samples"] for task in result["tasks"].values()} == {1}
    assert min(task["smallest_fill"] for task in result["tasks"].values()) >= 0.97
    assert f"{result['seconds']:.1f} s" in printed
    assert result["versions"]["transformers"]
