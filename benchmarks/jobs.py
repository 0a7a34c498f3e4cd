"""What benchmarks that train many small adapters share: samples, loss, answers, and jobs for several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from seal_peft.data import make_samples, write_samples
from seal_peft.generation import generate_answers, make_batches
from seal_peft.loading import load_tokenizer
from seal_peft.statistics import mean_interval
from seal_peft.tasks import TASKS, Sample
from seal_peft.tokens import AnswerCollator, encode_prompt

Part = tuple[int, int, int, int]


def make_lines(model: str, folder: Path, files: dict[str, list[Part]]) -> None:
    """Write the files of line retrieval that are not there yet, each part made in a process of its own.

    Args:
        model: Model whose tokenizer the samples are fitted to.
        folder: Where to.
        files: Parts by the name of the file, each with length in tokens, contexts, questions of each, and seed. The
            names of test files begin with `test`.
    """
    missing = {name: parts for name, parts in files.items() if not (folder / f"{name}.jsonl").is_file()}
    with ProcessPoolExecutor() as pool:
        made = {name: [pool.submit(_lines, model, name, *part) for part in parts] for name, parts in missing.items()}
        for name, futures in made.items():
            write_samples(folder / f"{name}.jsonl", [sample for future in futures for sample in future.result()])


def _lines(model: str, name: str, length: int, contexts: int, questions: int, seed: int) -> list[Sample]:
    numbers = {"lengths": [length], "num_samples": contexts, "questions_per_context": questions, "seed": seed}
    split = "test" if name.startswith("test") else "train"
    return make_samples("lines", tokenizer=load_tokenizer(model), split=split, **numbers)


@torch.inference_mode()
def mean_loss(model: Any, rows: Iterable[dict[str, list[int]]], collator: AnswerCollator) -> float:
    """Return the mean over rows of the loss on the answers."""
    losses = []
    for row in rows:
        batch = {key: v.to(model.device) if torch.is_tensor(v) else v for key, v in collator([row]).items()}
        losses.append(model(**batch).loss.item())
    return mean(losses)


def score_answers(model: Any, tokenizer: Any, samples: Sequence[Sample], batch_size: int) -> list[float]:
    """Let a model answer samples of line retrieval; return right and wrong."""
    task = TASKS["lines"]
    prompts = [encode_prompt(sample, tokenizer) for sample in samples]
    found: dict[int, float] = {}
    for batch in make_batches(prompts, [task.max_new_tokens] * len(prompts), batch_size):
        answers = generate_answers(model, tokenizer, [prompts[i] for i in batch], task.max_new_tokens)
        found |= {i: task.score(answer, samples[i].answers) for i, answer in zip(batch, answers, strict=True)}
    return [found[index] for index in range(len(samples))]


def interval_over_seeds(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and 95% interval over samples, each of them the mean over seeds: seeds answer the same samples."""
    value, low, high = mean_interval([mean(own) for own in zip(*scores, strict=True)])
    return {"mean": value, "low": low, "high": high, "n": len(scores[0])}


def claimed(folder: Path, jobs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Yield the jobs that no other process has begun since `spread` was called."""
    for job in jobs:
        name = "-".join(f"{part:g}" if isinstance(part, float) else str(part) for part in job)
        try:
            (folder / f"{name}.claim").touch(exist_ok=False)
        except FileExistsError:
            continue
        yield job


def spread(folder: Path, words: Sequence[str], workers: int) -> None:
    """Run a Python script in worker processes, spread over the GPUs, and wait for all of them.

    Args:
        folder: Work folder, in which the workers claim their jobs.
        words: Path of the script and its command line.
        workers: Number of processes.

    Raises:
        SystemExit: One of them failed.
    """
    for claim in folder.glob("*.claim"):
        claim.unlink()
    gpus = max(1, torch.cuda.device_count())
    running = []
    for number in range(workers):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(number % gpus)}
        running.append(subprocess.Popen([sys.executable, *words], env=environment))
    if any([process.wait() for process in running]):
        sys.exit(f"a worker failed: {' '.join(words)}")
