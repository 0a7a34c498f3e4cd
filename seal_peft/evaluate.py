"""Measure: the base model and any number of adapters answer the same prompts, scored with intervals.

seal-peft evaluate --model_name_or_path smollm2 --adapters runs/demo/adapter --test_file runs/demo/test.jsonl
--output_dir runs/demo/eval
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data import check_window, read_samples, window_of
from .files import write_json
from .generation import generate_answers, make_batches
from .loading import (
    DTYPE_HELP,
    Dtype,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    locate_model,
    pick_device,
    pick_dtype,
    read_adapter,
    unload_adapter,
)
from .predictions import Predictions, fingerprint, identity
from .provenance import provenance
from .statistics import summarise
from .tasks import Sample, get_task
from .tokens import encode_prompt, encode_training

BASE = "base"


@dataclass
class EvaluateArguments:
    """What to evaluate, on what, and where to put the results."""

    model_name_or_path: str = field(metadata={"help": "Base model: Hub id, local folder, or `smollm2`."})
    test_file: str = field(metadata={"help": "Samples, one JSON row each, as `seal-peft make-data` writes them."})
    output_dir: str = field(metadata={"help": "Folder for predictions.jsonl and metrics.json."})
    adapters: list[str] = field(
        default_factory=list,
        metadata={"help": "Adapter folders or Hub ids of any PEFT method, as PATH or NAME=PATH."},
    )
    models: list[str] = field(
        default_factory=list, metadata={"help": "Further plain models, e.g. merged ones, as PATH or NAME=PATH."}
    )
    skip_base: bool = field(default=False, metadata={"help": "Do not evaluate the base model itself."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Prompts generated together."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer; default: the task's own."})
    dtype: Dtype = field(default="auto", metadata={"help": DTYPE_HELP})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention function, e.g. sdpa."})


@dataclass(frozen=True)
class System:
    """One thing that answers: a plain model, or a base model with an adapter.

    Attributes:
        name: Name in the results.
        model: Model to load.
        adapter: Adapter to load onto it, if any.
    """

    name: str
    model: str
    adapter: str | None = None


@dataclass(frozen=True)
class Questions:
    """The samples as one model reads them.

    Attributes:
        tokenizer: The model's tokenizer.
        prompts: Token ids of each sample's prompt.
        limits: Longest answer to each, in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    limits: list[int]


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Let every system answer every sample, and write `predictions.jsonl` and `metrics.json`.

    Answers that an earlier call finished are kept where files, prompts and settings are still the same; a changed
    adapter is evaluated again.

    Args:
        arguments: See `EvaluateArguments`.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: Bad rows, names, lengths or adapter files; raised before any model is loaded.
    """
    systems = _systems(arguments)
    samples = read_samples(arguments.test_file)
    if not samples:
        raise ValueError(f"{arguments.test_file} holds no samples. Make some with `seal-peft make-data`.")
    for name in {sample.task for sample in samples}:
        get_task(name)
    for system in systems:
        if system.adapter:
            read_adapter(system.adapter)
    questions = {model: _read(model, samples, arguments) for model in dict.fromkeys(s.model for s in systems)}

    keys = {system.name: _fingerprints(system, samples, questions[system.model], arguments) for system in systems}
    predictions = Predictions(Path(arguments.output_dir) / "predictions.jsonl")
    predictions.keep_only(keys)
    for model, asked in questions.items():
        sharing = [system for system in systems if system.model == model]
        _answer_all(sharing, samples, asked, keys, predictions, arguments)

    scores = {name: [predictions.score(key) for key in own] for name, own in keys.items()}
    metrics = {**summarise(samples, scores, BASE), "arguments": asdict(arguments), **provenance()}
    write_json(Path(arguments.output_dir) / "metrics.json", metrics)
    return metrics


def _systems(arguments: EvaluateArguments) -> list[System]:
    base = arguments.model_name_or_path
    systems = [] if arguments.skip_base else [System(BASE, base)]
    systems += [System(name, base, path) for name, path in map(_named, arguments.adapters)]
    systems += [System(name, path) for name, path in map(_named, arguments.models)]
    names = [system.name for system in systems]
    if not systems or len(set(names)) < len(names):
        raise ValueError(f"Systems need distinct names, at least one; got {names}. Name them as NAME=PATH.")
    for name, value in (
        ("per_device_eval_batch_size", arguments.per_device_eval_batch_size),
        ("max_new_tokens", arguments.max_new_tokens),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} was given; use at least 1.")
    return systems


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).resolve().name, text)


def _read(model: str, samples: list[Sample], arguments: EvaluateArguments) -> Questions:
    """Tokenise the samples for a model, and make sure that its window holds them together with their answers."""
    config, tokenizer = load_config(model), load_tokenizer(model)
    prompts, longest = [], 0
    for sample in tqdm(samples, desc="Tokenising", unit="sample", delay=1.0):
        prompts.append(encode_prompt(sample, tokenizer))
        longest = max(longest, len(encode_training(sample, tokenizer)["input_ids"]))
    check_window(config, longest)
    limits = [arguments.max_new_tokens or get_task(sample.task).max_new_tokens for sample in samples]
    window = window_of(config)
    if window is not None:
        # Right answers end inside the window; babble must not run past it, where learned positions have no entry.
        limits = [max(1, min(limit, window - len(prompt))) for limit, prompt in zip(limits, prompts, strict=True)]
    return Questions(tokenizer, prompts, limits)


def _fingerprints(
    system: System, samples: list[Sample], questions: Questions, arguments: EvaluateArguments
) -> list[str]:
    """Cover all that changes an answer or its row. The batch size is not among it: padding is masked."""
    files = [identity(locate_model(system.model)), system.adapter and identity(system.adapter)]
    settings = [str(pick_dtype(arguments.dtype)), pick_device().type, arguments.attn_implementation]
    return [
        fingerprint(system.name, files, settings, limit, prompt, asdict(sample))
        for sample, prompt, limit in zip(samples, questions.prompts, questions.limits, strict=True)
    ]


def _answer_all(
    systems: list[System],
    samples: list[Sample],
    questions: Questions,
    keys: dict[str, list[str]],
    predictions: Predictions,
    arguments: EvaluateArguments,
) -> None:
    """Let the systems that share a model answer what they have not answered yet; the model is loaded once."""
    todo = [system for system in systems if any(key not in predictions for key in keys[system.name])]
    if not todo:
        return
    model = load_model(systems[0].model, arguments.dtype, arguments.attn_implementation).eval()
    for system in todo:
        # An adapter that does not fit the model is to be found now, not after hours of answers by the others.
        if system.adapter:
            model = unload_adapter(load_adapter(model, system.adapter))
    batches = make_batches(questions.prompts, questions.limits, arguments.per_device_eval_batch_size)
    for system in todo:
        answering = load_adapter(model, system.adapter) if system.adapter else model
        own = keys[system.name]
        with tqdm(total=len(own), desc=f"Evaluating {system.name}", unit="sample") as progress:
            for batch in batches:
                missing = [index for index in batch if own[index] not in predictions]
                if missing:
                    # The whole batch again: an answer must not depend on where an earlier call was interrupted.
                    prompts = [questions.prompts[index] for index in batch]
                    answers = generate_answers(answering, questions.tokenizer, prompts, questions.limits[batch[0]])
                    answer_of = dict(zip(batch, answers, strict=True))
                    predictions.add(_row(system, samples[i], answer_of[i], own[i]) for i in missing)
                progress.update(len(batch))
        if system.adapter:
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
        "fingerprint": key,
    }
