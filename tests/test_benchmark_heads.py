"""The benchmark of heads runs at a tiny size, where there is no GPU, too, and every part writes what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

from stages import save_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "heads.py"


def test_every_part_writes_what_it_found(tmp_path: Path) -> None:
    sizes = {"lengths": [300, 400], "num_samples": 4, "contexts": 2, "check_heads": 2, "generate_heads": 1}
    sizes |= {"train_lengths": [300], "num_train_samples": 2, "num_test_samples": 2}
    words = [
        word for name, value in sizes.items() for word in (f"--{name}", *(value if type(value) is list else [value]))
    ]
    command = [sys.executable, SCRIPT, "--model", save_model(tmp_path / "model"), "--output_dir", tmp_path, *words]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(SCRIPT.parents[1])}
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    maps, speed, quadrants = (
        json.loads((tmp_path / f"heads-{part}.json").read_text()) for part in ("maps", "speed", "quadrants")
    )
    assert len(maps["results"]["channel"]["heads"]) == 8
    assert set(maps["results"]["pruning"]["generated"]) == {"300", "400"}
    for length, own in speed["results"].items():
        assert 0 < own["pruning, 2 contexts"]["share_of_naive"]
        for values in own["equality"]["auto"].values():
            assert values["mean"] <= values["sample"] < 1e-3, length
            assert values["noise"]["same"] == 1.0
    systems = {cell["system"] for cell in quadrants["results"]["logprob"]}
    assert systems == {"base", "Q1x0.9", "Q3x0.9", "Q1x0.9-Q3x1.1", "seal-head", "seal-channel"}
