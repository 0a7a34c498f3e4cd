"""Several processes give what one gives: both evaluate the same samples, and all rows and numbers are compared.

Prints seconds, rows that differ and whether metrics.json is the same but for date, command and folder, writes that as
JSON, and ends with 1 if anything differs. SmolLM2 and a fresh adapter, 40 lines samples at each length, on all GPUs;
without GPUs two processes share the CPU.

    python benchmarks/evaluate_processes.py --output results/evaluate-processes.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from evaluate_lines import fresh_adapter

from seal_peft.data import make_samples, write_samples
from seal_peft.files import write_json
from seal_peft.loading import load_tokenizer
from seal_peft.provenance import provenance

# As accelerate's own script, which need not be on the path. Without GPUs `--multi_gpu` starts processes on the CPU.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes"]


def evaluate(folder: Path, words: list[str], processes: int) -> float:
    """Evaluate into a folder and return the seconds that it took, starting and loading included."""
    launch = [*LAUNCH, str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "seal_peft", "evaluate", *words, "--output_dir", str(folder)]
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    started = time.perf_counter()
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths})
    return time.perf_counter() - started


def rows_of(folder: Path) -> dict[str, Any]:
    """Return the rows of predictions.jsonl by fingerprint."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["fingerprint"]: row for row in rows}


def metrics_of(folder: Path) -> dict[str, Any]:
    """Return metrics.json without what two runs cannot share."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    del metrics["date"], metrics["command"], metrics["arguments"]["output_dir"]
    return metrics


def main() -> int:
    """Evaluate twice, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", dest="model", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--num_samples", type=int, default=40)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate-processes.json"))
    options = parser.parse_args()
    if options.processes < 2:
        print("There is one GPU, so there is nothing to compare. Use a machine with several.")
        return 0
    numbers = {"lengths": options.lengths, "num_samples": options.num_samples}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = fresh_adapter(options.model, folder / "adapter")
        samples = make_samples("lines", tokenizer=load_tokenizer(options.model), split="test", **numbers)
        write_samples(folder / "test.jsonl", samples)
        words = ["--model_name_or_path", options.model, "--test_file", str(folder / "test.jsonl")]
        words += ["--adapters", str(adapter), "--max_new_tokens", str(options.max_new_tokens)]
        one, several = folder / "one", folder / "several"
        seconds = [evaluate(one, words, 1), evaluate(several, words, options.processes)]
        rows, others = rows_of(one), rows_of(several)
        different = [key for key in rows.keys() | others.keys() if rows.get(key) != others.get(key)]
        same = metrics_of(one) == metrics_of(several)
        systems = metrics_of(one)["systems"]
    result = {**numbers, "processes": options.processes, "seconds_one": seconds[0], "seconds_several": seconds[1]}
    result |= {"rows": len(rows), "rows_that_differ": len(different), "same_metrics": same, "systems": systems}
    write_json(options.output, {**result, **provenance()})
    print(f"{len(rows)} rows: one process {seconds[0]:.1f} s, {options.processes} processes {seconds[1]:.1f} s")
    print(f"{len(different)} rows differ; metrics.json {'is the same' if same else 'DIFFERS'}")
    print(f"written to {options.output}")
    return 0 if same and not different else 1


if __name__ == "__main__":
    sys.exit(main())
