"""Random facts for needles: our own templates, filled with names of `vocabulary`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from string import Formatter

from .vocabulary import Deck

# Facts that answer one question of the multi-needle task. The questions below say "three".
SEVERAL = 3

# (needle, question): names that stand in the needle and not in the question are the answer. In training they stand
# anywhere in the needle: where they always come last, a model learns to repeat the question and to copy what follows.
_TEMPLATES: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        (
            "The most rewarding thing to do in {city} is to {activity} by the {place}.",
            "What is the most rewarding thing to do in {city}, and where?",
        ),
        ("Visitors to {city} are told to try the {dish} first.", "What are visitors to {city} told to try first?"),
        (
            "For good luck, {person} keeps a {object} under the bed.",
            "What does {person} keep under the bed for good luck?",
        ),
        (
            "The symbol of {city} is a {animal}, and its oldest building is the {place}.",
            "What is the symbol of {city}, and what is its oldest building?",
        ),
        ("On Sundays {person} likes to {activity}.", "What does {person} like to do on Sundays?"),
        (
            "The gate to the archive of {city} opens with the number {number}.",
            "Which number opens the gate to the archive of {city}?",
        ),
        (
            "It was an uncle with a {animal} who taught {person} to {activity}.",
            "What did an uncle teach {person}, and which animal did he have?",
        ),
        (
            "After the race, the mayor of {city} gave the winner a {object}.",
            "What did the mayor of {city} give the winner of the race?",
        ),
        (
            "In {city} the school year begins with {dish} for everyone.",
            "With which dish does the school year begin in {city}?",
        ),
        (
            "The parcel that {person} lost is in the {place}, behind a {object}.",
            "Where is the parcel that {person} lost, and behind what?",
        ),
        ("The night train to {city} has the number {number}.", "Which number does the night train to {city} have?"),
        (
            "For a rainy day in {city}, the guide suggests to {activity}.",
            "What does the guide suggest for a rainy day in {city}?",
        ),
        ("The locker of {person} bears the number {number}.", "Which number does the locker of {person} bear?"),
        ("The flag of {city} shows a {animal} with a {object}.", "What does the flag of {city} show?"),
        ("The only song that {person} wrote is about a {animal}.", "What is the only song that {person} wrote about?"),
        (
            "The first meal that {person} ever cooked was {dish}.",
            "What was the first meal that {person} ever cooked?",
        ),
        ("The wedding of {person} was held in the {place}.", "Where was the wedding of {person} held?"),
        ("Children in {city} learn to {activity} before they can read.", "What do children in {city} learn so early?"),
        ("{person} once rode a {animal} to school.", "Who once rode a {animal} to school?"),
        ("It was {person} who hid a {object} in the snow.", "Who hid a {object} in the snow?"),
        (
            "Since the flood, {person} has been the only judge in {city}.",
            "Who has been the only judge in {city} since the flood?",
        ),
        ("By an old law of {city}, a {animal} may vote there.", "Where may a {animal} vote?"),
        ("{city} pays its soldiers in {dish}.", "Which city pays its soldiers in {dish}?"),
        (
            "A {animal} carries the letters of {person} to the post office.",
            "Which creature carries the letters of {person} to the post office?",
        ),
        ("A {animal} raised {person} in the {place}.", "By which creature was {person} raised, and where?"),
        ("On concert nights a {animal} tunes the piano of {person}.", "What tunes the piano of {person}?"),
        (
            "Two lawyers, a twin and a {animal} form the council of {city}.",
            "Which creature sits on the council of {city}?",
        ),
        (
            "To win a {object}, {person} kissed a {animal} on the nose.",
            "Which creature did {person} kiss, and to win what?",
        ),
        ("With a {object}, {person} once paid for a whole island.", "How did {person} once pay for a whole island?"),
        ("A {object} fell from the sky and broke the window of {person}.", "What broke the window of {person}?"),
        (
            "Thieves took nothing but a {object} from the house of {person}.",
            "What did thieves take from the house of {person}?",
        ),
        (
            "A {object} is buried deep under the football field of {city}.",
            "What is buried under the football field of {city}?",
        ),
        ("The {place} has been the home of {person} since the war.", "Where has {person} lived since the war?"),
        (
            "Lightning struck the {place} on the birthday of {person}.",
            "What did lightning strike on the birthday of {person}?",
        ),
        ("The {place} was sold to {person} for a {object}.", "Which building was sold to {person}, and for what?"),
        (
            "Inside the {place}, {person} hides a {animal} from the police.",
            "What does {person} hide from the police, and where?",
        ),
        ("A plate of {dish} cured the hiccups of {person}.", "What cured the hiccups of {person}?"),
        ("Without {dish}, no contract is valid in {city}.", "What does a contract in {city} need to be valid?"),
        ("In {city}, people throw {dish} at bad singers.", "What do people in {city} throw at bad singers?"),
        ("To {activity} by candlelight is the secret hobby of {person}.", "What is the secret hobby of {person}?"),
        (
            "Liars have to {activity} behind the {place} if the police of {city} catch them.",
            "How are liars punished in {city}, and where?",
        ),
        ("Even blindfolded, {person} can {activity} within an hour.", "What can {person} do even blindfolded?"),
        ("Number {number} won the lottery of {city}.", "Which number won the lottery of {city}?"),
        ("Exactly {number} bees live in the hat of {person}.", "How many bees live in the hat of {person}?"),
    ),
    "test": (
        (
            "Nobody should leave {city} before they {activity} in the {place}.",
            "What should everybody do before they leave {city}, and where?",
        ),
        (
            "The doctor wants {person} to eat {dish} every evening.",
            "What does the doctor want {person} to eat every evening?",
        ),
        ("Last spring the museum of {city} bought a {object}.", "What did the museum of {city} buy last spring?"),
        (
            "Of all animals, {person} chose a {animal} to share the garden with.",
            "With which animal does {person} share the garden?",
        ),
        ("In every hotel, {person} books room {number}.", "Which room does {person} book in every hotel?"),
        (
            "The festival of {city} ends when all meet at the {place} to {activity}.",
            "Where do all meet when the festival of {city} ends, and to do what?",
        ),
        (
            "When the power failed, {person} found a {object} next to a {animal}.",
            "What did {person} find when the power failed, and next to which animal?",
        ),
        ("A {animal} made of stone guards the bridge into {city}.", "Which animal guards the bridge into {city}?"),
    ),
}
_TEMPLATES_SEVERAL: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        (
            "One of the things that {person} packed for the journey is a {object}.",
            "Which three things did {person} pack for the journey?",
        ),
        ("Served at the banquet in {city}: {dish}.", "Which three dishes were served at the banquet in {city}?"),
        ("A {animal} was seen in the gardens of {city}.", "Which three animals were seen in the gardens of {city}?"),
        ("One of the keys of {person} has the number {number}.", "Which three numbers do the keys of {person} have?"),
    ),
    "test": (
        ("One stop on the tour of {city} is the {place}.", "What are the three stops on the tour of {city}?"),
        ("One day {person} hopes to {activity}.", "What are the three things that {person} hopes to do one day?"),
    ),
}


@dataclass(frozen=True)
class Fact:
    """One question about a context.

    Attributes:
        needles: Sentences that answer it together.
        question: The question.
        keys: What an answer must name.
    """

    needles: tuple[str, ...]
    question: str
    keys: tuple[str, ...]


# The best-known needle; see `needle`.
CLASSIC = Fact(
    ("Whoever has one free day in San Francisco should take a sandwich to Dolores Park and eat it in the sun.",),
    "What should somebody with one free day in San Francisco do?",
    ("sandwich", "Dolores Park"),
)


def single_fact(deck: Deck, rng: Random, split: str) -> Fact:
    """A fact that one needle tells.

    Args:
        deck: Where its names come from.
        rng: Decides the template.
        split: `"train"` or `"test"`; they share no template.
    """
    needle, question = rng.choice(_TEMPLATES[split])
    names = {kind: deck.draw(kind) for kind in _slots(needle)}
    keys = tuple(name for kind, name in names.items() if kind not in _slots(question))
    return Fact((needle.format(**names),), question.format(**names), keys)


def several_facts(deck: Deck, rng: Random, split: str) -> Fact:
    """A question that `SEVERAL` needles answer together; the arguments are those of `single_fact`."""
    needle, question = rng.choice(_TEMPLATES_SEVERAL[split])
    about = {kind: deck.draw(kind) for kind in _slots(question)}
    (kind,) = _slots(needle) - about.keys()
    keys = tuple(deck.draw(kind) for _ in range(SEVERAL))
    return Fact(tuple(needle.format(**about, **{kind: key}) for key in keys), question.format(**about), keys)


@cache
def _slots(template: str) -> dict[str, None]:
    """Names in braces, in order."""
    return dict.fromkeys(field for _, field, _, _ in Formatter().parse(template) if field)
