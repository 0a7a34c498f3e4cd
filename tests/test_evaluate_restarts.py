"""Evaluation that is killed, or shared by several processes, ends with the numbers of one clean run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import models
import nvidia_ruler as nvidia
from seal_peft import SealConfig
from seal_peft.data import write_samples
from seal_peft.evaluate import EvaluateArguments, evaluate
from stages import python, save_model, some_samples

# What two runs of one evaluation cannot share: when, by which words, and where to.
OWN = ("date", "command")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    save_model(folder / "model", max_position_embeddings=8192)  # the guard's passages are long in these tokens
    write_samples(folder / "test.jsonl", [*some_samples("test", 300, 16), *some_samples("test", 400, 8)])
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = get_peft_model(base, SealConfig(task_type="CAUSAL_LM"))
    models.draw_scales(model)
    model.save_pretrained(str(folder / "seal"))
    return folder


def arguments_for(house: Path, folder: Path, **changes: Any) -> EvaluateArguments:
    settings: dict[str, Any] = {
        "adapters": [str(house / "seal")],
        "max_new_tokens": 6,
        "dtype": "float32",
        "per_device_eval_batch_size": 2,
        **changes,
    }
    return EvaluateArguments(str(house / "model"), str(house / "test.jsonl"), str(folder), **settings)


# A guard of four samples a task, here and in the processes below: what counts is that it goes through the same files.
SMALL_GUARD = "import seal_peft.guard; seal_peft.guard._SAMPLES = 4"


@pytest.fixture(scope="module")
def clean(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seal_peft.guard._SAMPLES", 4)
        evaluate(arguments_for(house, folder, guard=bool(nvidia.SPEC)))
    return folder


def metrics_of(folder: Path) -> str:
    """All of `metrics.json` but for `OWN`, in its order."""
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["arguments"].pop("output_dir") == str(folder)
    assert all(metrics.pop(name) for name in OWN)
    return json.dumps(metrics)


def rows_of(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]
    by_key = {row["fingerprint"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key


# The child of a fork starts in milliseconds, with everything imported, so that most kills hit the work itself.
KILLER = """
import json, logging, os, random, signal, sys, time
from pathlib import Path
from seal_peft.evaluate import EvaluateArguments, evaluate
house, folder, guard = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
rng, rows_at_kills = random.Random(0), []
if guard:
    seal_peft.guard.make_guard([str(house / "model")])  # essays and questions are read once, before the forks

def start(output):
    child = os.fork()
    if child == 0:
        evaluate(EvaluateArguments(
            str(house / "model"), str(house / "test.jsonl"), str(output), adapters=[str(house / "seal")], guard=guard,
            max_new_tokens=6, dtype="float32", per_device_eval_batch_size=2,
        ))
        os._exit(0)
    return child

def rows_in(output):
    file = output / "predictions.jsonl"
    return file.read_bytes().count(b"\\n") if file.exists() else 0

attempt = 0
while len(rows_at_kills) < 10:
    output = folder / str(attempt)
    # Random in rows, and then in time: a slow machine must not get all its kills before the first answer.
    goal, delay = rows_in(output) + rng.randint(0, 15), rng.uniform(0, 0.05)
    child = start(output)
    while rows_in(output) < goal and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)
    if (output / "metrics.json").exists():
        attempt += 1  # The next kills hit a new one.
    else:
        rows_at_kills.append(rows_in(output))
assert os.waitpid(start(folder / str(attempt)), 0)[1] == 0
print(json.dumps([attempt + 1, rows_at_kills]))
"""


def test_ten_kills_at_random_moments_change_no_number(house: Path, clean: Path, tmp_path: Path) -> None:
    ended = python(f"{SMALL_GUARD}\n{KILLER}", house, tmp_path, bool(nvidia.SPEC))
    assert ended.returncode == 0, ended.stderr
    attempts, rows_at_kills = json.loads(ended.stdout.splitlines()[-1])
    assert len(rows_at_kills) == 10
    assert len(set(rows_at_kills)) > 3, "the kills did not hit different moments"
    for attempt in range(attempts):
        assert metrics_of(tmp_path / str(attempt)) == metrics_of(clean)
        assert rows_of(tmp_path / str(attempt)) == rows_of(clean)


def launch(house: Path, folder: Path, script: Path, *words: str) -> subprocess.CompletedProcess:
    script.write_text(f"{SMALL_GUARD}\nfrom seal_peft.cli import main\nraise SystemExit(main())\n")
    command = [
        # Without GPUs this launcher starts processes on the CPU; `--cpu` starts a single one (accelerate 1.15).
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *(script, "evaluate", "--model_name_or_path", house / "model", "--adapters", house / "seal"),
        *("--test_file", house / "test.jsonl", "--output_dir", folder, "--dtype", "float32", "--max_new_tokens", "6"),
        *("--per_device_eval_batch_size", "2", *words),
    ]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)


def test_two_processes_give_the_results_of_one(
    house: Path, clean: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # As an interrupted run leaves it: rows in the file of a process, the last one cut off.
    first, second, third = (clean / "predictions.jsonl").read_bytes().splitlines(keepends=True)[:3]
    (tmp_path / "predictions.jsonl").write_bytes(first)
    part = tmp_path / "predictions.process-1.jsonl"
    part.write_bytes(second.replace(b'"answer": "', b'"answer": "made before ') + third[:30])
    script = tmp_path_factory.mktemp("script") / "evaluate.py"
    ended = launch(house, tmp_path, script, *(["--guard"] if bool(nvidia.SPEC) else []))
    assert ended.returncode == 0, ended.stderr
    # Scores and, with the guard, essays, questions and instructions: by the first process alone.
    assert ended.stdout.count("| seal |") == (4 if nvidia.SPEC else 1)
    assert metrics_of(tmp_path) == metrics_of(clean)
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.jsonl", "metrics.json"}
    rows, expected = rows_of(tmp_path), rows_of(clean)
    kept = json.loads(second)["fingerprint"]
    assert rows.keys() == expected.keys()
    assert [key for key in rows if rows[key] != expected[key]] == ([kept] if "answer" in expected[kept] else [])
