"""Ctrl-C on the command line: exit code 130, a line that says how to go on, and the same command then does."""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages import save_model, save_samples, seal

# An interrupt leaves files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    save_model(folder / "model")
    save_samples(folder / "train.jsonl")
    save_samples(folder / "test.jsonl", "test", num_samples=40)
    return folder


def press_ctrl_c_when(reached: Callable[[], bool]) -> threading.Thread:
    """Send SIGINT to this process as soon as the work has got so far."""

    def watch() -> None:
        while not reached():
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_training_goes_on_from_its_last_checkpoint(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model_name_or_path", house / "model", "--train_file", house / "train.jsonl"]
    words += ["--output_dir", tmp_path, "--max_steps", 30, "--save_steps", 2, "--disable_tqdm", "true"]
    # From then on one checkpoint or another is whole, wherever the signal hits.
    thread = press_ctrl_c_when(lambda: any(tmp_path.glob("checkpoint-[4-9]*")) or any(tmp_path.glob("checkpoint-??")))
    assert seal(*words) == 130
    thread.join()
    assert (
        "seal-peft train: interrupted. Start the same command again: it goes on from what is finished."
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run.json").exists()
    assert seal(*words) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert "checkpoint-" in run["resumed_from"]
    assert run["steps"] == 30


def test_evaluation_keeps_its_finished_rows(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "predictions.jsonl"
    words = ["evaluate", "--model_name_or_path", house / "model", "--test_file", house / "test.jsonl"]
    words += ["--output_dir", tmp_path, "--per_device_eval_batch_size", 1, "--max_new_tokens", 8]
    thread = press_ctrl_c_when(lambda: rows.is_file() and rows.read_bytes().count(b"\n") > 3)
    assert seal(*words) == 130
    thread.join()
    assert (
        "seal-peft evaluate: interrupted. Start the same command again: it goes on from what is finished."
        in capsys.readouterr().err
    )
    assert not (tmp_path / "metrics.json").exists()
    finished = rows.read_bytes().splitlines()[:3]
    # A mark in a finished row shows that it is kept, not answered again.
    marked = finished[0].replace(b'"answer": "', b'"answer": "kept ')
    rows.write_bytes(rows.read_bytes().replace(finished[0], marked))
    assert seal(*words) == 0
    after = rows.read_bytes().splitlines()
    assert len(after) == 40
    assert {marked, *finished[1:]} <= set(after)
    assert json.loads((tmp_path / "metrics.json").read_text())["systems"]["base"]["n"] == 40
