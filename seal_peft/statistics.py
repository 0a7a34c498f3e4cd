"""Honest numbers from few samples: means with intervals, paired differences, and tables of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from .tasks import Sample

_Z = 1.959964  # two-sided 95% of the normal distribution
_RESAMPLES = 2000

Interval = tuple[float, float, float]


def mean_interval(scores: Sequence[float]) -> Interval:
    """Return the mean of scores in [0, 1] and the ends of its 95% interval.

    Right-or-wrong scores get Wilson's interval, which stays sensible at 0% and 100%; graded scores a bootstrap one.

    Args:
        scores: One score per sample, at least one.
    """
    return _wilson(scores) if _right_or_wrong(scores) else _bootstrap(scores)


def paired_difference(scores: Sequence[float], base: Sequence[float]) -> Interval:
    """Return the mean difference to the base on the same samples, and the ends of its 95% interval.

    Right-or-wrong scores get Newcombe's interval for paired proportions (1998, method 10 without continuity
    correction), which does not shrink to a point where all samples agree; graded scores a bootstrap one.

    Raises:
        ValueError: The two do not have one score each for the same samples.
    """
    if len(scores) != len(base) or not scores:
        raise ValueError(f"Paired scores must have the same length, at least 1; got {len(scores)} and {len(base)}.")
    if _right_or_wrong(scores) and _right_or_wrong(base):
        return _newcombe(scores, base)
    return _bootstrap([a - b for a, b in zip(scores, base, strict=True)])


def summarise(samples: Sequence[Sample], scores: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Return means with intervals: over all samples by system (`systems`), and by task, length and depth (`cells`).

    Args:
        samples: What was asked.
        scores: One score per sample, by system.
        base: The system that the others are compared to, where it is among them.
    """
    groups = {(None, None, None): list(range(len(samples))), **_cells(samples)}
    systems: dict[str, Any] = {}
    cells: list[dict[str, Any]] = []
    for system in scores:
        for (task, length, depth), group in groups.items():
            own = [scores[system][index] for index in group]
            mean, low, high = mean_interval(own)
            summary: dict[str, Any] = {"accuracy": mean, "low": low, "high": high, "n": len(own)}
            if base in scores and system != base:
                difference, low, high = paired_difference(own, [scores[base][index] for index in group])
                summary["difference_to_base"] = {"mean": difference, "low": low, "high": high}
            if task is None:
                systems[system] = summary
            else:
                cells.append({"system": system, "task": task, "length": length, "depth": depth, **summary})
    return {"systems": systems, "cells": cells}


def _cells(samples: Sequence[Sample]) -> dict[tuple[str | None, int | None, float | None], list[int]]:
    """Indices of samples by task and length (depth `None`), and by depth too where several samples share one."""
    groups: dict[tuple[str | None, int | None, float | None], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.task, sample.length, None].append(index)
    for (task, length, _), group in list(groups.items()):
        if len({samples[index].depth for index in group}) < len(group):
            for index in group:
                if samples[index].depth is not None:
                    groups[task, length, samples[index].depth].append(index)
    return groups


def _right_or_wrong(scores: Sequence[float]) -> bool:
    return all(score in (0.0, 1.0) for score in scores)


def _wilson(scores: Sequence[float]) -> Interval:
    n = len(scores)
    mean = sum(scores) / n
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    # Rounding must not push the interval over its mean, or out of [0, 1].
    return mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def _newcombe(scores: Sequence[float], base: Sequence[float]) -> Interval:
    (p, low_p, high_p), (q, low_q, high_q) = _wilson(scores), _wilson(base)
    both = sum(a * b for a, b in zip(scores, base, strict=True)) / len(scores)
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    correlation = (both - p * q) / spread if spread else 0.0
    down, up = (p - low_p, high_q - q), (high_p - p, q - low_q)
    below, above = (math.sqrt(max(0.0, a**2 - 2 * correlation * a * b + b**2)) for a, b in (down, up))
    return p - q, max(-1.0, p - q - below), min(1.0, p - q + above)


def _bootstrap(values: Sequence[float]) -> Interval:
    mean = math.fsum(values) / len(values)
    # A generator of its own: the interval of given values must not change from run to run.
    picks = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = torch.tensor(values, dtype=torch.float64)[picks].mean(dim=1).sort().values
    cut = int(0.025 * _RESAMPLES)
    return mean, min(mean, means[cut].item()), max(mean, means[-cut - 1].item())
