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

# What Llama-2-7B-chat reaches at 4K tokens, which RULER takes as the bar for "it can use this length".
RULER_THRESHOLD = 0.856
MEAN_OF_TASKS = "mean of tasks"

Interval = tuple[float, float, float]


def mean_interval(scores: Sequence[float]) -> Interval:
    """Return the mean of scores in [0, 1] and the ends of its 95% interval.

    Right-or-wrong scores get Wilson's interval, which stays sensible at 0% and 100%; graded scores a bootstrap one.

    Args:
        scores: One score per sample, at least one.
    """
    return _wilson(scores) if _right_or_wrong(scores) else _bounded_bootstrap(scores, lowest=0.0)


def paired_difference(scores: Sequence[float], base: Sequence[float]) -> Interval:
    """Return the mean difference to the base on the same samples, and the ends of its 95% bootstrap interval.

    Samples are drawn with both their scores, so what makes a sample hard for both systems does not widen it.

    Args:
        scores: One score in [0, 1] per sample.
        base: The scores of the other system, in the same order.

    Raises:
        ValueError: The two do not have one score each for the same samples.
    """
    if len(scores) != len(base) or not scores:
        raise ValueError(f"Paired scores must have the same length, at least 1; got {len(scores)} and {len(base)}.")
    return _bounded_bootstrap([a - b for a, b in zip(scores, base, strict=True)], lowest=-1.0)


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and the ends of its 95% percentile bootstrap interval.

    Args:
        values: One number per sample, at least one.
    """
    mean = math.fsum(values) / len(values)
    # A generator of its own: the interval of given values must not change from run to run.
    picks = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = torch.tensor(values, dtype=torch.float64)[picks].mean(dim=1).sort().values
    cut = int(0.025 * _RESAMPLES)
    return mean, min(mean, means[cut].item()), max(mean, means[-cut - 1].item())


def sign_test(scores: Sequence[float], base: Sequence[float]) -> float:
    """Return the two-sided p-value of "neither is better", from the samples on which the two differ.

    It is exact (binomial). For right-or-wrong scores this is McNemar's test.

    Args:
        scores: One score per sample.
        base: The scores of the other system, in the same order.
    """
    better = sum(a > b for a, b in zip(scores, base, strict=True))
    worse = sum(a < b for a, b in zip(scores, base, strict=True))
    differing = better + worse
    tail = sum(math.comb(differing, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**differing)


def summarise(
    samples: Sequence[Sample], scores: dict[str, list[float]], base: str, threshold: float = RULER_THRESHOLD
) -> dict[str, Any]:
    """Return means with intervals: over all samples by system (`systems`), and by task, length and depth (`cells`).

    Every system that is compared gets the paired difference to the base, its interval and the p-value of `sign_test`.

    Args:
        samples: What was asked.
        scores: One score per sample, by system.
        base: The system that the others are compared to, where it is among them.
        threshold: Mean score that a length must reach to count for `effective_lengths`.
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
                theirs = [scores[base][index] for index in group]
                difference, low, high = paired_difference(own, theirs)
                p_value = sign_test(own, theirs)
                summary["difference_to_base"] = {"mean": difference, "low": low, "high": high, "p_value": p_value}
            if task is None:
                systems[system] = summary
            else:
                cells.append({"system": system, "task": task, "length": length, "depth": depth, **summary})
    reached = {name: effective_lengths([c for c in cells if c["system"] == name], threshold) for name in scores}
    return {"systems": systems, "cells": cells, "effective_lengths": {"threshold": threshold, "systems": reached}}


def effective_lengths(cells: Sequence[dict[str, Any]], threshold: float) -> dict[str, int | None]:
    """Return by task the greatest length whose mean score is at least `threshold`; `None` where there is none.

    With several tasks, `MEAN_OF_TASKS` is added, as RULER reports it: over the lengths that all of them have.

    Args:
        cells: Cells of one system.
        threshold: Score from 0.0 to 1.0.
    """
    means: dict[str, dict[int, float]] = defaultdict(dict)
    for cell in cells:
        if cell["depth"] is None:
            means[cell["task"]][cell["length"]] = cell["accuracy"]
    if len(means) > 1:
        shared = set.intersection(*(set(own) for own in means.values()))
        means[MEAN_OF_TASKS] = {
            length: math.fsum(own[length] for own in means.values()) / len(means) for length in shared
        }
    # A mean of 0.856 may come out a rounding error below the number that was typed.
    reached = {name: [n for n, mean in own.items() if mean >= threshold - 1e-9] for name, own in means.items()}
    return {name: max(lengths, default=None) for name, lengths in reached.items()}


def label_of(metrics: dict[str, Any], task: str) -> str:
    """Return the name of a task in tables and pictures, which says where its words are ours and not a benchmark's."""
    return f"{task} (own wording)" if "own" in metrics.get("wording", {}).get(task, ()) else task


def _cells(samples: Sequence[Sample]) -> dict[tuple[str | None, int | None, float | None], list[int]]:
    """Indices of samples by task and length (depth `None`), and by task, length and depth.

    Depths that were given recur, and each is a group. Random ones hardly recur; they are grouped into fifths of the
    context, named by their middles.
    """
    groups: dict[tuple[str | None, int | None, float | None], list[int]] = defaultdict(list)
    depths: dict[str, list[float]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.task, sample.length, None].append(index)
        if sample.depth is not None:
            depths[sample.task].append(sample.depth)
    random = {task: 2 * len(set(own)) > len(own) for task, own in depths.items()}
    for index, sample in enumerate(samples):
        if sample.depth is not None:
            depth = (min(4, int(5 * sample.depth)) + 0.5) / 5 if random[sample.task] else sample.depth
            groups[sample.task, sample.length, depth].append(index)
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


def _bounded_bootstrap(values: Sequence[float], lowest: float) -> Interval:
    """Bootstrap values between `lowest` and 1.

    Where all are equal, drawing from them would give a point, as if there were no doubt. Then the ends are what no
    exception among so many leaves possible: the share of exceptions has an exact bound, and they may lie anywhere.
    """
    mean, low, high = bootstrap_interval(values)
    if max(values) - min(values) > 1e-9:
        return mean, low, high
    share = 1 - 0.025 ** (1 / len(values))
    return mean, mean - share * (mean - lowest), mean + share * (1.0 - mean)
