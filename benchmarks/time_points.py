"""From which point of a training on an accuracy is reached: what to ask for it, by bisection, and what follows."""

from __future__ import annotations

from statistics import mean
from typing import Any

REACHED = (0.90, 0.95)


def asked_next(known: dict[str, list[float]], steps: list[str]) -> str | None:
    """What answers next: the end in both wordings, then the middle of where an accuracy may lie, if any."""
    accuracies = [mean(known[step]) if step in known else None for step in steps]
    for name in ("reworded", steps[-1]):
        if name not in known:
            return name
    between = (_middle(accuracies, target) for target in REACHED)
    return next((steps[index] for index in between if index is not None), None)


def _middle(accuracies: list[float | None], target: float) -> int | None:
    """Index halfway from the last point known to be below a target to the first known after it; `None` if decided."""
    below = _last_below(accuracies, target)
    after = next((i for i in range(below + 1, len(accuracies)) if accuracies[i] is not None), below)
    return (below + after) // 2 if after - below > 1 else None


def _last_below(accuracies: list[float | None], target: float) -> int:
    return max((i for i, own in enumerate(accuracies) if own is not None and own < target), default=-1)


def reached(points: list[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The point after the last one that is known to be below a target."""
    return next(iter(points[_last_below([point["accuracy"] for point in points], target) + 1 :]), None)
