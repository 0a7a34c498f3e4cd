"""Parts that several tasks are made of: argument checks, pools cut in two, UUIDs, places to ask at."""

from __future__ import annotations

import uuid
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from random import Random

from .sample import SPLITS, Sample


def check_arguments(unit: str, *, size: int, depth: float, split: str, questions: int) -> None:
    """Refuse arguments of `MakeSample` that are out of range.

    Args:
        unit: What `size` counts, in the plural.
        size: As in `MakeSample`, and so are all others.
        depth: Place of the fact asked last.
        split: One of `SPLITS`.
        questions: Number of questions.

    Raises:
        ValueError: The message names the argument, what is allowed and what to do.
    """
    if questions < 1:
        raise ValueError(f"questions={questions} was given, but a context is asked at least 1 question.")
    if size < questions:
        raise ValueError(
            f"size={size} {unit} cannot answer questions={questions}: each question asks for something else. "
            f"Use a size of at least {questions}, or fewer questions."
        )
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth={depth} was given; use a number from 0.0 (start) to 1.0 (end).")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} was given; use one of {', '.join(SPLITS)}.")


def check_questions(task: str, questions: int, most: int) -> None:
    """Refuse more questions about one context than a task has.

    Args:
        task: Name of the task.
        questions: Number of questions.
        most: How many the task has.

    Raises:
        ValueError: The message names the limit.
    """
    if questions > most:
        raise ValueError(
            f"questions={questions} was given, but {task} has no more than {most} for one context. "
            f"Use questions_per_context={most}, or another task."
        )


def half(items: Iterable[str], split: str) -> tuple[str, ...]:
    """The part of a pool that belongs to a split.

    A hash decides, not a shuffle, so that an item stays on its side when the pool changes.

    Args:
        items: The whole pool.
        split: One of `SPLITS`.

    Returns:
        The items of the split, in their order.
    """
    return tuple(item for item in items if belongs(item, split))


def new_uuid(rng: Random, split: str) -> str:
    """A random UUID (version 4) of a split; no UUID belongs to both.

    Args:
        rng: Decides which.
        split: One of `SPLITS`.
    """
    while True:
        text = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if belongs(text, split):
            return text


def new_number(rng: Random, split: str, first: int, last: int) -> str:
    """A random whole number of a split in decimal; no number belongs to both.

    Args:
        rng: Decides which.
        split: One of `SPLITS`.
        first: Smallest number.
        last: Greatest number.
    """
    while True:
        text = str(rng.randint(first, last))
        if belongs(text, split):
            return text


def belongs(item: str, split: str) -> bool:
    """Whether an item is on a split's side. About half of all are.

    Args:
        item: A word, name or title.
        split: One of `SPLITS`.
    """
    return zlib.crc32(item.encode()) % len(SPLITS) == SPLITS.index(split)


def asked_places(rng: Random, size: int, target: int, questions: int) -> list[int]:
    """Which entries of a list are asked, in the order of asking: the last is `target`, the others are random.

    Args:
        rng: Decides the others.
        size: Entries of the list.
        target: Index of the entry asked last.
        questions: How many entries to ask, at most `size`.
    """
    others: list[int] = []
    while len(others) < questions - 1:
        # Places are drawn as fractions: the same seed asks about the same regions at every size.
        place = int(rng.random() * size)
        while place == target or place in others:
            place = (place + 1) % size
        others.append(place)
    return [*others, target]


def new_sample(
    name: str,
    context: str,
    turns: Sequence[tuple[str, str]],
    answers: Sequence[str],
    *,
    seed: int,
    size: int,
    depth: float,
    split: str,
    questions: int,
) -> Sample:
    """A chat about one context. `length` stays 0 for the one who fits the sample to a length in tokens.

    Args:
        name: Name of the task.
        context: What stands before the first question.
        turns: Question and answer of every turn.
        answers: Accepted answers to the last question.
        seed: As in `MakeSample`, and so are the others.
        size: Units of context.
        depth: Place of the fact asked last.
        split: One of `SPLITS`.
        questions: Number of questions.

    Returns:
        The sample, its `messages` and `target` filled from the turns.
    """
    messages: list[dict[str, str]] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question if messages else f"{context}\n\n{question}"})
        messages.append({"role": "assistant", "content": answer})
    return Sample(
        id=f"{name}-{split}-{seed}",
        task=name,
        length=0,
        depth=depth,
        messages=messages[:-1],
        target=turns[-1][1],
        answers=list(answers),
        seed=seed,
        meta={"size": size, "split": split, "questions": questions},
    )


def hide(needles: Iterable[tuple[float, str]], haystack: Sequence[str]) -> list[str]:
    """Put needles between the units of a haystack.

    Args:
        needles: Depth and text of each. The depth is the share of the haystack's characters before the needle, to the
            nearest border between units. Needles at one border keep the order of their depths.
        haystack: Sentences or other units.

    Returns:
        The units with the needles among them.
    """
    borders = [0, *accumulate(len(unit) for unit in haystack)]
    result: list[str] = []
    done = 0
    for depth, needle in sorted(needles, key=lambda pair: pair[0]):
        place = depth * borders[-1]
        after = min(bisect_left(borders, place), len(haystack))
        nearest = after if after == 0 or borders[after] - place < place - borders[after - 1] else after - 1
        result += [*haystack[done:nearest], needle]
        done = nearest
    return [*result, *haystack[done:]]
