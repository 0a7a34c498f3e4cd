"""How answers are scored: small pure functions from a model's text and the accepted answers to a number in 0..1."""

from __future__ import annotations

import re
import string
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


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by RULER's rule for lists: the share of `answers` that stand in it, in any case of letters.

    Args:
        prediction: A model's answer.
        answers: Texts that are all asked for.
    """
    text = _ruler_text(prediction)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by RULER's rule for questions: 1.0 where one of `answers` stands in it, in any case of letters.

    Args:
        prediction: A model's answer.
        answers: Texts of which one is enough.
    """
    text = _ruler_text(prediction)
    return float(any(answer.lower() in text for answer in answers))


def _ruler_text(prediction: str) -> str:
    # As RULER prepares answers: control characters become line ends.
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()


def normalised_words(text: str) -> list[str]:
    """Words as SQuAD compares them: in lower case, without punctuation and articles.

    Args:
        text: An answer.
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by the words it shares with the most similar of `answers`, as in SQuAD and LongBench.

    Args:
        prediction: A model's answer.
        answers: Texts of which one is enough.

    Returns:
        The harmonic mean of the share of `prediction` that is right and the share of the answer that is there.
    """
    given = normalised_words(prediction)
    return max(_f1(given, normalised_words(answer)) for answer in answers)


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        # An answer such as "The" has no words left; then only the same emptiness is right.
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def first_line_match(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer of which every character counts, up to a final full stop.

    Args:
        prediction: A model's answer; only its first line that is not empty is read.
        answers: Texts of which one must be given.
    """
    lines = prediction.strip().splitlines()
    given = lines[0].strip().removesuffix(".") if lines else ""
    return float(given in {answer.removesuffix(".") for answer in answers})
