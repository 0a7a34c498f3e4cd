"""Who answers, and what each reads: systems by name, samples in a model's tokens, and how far each system reaches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data import check_window, has_position_table, prompt_hash, read_samples, trained_prompts, window_of
from .folders import REST
from .loading import check_adapter, load_config, load_tokenizer
from .reach import reach, reach_of_folder
from .tasks import Sample, get_task
from .together import split_together
from .tokens import encode_question

logger = logging.getLogger(__name__)

BASE = "base"


@dataclass(frozen=True)
class System:
    """One thing that answers: a plain model, or a base model with adapters.

    Attributes:
        name: Name in the results.
        model: Model to load.
        adapters: Adapters that are loaded onto it together; none for a plain model.
    """

    name: str
    model: str
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """The samples as one model reads them.

    Attributes:
        tokenizer: The model's tokenizer.
        prompts: Token ids of each sample's prompt.
        drafts: Token ids of the right answer to each, its end of turn last.
        limits: Longest answer to each, in tokens.
        longest: Tokens of the longest prompt with its right answer.
        ends: Tokens that end a turn in the model's chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    drafts: list[list[int]]
    limits: list[int]
    longest: int
    ends: list[int]


def split_name(text: str) -> tuple[str, str]:
    """Split NAME=PATH, what a user calls a system; without a name the folder's own counts.

    Paths may hold the sign, too: what exists is a path, and so is what has a / before the sign.

    Args:
        text: PATH or NAME=PATH; PATH+PATH where adapters answer together.

    Returns:
        Name and path.
    """
    name, equals, path = text.partition("=")
    if not equals or "/" in name or Path(text).exists():
        return "+".join(Path(path).resolve().name for path in split_together(text)), text
    return name, path


def name_systems(base: str, adapters: Sequence[str], models: Sequence[str], skip_base: bool) -> list[System]:
    """Give every system its name.

    Args:
        base: Model that the adapters are for.
        adapters: PATH or NAME=PATH of each, with PATH+PATH for those that answer together.
        models: PATH or NAME=PATH of further plain models.
        skip_base: Leave the base model itself out.

    Raises:
        ValueError: There is no system, or two have one name.
    """
    systems = [] if skip_base else [System(BASE, base)]
    systems += [System(name, base, tuple(split_together(path))) for name, path in map(split_name, adapters)]
    systems += [System(name, path) for name, path in map(split_name, models)]
    names = [system.name for system in systems]
    if not systems:
        raise ValueError("There is nothing to evaluate: leave out --skip_base, or give --adapters or --models.")
    if len(set(names)) < len(names):
        raise ValueError(
            f"Systems need distinct names; got {names}. Name them as NAME=PATH in --adapters and --models."
        )
    return systems


def read_questions(model: str, samples: Sequence[Sample], max_new_tokens: int | None) -> Questions:
    """Tokenise the samples for a model.

    Args:
        model: Hub id, local folder, or `smollm2`.
        samples: What is asked.
        max_new_tokens: Longest answer; `None` for the one of each task.
    """
    config, tokenizer = load_config(model), load_tokenizer(model)
    special = set(tokenizer.all_special_ids) | {
        n for n, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    prompts, drafts, limits, longest, ends = [], [], [], 0, set()
    table = window_of(config) if has_position_table(config) else None
    for sample in tqdm(samples, desc="Tokenising", unit="sample", delay=1.0):
        prompt, answer = encode_question(sample, tokenizer)
        limit = max_new_tokens or get_task(sample.task).max_new_tokens
        # Right answers end inside the window. Where positions are a table, babble must not run past it either.
        limits.append(limit if table is None else max(1, min(limit, table - len(prompt))))
        prompts.append(prompt)
        drafts.append(answer)
        longest = max(longest, len(prompt) + len(answer))
        ends |= {*answer[-1:]} & special
    return Questions(tokenizer, prompts, drafts, limits, longest, sorted(ends))


def read_test_file(path: str) -> list[Sample]:
    """Read the samples, and make sure that each can be scored.

    Args:
        path: A JSONL file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are no samples, one is no sample, or its task or answers cannot be scored; the message names
            file, line and field.
    """
    samples = read_samples(path)
    if not samples:
        raise ValueError(f"{path} holds no samples. Make some with `seal-peft make-data`.")
    for line, sample in enumerate(samples, start=1):
        try:
            score = get_task(sample.task).score
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: Field 'task': {error}") from error
        try:
            score("0", sample.answers)  # a digit, because the rule of `lines` reads numbers
        except ValueError as error:
            raise ValueError(
                f"{path}, line {line}: Field 'answers': the rule of {sample.task!r} cannot read "
                f"{sample.answers!r:.70} ({error}). Give answers of the kind that it scores, or another task; "
                "docs/tasks.md has the rules."
            ) from error
    return samples


def check_held_out(systems: Sequence[System], samples: Sequence[Sample], test_file: str) -> None:
    """Make sure that no adapter was trained on what it is asked, as far as the `run.json` beside it tells.

    Args:
        systems: Who answers; adapters on the Hub, and merged models, bring no record.
        samples: What is asked, in the order of the file.
        test_file: Where they come from.

    Raises:
        ValueError: Some of them were in the training data of an adapter; the message names the lines.
    """
    for system in systems:
        learned = {prompt for adapter in system.adapters for prompt in trained_prompts(adapter)}
        seen = [line for line, sample in enumerate(samples, start=1) if prompt_hash(sample) in learned]
        if seen:
            lines = ", ".join(map(str, seen[:5])) + (", ..." if len(seen) > 5 else "")
            raise ValueError(
                f"{len(seen)} of the {len(samples)} samples in {test_file} (lines {lines}) were in the training data "
                f"of {system.name!r}, so its score would say nothing about others. Give samples that were held out: "
                "rows of your own that training has not seen, or those of `seal-peft make-data --split test`."
            )


def check_system(system: System, longest: int, beyond: bool) -> int | None:
    """Make sure, without any weights, that a system can be loaded and reads samples as long as these.

    A merged model that goes without the scales that were not merged into it is warned about.

    Args:
        system: What is to answer.
        longest: Tokens of the longest prompt with its right answer.
        beyond: Whether it may be asked beyond its window; a table of positions has nothing there.

    Returns:
        Tokens that it reaches, context extension of its adapter included; `None` where there is no such limit.

    Raises:
        ValueError: The adapter is broken or made for another model, or the samples are too long.
    """
    config: Any = load_config(system.model)
    if system.name != BASE and not system.adapters and (rest := Path(system.model) / REST).is_dir():
        logger.warning(
            "System %r is the model without the scales that were not merged into it (%s). With them it is "
            "--model_name_or_path %s --adapters %s.",
            *(system.name, rest, system.model, rest),
        )
    window = reach_of_folder(config)
    for adapter in system.adapters:
        adapted = check_adapter(system.model, adapter)
        # Of several, the one that extends the context counts.
        if adapted is not None and (len(system.adapters) == 1 or (reach(adapted) or 0) > (window or 0)):
            config, window = adapted.config, reach(adapted)
    try:
        check_window(config, longest, window, beyond)
    except ValueError as error:
        hint = " Other systems are evaluated without it by --skip_base." if system.name == BASE else ""
        raise ValueError(f"System {system.name!r}: {error}{hint}") from error
    return window
