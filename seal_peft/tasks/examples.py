"""More samples like some given ones: their facts, questions and answers word for word, hidden in text of any length.

An example is a short sample: paragraphs that say something, and the question as the last one. The others are hidden in
essays (plain sentences of our own where those are not installed), in their order, the first one at the asked depth.
Nothing is reworded and no value is invented: only the author knows what else would be true. Examples 1, 3, 5, ... are
for training, 2, 4, 6, ... for testing, so no example and no fact is in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from .haystacks import prose
from .metrics import share_of_answers
from .parts import check_arguments, check_questions, hide
from .sample import SPLITS, Sample


@dataclass(frozen=True)
class Example:
    """A sample, taken apart.

    Attributes:
        sample: The sample as it was given.
        system: Its system turn, if it has one.
        facts: Paragraphs of the user's turn before the question.
        question: The last paragraph.
    """

    sample: Sample
    system: tuple[str, ...]
    facts: tuple[str, ...]
    question: str


def take_apart(samples: Sequence[Sample]) -> list[Example]:
    """Find facts and question of each sample.

    Args:
        samples: Examples in the order of their file, one a line.

    Raises:
        ValueError: If there are fewer than two, one has not the form of an example, or a fact would be in both
            splits; the message names line and field.
    """
    if len(samples) < len(SPLITS):
        raise ValueError(f"examples given: {len(samples)}; use at least 2: one to train with, one to test with.")
    examples: list[Example] = []
    lines: dict[str, int] = {}
    for line, sample in enumerate(samples, start=1):
        roles = [turn["role"] for turn in sample.messages]
        if roles not in (["user"], ["system", "user"]):
            raise ValueError(f"line {line}: Field 'messages' of an example is one user turn, not {', '.join(roles)}.")
        *system, user = (turn["content"] for turn in sample.messages)
        *facts, question = [part.strip() for part in user.split("\n\n") if part.strip()] or [""]
        if not facts:
            raise ValueError(
                f"line {line}: Field 'messages' must hold the facts, an empty line, and then the question; there is "
                f"no empty line in {user!r:.80}."
            )
        for fact in facts:
            first = lines.setdefault(fact, line)
            if (line - first) % len(SPLITS):
                raise ValueError(
                    f"line {line}: Field 'messages': {fact!r:.80} stands in line {first}, too, and one of the two is "
                    "for training, the other for testing. Tell a fact once, and put instructions into a system turn."
                )
        examples.append(Example(sample, tuple(system), tuple(facts), question))
    return examples


def make(
    examples: Sequence[Example], *, seed: int, size: int, depth: float, split: str = "test", questions: int = 1
) -> Sample:
    """Hide the facts of as many examples as there are questions.

    Args:
        examples: What `take_apart` returned.
        seed: Decides which examples, and the text around them.
        size: Sentences around the facts.
        depth: Place of the first fact of the example asked last; its others follow evenly to the end.
        split: `"train"` or `"test"`.
        questions: Number of questions, one example each.

    Raises:
        ValueError: If an argument is out of range, or the split has not so many examples with different questions.
    """
    check_arguments("sentences", size=size, depth=depth, split=split, questions=questions)
    rng = Random(f"examples/{seed}")
    own = list(examples[SPLITS.index(split) :: len(SPLITS)])
    asked = [rng.choice(own)]
    for example in rng.sample(own, len(own)):
        # The same question about two facts has no right answer, and a conversation has one system turn.
        if example.question not in {e.question for e in asked} and example.system == asked[0].system:
            asked.insert(0, example)
    check_questions("this split of the file", questions, most=len(asked))
    asked = asked[len(asked) - questions :]

    needles = []
    for example in asked:
        first = depth if example is asked[-1] else rng.random()
        step = (1.0 - first) / len(example.facts)
        needles += [(first + index * step, fact) for index, fact in enumerate(example.facts)]
    answers = [answer for example in asked for answer in example.sample.answers]
    text = prose(split)
    start = rng.randrange(len(text.sentences))
    stream = (text.sentences[(start + n) % len(text.sentences)] for n in range(2 * size + len(text.sentences)))
    haystack = list(islice((sentence for sentence in stream if not share_of_answers(sentence, answers)), size))

    messages = [{"role": "system", "content": content} for content in asked[-1].system]
    context = " ".join(hide(needles, haystack))
    for number, example in enumerate(asked):
        content = example.question if number else f"{context}\n\n{example.question}"
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": example.sample.target})
    meta = {"size": size, "split": split, "questions": questions, "haystack": text.source}
    return replace(
        asked[-1].sample,
        length=0,
        depth=depth,
        messages=messages[:-1],
        seed=seed,
        meta={**meta, "examples": [example.sample.id for example in asked]},
    )
