"""What is asked: long-context tasks as pure functions of (seed, size, depth). No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from . import associative, examples, guard, json_kv, lines, metrics, needle, passkey, qa, ruler, uuid_chain
from .sample import CONVERSATION, SCORED_FIELDS, SPLITS, MakeSample, Sample

__all__ = ["SCORED_FIELDS", "SPLITS", "TASKS", "MakeSample", "Sample", "Task", "examples", "get_task"]


Score = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    Attributes:
        name: Name in files and on the command line.
        make: Builds a sample of a given size.
        score: Score, 0.0 to 1.0, of a model's answer against the accepted answers.
        max_new_tokens: Longest answer that evaluation lets a model generate.
        description: One line for `--help` and reports.
        more_scores: Further scores by name, for comparison with results that others report.
    """

    name: str
    make: MakeSample
    score: Score
    max_new_tokens: int
    description: str
    more_scores: Mapping[str, Score] = field(default_factory=dict)


_RECALL = {"word_recall": metrics.word_recall}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name=lines.NAME,
            make=lines.make,
            score=metrics.last_integer_match,
            max_new_tokens=64,
            description="LongEval line retrieval: the number of one named line. Score: the answer's last integer.",
        ),
        Task(
            name=needle.ESSAY,
            make=needle.make,
            score=metrics.share_of_answers,
            max_new_tokens=64,
            description="A random fact hidden in essays. Score: share of its key words named.",
            more_scores=_RECALL,
        ),
        Task(
            name=needle.NOISE,
            make=needle.make_noise,
            score=metrics.share_of_answers,
            max_new_tokens=64,
            description="A random fact hidden in plain sentences of our own. Score: share of its key words named.",
            more_scores=_RECALL,
        ),
        Task(
            name=needle.MULTI,
            make=needle.make_multi,
            score=metrics.share_of_answers,
            max_new_tokens=128,
            description="Three facts about one thing hidden in essays. Score: share of the facts named.",
            more_scores=_RECALL,
        ),
        Task(
            name=needle.CLASSIC,
            make=needle.make_classic,
            score=metrics.share_of_answers,
            max_new_tokens=64,
            description="The San Francisco needle in essays, for testing only. Score: share of its key words named.",
            more_scores=_RECALL,
        ),
        Task(
            name=passkey.NAME,
            make=passkey.make,
            score=metrics.share_of_answers,
            max_new_tokens=32,
            description="A number hidden in plain sentences. Score: the number is named.",
        ),
        Task(
            name=json_kv.NAME,
            make=json_kv.make,
            score=metrics.share_of_answers,
            max_new_tokens=64,
            description="The value of one key in a JSON object of random UUIDs. Score: the value is named.",
        ),
        Task(
            name=uuid_chain.NAME,
            make=uuid_chain.make,
            score=metrics.furthest_answer,
            max_new_tokens=192,
            description="Follow three links from UUID to UUID. Score: furthest code named, as a share of the way.",
        ),
        Task(
            name=associative.NAME,
            make=associative.make,
            score=metrics.share_of_answers,
            max_new_tokens=32,
            description="A needle that shares no word with the question. Score: the person is named.",
        ),
        *(Task(*row) for row in ruler.ROWS),
        Task(
            name=qa.SINGLE,
            make=partial(qa.make, qa.SINGLE, "squad"),
            score=metrics.token_f1,
            max_new_tokens=32,
            description="A question of SQuAD: one of many documents answers it. Score: token F1.",
        ),
        Task(
            name=qa.MULTI,
            make=partial(qa.make, qa.MULTI, "hotpotqa"),
            score=metrics.token_f1,
            max_new_tokens=32,
            description="A question of HotpotQA: two of many documents answer it together. Score: token F1.",
        ),
        Task(
            name=guard.QA,
            make=guard.make_qa,
            score=metrics.token_f1,
            max_new_tokens=32,
            description="Short guard, up to 1,000 tokens: a question of SQuAD about one passage. Score: token F1.",
        ),
        Task(
            name=guard.INSTRUCTIONS,
            make=guard.make_instructions,
            score=metrics.first_line_match,
            max_new_tokens=32,
            description="Short guard: small instructions with one right answer. Score: the first line is just that.",
        ),
    )
}


def get_task(name: str) -> Task:
    """Look up a task.

    Args:
        name: A key of `TASKS`.

    Returns:
        How it makes samples and how it scores answers.

    Raises:
        ValueError: If no task has this name.
    """
    if name == CONVERSATION:
        raise ValueError(
            "Rows without `task` and `answers` are for training. To be scored, a row names both: see "
            "'Your own files' in docs/tasks.md."
        )
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}. Known tasks: {', '.join(sorted(TASKS))}.")
    return TASKS[name]
