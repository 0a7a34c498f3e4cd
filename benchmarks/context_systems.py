"""What benchmarks/context.py compares: context extensions alone, under SEAL-C, and under SEAL-C with temperatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXTENSIONS: dict[str, dict[str, dict[str, Any]]] = {
    # The model's own rotation, only told that it may go on.
    "base": {"rope_parameters": {"rope_type": "default", "max_position_embeddings": 32768}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    "ntk": {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}},
    # What `seal-peft advise` names for 32K: factor 4 reaches less.
    "ntk8.75": {"rope_parameters": {"rope_type": "ntk", "factor": 8.75}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "self-extend": {"self_extend": {"group_size": 8, "window": 1024}},
}
METHODS = {"": [], "+seal-c": ["output"], "+seal-c+temperature": ["output", "query"]}
SYSTEMS = {extension + method: (extension, method) for extension in EXTENSIONS for method in METHODS}


def is_trained(system: str) -> bool:
    """Whether a system has scales."""
    return bool(METHODS[SYSTEMS[system][1]])


def adapter_is_there(folder: Path, system: str) -> bool:
    """Whether a system's adapter is finished: what is written last is there."""
    return (folder / ("run.json" if is_trained(system) else "adapter_config.json")).is_file()


def by_cost(job: tuple[str, str]) -> tuple[bool, bool]:
    """Sort key of a task and system: long jobs begin first, so that no worker ends long after the others."""
    extension, _ = SYSTEMS[job[1]]
    # Self-Extend computes more, and under dynamic RoPE prompts are asked one by one.
    return not is_trained(job[1]), extension not in ("self-extend", "dynamic")
