"""Generate samples of a task for training or testing.

seal-peft make-data --task lines --model_name_or_path smollm2 --split train --lengths 1024 --num_samples 50
--questions_per_context 8 --output_file train.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from .data import check_window, make_samples, read_samples, write_samples
from .folders import check_place
from .loading import load_config, load_tokenizer
from .reach import reach_of_folder
from .tasks import TASKS, Task, examples, get_task


@dataclass
class MakeDataArguments:
    """Which samples to generate."""

    model_name_or_path: str = field(metadata={"help": "Model whose tokenizer and window the samples are fitted to."})
    output_file: str = field(metadata={"help": "JSONL file to write."})
    task: str = field(
        default="lines",
        metadata={"help": f"One of: {', '.join(sorted(TASKS))}.", "choices": TASKS, "metavar": "TASK"},
    )
    task_file: str | None = field(
        default=None,
        metadata={"help": "JSONL file of your own examples, in place of --task: more samples like these."},
    )
    split: Literal["train", "test"] = field(default="train", metadata={"help": "The two share no key or document."})
    lengths: list[int] = field(default_factory=lambda: [1024], metadata={"help": "Lengths in tokens."})
    num_samples: int = field(default=50, metadata={"help": "Samples per length."})
    depths: list[float] | None = field(
        default=None, metadata={"help": "Depths of the asked fact, 0.0 to 1.0. Default: a random one per sample."}
    )
    questions_per_context: int = field(default=1, metadata={"help": "Questions that share one context (training)."})
    allow_beyond_window: bool = field(
        default=False, metadata={"help": "Allow lengths beyond the model's window: for adapters that extend it."}
    )
    seed: int = field(default=0, metadata={"help": "Same seed, same bytes."})


def make_data(arguments: MakeDataArguments) -> Path:
    """Write one JSONL file of samples.

    Args:
        arguments: See `MakeDataArguments`.

    Returns:
        The file.

    Raises:
        ValueError: A task, an example, a split, length, depth or number is not allowed, or the file is a folder.
    """
    if Path(arguments.output_file).is_dir():
        raise ValueError(f"--output_file {arguments.output_file} is a folder. Name the JSONL file to write in it.")
    check_place(Path(arguments.output_file).parent)
    task = _task_of_file(arguments.task_file) if arguments.task_file else get_task(arguments.task)
    longest = max(arguments.lengths, default=1)
    config = load_config(arguments.model_name_or_path)
    check_window(config, longest, reach_of_folder(config), arguments.allow_beyond_window)
    samples = make_samples(
        task,
        tokenizer=load_tokenizer(arguments.model_name_or_path),
        split=arguments.split,
        lengths=arguments.lengths,
        num_samples=arguments.num_samples,
        depths=arguments.depths,
        questions_per_context=arguments.questions_per_context,
        seed=arguments.seed,
    )
    write_samples(arguments.output_file, samples)
    return Path(arguments.output_file)


def _task_of_file(path: str) -> Task:
    """Make a task out of a file of examples; its samples keep the tasks of their examples, which score them."""
    samples = read_samples(path)
    for line, sample in enumerate(samples, start=1):
        try:
            get_task(sample.task)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: Field 'task': {error}") from error
    try:
        known = examples.take_apart(samples)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    return replace(get_task(samples[0].task), name=Path(path).stem, make=partial(examples.make, known))
