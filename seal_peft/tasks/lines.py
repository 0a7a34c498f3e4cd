"""Line retrieval, the task of LongEval: find one numbered line in a long register of lines like it.

Every line has LongEval's form, `line KEY: REGISTER_CONTENT is <N>`, with an adjective-noun key and N in 1..50000; the
sentences around the lines are our own. What LongEval lacks is here: a seed, the asked line at a chosen depth, distinct
keys at any size, disjoint keys and numbers for training and testing, and several questions about one register.
"""

from __future__ import annotations

from functools import cache
from random import Random

from wonderwords import RandomWord

from .parts import asked_places, check_arguments, half, new_number, new_sample
from .sample import Sample

NAME = "lines"
MAX_VALUE = 50_000

_HEADER = (
    "Here is a register, one entry per line. Each entry starts with the name of its line and ends with a number, the "
    "<REGISTER_CONTENT> of that line. Keep every name together with its number: after the last entry you will be "
    "asked about some of them."
)
_FIRST_QUESTION = "The register ends here. Which number is the <REGISTER_CONTENT> in line {key}? Give the number."
_NEXT_QUESTION = "And the <REGISTER_CONTENT> in line {key}?"
_ANSWER = "The <REGISTER_CONTENT> in line {key} is {value}."


def make(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """Build one register with its questions.

    With one seed, the register of `size + 1` lines is the register of `size` lines and one more, so that the number of
    tokens grows with `size`. All keys differ. The numbers of a register differ as well, up to some 25,000 lines: a
    right number cannot come from a wrong line.

    Args:
        seed: Decides keys, numbers and which other lines are asked.
        size: Number of lines.
        depth: Place of the line asked last, from 0.0 (first line) to 1.0 (last line).
        split: `"train"` or `"test"`; no key and no number of one ever occurs in the other.
        questions: Number K of different lines asked, one a turn; the first K - 1 are answered in `messages`.

    Returns:
        The sample, with `id` and `length` still to be set by the one who fits it to a length in tokens.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("lines", size=size, depth=depth, split=split, questions=questions)
    entries = _entries(seed, size, split)
    asked = asked_places(Random(f"{NAME}/questions/{seed}"), size, round(depth * (size - 1)), questions)

    register = "\n".join(f"line {key}: REGISTER_CONTENT is <{value}>" for key, value in entries)
    turns: list[tuple[str, str]] = []
    for place in asked:
        key, value = entries[place]
        question = _NEXT_QUESTION if turns else _FIRST_QUESTION
        turns.append((question.format(key=key), _ANSWER.format(key=key, value=value)))
    return new_sample(
        NAME,
        f"{_HEADER}\n\n{register}",
        turns,
        [str(entries[asked[-1]][1])],
        seed=seed,
        size=size,
        depth=depth,
        split=split,
        questions=questions,
    )


def _entries(seed: int, size: int, split: str) -> list[tuple[str, int]]:
    """The first `size` entries (key, number) of the endless register that a seed stands for."""
    adjectives, nouns = _words(split)
    if size > len(adjectives) * len(nouns):
        raise ValueError(
            f"size={size} lines was given, but there are {len(adjectives) * len(nouns)} different keys for "
            f"{split!r}. Use fewer lines."
        )
    rng = Random(f"{NAME}/entries/{seed}")
    keys: set[str] = set()
    values: set[int] = set()
    entries = []
    for _ in range(size):
        key = _new_key(rng, adjectives, nouns)
        while key in keys:
            key = _new_key(rng, adjectives, nouns)
        if len(values) == _num_values(split):
            values.clear()
        value = int(new_number(rng, split, 1, MAX_VALUE))
        while value in values:
            value = int(new_number(rng, split, 1, MAX_VALUE))
        keys.add(key)
        values.add(value)
        entries.append((key, value))
    return entries


def _new_key(rng: Random, adjectives: tuple[str, ...], nouns: tuple[str, ...]) -> str:
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


@cache
def _num_values(split: str) -> int:
    return len(half(map(str, range(1, MAX_VALUE + 1)), split))


@cache
def _words(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Adjectives, and the half of the nouns that belongs to a split."""
    words = RandomWord()
    # Plain lower-case words only: with an inner hyphen two different pairs could give one key.
    adjectives = sorted(set(words.filter(include_categories=["adjective"], regex="[a-z]+")))
    nouns = sorted(set(words.filter(include_categories=["noun"], regex="[a-z]+")))
    return tuple(adjectives), half(nouns, split)
