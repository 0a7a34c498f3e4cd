"""Measure: the base model and any number of adapters answer the same prompts, scored with intervals.

seal-peft evaluate --model_name_or_path smollm2 --adapters runs/demo/adapter --test_file runs/demo/test.jsonl
--output_dir runs/demo/eval
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from .files import alone_in, write_json
from .folders import check_output_folder
from .generation import generate_answers, make_batches
from .guard import Guard, make_guard, window_losses
from .loading import (
    DTYPE_HELP,
    Dtype,
    load_adapter,
    load_model,
    locate_model,
    pick_device,
    pick_dtype,
    unload_adapter,
)
from .predictions import Predictions, fingerprint, identity
from .provenance import provenance
from .scores import LABELS, compute_metrics
from .statistics import RULER_THRESHOLD
from .systems import Questions, System, check_held_out, check_system, name_systems, read_questions, read_test_file
from .tasks import Sample, get_task
from .together import check_together


@dataclass
class EvaluateArguments:
    """What to evaluate, on what, and where to put the results."""

    model_name_or_path: str = field(metadata={"help": "Base model: Hub id, local folder, or `smollm2`."})
    test_file: str = field(
        metadata={
            "help": "Samples, one JSON row each: what `seal-peft make-data` writes, or your own.",
            "aliases": ["--task_file"],
        }
    )
    output_dir: str = field(metadata={"help": "Folder for predictions.jsonl and metrics.json."})
    adapters: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Adapters (folder, Hub id) of any PEFT method, PATH or NAME=PATH; PATH+PATH for LoRA and SEAL."
        },
    )
    models: list[str] = field(
        default_factory=list, metadata={"help": "Further plain models, e.g. merged ones, as PATH or NAME=PATH."}
    )
    skip_base: bool = field(default=False, metadata={"help": "Do not evaluate the base model itself."})
    allow_beyond_window: bool = field(
        default=False,
        metadata={"help": "Ask systems beyond their windows, too: the base beside an adapter that extends it."},
    )
    guard: bool = field(
        default=False,
        metadata={
            "help": "Measure harm to short contexts, too: perplexity of essays, questions about a passage, small "
            "instructions."
        },
    )
    per_device_eval_batch_size: int = field(
        default=8,
        metadata={"help": "Prompts of the greatest length generated together; of shorter ones, as many tokens."},
    )
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer; default: the task's own."})
    effective_threshold: float = field(
        default=RULER_THRESHOLD, metadata={"help": "Mean score that a length must reach to count as effective."}
    )
    dtype: Dtype = field(default="auto", metadata={"help": DTYPE_HELP})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention function, e.g. sdpa."})


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Let every system answer every sample, and write `predictions.jsonl` and `metrics.json`.

    Answers that an earlier call finished are kept where files, prompts and settings are still the same; a changed
    adapter is evaluated again. Under `accelerate launch` the processes share the batches, and the first one writes
    the results.

    Args:
        arguments: See `EvaluateArguments`.

    Returns:
        What `metrics.json` holds; nothing in processes other than the first.

    Raises:
        ValueError: Bad rows, names, lengths or adapters, samples that an adapter was trained on, or an output folder
            of another stage or of a process that is at work; raised before any model is loaded.
    """
    systems = name_systems(arguments.model_name_or_path, arguments.adapters, arguments.models, arguments.skip_base)
    _check_numbers(arguments)
    check_output_folder(Path(arguments.output_dir), "evaluate")
    samples = read_test_file(arguments.test_file)
    for system in systems:
        check_together(system.adapters)  # a mistyped name shows before all prompts are turned into tokens
    check_held_out(systems, samples, arguments.test_file)
    models = list(dict.fromkeys(system.model for system in systems))
    guard = make_guard(models) if arguments.guard else Guard()
    asked = [*samples, *guard.samples]
    questions = {model: read_questions(model, asked, arguments.max_new_tokens) for model in models}
    windows = {
        system.name: check_system(system, questions[system.model].longest, arguments.allow_beyond_window)
        for system in systems
    }

    batches = {
        model: _batches(own, len(guard.samples), arguments.per_device_eval_batch_size)
        for model, own in questions.items()
    }
    keys = {
        system.name: _fingerprints(
            system, asked, questions[system.model], batches[system.model], guard.essays.get(system.model), arguments
        )
        for system in systems
    }
    # A process that is done may wait for hours for one that is not.
    processes = PartialState(cpu=pick_device().type == "cpu", timeout=timedelta(days=7))
    folder, first = Path(arguments.output_dir), processes.is_main_process
    # To the end: a second call would drop rows that the first one counts on.
    with alone_in(folder) if first else nullcontext():
        path = folder / "predictions.jsonl"
        if first:
            Predictions(path).keep_only(keys)
        processes.wait_for_everyone()
        predictions = Predictions(path, process=processes.process_index if processes.num_processes > 1 else None)
        for model in models:
            sharing = [system for system in systems if system.model == model]
            _answer_all(sharing, asked, questions[model], batches[model], guard, keys, predictions, arguments)
        processes.wait_for_everyone()
        if not first:
            return {}

        predictions = Predictions(path)
        predictions.keep_only(keys)
        rows = {name: [predictions[key] for key in own] for name, own in keys.items()}
        metrics = compute_metrics(samples, guard, systems, rows, arguments.effective_threshold)
        metrics |= {"windows": windows, "arguments": asdict(arguments), **provenance()}
        write_json(folder / "metrics.json", metrics)
    return metrics


