"""Threads through the context: A leads to B, B leads to C, C leads to D; the question names A and asks for the end.

The links of a thread are spread through plain sentences in any order, and larger contexts hold links of threads that
nobody asks about. The score is how far along its thread an answer came.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

from .parts import check_arguments, hide, new_sample, new_uuid
from .sample import Sample
from .vocabulary import noise

NAME = "uuid_chain"
HOPS = 3
# So many plain sentences for one link of a thread that nobody asks about.
_SENTENCES_PER_LINK = 12

_HEADER = (
    "In the following text some codes lead to other codes. From a first code one can follow the links, one after the "
    "other, up to a code that leads no further. The links stand in any order."
)
_LINK = "The code {start} leads to the code {end}."
_FIRST_QUESTION = (
    "The text ends here. Start at the code {start} and follow the links to the end. Give every code that you reach, "
    "in order."
)
_NEXT_QUESTION = "Do the same from the code {start}."


def make(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """Lay one thread of `HOPS` links for each question.

    Args:
        seed: Decides everything random.
        size: Sentences around the threads; some are links of other threads. Size + 1 adds one at the end.
        depth: Place of the link that ends the thread asked last: the share of the text before it, to the nearest end
            of a sentence. All other links are spread at random.
        split: `"train"` or `"test"`; they share no code and no sentence.
        questions: Number of questions, one thread each.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("sentences", size=size, depth=depth, split=split, questions=questions)
    rng = Random(f"{NAME}/threads/{seed}")
    needles: list[tuple[float, str]] = []
    turns: list[tuple[str, str]] = []
    for _ in range(questions):
        codes = [new_uuid(rng, split) for _ in range(HOPS + 1)]
        needles += [(rng.random(), link) for link in _links(codes)]
        question = _NEXT_QUESTION if turns else _FIRST_QUESTION
        turns.append((question.format(start=codes[0]), f"The links lead to {', then '.join(codes[1:])}."))
    needles[-1] = (depth, needles[-1][1])
    sentences = list(islice(_text(Random(f"{NAME}/text/{seed}"), split), size))
    return new_sample(
        NAME,
        f"{_HEADER}\n\n{' '.join(hide(needles, sentences))}",
        turns,
        codes[1:],
        seed=seed,
        size=size,
        depth=depth,
        split=split,
        questions=questions,
    )


def _links(codes: list[str]) -> list[str]:
    return [_LINK.format(start=start, end=end) for start, end in zip(codes, codes[1:], strict=False)]


def _text(rng: Random, split: str) -> Iterator[str]:
    """Plain sentences with links of other threads among them."""
    sentences = noise(rng, split)
    # Links are long. If they came at the same sizes for every seed, some lengths could not be filled.
    yield from islice(sentences, rng.randint(0, _SENTENCES_PER_LINK))
    while True:
        for link in _links([new_uuid(rng, split) for _ in range(HOPS + 1)]):
            yield link
            yield from islice(sentences, _SENTENCES_PER_LINK)
