"""Passkey retrieval: a number among plain sentences that say nothing.

The form is the well-known one; the words are our own. A number stands in the context once, and every key belongs to a
named place, so that several can be asked about one context.
"""

from __future__ import annotations

from itertools import islice
from random import Random

from .parts import check_arguments, hide, new_sample
from .sample import Sample
from .vocabulary import Deck, noise

NAME = "passkey"

_HEADER = (
    "Somewhere in the following text a pass key is given away. The rest is of no importance. Find the pass key and "
    "keep it in mind: you will be asked for it."
)
_FIRST_QUESTION = "The text ends here. What is the pass key to the {place}?"
_NEXT_QUESTION = "And the pass key to the {place}?"
# The text gives it away in the words of the answer.
_NEEDLE = "The pass key to the {place} is {key}."


def make(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """Hide one pass key for each question.

    Args:
        seed: Decides everything random.
        size: Sentences around the pass keys. Size + 1 adds one at the end.
        depth: Place of the pass key asked last: the share of the text before it, to the nearest end of a sentence.
            The others are spread at random.
        split: `"train"` or `"test"`; they share no pass key, place or sentence.
        questions: Number of questions, one pass key each.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("sentences", size=size, depth=depth, split=split, questions=questions)
    rng = Random(f"{NAME}/keys/{seed}")
    deck = Deck(rng, split)
    needles: list[tuple[float, str]] = []
    turns: list[tuple[str, str]] = []
    for question in range(questions):
        names = {"place": deck.draw("place"), "key": deck.draw("number")}
        needles.append((rng.random() if question < questions - 1 else depth, _NEEDLE.format(**names)))
        asking = _NEXT_QUESTION if turns else _FIRST_QUESTION
        turns.append((asking.format(**names), _NEEDLE.format(**names)))
    sentences = list(islice(noise(Random(f"{NAME}/text/{seed}"), split), size))
    return new_sample(
        NAME,
        f"{_HEADER}\n\n{' '.join(hide(needles, sentences))}",
        turns,
        [names["key"]],
        seed=seed,
        size=size,
        depth=depth,
        split=split,
        questions=questions,
    )
