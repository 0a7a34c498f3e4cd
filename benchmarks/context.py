"""SEAL on top of context extension, in the shape of the paper's table 2: SmolLM2 (8K native) from 4K to 32K tokens.

Every extension answers alone, under SEAL-C, and under SEAL-C with temperatures; all are trained on the same samples,
of mixed lengths up to 31K, at the learning rate that was best for one of them. Three steps, each of which goes on
where it was interrupted; without one, all of them:

    python benchmarks/context.py data  --folder runs/context            # CPU; needs the tokenizer and the essays only
    python benchmarks/context.py run   --folder runs/context --workers 8
    python benchmarks/context.py merge --folder runs/context --output results/context-smollm2.json

`run` shares systems and tasks out to `--workers` processes, which are spread over the GPUs, and begins none after
`--minutes`. `merge` takes all work that is in the folder, whoever did it. A trial on a CPU:

    python benchmarks/context.py data --folder /tmp/c --lengths 1024 --train_lengths 1024 --contexts 2 --num_samples 2
    python benchmarks/context.py run  --folder /tmp/c --systems ntk self-extend+seal-c+temperature
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

from context_systems import EXTENSIONS, METHODS, SYSTEMS, adapter_is_there, by_cost, is_trained
from context_table import merge
from jobs import batches_of, do_jobs, spread
from peft import get_peft_model

from seal_peft import SealConfig
from seal_peft.data import make_samples, read_samples, write_samples
from seal_peft.files import write_json
from seal_peft.generation import generate_answers
from seal_peft.loading import load_adapter, load_model, load_tokenizer, unload_adapter
from seal_peft.provenance import provenance
from seal_peft.tasks import Sample, get_task
from seal_peft.tokens import encode_prompt
from seal_peft.train import SealTrainingArguments, TrainArguments, train

TASKS = ("lines", "needle")
# What the learning rate of all is searched with.
SEARCHED_TASK, SEARCHED = "lines", "ntk+seal-c+temperature"
# Longer training texts are fewer, so that no length has more tokens than this one.
FULL_LENGTH = 12_288
# Keys and values of so many tokens of SmolLM2 take 4.6 GB.
BATCH_TOKENS = 200_000


# -- samples ----------------------------------------------------------------------------------------------------------


def make_data(arguments: argparse.Namespace) -> None:
    """Write the samples that all systems share, each length in a process of its own."""
    jobs = {}
    for task in arguments.tasks:
        for split in ("train", "test"):
            path = arguments.folder / f"{task}-{split}.jsonl"
            lengths = arguments.train_lengths if split == "train" else arguments.lengths
            if not path.is_file():
                jobs[path] = [(arguments.model, task, split, n, *counts(arguments, split, n)) for n in lengths]
    with ProcessPoolExecutor() as pool:
        made = {path: [pool.submit(_samples, *job) for job in own] for path, own in jobs.items()}
        for path, futures in made.items():
            write_samples(path, [sample for future in futures for sample in future.result()])


def counts(arguments: argparse.Namespace, split: str, length: int) -> tuple[int, int]:
    """How many contexts of a length, and how many questions about each."""
    if split == "test":
        return arguments.num_samples, 1
    return max(1, round(arguments.contexts * min(1, FULL_LENGTH / length))), arguments.questions


def _samples(model: str, task: str, split: str, length: int, num_samples: int, questions: int) -> list[Sample]:
    tokenizer = load_tokenizer(model)
    numbers: dict[str, Any] = {"num_samples": num_samples, "questions_per_context": questions}
    return make_samples(task, tokenizer=tokenizer, split=split, lengths=[length], **numbers)


# -- one system -------------------------------------------------------------------------------------------------------


def make_adapter(arguments: argparse.Namespace, task: str, system: str, folder: Path) -> None:
    """Train a system's scales, or save the extension alone."""
    if is_trained(system):
        train_scales(arguments, task, system, folder, best_rate(arguments))
        return
    extension, _ = SYSTEMS[system]
    config = SealConfig(sites=(), task_type="CAUSAL_LM", **EXTENSIONS[extension])
    get_peft_model(load_model(arguments.model), config).save_pretrained(str(folder))


def train_scales(arguments: argparse.Namespace, task: str, system: str, folder: Path, rate: float) -> None:
    """Train a system's scales; with the same settings, go on where that was interrupted."""
    extension, method = SYSTEMS[system]
    asked = {name: json.dumps(value) for name, value in EXTENSIONS[extension].items()}
    train(
        TrainArguments(
            arguments.model,
            str(arguments.folder / f"{task}-train.jsonl"),
            sites=METHODS[method],
            **asked,
        ),
        SealTrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            gradient_accumulation_steps=arguments.accumulate,
            activation_checkpointing=True,
            seed=arguments.seed,
            disable_tqdm=True,
            logging_steps=0.05,
        ),
    )


@cache
def prompts_of(model: str, path: Path) -> tuple[list[Sample], list[list[int]]]:
    """Samples of a file, and their prompts; once a process."""
    samples, tokenizer = read_samples(path), load_tokenizer(model)
    return samples, [encode_prompt(sample, tokenizer) for sample in samples]


