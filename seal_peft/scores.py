"""From answered and scored rows to the numbers of `metrics.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .guard import Guard, summarise_guard
from .statistics import summarise
from .systems import BASE, System
from .tasks import Sample, get_task

# What samples say of themselves that a reader of scores must know: whose words they are in, what their facts hide in.
LABELS = ("wording", "haystack")


def compute_metrics(
    samples: list[Sample],
    guard: Guard,
    systems: Sequence[System],
    rows: Mapping[str, list[dict[str, Any]]],
    threshold: float,
) -> dict[str, Any]:
    """Summarise the rows of every system, each beside those of the base.

    Args:
        samples: What was asked.
        guard: What was asked beside them.
        systems: What answered.
        rows: By name of the system a row for each of `samples`, then one for each sample of the guard, and, if it
            has essays, a last one with its `losses` on them.
        threshold: Mean score that a length must reach to count as effective.

    Returns:
        Scores by system and cell; further rules, guard and labels of the samples where there are any.
    """
    cut, asked = len(samples), len(samples) + len(guard.samples)
    scores = {name: [row["score"] for row in own[:asked]] for name, own in rows.items()}
    metrics = summarise(samples, {name: own[:cut] for name, own in scores.items()}, BASE, threshold)
    if more := _more_scores(samples, rows):
        metrics["more_scores"] = more
    if guard.essays:
        losses = {name: own[-1]["losses"] for name, own in rows.items()}
        essays = {system.name: guard.essays[system.model] for system in systems}
        short_scores = {name: own[cut:] for name, own in scores.items()}
        metrics["guard"] = summarise_guard(losses, essays, guard.samples, short_scores, BASE)
    return metrics | {label: _by_task(samples, label) for label in LABELS}


def _more_scores(samples: list[Sample], rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Results by the further rules of a task, as `systems` has them by its own: by task and name of the rule."""
    found: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(sample.task for sample in samples):
        places = [index for index, sample in enumerate(samples) if sample.task == task]
        for rule in get_task(task).more_scores:
            scores = {system: [own[index][rule] for index in places] for system, own in rows.items()}
            found.setdefault(task, {})[rule] = summarise([samples[i] for i in places], scores, BASE)["systems"]
    return found


def _by_task(samples: list[Sample], label: str) -> dict[str, list[str]]:
    """What the samples of a task say under one of `LABELS`, for tasks that have it."""
    found: dict[str, set[str]] = {}
    for sample in samples:
        if label in sample.meta:
            found.setdefault(sample.task, set()).add(str(sample.meta[label]))
    return {task: sorted(own) for task, own in found.items()}