def _check_numbers(arguments: EvaluateArguments) -> None:
    for name, value in (
        ("per_device_eval_batch_size", arguments.per_device_eval_batch_size),
        ("max_new_tokens", arguments.max_new_tokens),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} was given; use at least 1.")
    if not 0.0 <= arguments.effective_threshold <= 1.0:
        raise ValueError(f"effective_threshold={arguments.effective_threshold} was given; use 0.0 to 1.0.")


def _fingerprints(
    system: System,
    asked: list[Sample],
    questions: Questions,
    batches: list[list[int]],
    essays: list[list[int]] | None,
    arguments: EvaluateArguments,
) -> list[str]:
    """Cover all that changes an answer or its row: in bfloat16 also the prompts that share its batch, and all drafts.

    One for each sample, and a last one for the guard's essays, if they are asked for.
    """
    files = [identity(locate_model(system.model)), [*map(identity, system.adapters)]]
    settings = [str(pick_dtype(arguments.dtype)), pick_device().type, arguments.attn_implementation, questions.ends]
    keys = [""] * len(asked)
    for batch in batches:
        together = fingerprint([[questions.prompts[i], questions.drafts[i], questions.limits[i]] for i in batch])
        for place, index in enumerate(batch):
            keys[index] = fingerprint(system.name, files, settings, together, place, asdict(asked[index]))
    return keys if essays is None else [*keys, fingerprint(system.name, files, settings, essays)]


def _batches(questions: Questions, num_guard: int, batch_size: int) -> list[list[int]]:
    """What is generated together; the guard's samples apart, so that the batches of the others stay what they are."""
    prompts, limits = questions.prompts, questions.limits
    cut = len(prompts) - num_guard
    batches = make_batches(prompts[:cut], limits[:cut], batch_size)
    if num_guard:
        longest, short = max(map(len, prompts[:cut])), max(map(len, prompts[cut:]))
        short_batches = make_batches(prompts[cut:], limits[cut:], max(1, batch_size * longest // short))
        batches += [[cut + index for index in batch] for batch in short_batches]
    return batches


def _answer_all(
    systems: list[System],
    asked: list[Sample],
    questions: Questions,
    batches: list[list[int]],
    guard: Guard,
    keys: dict[str, list[str]],
    predictions: Predictions,
    arguments: EvaluateArguments,
) -> None:
    """Let the systems that share a model answer this process's batches, as far as they have not been answered yet."""
    todo = [system for system in systems if any(key not in predictions for key in keys[system.name])]
    if not todo:
        return
    processes = PartialState()
    batches = batches[processes.process_index :: processes.num_processes]
    model = load_model(systems[0].model, arguments.dtype, arguments.attn_implementation).eval()
    for system in todo:
        answering = load_adapter(model, *system.adapters) if system.adapters else model
        own = keys[system.name]
        if guard.samples and own[-1] not in predictions and processes.is_main_process:
            losses = window_losses(answering, guard.essays[system.model])
            predictions.add([{"system": system.name, "id": "guard", "losses": losses, "fingerprint": own[-1]}])
        description = f"Evaluating {system.name}"
        total = sum(map(len, batches))
        with tqdm(total=total, desc=description, unit="sample", disable=not processes.is_main_process) as progress:
            for batch in batches:
                missing = [index for index in batch if own[index] not in predictions]
                if missing:
                    # The whole batch again: an answer must not depend on where an earlier call was interrupted.
                    prompts, drafts = ([own[i] for i in batch] for own in (questions.prompts, questions.drafts))
                    limit, ends = questions.limits[batch[0]], questions.ends
                    answers = generate_answers(answering, questions.tokenizer, prompts, limit, ends, drafts)
                    answer_of = dict(zip(batch, answers, strict=True))
                    predictions.add(_row(system, asked[i], answer_of[i], own[i]) for i in missing)
                progress.update(len(batch))
        if system.adapters:
            model = unload_adapter(answering)


def _row(system: System, sample: Sample, answer: str, key: str) -> dict[str, Any]:
    task = get_task(sample.task)
    return {
        "system": system.name,
        "id": sample.id,
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "answer": answer,
        "answers": sample.answers,
        "score": task.score(answer, sample.answers),
        **{name: score(answer, sample.answers) for name, score in task.more_scores.items()},
        **{name: value for name, value in sample.meta.items() if name in LABELS},
        "fingerprint": key,
    }
