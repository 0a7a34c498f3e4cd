"""What the tests of the stages share: a tiny model folder, sample files, and the command line in this process."""

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import models
import tokenizers_for_tests as tokenizers_
from seal_peft import cli
from seal_peft.data import make_samples, write_samples
from seal_peft.tasks import Sample

WINDOW = 1024


def save_model(folder: Path, weights: bool = True, **changes) -> Path:
    """Save a tiny Llama with its tokenizer; without weights, whoever tries to load the model fails."""
    tokenizer = tokenizers_.bpe(tokenizers_.CHATML)
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": WINDOW, "eos_token_id": tokenizer.eos_token_id}
    model = models.llama(**{**sizes, **changes})
    model.save_pretrained(folder) if weights else model.config.save_pretrained(folder)
    return folder


@functools.cache
def some_samples(split: str, length: int = 400, num_samples: int = 6, questions: int = 1) -> list[Sample]:
    return make_samples(
        "lines",
        tokenizer=tokenizers_.bpe(tokenizers_.CHATML),
        split=split,
        lengths=[length],
        num_samples=num_samples,
        questions_per_context=questions,
    )


def save_samples(path: Path, split: str = "train", **changes) -> Path:
    write_samples(path, some_samples(split, **changes))
    return path


def seal(*words: object) -> int:
    """Run `seal-peft` in this process and return its exit code."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def python(code: str, *words: object, environment: dict[str, str] | None = None, **options):
    """Run code in a fresh interpreter, which is as strict about warnings as this one is not."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


def run_script(script: Path, *words: object) -> None:
    """Run a script in this process as `python script words` would in its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(script.parent)
        patch.setattr(sys, "argv", [str(script), *map(str, words)])
        runpy.run_path(str(script), run_name="__main__")


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line in which a stage says what is wrong."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if "error: " in line]
    assert len(lines) == 1, printed
    assert printed.rstrip().endswith(lines[0])
    return lines[0]
