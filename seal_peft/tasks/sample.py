"""What a task makes: the `Sample`, the checks of a row of a file, and the call that every task answers to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol

SPLITS = ("train", "test")
# The task of rows that are for training alone.
CONVERSATION = "conversation"
# A row with one of these is to be scored, and has all fields of a sample.
SCORED_FIELDS = frozenset({"task", "target", "answers"})
# What TRL and chat templates put into the prompt.
_PROMPT_FIELDS = frozenset({"tools", "images", "image", "videos", "documents", "chat_template_kwargs"})


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer, as it stands in a JSONL row.

    Attributes:
        id: Unique name of the sample inside its file.
        task: Name of the task in the table of tasks; it decides how answers are scored.
        length: Target length in tokens, of the prompt, its chat template and the answers together.
        depth: Where the asked fact stands in the context, 0.0 (start) to 1.0 (end); `None` where that has no meaning.
        messages: Chat turns (`role`, `content`) up to and including the last question. With K questions per
            context, the first K - 1 questions are followed by their `assistant` turns.
        target: The last `assistant` turn, what training teaches.
        answers: Accepted answers to the last question, for scoring.
        seed: Seed that rebuilds this very sample.
        n_tokens: Tokens used of `length`, counted with the tokenizer it was fitted to.
        answer_prefix: Text that opens the last answer and is given to the model, which goes on from there; `target`
            begins with it.
        meta: Anything else worth keeping in the row (JSON values).
    """

    id: str
    task: str
    length: int
    depth: float | None
    messages: list[dict[str, str]]
    target: str
    answers: list[str]
    seed: int
    n_tokens: int = 0
    answer_prefix: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Any) -> Sample:
        """Build a sample from the object of a JSONL row.

        Args:
            row: What `json.loads` gave.

        Raises:
            ValueError: If the row is not a sample; the message names the field.
        """
        if not isinstance(row, dict):
            raise ValueError(f"A row is a JSON object with the fields of a sample, not {type(row).__name__}.")
        for unknown in row.keys() - _FIELD_CHECKS.keys():
            raise ValueError(f"Field {unknown!r}: samples have no such field, only {', '.join(_FIELD_CHECKS)}.")
        for known in fields(cls):
            if known.name not in row:
                if known.default is MISSING and known.default_factory is MISSING:
                    raise ValueError(f"Field {known.name!r} is missing.")
                continue
            check, allowed = _FIELD_CHECKS[known.name]
            if not check(row[known.name]):
                raise ValueError(f"Field {known.name!r} must be {allowed}, not {row[known.name]!r:.80}.")
        if not row["target"].startswith(row.get("answer_prefix", "")):
            raise ValueError(
                f"Field 'answer_prefix' must be how 'target' begins, but {row['answer_prefix']!r:.80} is not."
            )
        return cls(**row)

    @classmethod
    def from_conversation(cls, row: dict[str, Any], id: str) -> Sample:
        """Build a sample from turns alone, the last one the answer. It is for training: no task says how to score it.

        Args:
            row: Its `messages` are turns (`role`, `content`), the last one the assistant's. Other fields are notes of
                the user's, as they are to TRL, but for those that would change the prompt.
            id: Unique name of the sample.

        Raises:
            ValueError: If the turns are not such a conversation, or the row is of another form.
        """
        if "messages" not in row:
            fields_of_row = ", ".join(map(repr, row)) or "none"
            joined = " The turns of 'prompt', then those of 'completion' make one."
            raise ValueError(
                f"Field 'messages' is missing; the row has {fields_of_row}. Give a conversation that ends with the "
                'answer: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.'
                + (joined if {"prompt", "completion"} <= row.keys() else "")
            )
        for field_of_prompt in sorted(row.keys() & _PROMPT_FIELDS):
            raise ValueError(
                f"Field {field_of_prompt!r} would change the prompt, and only 'messages' are read. Write what it says "
                "into a system turn, or train with TRL on rows of this form."
            )
        messages = row["messages"]
        last = messages[-1] if isinstance(messages, list) and messages else None
        if (
            not isinstance(last, dict)
            or last.keys() != {"role", "content"}
            or last["role"] != "assistant"
            or not isinstance(last["content"], str)
        ):
            raise ValueError(
                "Field 'messages': the last turn must be the answer, "
                f'{{"role": "assistant", "content": ...}} and nothing else, not {last!r:.80}.'
            )
        return cls.from_row(
            {
                "id": id,
                "task": CONVERSATION,
                "length": 0,
                "depth": None,
                "messages": list(messages[:-1]),
                "target": last["content"],
                "answers": [last["content"]],
                "seed": 0,
            }
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_messages(value: Any) -> bool:
    turns = isinstance(value, list) and all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and turn["role"] in ("system", "user", "assistant")
        and isinstance(turn["content"], str)
        for turn in value
    )
    return turns and bool(value) and value[-1]["role"] == "user"


_FIELD_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda v: isinstance(v, str) and v != "", "a text that is not empty"),
    "task": (lambda v: isinstance(v, str) and v != "", "a text that is not empty"),
    "length": (lambda v: _is_integer(v) and v >= 0, "an integer of at least 0"),
    "depth": (
        lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1),
        "a number from 0 to 1, or null",
    ),
    "messages": (
        _are_messages,
        "a list of {role, content} turns by system, user and assistant, with a user's before the answer",
    ),
    "target": (lambda v: isinstance(v, str) and v != "", "a text that is not empty"),
    "answers": (
        lambda v: isinstance(v, list) and bool(v) and all(isinstance(answer, str) for answer in v),
        "a list of at least one text",
    ),
    "seed": (_is_integer, "an integer"),
    "n_tokens": (lambda v: _is_integer(v) and v >= 0, "an integer of at least 0"),
    "answer_prefix": (lambda v: isinstance(v, str), "a text"),
    "meta": (lambda v: isinstance(v, dict), "an object"),
}


class MakeSample(Protocol):
    """How a task builds a sample. The same arguments give the same sample, on every machine."""

    def __call__(self, *, seed: int, size: int, depth: float, split: str, questions: int) -> Sample:
        """Build a sample.

        Args:
            seed: Decides everything random.
            size: Number of units (lines, sentences, documents) of context, from `max(1, questions)` up; the tokens
                grow with it.
            depth: Place of the fact asked last, 0.0 to 1.0.
            split: `"train"` or `"test"`; they share no keys, needles or documents.
            questions: Number of questions, one a turn.
        """
