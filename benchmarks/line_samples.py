"""Samples of line retrieval for benchmarks."""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from seal_peft.data import make_samples
from seal_peft.loading import load_tokenizer
from seal_peft.tasks import Sample, get_task

PARTS = 16  # of a length, each with a seed of its own, so that the samples do not depend on the machine
FEW = 2  # samples of a part, for which no processes are started


def lines(model: str, split: str, lengths: list[int], count: int, seed: int = 0) -> list[Sample]:
    """Make samples of line retrieval, each length in parts; many of them by as many processes as there are cores."""
    parts = [
        (model, split, length, len(range(part, count, PARTS)), 1000 * seed + part)
        for length in lengths
        for part in range(min(PARTS, count))
    ]
    if count <= FEW * PARTS:
        return [sample for part in parts for sample in _lines(part)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [sample for made in pool.map(_lines, parts) for sample in made]


def _lines(part: tuple[str, str, int, int, int]) -> list[Sample]:
    model, split, length, count, seed = part
    made = make_samples(
        "lines", tokenizer=load_tokenizer(model), split=split, lengths=[length], num_samples=count, seed=seed
    )
    return [replace(sample, id=f"{sample.id}-{seed}") for sample in made]


def samples_of(options: argparse.Namespace, length: int, contexts: int, split: str = "train") -> list[Sample]:
    """Make `num_samples` samples of one length that share so many contexts, their questions spread over the depths."""
    per_context = options.num_samples // contexts
    first = lines(options.model, split, [length], contexts)
    made = []
    for number, sample in enumerate(first):
        for question in range(per_context):
            depth = ((number + 0.5) / contexts + question) / per_context
            size = sample.meta["size"]
            other = get_task("lines").make(seed=sample.seed, size=size, depth=depth, split=split, questions=1)
            made.append(replace(other, id=f"{length}-{number}-{question}", length=length, n_tokens=sample.n_tokens))
    return made
