"""Key-value retrieval: a JSON object of random UUIDs, and the question which value belongs to a key.

Nothing but the exact characters helps here: no meaning, no wording that a model could have seen.
"""

from __future__ import annotations

import json
from itertools import islice
from random import Random

from .parts import asked_places, check_arguments, new_sample, new_uuid
from .sample import Sample
from .vocabulary import noise

NAME = "json_kv"

_HEADER = "Here is a JSON object. You will be asked for the values of some of its keys."
_FIRST_QUESTION = 'The JSON object ends here. Which value does the key "{key}" have?'
_NEXT_QUESTION = 'And the key "{key}"?'
_ANSWER = "The value is {value}."
# Many tokenizers make each pair equally long, some 80 tokens, so pairs alone fill no short length. A few words before
# the object do; the fitter tries seeds until one has the right number of them.
_MOST_REMARKS = 7


def make(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """Build one object with its questions.

    Args:
        seed: Decides everything random.
        size: Pairs of key and value. Size + 1 adds one at the end.
        depth: Place of the pair asked last, from 0.0 (first) to 1.0 (last).
        split: `"train"` or `"test"`; they share no key and no value.
        questions: Number of questions, each about another key.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("pairs", size=size, depth=depth, split=split, questions=questions)
    rng = Random(f"{NAME}/pairs/{seed}")
    pairs = [(new_uuid(rng, split), new_uuid(rng, split)) for _ in range(size)]
    asked = asked_places(Random(f"{NAME}/questions/{seed}"), size, round(depth * (size - 1)), questions)
    turns: list[tuple[str, str]] = []
    for place in asked:
        key, value = pairs[place]
        question = _NEXT_QUESTION if turns else _FIRST_QUESTION
        turns.append((question.format(key=key), _ANSWER.format(value=value)))

    words = Random(f"{NAME}/remarks/{seed}")
    remarks = list(islice(noise(words, split), words.randint(0, _MOST_REMARKS)))
    return new_sample(
        NAME,
        f"{' '.join([*remarks, _HEADER])}\n\n{json.dumps(dict(pairs), indent=0)}",
        turns,
        [pairs[asked[-1]][1]],
        seed=seed,
        size=size,
        depth=depth,
        split=split,
        questions=questions,
    )
