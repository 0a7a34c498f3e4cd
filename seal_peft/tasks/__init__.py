"""What is asked: long-context tasks as pure functions of (seed, size, depth). No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import lines, metrics
from .sample import SPLITS, MakeSample, Sample

__all__ = ["SPLITS", "TASKS", "MakeSample", "Sample", "Task", "get_task"]


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    Attributes:
        name: Name in files and on the command line.
        make: Builds a sample of a given size.
        score: Score, 0.0 to 1.0, of a model's answer against the accepted answers.
        max_new_tokens: Longest answer that evaluation lets a model generate.
        description: One line for `--help` and reports.
    """

    name: str
    make: MakeSample
    score: Callable[[str, Sequence[str]], float]
    max_new_tokens: int
    description: str


TASKS: dict[str, Task] = {
    lines.NAME: Task(
        name=lines.NAME,
        make=lines.make,
        score=metrics.last_integer_match,
        max_new_tokens=64,
        description="LongEval line retrieval: give the number of one named line. Score: the answer's last integer.",
    ),
}


def get_task(name: str) -> Task:
    """Look up a task.

    Args:
        name: A key of `TASKS`.

    Raises:
        ValueError: If no task has this name.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}. Known tasks: {', '.join(sorted(TASKS))}.")
    return TASKS[name]
