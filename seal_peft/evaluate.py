"""Measure: the base model and any number of adapters answer the same prompts, scored with intervals.

seal-peft evaluate --model_name_or_path smollm2 --adapters runs/demo/adapter --test_file runs/demo/test.jsonl
--output_dir runs/demo/eval
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .assets import resolve_model
from .data import check_window, encode_prompt, read_samples
from .generation import generate_answers
from .loading import is_adapter, load_adapter, load_config, load_model, load_tokenizer
from .provenance import provenance, write_json
from .statistics import mean_interval, paired_difference
from .tasks import Sample, get_task

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
    dtype: str = field(default="auto", metadata={"help": "auto (bfloat16 where the hardware has it) or a dtype name."})
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


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Let every system answer every sample, and write `predictions.jsonl` and `metrics.json`.

    Rows that an earlier, interrupted call finished are kept, if sample, system and settings are still the same.

    Args:
        arguments: See `EvaluateArguments`.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: Bad rows, names or lengths; raised before any model is loaded.
    """
    systems = _systems(arguments)
    samples = read_samples(arguments.test_file)
    if not samples:
        raise ValueError(f"{arguments.test_file} holds no samples. Make some with `seal-peft make-data`.")
    for name in {sample.task for sample in samples}:
        get_task(name)
    for model in {system.model for system in systems}:
        check_window(load_config(model), max(sample.length for sample in samples))

    predictions = Predictions(Path(arguments.output_dir) / "predictions.jsonl")
    for model_name in dict.fromkeys(system.model for system in systems):
        _answer_all(model_name, [s for s in systems if s.model == model_name], samples, arguments, predictions)
    metrics = {
        **summarise(systems, samples, predictions, arguments),
        "arguments": asdict(arguments),
        **provenance(),
    }
    write_json(Path(arguments.output_dir) / "metrics.json", metrics)
    return metrics


def _systems(arguments: EvaluateArguments) -> list[System]:
    systems = [] if arguments.skip_base else [System(BASE, arguments.model_name_or_path)]
    for text in arguments.adapters:
        name, path = _named(text)
        if Path(path).exists() and not is_adapter(path):
            raise ValueError(f"{path} is not an adapter folder: there is no adapter_config.json. Plain models go to --models.")
        systems.append(System(name, arguments.model_name_or_path, path))
    for text in arguments.models:
        name, path = _named(text)
        systems.append(System(name, path))
    names = [system.name for system in systems]
    if not systems or len(set(names)) < len(names):
        raise ValueError(f"Systems need distinct names, at least one; got {names}. Name them as NAME=PATH.")
    return systems


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).name, text)


def _answer_all(
    model_name: str,
    systems: list[System],
    samples: list[Sample],
    arguments: EvaluateArguments,
    predictions: Predictions,
) -> None:
    """Let the systems that share a model answer what they have not answered yet; the model is loaded once."""
    work = {system: predictions.missing(system, samples, arguments) for system in systems}
    if not any(work.values()):
        return
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, arguments.dtype, arguments.attn_implementation).eval()
    for system, todo in work.items():
        if not todo:
            continue
        wrapped = model if system.adapter is None else load_adapter(model, system.adapter)
        prompts = [encode_prompt(sample, tokenizer) for sample in todo]
        limit = arguments.max_new_tokens or max(get_task(sample.task).max_new_tokens for sample in todo)
        answers = generate_answers(wrapped, tokenizer, prompts, limit, arguments.per_device_eval_batch_size)
        for index, answer in tqdm(answers, total=len(todo), desc=f"Evaluating {system.name}", unit="sample"):
            predictions.add(system, todo[index], answer, arguments)
        if system.adapter is not None:
            model = wrapped.unload()


class Predictions:
    """The rows of `predictions.jsonl`: appended one by one, read back after a restart.

    A row counts for a sample only if its fingerprint is that of the sample, the system's files and the settings, so
    a changed adapter is never taken for the one that was evaluated before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            self._rows = {row["fingerprint"]: row for row in map(json.loads, whole)}
            # A kill in the middle of a write leaves half a line, which must not swallow the next row.
            path.write_text("".join(whole), encoding="utf-8")

    def missing(self, system: System, samples: list[Sample], arguments: EvaluateArguments) -> list[Sample]:
        """Return the samples that this system has not answered under these settings."""
        return [s for s in samples if _fingerprint(system, s, arguments) not in self._rows]

    def add(self, system: System, sample: Sample, answer: str, arguments: EvaluateArguments) -> None:
        """Score an answer and append its row."""
        row = {
            "system": system.name,
            "id": sample.id,
            "task": sample.task,
            "length": sample.length,
            "depth": sample.depth,
            "answer": answer,
            "answers": sample.answers,
            "score": get_task(sample.task).score(answer, sample.answers),
            "fingerprint": _fingerprint(system, sample, arguments),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._rows[row["fingerprint"]] = row

    def scores(self, system: System, samples: list[Sample], arguments: EvaluateArguments) -> list[float]:
        """Return the score of every sample, in order."""
        return [self._rows[_fingerprint(system, sample, arguments)]["score"] for sample in samples]


def _fingerprint(system: System, sample: Sample, arguments: EvaluateArguments) -> str:
    settings = [arguments.dtype, arguments.attn_implementation, arguments.max_new_tokens]
    text = json.dumps([system.name, identity(system.model), identity(system.adapter), settings, asdict(sample)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def identity(path: str | None) -> list[Any]:
    """What tells one version of a model or adapter from the next: its small files whole, its large ones by size and time."""
    folder = Path(resolve_model(path)) if path else None
    if folder is None or not folder.is_dir():
        return [path]
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
    return [
        [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
        if file.stat().st_size < 2**24
        else [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
    ]


def summarise(
    systems: list[System], samples: list[Sample], predictions: Predictions, arguments: EvaluateArguments
) -> dict[str, Any]:
    """Return means with intervals: over all samples by system (`systems`), and by task, length and depth (`cells`)."""
    summaries: dict[str, Any] = {}
    cells: list[dict[str, Any]] = []
    base = next((system for system in systems if system.name == BASE), None)
    for system in systems:
        other = base if base is not None and system is not base else None

        def summary(group: list[Sample], system: System = system, other: System | None = other) -> dict[str, Any]:
            scores = predictions.scores(system, group, arguments)
            return _summary(scores, predictions.scores(other, group, arguments) if other else None)

        summaries[system.name] = summary(samples)
        for (task, length, depth), group in _groups(samples).items():
            cells.append({"system": system.name, "task": task, "length": length, "depth": depth, **summary(group)})
    return {"systems": summaries, "cells": cells}


def _summary(scores: list[float], base_scores: list[float] | None) -> dict[str, Any]:
    mean, low, high = mean_interval(scores)
    result: dict[str, Any] = {"accuracy": mean, "low": low, "high": high, "n": len(scores)}
    if base_scores is not None:
        difference, low, high = paired_difference(scores, base_scores)
        result["difference_to_base"] = {"mean": difference, "low": low, "high": high}
    return result


def _groups(samples: list[Sample]) -> dict[tuple[str, int, float | None], list[Sample]]:
    """Samples by task and length (depth `None`), and by depth too where several samples share one."""
    groups: dict[tuple[str, int, float | None], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.task, sample.length, None].append(sample)
    for (task, length, _), group in list(groups.items()):
        if len({sample.depth for sample in group}) < len(group):
            for sample in group:
                if sample.depth is not None:
                    groups[task, length, sample.depth].append(sample)
    return dict(groups)