def ask(arguments: argparse.Namespace, task: str, folder: Path) -> None:
    """Answer what has not been answered yet."""
    samples, prompts = prompts_of(arguments.model, arguments.folder / f"{task}-test.jsonl")
    record = folder / "answers.json"
    answered: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    tokenizer, rule, started = load_tokenizer(arguments.model), get_task(task), time.monotonic()
    # Batches are those of all samples, so that a run that goes on pads as one that was never interrupted.
    batches = asked_together(folder.name, prompts, rule.max_new_tokens, arguments.batch_tokens)
    todo = [batch for batch in batches if not {samples[i].id for i in batch} <= answered.keys()]
    if todo:
        model = load_adapter(load_model(arguments.model), str(folder / "adapter"))
    for batch in todo:
        answers = generate_answers(model, tokenizer, [prompts[i] for i in batch], rule.max_new_tokens)
        for i, answer in zip(batch, answers, strict=True):
            answered[samples[i].id] = {"answer": answer, "score": rule.score(answer, samples[i].answers)}
        write_json(record, answered)
    if todo:
        unload_adapter(model)
    took = {"seconds": time.monotonic() - started, "rows": sum(map(len, todo))}
    write_json(folder / "asked.json", {**took, "batch_tokens": arguments.batch_tokens, **provenance()})


def asked_together(system: str, prompts: list[list[int]], limit: int, tokens: int) -> list[list[int]]:
    """Indices of the prompts of each batch: one under dynamic RoPE, which turns all as it turns the longest."""
    if SYSTEMS[system][0] == "dynamic":
        return [[index] for index in range(len(prompts))]
    return batches_of(prompts, limit, tokens)


# -- the learning rate of all -----------------------------------------------------------------------------------------


def searches(arguments: argparse.Namespace) -> dict[Path, Callable[[], object]]:
    """Trainings of one system with every rate, by the file that is written last."""
    jobs: dict[Path, Callable[[], object]] = {}
    for rate in arguments.rates if len(arguments.rates) > 1 else ():
        folder = arguments.folder / "search" / f"{rate:g}"
        jobs[folder / "run.json"] = partial(train_scales, arguments, SEARCHED_TASK, SEARCHED, folder, rate)
    return jobs


def late_losses(arguments: argparse.Namespace) -> dict[float, float]:
    """Mean loss over the last quarter of the search's trainings, by their rate: no context is seen twice in them."""
    losses = {}
    for path in searches(arguments):
        curve = json.loads(path.read_text(encoding="utf-8"))["loss_curve"]
        losses[float(path.parent.name)] = mean(entry["loss"] for entry in curve[-math.ceil(len(curve) / 4) :])
    return losses


def best_rate(arguments: argparse.Namespace) -> float:
    """The rate whose training ended with the lowest loss; a single one needs no search."""
    losses = late_losses(arguments)
    return min(losses, key=losses.__getitem__, default=arguments.rates[0])


# -- all of them ------------------------------------------------------------------------------------------------------


def jobs_of(arguments: argparse.Namespace) -> dict[Path, Callable[[], object]]:
    """What is done for every task and system, by the file that is written last; the longest first."""
    jobs = sorted(((task, system) for task in arguments.tasks for system in arguments.systems), key=by_cost)
    return {
        arguments.folder / task / system / "asked.json": partial(do, arguments, task, system) for task, system in jobs
    }


def do(arguments: argparse.Namespace, task: str, system: str) -> None:
    """Train one system and let it answer."""
    folder, started = arguments.folder / task / system, time.monotonic()
    if not adapter_is_there(folder / "adapter", system):
        make_adapter(arguments, task, system, folder / "adapter")
    made = time.monotonic()
    ask(arguments, task, folder)
    print(f"{task}, {system}: {made - started:.0f} s + {time.monotonic() - made:.0f} s", flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Train and ask the chosen systems, in worker processes."""
    until = str(time.time() + 60 * arguments.minutes)
    words = [word for word in sys.argv[1:] if word != arguments.step]
    spread([__file__, "work", *words, "--until", until], arguments.workers)
    if left := [path for path in jobs_of(arguments) if not path.is_file()]:
        sys.exit(f"{len(left)} of the systems are left; call this again to go on.")


def work(arguments: argparse.Namespace) -> None:
    """Do a share of the tasks and systems; those without scales while the learning rate is searched."""
    jobs = jobs_of(arguments)
    untrained = {path: do for path, do in jobs.items() if not is_trained(path.parent.name)}
    if do_jobs({**searches(arguments), **untrained}, arguments.until):
        do_jobs(jobs, arguments.until)


def main() -> None:
    """Do one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=["data", "run", "work", "merge"])
    parser.add_argument("--folder", type=Path, default=Path("runs/context"))
    parser.add_argument("--model_name_or_path", dest="model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 24576, 32768])
    parser.add_argument("--num_samples", type=int, default=50, help="test samples per length")
    parser.add_argument(
        "--train_lengths", type=int, nargs="+", default=[1536, 2048, 4096, 8192, 12288, 16384, 24576, 31744]
    )
    parser.add_argument("--contexts", type=int, default=32, help="training contexts of each length; fewer beyond 12K")
    parser.add_argument("--questions", type=int, default=16, help="questions per training context")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-2, 4e-2, 8e-2], help=f"searched with {SEARCHED}")
    parser.add_argument("--accumulate", type=int, default=1, help="contexts per optimiser step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes of `run`, over all GPUs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no system later than this")
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    parser.add_argument("--batch_tokens", type=int, default=BATCH_TOKENS, help="tokens that are answered together")
    parser.add_argument("--output", default="results/context-smollm2.json")
    parser.add_argument("--picture", type=Path, help="default: beside the output")
    arguments = parser.parse_args()
    steps = {"data": make_data, "run": run, "work": work, "merge": lambda own: merge(own, late_losses(own))}
    for step in [arguments.step] if arguments.step else ("data", "run", "merge"):
        steps[step](arguments)


if __name__ == "__main__":
    main()
