"""What benchmarks that train many small adapters share: samples, loss, answers, and jobs for several processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from seal_peft.data import make_samples, write_samples
from seal_peft.generation import generate_answers, make_batches
from seal_peft.loading import load_tokenizer
from seal_peft.reproduce.share import make_all
from seal_peft.statistics import mean_interval
from seal_peft.tasks import TASKS, Sample
from seal_peft.tokens import AnswerCollator, encode_question

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
    samples = make_samples("lines", tokenizer=load_tokenizer(model), split=split, **numbers)
    # Parts of a length differ in their seed alone, which ids do not tell.
    return [replace(sample, id=f"{sample.id}-{seed}") for sample in samples]


@torch.inference_mode()
def mean_loss(model: Any, rows: Iterable[dict[str, list[int]]], collator: AnswerCollator) -> float:
    """Return the mean over rows of the loss on the answers."""
    losses = []
    for row in rows:
        batch = {key: v.to(model.device) if torch.is_tensor(v) else v for key, v in collator([row]).items()}
        losses.append(model(**batch).loss.item())
    return mean(losses)


def score_answers(model: Any, tokenizer: Any, samples: Sequence[Sample], batch_tokens: int) -> list[float]:
    """Let a model answer samples of line retrieval, as many together as such tokens hold; return right and wrong."""
    task = TASKS["lines"]
    prompts, drafts = zip(*(encode_question(sample, tokenizer) for sample in samples), strict=True)
    found: dict[int, float] = {}
    for batch in batches_of(prompts, task.max_new_tokens, batch_tokens):
        asked, guessed = ([own[i] for i in batch] for own in (prompts, drafts))
        answers = generate_answers(model, tokenizer, asked, task.max_new_tokens, drafts=guessed)
        found |= {i: task.score(answer, samples[i].answers) for i, answer in zip(batch, answers, strict=True)}
    return [found[index] for index in range(len(samples))]


def batches_of(prompts: Sequence[list[int]], limit: int, tokens: int) -> list[list[int]]:
    """Indices of prompts that so many tokens hold together, with answers of up to `limit` tokens."""
    longest = max(map(len, prompts)) + limit
    return make_batches(prompts, [limit] * len(prompts), max(1, tokens // longest))


def interval_over_seeds(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and 95% interval over samples, each of them the mean over seeds: seeds answer the same samples."""
    value, low, high = mean_interval([mean(own) for own in zip(*scores, strict=True)])
    return {"mean": value, "low": low, "high": high, "n": len(scores[0])}


class TimeIsUpError(Exception):
    """No job may begin any more."""


def do_jobs(jobs: Mapping[Path, Callable[[], object]], until: float = math.inf) -> bool:
    """Do the jobs whose last file is not there yet, sharing them with the other processes that are at the same.

    A process that is killed leaves its job to the next who asks. A job that fails keeps nobody from the others.

    Args:
        jobs: What to do, by the path of the file that it writes last.
        until: When the last job may begin, as `time.time()` counts.

    Returns:
        Whether all jobs are done.

    Raises:
        SystemExit: Some failed.
    """
    failed = []

    def begin(path: Path, do: Callable[[], object]) -> None:
        if time.time() > until:
            raise TimeIsUpError
        try:
            do()
        except Exception:  # whatever it was, it is shown, and the process ends with an error after the other jobs
            traceback.print_exc()
            failed.append(path)
        else:
            print(path, flush=True)

    with suppress(TimeIsUpError):
        make_all({path: partial(begin, path, do) for path, do in jobs.items()})
    if failed:
        sys.exit(f"{len(failed)} jobs failed, {failed[0]} first.")
    return all(path.is_file() for path in jobs)


def spread(words: Sequence[str], workers: int) -> None:
    """Run a Python script in worker processes, spread over the GPUs, and wait for all of them.

    Args:
        words: Path of the script and its command line.
        workers: Number of processes.

    Raises:
        SystemExit: One of them failed; what the others finished stays.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")  # an empty one hides all GPUs from the workers, too
    gpus = list(map(str, range(max(1, torch.cuda.device_count())))) if seen is None else seen.split(",")
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    running = []
    try:
        for number in range(workers):
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
            running.append(subprocess.Popen([sys.executable, *words], env=environment))
        if failed := sum(process.wait() != 0 for process in running):
            sys.exit(f"{failed} of {workers} workers failed; the same command goes on from what is finished.")
    finally:  # an interrupt ends the workers, too
        for process in running:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)
