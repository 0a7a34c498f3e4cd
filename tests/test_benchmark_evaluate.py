"""The benchmark of evaluation runs at a tiny size, where there is no GPU, too."""

import json
import os
import subprocess
import sys
from pathlib import Path

from stages import save_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "evaluate_lines.py"


def test_it_measures_two_systems_and_writes_what_it_prints(tmp_path: Path) -> None:
    words = [
        "--lengths",
        "300",
        "400",
        "--num_samples",
        "2",
        "--max_new_tokens",
        "4",
        "--output",
        tmp_path / "out.json",
    ]
    command = [sys.executable, SCRIPT, "--model", save_model(tmp_path / "model"), *words]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(SCRIPT.parents[1])}
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert f"4 samples x 2 systems: {result['seconds']:.1f} s" in ended.stdout
    assert result["peak_bytes"] > 0
    assert [(name, system["n"]) for name, system in result["systems"].items()] == [("base", 4), ("adapter", 4)]
    assert result["versions"]["torch"]
