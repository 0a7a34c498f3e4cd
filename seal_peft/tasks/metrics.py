"""How answers are scored: small pure functions from a model's text and the accepted answers to a number in 0..1."""

from __future__ import annotations

import re
from collections import Counter
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


def share_of_answers(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer that must name several things, or one.

    A thing is named where it stands as whole words, in any case and any spacing: 123 is not named by 1234.

    Args:
        prediction: A model's answer.
        answers: What it must name.

    Returns:
        The share of `answers` that `prediction` names.
    """
    return sum(_names(prediction, answer) for answer in answers) / len(answers)


def furthest_answer(prediction: str, answers: Sequence[str]) -> float:
    """Score how far an answer came along a chain, by the furthest stop that it names.

    Args:
        prediction: A model's answer.
        answers: The stops, in order; the last is the one asked for.

    Returns:
        Number of that stop, counted from 1, divided by the number of stops; 0.0 where it names none.
    """
    return max((index for index, stop in enumerate(answers, 1) if _names(prediction, stop)), default=0) / len(answers)


def word_recall(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-1 recall: the share of the answers' words that a prediction holds, each as often as it stands there.

    Words are runs of ASCII letters and digits in lower case, as in `rouge_score` without a stemmer.

    Args:
        prediction: A model's answer.
        answers: The reference; the texts count as one.
    """
    wanted = Counter(re.findall(r"[a-z0-9]+", " ".join(answers).lower()))
    found = wanted & Counter(re.findall(r"[a-z0-9]+", prediction.lower()))
    return found.total() / wanted.total() if wanted else 0.0


def _names(text: str, thing: str) -> bool:
    spaced = r"\s+".join(re.escape(word) for word in thing.split())
    return re.search(rf"(?<!\w){spaced}(?!\w)", text, re.IGNORECASE) is not None


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
