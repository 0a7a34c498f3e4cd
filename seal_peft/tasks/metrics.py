"""How answers are scored: small pure functions from a model's text and the accepted answers to a number in 0..1."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Longer runs of digits are babble, and Python refuses to convert very long ones.
_MAX_DIGITS = 1000


def last_integer(text: str) -> int | None:
    """Read the last run of decimal digits, the rule of LongEval.

    Signs and thousands separators are not part of a run: `"12,345"` reads as 345, as it does there.

    Args:
        text: A model's answer.

    Returns:
        The number, or `None` where the text holds none.
    """
    runs = re.findall(r"[0-9]+", text)
    if not runs or len(runs[-1]) > _MAX_DIGITS:
        return None
    return int(runs[-1])


def last_integer_match(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by its last integer.

    Args:
        prediction: A model's answer.
        answers: Accepted answers, each the decimal text of an integer.

    Returns:
        1.0 where the last integer of `prediction` equals one of `answers`, else 0.0.
    """
    number = last_integer(prediction)
    return float(number is not None and number in {int(answer) for answer in answers})
