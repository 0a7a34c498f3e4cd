"""RULER's tasks without needles: follow variables, find the most common words, find the most frequent coded words.

All three ask one question about the whole context, so there is no depth, and no second question.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random

from .haystacks import words
from .parts import belongs, check_arguments, check_questions, new_number
from .ruler_templates import wording
from .sample import Sample

_HOPS = 4
_EXAMPLE_LINES = 10
_EXAMPLE_NAME = 3
_NAME = 5

_COMMON = 10
# Prompts of this many numbered words and more repeat them 30 and 3 times, shorter ones 6 times and once. At 4,096
# tokens every usual tokenizer is above it (SmolLM2, which cuts numbers into digits, has some 640 words there).
_LONG_LIST = 550

_CODED_LENGTH = 6
# From this expected number of words on, the fourth and the fifth frequency differ.
_FEWEST_CODED = 73


def make_vt(*, seed: int, size: int, depth: float, split: str, questions: int) -> Sample:
    """Build a sample of variable tracking: one chain of five variables in noise, after one solved example.

    Args:
        seed: Decides everything random.
        size: Sentences of noise, beyond the fewest that hold a chain.
        depth: Not used: the chain runs through the whole context.
        split: `"train"` or `"test"`; they share no variable names and no values.
        questions: 1, as there is one chain.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("sentences", size=size, depth=depth, split=split, questions=questions)
    check_questions("ruler_vt", questions, most=1)
    template, fixed = wording().variable_tracking, 5 * (_HOPS + 1)
    rng = Random(f"vt/{seed}")
    lines = wording().noise_lines(fixed + size)

    value, names, context = _chain(rng, wording().noise_lines(5 * _EXAMPLE_LINES), _EXAMPLE_NAME, split)
    fields = {"context": context, "query": value, "num_v": _HOPS + 1}
    # Blanks and empty lines as NVIDIA has them.
    solved = f"{template.prompt}{template.answer_prefix}".format(**fields)
    example = f" {solved} {' '.join(names)}\n\n\n\n"

    asked = value
    while asked == value:
        asked, names, context = _chain(rng, lines, _NAME, split)
    fields = {"context": context, "query": asked, "num_v": _HOPS + 1}
    return _sample(
        "vt",
        seed,
        size,
        split,
        example + template.prompt.format(**fields),
        template.answer_prefix.format(**fields),
        " " + " ".join(names),
        names,
    )


def _chain(rng: Random, lines: Sequence[str], name_length: int, split: str) -> tuple[str, list[str], str]:
    """A chain of assignments in noise: its value, its names and the context."""
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=name_length))
        if name not in names and belongs(name, split):
            names.append(name)
    value = new_number(rng, split, 10_000, 99_999)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:], strict=False)]
    # Places are drawn as fractions: the same seed hides the chain in the same regions at every size.
    gaps: list[int] = []
    while len(gaps) < len(chain):
        gap = int(rng.random() * len(lines))
        while gap in gaps:
            gap = (gap + 1) % len(lines)
        gaps.append(gap)
    parts = [line + "\n" for line in lines]
    for index, (gap, link) in enumerate(zip(sorted(gaps), chain, strict=True)):
        parts.insert(gap + index, link)
    return value, names, " ".join(parts).replace(". \n", ".\n")


def make_cwe(*, seed: int, size: int, depth: float, split: str, questions: int) -> Sample:
    """Build a sample of common word extraction: ten words of a long list occur ten times as often as the others.

    Args:
        seed: Decides everything random.
        size: Numbered words, those of the solved example included, beyond the fewest there can be.
        depth: Not used: the words are everywhere.
        split: `"train"` or `"test"`; they share no words.
        questions: 1, as there is one list.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("words", size=size, depth=depth, split=split, questions=questions)
    check_questions("ruler_cwe", questions, most=1)
    # Counted with its example, the list grows evenly where the repeats change.
    few = (3, 1, 20 - _COMMON), (6, 1)
    many = (10, 3, 40 - _COMMON), (30, 3)
    fewest = _COMMON * (few[0][0] + few[1][0]) + few[0][1] * few[0][2]
    total = fewest + size
    (example_common, example_rare, example_words), (common, rare) = many if total >= _LONG_LIST else few
    num_rare = (total - _COMMON * (example_common + common) - example_rare * example_words) // rare

    stock = _stock(Random(f"cwe/words/{seed}"), split)
    shuffle = Random(f"cwe/order/{seed}")
    template = wording().common_words
    example_answers = list(islice(stock, _COMMON))
    answers = list(islice(stock, _COMMON))
    example = _numbered(shuffle, example_answers, example_common, list(islice(stock, example_words)), example_rare)
    context = _numbered(shuffle, answers, common, list(islice(stock, num_rare)), rare)
    prompt = (
        template.prompt.format(context=example, query="")
        + template.answer_prefix
        + _enumerated(example_answers)
        + "\n"
        + template.prompt.format(context=context, query="")
    )
    return _sample("cwe", seed, size, split, prompt, template.answer_prefix, _enumerated(answers), answers)


def _stock(rng: Random, split: str) -> Iterator[str]:
    """Words without end, all different: the split's single words, then pairs of them."""
    known = words(split)
    single = sorted({*known.adjectives, *known.nouns, *known.verbs})
    yield from rng.sample(single, len(single))
    seen = set()
    while True:
        pair = f"{rng.choice(known.adjectives)}-{rng.choice(known.nouns)}"
        if pair not in seen:
            seen.add(pair)
            yield pair


def _numbered(rng: Random, common: list[str], often: int, rare: list[str], seldom: int) -> str:
    mixed = common * often + rare * seldom
    rng.shuffle(mixed)
    return _enumerated(mixed)


def _enumerated(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


def make_fwe(*, seed: int, size: int, depth: float, split: str, questions: int) -> Sample:
    """Build a sample of frequent word extraction: coded words whose frequency falls with the square of their rank.

    Args:
        seed: Decides everything random.
        size: Expected number of words, beyond the fewest that have three clear winners.
        depth: Not used: the words are everywhere.
        split: `"train"` or `"test"`; they share no coded words.
        questions: 1, as there is one text.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("words", size=size, depth=depth, split=split, questions=questions)
    check_questions("ruler_fwe", questions, most=1)
    rng = Random(f"fwe/words/{seed}")
    scale = (_FEWEST_CODED + size) / (math.pi**2 / 6)
    # The most frequent of all are dots, which do not count.
    coded = ["..."]
    mixed: list[str] = ["..."] * int(scale)
    while count := int(scale / (len(coded) + 1) ** 2):
        word = "".join(rng.choices(string.ascii_lowercase, k=_CODED_LENGTH))
        if word in coded or not belongs(word, split):
            continue
        coded.append(word)
        mixed += [word] * count
    Random(f"fwe/order/{seed}").shuffle(mixed)
    template, answers = wording().frequent_words, coded[1:4]
    prompt = template.prompt.format(context=" ".join(mixed), query="")
    return _sample("fwe", seed, size, split, prompt, template.answer_prefix, f" {', '.join(answers)}", answers)


def _sample(
    name: str, seed: int, size: int, split: str, prompt: str, prefix: str, answer: str, answers: list[str]
) -> Sample:
    return Sample(
        id=f"ruler_{name}-{split}-{seed}",
        task=f"ruler_{name}",
        length=0,
        depth=None,
        messages=[{"role": "user", "content": prompt}],
        target=prefix + answer,
        answers=answers,
        seed=seed,
        answer_prefix=prefix,
        meta={"size": size, "split": split, "questions": 1, "wording": wording().source},
    )
