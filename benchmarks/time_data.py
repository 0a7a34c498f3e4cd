"""The samples of benchmarks/time_to_accuracy.py: how many of each, from which seeds, and the other wording."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from jobs import Part
from time_systems import CENTRE, KNOBS

from seal_peft.tasks import Sample

# Samples of a seed begin at this times the seed: further apart than any file is long, so that seeds share no sample.
STRIDE = 10_000
VALIDATION_SEED, CHOICE_SEED, LONG_SEED = 100_000, 200_000, 300_000
SEEDS = {
    "training": "of each run",
    "training samples": f"{STRIDE} times that of the run",
    "training samples of the file long": f"{LONG_SEED} and {STRIDE} times that of the run",
    "validation samples": VALIDATION_SEED,
    "validation samples that are answered": CHOICE_SEED,
    "test samples": 0,
}


@dataclass(frozen=True)
class Size:
    """How much there is of everything.

    Attributes:
        lengths: Training lengths in tokens; the last one is tested.
        contexts: Training contexts of each.
        full: Contexts of the paper's recipe, all at the last length: nearly four times the tokens of ours.
        long: Contexts of the knobs with the last length only: about as many tokens as ours.
        valid: Validation contexts, for the loss.
        choice: Validation samples that knobs answer.
        searched: Contexts of a training of the search.
        timed: Contexts of a training whose seconds count; each seed is a round of these.
        seeds: Seeds of data and training.
        test: Test samples.
    """

    lengths: tuple[int, ...]
    contexts: int
    full: int
    long: int
    valid: int
    choice: int
    searched: int
    timed: int
    seeds: int
    test: int


SIZES = {
    "full": Size((1536, 2048, 4096, 6144, 8192), 120, 1200, 325, 24, 100, 200, 40, 3, 200),
    "tiny": Size((1536, 2600), 4, 6, 4, 2, 2, 2, 2, 1, 4),
}


def first_questions(sample: Sample, count: int) -> Sample:
    """Return a sample with its first questions only."""
    if sample.meta["questions"] <= count:
        return sample
    turns = sample.messages[: 2 * count]
    return replace(sample, messages=turns[:-1], target=turns[-1]["content"])


def reworded(sample: Sample) -> Sample:
    """Return a sample of line retrieval with the same keys and numbers in another wording."""
    (turn,) = sample.messages
    _, register, question = turn["content"].split("\n\n")
    lines, count = re.subn(r"line (\S+): REGISTER_CONTENT is <(\d+)>", r"\1 has the value \2", register)
    (key,) = re.findall(r"in line (\S+)\?", question)
    if count != register.count("\n") + 1:
        raise ValueError(f"{sample.id}: {count} lines were found, the register has {register.count(chr(10)) + 1}.")
    content = f"Items and their values:\n\n{lines}\n\nWhat is the value of {key}? Answer with the number."
    return replace(sample, id=f"{sample.id}-reworded", messages=[{"role": "user", "content": content}])


def files_of(size: Size) -> dict[str, list[Part]]:
    """Return what each file of samples is made of."""
    longest, questions = size.lengths[-1], CENTRE.questions
    most = max(recipe.questions for recipe in KNOBS.values())
    files: dict[str, list[Part]] = {}
    for seed in range(size.seeds):
        first = STRIDE * seed
        files[f"mixed-{seed}"] = [
            part for length in size.lengths for part in _parts(length, size.contexts, questions, first)
        ]
        files[f"long-{seed}"] = _parts(longest, size.long, most, LONG_SEED + first)
        files[f"full-{seed}"] = _parts(longest, size.full, 1, first)
    files["valid"] = _parts(longest, size.valid, 1, VALIDATION_SEED)
    files["choice"] = _parts(longest, size.choice, 1, CHOICE_SEED)
    files["test"] = _parts(longest, size.test, 1, 0)
    return files


def _parts(length: int, contexts: int, questions: int, first: int, at_once: int = 50) -> list[Part]:
    """Split a number of contexts, so that many processes have something to make."""
    starts = range(0, contexts, at_once)
    return [(length, min(at_once, contexts - start), questions, first + start) for start in starts]
