"""Where a number comes from: command, versions, device, date and commit, for every file that holds results.

A copy of the tree without its git history does not know its commit: tell it by the environment variable
`SEAL_PEFT_COMMIT`, as `git rev-parse HEAD` prints it where the copy was made.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


def provenance() -> dict[str, Any]:
    """Return what a reader needs to repeat a run, as JSON values."""
    program = Path(sys.argv[0])
    ours = program.name == "seal-peft" or program.parts[-2:] == ("seal_peft", "__main__.py")
    return {
        "command": shlex.join(["seal-peft" if ours else str(program), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "seal-peft": __version__}
        | {name: _version(name) for name in _PACKAGES},
        "device": device_name(),
    }


def source_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the provenance of results that other calls had a part in, on other machines or with other commits.

    Args:
        records: What these calls wrote, each with its own provenance.
    """
    records = list(records)

    def found(values: Iterable[Any]) -> Any:
        kinds = list(dict.fromkeys(values))
        return kinds[0] if len(kinds) == 1 else ", ".join(sorted(map(str, kinds)))

    versions = {name: found(own["versions"][name] for own in records) for name in records[0]["versions"]}
    sources = {name: found(own[name] for own in records) for name in ("device", "commit")}
    return {**provenance(), **sources, "versions": versions}


def device_name() -> str:
    """Return the name of the GPU, or the number of CPU threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree, marked `-dirty` if it has changes; without git the one that the environment tells."""
    file = Path(__file__)
    try:
        # An environment may lie inside the tree of another project, whose commit says nothing about this file.
        _git(file, "ls-files", "--error-unmatch", file.name)
        return _git(file, "rev-parse", "HEAD") + ("-dirty" if _git(file, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SEAL_PEFT_COMMIT") or None


def _git(file: Path, *words: str) -> str:
    command = ["git", "-C", str(file.parent), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
