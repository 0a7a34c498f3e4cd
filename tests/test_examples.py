"""The example scripts run as they stand, on the tiny model of `--tiny`, and train what they say they train."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import seal_peft
from seal_peft.tuner.weights import take_settings

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(command: list[object], folder: Path, **variables: str) -> str:
    """Run a command as a user would, in a process of its own; return what it printed."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= variables
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def assert_learned(folder: Path) -> None:
    scales = seal_peft.scales(folder)
    assert len(scales) == 2
    assert all((scale - 1).abs().max() > 0.02 for scale in scales.values())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return take_settings(load_file(folder / "adapter_model.safetensors"))[0]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the example of the plain Trainer in this process."""

    def train(batch_size: int) -> Path:
        words = ["--tiny", "--batch_size", str(batch_size), "--output_dir", str(tmp_path / "here")]
        monkeypatch.setattr(sys, "argv", ["train_with_trainer.py", *words])
        runpy.run_path(str(EXAMPLES / "train_with_trainer.py"), run_name="__main__")
        assert "model.layers.1.self_attn.o_proj: 0." in capsys.readouterr().out
        return tmp_path / "here"

    monkeypatch.syspath_prepend(str(EXAMPLES))
    return train


def test_two_processes_of_the_trainer_learn_what_one_learns_from_twice_the_batch(trained, tmp_path: Path) -> None:
    one = trained(batch_size=2)
    assert_learned(one)
    # Without GPUs this launcher starts processes on the CPU; `--cpu` starts a single one (accelerate 1.15).
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    settings = ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    words = [EXAMPLES / "train_with_trainer.py", "--tiny", "--output_dir", tmp_path / "two"]
    printed = run([*launcher, *settings, *words], tmp_path)
    assert printed.count("layers.0.self_attn.o_proj") == 1
    assert_close(weights(one), weights(tmp_path / "two"))


def test_trl_trains_on_the_answers_alone(trained, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs `pip install trl`")
    run([sys.executable, EXAMPLES / "train_with_trl.py", "--tiny", "--output_dir", tmp_path / "trl"], tmp_path)
    assert_learned(tmp_path / "trl")
    ours, trl = weights(trained(batch_size=1)), weights(tmp_path / "trl")
    # The same rows, labels and settings, but TRL computes in bfloat16. With labels on the prompt, too, it is 0.73.
    for name in ours:
        agreement = torch.corrcoef(torch.stack([ours[name].flatten(), trl[name].flatten()]))[0, 1]
        assert agreement > 0.95, (name, agreement)


def test_a_4_bit_base_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes`")
    run([sys.executable, EXAMPLES / "train_4bit.py", "--tiny", "--output_dir", tmp_path / "4bit"], tmp_path)
    assert_learned(tmp_path / "4bit")


def test_axolotl_trains_the_adapter_and_goes_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("needs axolotl: `make test-axolotl`")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    model, rows = runpy.run_path(str(EXAMPLES / "tiny.py"))["make_tiny"](tmp_path)
    shutil.copy(rows, tmp_path / "my.jsonl")
    train = [
        sys.executable,
        "-m",
        "axolotl.cli.main",
        "train",
        EXAMPLES / "axolotl" / "seal.yaml",
        "--launcher",
        "python",
    ]
    settings = ["--base-model", model, "--sequence-len", 2048]
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    quiet["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES / "axolotl"), *filter(None, sys.path)])
    run([*train, *settings, "--output-dir", tmp_path / "first"], tmp_path, **quiet)
    assert_learned(tmp_path / "first")
    more = ["--output-dir", tmp_path / "second", "--lora-model-dir", tmp_path / "first"]
    run([*train, *settings, *more], tmp_path, **quiet)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in first:  # a run from scratch would end where the first did
        assert (second[name] - first[name]).abs().max() > 0.02
        assert torch.corrcoef(torch.stack([first[name].flatten(), second[name].flatten()]))[0, 1] > 0.3
