"""Samples: made to fill a length in tokens, written and read as JSONL, checked against a model's window."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_json, replacing
from .fitting import fit_samples
from .tasks import SCORED_FIELDS, Sample, Task, get_task
from .tokens import encode_training

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def make_samples(
    task: str | Task,
    *,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    lengths: Sequence[int],
    num_samples: int,
    depths: Sequence[float] | None = None,
    questions_per_context: int = 1,
    seed: int = 0,
) -> list[Sample]:
    """Make samples that fill given lengths in tokens to at least 97%, and never exceed them.

    The whole conversation counts: chat template, prompt and all answers.

    Args:
        task: Name of a task in `seal_peft.tasks.TASKS`, or a task that is not in the table.
        tokenizer: Tokenizer of the model the samples are for.
        split: `"train"` or `"test"`. No seed, key, needle or document of one occurs in the other.
        lengths: Lengths in tokens.
        num_samples: Samples for each length.
        depths: Places of the asked fact, 0.0 to 1.0, used in turn; uniformly random ones by default.
        questions_per_context: Questions about one context, one a turn.
        seed: The same seed gives the same samples.

    Returns:
        `num_samples` for the first length, then for the next.

    Raises:
        ValueError: If an argument is out of range, or a length too short; the message names one that works.
    """
    return fit_samples(
        get_task(task) if isinstance(task, str) else task,
        count_tokens=lambda sample: len(encode_training(sample, tokenizer)["input_ids"]),
        split=split,
        lengths=lengths,
        num_samples=num_samples,
        depths=depths,
        questions_per_context=questions_per_context,
        seed=seed,
    )


def write_samples(path: str | os.PathLike[str], samples: Iterable[Sample]) -> None:
    """Write samples as JSONL (UTF-8, one row a sample). The same samples give the same bytes.

    The file appears whole or not at all: an interrupt leaves the old file, if there was one.

    Args:
        path: File to write; missing folders are made.
        samples: The rows, in order.
    """
    with replacing(path) as file:
        for sample in samples:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """Read what `write_samples` wrote, or conversations for training: rows with `messages`, and no task or answers.

    Args:
        path: A JSONL file.

    Returns:
        The samples, in order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row is not a sample; the message names file, line and field. Also if two rows share an id.
    """
    if not Path(path).exists() or Path(path).is_dir():
        raise FileNotFoundError(
            f"There is no file {path}. Give a JSONL file: what `seal-peft make-data` wrote, or rows of your own. See "
            "'Your own files' in docs/tasks.md."
        )
    samples: list[Sample] = []
    lines_of_ids: dict[str, int] = {}
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                conversation = isinstance(row, dict) and not row.keys() & SCORED_FIELDS
                sample = Sample.from_conversation(row, f"line {number}") if conversation else Sample.from_row(row)
            except ValueError as error:
                not_json = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
                problem = f"The row is not JSON ({error})." if not_json else error
                raise ValueError(f"{path}, line {number}: {problem} See 'Your own files' in docs/tasks.md.") from error
            first = lines_of_ids.setdefault(sample.id, number)
            if first != number:
                raise ValueError(f"{path}, line {number}: the id {sample.id!r} is already that of line {first}.")
            samples.append(sample)
    return samples


def prompt_hash(sample: Sample) -> str:
    """Return a short name of what a sample asks, by which it is found again in other files.

    Args:
        sample: Its turns count, nothing else.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(sample.messages, sort_keys=True).encode()).hexdigest()[:16]


def trained_prompts(adapter: str | os.PathLike[str]) -> list[str]:
    """Return the prompts that an adapter was trained on, by `prompt_hash`, as far as its `run.json` tells.

    Args:
        adapter: Its folder. A Hub id brings no record.
    """
    record = Path(adapter) / "run.json"
    return read_json(record).get("prompt_hashes", []) if record.is_file() else []


def window_of(model_config: PretrainedConfig) -> int | None:
    """Return how many tokens a model's positions reach, RoPE scaling included; `None` where there is no such limit.

    By the conventions of published models, `max_position_embeddings` is

    - the extended window under `llama3` scaling, and under `yarn` and `longrope`, unless it was left at (or near) the
      original one, as Qwen's cards tell users to do: then original x factor is larger, and counts;
    - the original window under `dynamic` scaling, whose formula starts to stretch there, and under `linear` scaling;
    - the extended window again where each kind of layer has a scaling of its own, as in Gemma 3, whose full-attention
      layers reached the published window by `linear`.

    Args:
        model_config: Configuration of the model; multimodal ones are asked for their text part.
    """
    config = model_config.get_text_config()
    window = getattr(config, "max_position_embeddings", None)
    if window is None:
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind_of_layer = [kind for kind in parameters.values() if isinstance(kind, dict)]
    return max([window, *(_scaled(kind, window, bool(by_kind_of_layer)) for kind in by_kind_of_layer or [parameters])])


def _scaled(parameters: dict[str, Any], window: int, one_of_several: bool) -> int:
    """Window that one set of RoPE parameters reaches."""
    factor = parameters.get("factor") or 1
    match parameters.get("rope_type", "default"):
        case "yarn" | "longrope":
            return int(factor * (parameters.get("original_max_position_embeddings") or window))
        case "dynamic":
            return int(factor * window)
        case "linear" if not one_of_several:
            return int(factor * window)
    return window


def has_position_table(model_config: PretrainedConfig) -> bool:
    """Return whether positions are a learned table, which has no entry beyond the window.

    Args:
        model_config: Configuration of the model; multimodal ones are asked for their text part.
    """
    return window_of(model_config) is not None and not getattr(model_config.get_text_config(), "rope_parameters", None)


def check_window(
    model_config: PretrainedConfig, length: int, window: int | None = None, beyond: bool | None = None
) -> None:
    """Refuse lengths that the model's positions do not reach.

    Args:
        model_config: Configuration of the model; multimodal ones are asked for their text part.
        length: Tokens of the longest sequence, its answer included.
        window: What the model reaches, if something extends it that its configuration does not tell.
        beyond: What the user said to `--allow_beyond_window`; `None` where there is no such flag. A learned table has
            nothing beyond, whatever they said.

    Raises:
        ValueError: If `length` exceeds the window.
    """
    plain = window_of(model_config)
    window = window or plain
    if window is None or length <= window or (beyond and not has_position_table(model_config)):
        return
    config = model_config.get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    grouped = f", self_extend={getattr(config, 'self_extend', None)}" if window != plain else ""
    start = (
        f"A length of {length} tokens was given, but the window of this model is {window} tokens "
        f"(max_position_embeddings={config.max_position_embeddings}, rope_parameters={parameters}{grouped}). "
    )
    if not parameters:
        raise ValueError(
            f"{start}Use lengths up to {window}: its positions are a learned table, which nothing extends."
        )
    raise ValueError(
        f"{start}Use lengths up to {window}, or extend the window: `seal-peft advise --length {length}` says which "
        "rope_parameters or self_extend reach so far. An adapter brings them (flags of `seal-peft train`), or the "
        "model's config.json the rope_parameters."
        + (" For lengths beyond the window all the same, pass --allow_beyond_window." if beyond is False else "")
    )
