"""The demo with a tiny model: every stage runs, every file is there, and a second call keeps what is finished."""

import json
from pathlib import Path

import pytest

import models
from stages import error_of, save_model, seal

SIZES = {"length": 300, "num_train_samples": 3, "questions_per_context": 1, "num_test_samples": 2}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, run once as a user would, in a folder beside its model."""
    parent = tmp_path_factory.mktemp("demo")
    save_model(parent / "model")
    words = [f"--{name}={value}" for name, value in SIZES.items()]
    assert seal("demo", "--model_name_or_path", parent / "model", "--output_dir", parent / "run", *words) == 0
    return parent / "run"


def test_the_demo_keeps_its_contract(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("base", "adapter", "merged"):
        assert 0.0 <= metrics[name]["accuracy"] <= 1.0
        assert metrics[name]["n"] == 2
    assert metrics["trainable_parameters"] == models.LAYERS * models.HEADS * models.HEAD_DIM
    assert metrics["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 0.0 < metrics["max_logit_difference_merged"] < 0.5
    assert metrics["seconds"] > metrics["training_seconds"] > 0
    assert metrics["resumed"] is False


def test_the_demo_leaves_a_report_a_picture_and_a_plain_model(folder: Path) -> None:
    assert "| merged |" in (folder / "report.md").read_text()
    assert (folder / "scales.png").stat().st_size > 1000
    assert (folder / "merged" / "model.safetensors").is_file()
    assert not (folder / "merged" / "adapter_config.json").exists()


def test_a_demo_is_not_continued_with_other_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder.parent / "model"
    words = [f"--{name}={value}" for name, value in {**SIZES, "length": 350}.items()]
    before = (folder / "metrics.json").read_bytes()
    capsys.readouterr()
    assert seal("demo", "--model_name_or_path", model, "--output_dir", folder, *words) == 1
    assert "holds a demo with other settings (length 300 -> 350)" in error_of(capsys)
    assert (folder / "metrics.json").read_bytes() == before


def test_a_length_too_short_ends_the_demo_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", weights=False)
    assert seal("demo", "--model_name_or_path", model, "--output_dir", tmp_path / "run", "--length", 20) == 1
    assert "length=20 tokens is too short" in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_a_failing_process_ends_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", weights=False)
    words = [f"--{name}={value}" for name, value in SIZES.items()]
    assert seal("demo", "--model_name_or_path", model, "--output_dir", tmp_path / "run", *words) == 1
    printed = capfd.readouterr().err
    assert "no file named model.safetensors" in printed
    assert "`seal-peft evaluate` ended with code 1; its message stands above" in printed
    assert not (tmp_path / "run" / "metrics.json").exists()
