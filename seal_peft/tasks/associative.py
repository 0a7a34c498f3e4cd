"""A needle without literal overlap: it names a landmark, the question names the country or city where that stands.

In the spirit of NoLiMa, with content of our own: who searches for the words of the question finds nothing. One person
lives next to a landmark; others, next to landmarks elsewhere, are there to be confused with. Training and testing
share no landmark, no country, no person and no wording.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

from .landmarks import LANDMARKS, Landmark
from .parts import check_arguments, half, hide, new_sample
from .sample import Sample
from .vocabulary import noise

NAME = "associative"
# People whom nobody asks about: some in every context, and one more for so many plain sentences, until all landmarks
# are in use.
DISTRACTORS = 2
_SENTENCES_PER_DISTRACTOR = 12

_HEADER = "Read the following text with care. You will be asked about the people in it."
_FIRST_QUESTION = "The text ends here. {question} Answer with the name."
# The two sides share no word, apart from the likes of "the" and "in". A test makes sure.
_NEEDLES = {
    "train": (
        "{person} lives right next to {landmark}.",
        "The flat that {person} rents looks out on {landmark}.",
        "Every morning {person} waters the plants on a balcony that faces {landmark}.",
        "From the bed of {person} one can see {landmark}.",
    ),
    "test": (
        "The rooms of {person} are just across the street from {landmark}.",
        "{person} wakes up each day to the sight of {landmark}.",
        "Only a fence separates the kitchen of {person} from {landmark}.",
    ),
}
_QUESTIONS = {
    "train": ("Who is a resident of {place}?", "Which character has a home in {place}?"),
    "test": ("Who is based in {place}?", "Which character is an inhabitant of {place}?"),
}
_ANSWER = "It is {person}."
# None of them is a place or begins another name.
_PEOPLE = (
    "Agnes Albert Alfred Alice Amalia Anton Arthur Astrid Beatrice Benedict Bernard Bridget Camille Cecil Clara "
    "Conrad Cyril Dagmar Daphne Desmond Dolores Edgar Edmund Eleanor Elmer Elsa Emil Ernest Esther Eugene Fiona "
    "Flora Franklin Frieda Gerald Gilbert Gloria Gordon Gustav Hannah Harriet Harvey Hazel Helga Herbert Hilda "
    "Horace Hugo Ingrid Irene Isidor Ivan Joachim Judith Julius Karin Konstantin Lambert Laura Leonard Lionel "
    "Lorenz Louise Lucian Magnus Manfred Marianne Martha Maurice Mildred Miriam Mortimer Muriel Natalie Nigel "
    "Norbert Oliver Oswald Otto Pamela Patrick Priscilla Ralph Raymond Rebecca Reginald Roderick Roland Rosemary "
    "Rudolf Rupert Sabine Samuel Selma Sigrid Simon Sophie Stella Stuart Sylvia Theodor Thelma Theresa Tobias "
    "Ulrich Valentin Vanessa Vincent Viola Walter Wanda Wilfred Winifred Wolfgang Yvonne"
).split()


def make(*, seed: int, size: int, depth: float, split: str = "test", questions: int = 1) -> Sample:
    """Hide one person for each question, and some to be confused with.

    Args:
        seed: Decides everything random.
        size: Sentences around the needles; some place other people elsewhere. Size + 1 adds one at the end.
        depth: Place of the needle asked last: the share of the text before it, to the nearest end of a sentence. All
            other people are spread at random.
        split: `"train"` or `"test"`.
        questions: Number of questions, each about another country.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments("sentences", size=size, depth=depth, split=split, questions=questions)
    rng = Random(f"{NAME}/people/{seed}")
    landmarks, names = pools(split)
    places, people = rng.sample(landmarks, len(landmarks)), rng.sample(names, len(names))
    most = min(len(places), len(people))
    if questions + DISTRACTORS > most:
        raise ValueError(
            f"questions={questions} was given, but there are landmarks for {most - DISTRACTORS} questions about one "
            "context. Use fewer questions."
        )
    residents = [_resident(rng, person, place, split) for person, place in zip(people, places, strict=False)]
    # The asked ones come first, so that a larger context asks the same.
    turns: list[tuple[str, str]] = []
    for person, place in zip(people[:questions], places, strict=False):
        question = rng.choice(_QUESTIONS[split]).format(place=rng.choice((place.city, place.country)))
        turns.append((question if turns else _FIRST_QUESTION.format(question=question), _ANSWER.format(person=person)))
    known = questions + DISTRACTORS
    needles = [(rng.random(), sentence) for sentence in residents[:known]]
    needles[questions - 1] = (depth, residents[questions - 1])
    stream = _text(Random(f"{NAME}/text/{seed}"), split, residents[known:])
    return new_sample(
        NAME,
        f"{_HEADER}\n\n{' '.join(hide(needles, list(islice(stream, size))))}",
        turns,
        [people[questions - 1]],
        seed=seed,
        size=size,
        depth=depth,
        split=split,
        questions=questions,
    )


def pools(split: str) -> tuple[list[Landmark], tuple[str, ...]]:
    """Landmarks and people of a split.

    Args:
        split: `"train"` or `"test"`.
    """
    countries = set(half([landmark.country for landmark in LANDMARKS], split))
    return [landmark for landmark in LANDMARKS if landmark.country in countries], half(_PEOPLE, split)


def _resident(rng: Random, person: str, place: Landmark, split: str) -> str:
    sentence = rng.choice(_NEEDLES[split]).format(person=person, landmark=place.landmark)
    return sentence[0].upper() + sentence[1:]


def _text(rng: Random, split: str, residents: list[str]) -> Iterator[str]:
    """Plain sentences, with the residents among them one by one until none is left."""
    sentences = noise(rng, split)
    for resident in residents:
        yield from islice(sentences, _SENTENCES_PER_DISTRACTOR)
        yield resident
    yield from sentences
