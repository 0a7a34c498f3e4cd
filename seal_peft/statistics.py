"""Honest numbers from few samples: means with intervals, and paired differences."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

_Z = 1.959964  # two-sided 95% of the normal distribution
_RESAMPLES = 2000


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of scores in [0, 1] with a 95% interval.

    Right-or-wrong scores get Wilson's interval, which stays sensible at 0% and 100%; graded scores a bootstrap one.

    Args:
        scores: One score per sample, at least one.
    """
    mean = sum(scores) / len(scores)
    if all(score in (0.0, 1.0) for score in scores):
        return (mean, *_wilson(mean, len(scores)))
    return (mean, *_bootstrap(scores))


def paired_difference(scores: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference to the base on the same samples, with a 95% bootstrap interval over samples.

    Raises:
        ValueError: The two do not have one score each for the same samples.
    """
    if len(scores) != len(base) or not scores:
        raise ValueError(f"Paired scores must have the same length, at least 1; got {len(scores)} and {len(base)}.")
    differences = [a - b for a, b in zip(scores, base, strict=True)]
    return (sum(differences) / len(differences), *_bootstrap(differences))


def _wilson(mean: float, n: int) -> tuple[float, float]:
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    rng = random.Random(0)  # the interval of given values must not change from run to run
    n = len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(_RESAMPLES))
    return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]
