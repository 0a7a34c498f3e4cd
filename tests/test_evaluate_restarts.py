"""Evaluation that is killed, or shared by several processes, ends with the numbers of one clean run."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import models
import nvidia_ruler as nvidia
from faults import runs, signal_that_ended, start
from processes import launch_two
from seal_peft import SealConfig
from seal_peft.data import write_samples
from seal_peft.evaluate import EvaluateArguments, evaluate
from stages import save_model, some_samples

# What two runs of one evaluation need not share: when, by which words, on how many threads, and from a tree that may
# be edited meanwhile.
OWN = ("date", "command", "commit", "device")


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


@pytest.fixture(scope="module", autouse=True)
def small_guard() -> Iterator[None]:
    """A guard of four samples a task, here and in forks: what counts is that it goes through the same files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seal_peft.guard._SAMPLES", 4)
        yield


@pytest.fixture(scope="module")
def clean(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    evaluate(arguments_for(house, folder, guard=bool(nvidia.SPEC)))
    return folder


def metrics_of(folder: Path) -> str:
    """All of `metrics.json` but for `OWN`, in its order."""
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["arguments"].pop("output_dir") == str(folder)
    return json.dumps({name: value for name, value in metrics.items() if name not in OWN})


def rows_of(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]
    by_key = {row["fingerprint"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key


def rows_in(folder: Path) -> int:
    file = folder / "predictions.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_at_a_random_moment(arguments: EvaluateArguments, rng: random.Random) -> None:
    """Evaluate in a fork, which starts in milliseconds, so that most kills hit the work itself."""
    # Random in rows, and then in time: a slow machine must not get all its kills before the first answer.
    folder = Path(arguments.output_dir)
    goal, delay = rows_in(folder) + rng.randint(0, 15), rng.uniform(0, 0.05)
    child = start(lambda: evaluate(arguments))
    while rows_in(folder) < goal and runs(child):
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert signal_that_ended(child) in (0, signal.SIGKILL)


def test_ten_kills_at_random_moments_change_no_number(house: Path, clean: Path, tmp_path: Path) -> None:
    rng, attempts, rows_at_kills = random.Random(0), 0, []
    while len(rows_at_kills) < 10:
        arguments = arguments_for(house, tmp_path / str(attempts), guard=bool(nvidia.SPEC))
        kill_at_a_random_moment(arguments, rng)
        if (tmp_path / str(attempts) / "metrics.json").exists():
            attempts += 1  # the next kills hit a new one
        else:
            rows_at_kills.append(rows_in(tmp_path / str(attempts)))
    evaluate(arguments_for(house, tmp_path / str(attempts), guard=bool(nvidia.SPEC)))
    assert len(rows_at_kills) == 10
    assert len(set(rows_at_kills)) > 3, "the kills did not hit different moments"
    for attempt in range(attempts + 1):
        assert metrics_of(tmp_path / str(attempt)) == metrics_of(clean)
        assert rows_of(tmp_path / str(attempt)) == rows_of(clean)
        assert not (tmp_path / str(attempt) / ".lock").exists()


def test_a_second_evaluation_into_a_folder_at_work_is_refused_and_harms_nothing(
    house: Path, clean: Path, tmp_path: Path
) -> None:
    arguments = arguments_for(house, tmp_path, guard=bool(nvidia.SPEC))
    child = start(lambda: evaluate(arguments))
    while not rows_in(tmp_path):
        assert runs(child), f"it ended before its first answer, by signal {signal_that_ended(child)}"
        time.sleep(0.002)
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(ValueError, match=f"Another process is writing to {tmp_path}. Wait"):
        evaluate(arguments)
    os.kill(child, signal.SIGCONT)
    assert signal_that_ended(child) == 0
    assert metrics_of(tmp_path) == metrics_of(clean)
    assert rows_of(tmp_path) == rows_of(clean)


def test_two_processes_give_the_results_of_one(
    house: Path, clean: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # As an interrupted run leaves it: rows in the file of a process, the last one cut off.
    first, second, third = (clean / "predictions.jsonl").read_bytes().splitlines(keepends=True)[:3]
    (tmp_path / "predictions.jsonl").write_bytes(first)
    part = tmp_path / "predictions.process-1.jsonl"
    part.write_bytes(second.replace(b'"answer": "', b'"answer": "made before ') + third[:30])
    script = tmp_path_factory.mktemp("script") / "evaluate.py"  # the command line, with the small guard
    script.write_text("from seal_peft import cli, guard\nguard._SAMPLES = 4\nraise SystemExit(cli.main())\n")
    printed = launch_two(
        *(script, "evaluate", "--model_name_or_path", house / "model", "--adapters", house / "seal"),
        *("--test_file", house / "test.jsonl", "--output_dir", tmp_path, "--dtype", "float32", "--max_new_tokens", 6),
        *("--per_device_eval_batch_size", 2, *["--guard"] * bool(nvidia.SPEC)),
    )
    # Scores and, with the guard, essays, questions and instructions: by the first process alone.
    assert printed.count("| seal |") == (4 if nvidia.SPEC else 1)
    assert metrics_of(tmp_path) == metrics_of(clean)
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.jsonl", "metrics.json"}
    rows, expected = rows_of(tmp_path), rows_of(clean)
    kept = json.loads(second)["fingerprint"]
    assert rows.keys() == expected.keys()
    assert [key for key in rows if rows[key] != expected[key]] == ([kept] if "answer" in expected[kept] else [])
