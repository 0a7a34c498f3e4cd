"""RULER's eight needle tasks: keys with magic values, hidden in noise, in essays or among needles like them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from .haystacks import prose, words
from .parts import check_arguments, check_questions, new_number, new_uuid
from .ruler_templates import wording
from .sample import Sample

# NVIDIA draws the places of needles from this many even steps of depth.
_STEPS = 40


@dataclass(frozen=True)
class Form:
    """What makes one needle task differ from the others.

    Attributes:
        haystack: `noise`, `essay`, or `needle` (the haystack is needles that nobody asks for).
        keys: `words` (adjective-noun) or `uuids`.
        values: `numbers` (seven digits) or `uuids`.
        num_keys: Keys that are hidden on purpose.
        num_values: Values of each key.
        num_asked: Keys asked for at once.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1

    @property
    def asks_one(self) -> bool:
        """Whether one value is asked: then there is one place that it stands at."""
        return self.num_values * self.num_asked == 1


FORMS = {
    "niah_single_1": Form("noise"),
    "niah_single_2": Form("essay"),
    "niah_single_3": Form("essay", values="uuids"),
    "niah_multikey_1": Form("essay", num_keys=4),
    "niah_multikey_2": Form("needle"),
    "niah_multikey_3": Form("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Form("essay", num_values=4),
    "niah_multiquery": Form("essay", num_keys=4, num_asked=4),
}


@dataclass(frozen=True)
class Needle:
    """A key and its values."""

    key: str
    values: tuple[str, ...]


def make(name: str, *, seed: int, size: int, depth: float, split: str, questions: int) -> Sample:
    """Build a sample of one needle task.

    Args:
        name: A key of `FORMS`.
        seed: Decides everything random.
        size: Words of essay, sentences of noise, or needles that the haystack is made of.
        depth: Place of the needle asked last. Where several values are asked at once, all stand at random places.
        split: `"train"` or `"test"`; they share no key words, no values and no essays.
        questions: Number K of keys asked one after the other.

    Raises:
        ValueError: If an argument is out of range, or the task has fewer keys than there are questions.
    """
    form = FORMS[name]
    among_needles = form.haystack == "needle"
    most = size + 1 if among_needles else form.num_keys // form.num_asked
    unit = {"needle": "needles", "noise": "sentences", "essay": "words"}[form.haystack]
    check_arguments(unit, size=size, depth=depth, split=split, questions=questions)
    check_questions(f"ruler_{name}", questions, most=most)

    hidden = _needles(Random(f"{name}/needles/{seed}"), form, split, form.num_keys + (size if among_needles else 0))
    # The needle asked last is the first that was made, so that it is the same at every size.
    asked = hidden[: form.num_asked]
    turns = [*([needle] for needle in Random(f"{name}/asked/{seed}").sample(hidden[1:], questions - 1)), asked]
    places = Random(f"{name}/places/{seed}")
    if among_needles:
        units = [line for needle in hidden[1:] for line in _sentences(needle, form.values)]
        hidden = asked
    elif form.haystack == "noise":
        units = wording().noise_lines(size)
    else:
        text = prose(split)
        units = text.passage(places.randrange(len(text.sentences)), size)
    lines = [line for needle in hidden for line in _sentences(needle, form.values)]
    depths = [step / (_STEPS - 1) for step in places.sample(range(_STEPS), len(lines))]
    if form.asks_one:
        depths[0] = depth
    context = (" " if form.haystack == "essay" else "\n").join(insert(units, lines, depths))

    kind = form.values[:-1] if form.asks_one else form.values
    template = wording().niah_one if form.asks_one else wording().niah_many
    prompts = [template.prompt, *[template.question] * (questions - 1)]
    messages = []
    for turn, prompt in zip(turns, prompts, strict=True):
        query = listed([needle.key for needle in turn])
        prefix = template.answer_prefix.format(type_needle_v=kind, query=query)
        values = [value for needle in turn for value in needle.values]
        answer = f"{prefix} {listed(values)}."
        messages.append({"role": "user", "content": prompt.format(type_needle_v=kind, query=query, context=context)})
        messages.append({"role": "assistant", "content": answer})
    return Sample(
        id=f"ruler_{name}-{split}-{seed}",
        task=f"ruler_{name}",
        length=0,
        depth=depth if form.asks_one else None,
        messages=messages[:-1],
        target=answer,
        answers=values,
        seed=seed,
        answer_prefix=prefix,
        meta={"size": size, "split": split, "questions": questions, "wording": wording().source},
    )


def _needles(rng: Random, form: Form, split: str, count: int) -> list[Needle]:
    """Needles with keys and values that all differ. With one generator the first ones are the same for any count."""
    known = words(split)
    seen: set[str] = set()

    def new(draw: Callable[[], str]) -> str:
        text = draw()
        while text in seen:
            text = draw()
        seen.add(text)
        return text

    draws: dict[str, Callable[[], str]] = {
        "words": lambda: f"{rng.choice(known.adjectives)}-{rng.choice(known.nouns)}",
        "numbers": lambda: new_number(rng, split, 1_000_000, 9_999_999),
        "uuids": lambda: new_uuid(rng, split),
    }
    return [
        Needle(new(draws[form.keys]), tuple(new(draws[form.values]) for _ in range(form.num_values)))
        for _ in range(count)
    ]


def _sentences(needle: Needle, kind: str) -> list[str]:
    return [wording().needle.format(type_needle_v=kind, key=needle.key, value=value) for value in needle.values]


def insert(units: Sequence[str], lines: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Put lines between units.

    Args:
        units: The haystack.
        lines: What is hidden in it.
        depths: Place of each line, 0.0 (before the first unit) to 1.0 (behind the last).
    """
    gaps: list[list[str]] = [[] for _ in range(len(units) + 1)]
    for line, depth in zip(lines, depths, strict=True):
        gaps[round(depth * len(units))].append(line)
    mixed = list(gaps[0])
    for unit, gap in zip(units, gaps[1:], strict=True):
        mixed += [unit, *gap]
    return mixed


def listed(items: Sequence[str]) -> str:
    """Join as NVIDIA's question does: `a`, and `a, b, and c`."""
    return ", and ".join(filter(None, (", ".join(items[:-1]), items[-1])))
