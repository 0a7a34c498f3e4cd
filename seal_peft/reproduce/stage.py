"""Repeat the paper's experiments: samples, trainings, answers and a results file, part by part.

seal-peft reproduce lines needle --output_dir results
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..files import read_json, write_json
from ..folders import check_place
from ..loading import load_config, load_tokenizer
from ..plots import new_figure
from ..report import length_rows, markdown_table
from ..train import RECIPES
from .parts import PARTS, shrunk
from .run import Run


@dataclass
class ReproduceArguments:
    """Which experiments, and where to put everything."""

    parts: list[str] = field(
        default_factory=lambda: [*PARTS],
        metadata={
            "help": f"Of: {', '.join(PARTS)}. The words behind `reproduce` are these, too.",
            "choices": PARTS,
            "metavar": "PART",
        },
    )
    model_name_or_path: str = field(default="smollm2", metadata={"help": "Base model; the settings are SmolLM2's."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for reproduce-PART.json and a folder reproduce-PART of pictures. Default: results; with "
            "--size tiny the work folder, as its numbers are none."
        },
    )
    work_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for samples, adapters and answers; what is finished there is not done again. Default: "
            "runs/reproduce, with --size tiny runs/reproduce-tiny."
        },
    )
    size: Literal["full", "tiny"] = field(
        default="full", metadata={"help": "tiny: only to see that everything runs; its scores mean nothing."}
    )
    samples_only: bool = field(
        default=False,
        metadata={
            "help": "Make the samples and stop: work for a machine without a GPU, whose work folder then moves."
        },
    )
    per_device_eval_batch_size: int = field(
        default=8, metadata={"help": "Prompts of 8,192 tokens generated together; of other lengths, as many tokens."}
    )


def reproduce(arguments: ReproduceArguments) -> str:
    """Do parts of the paper, one after the other.

    Called again, it goes on where it was interrupted. Several processes with the same words share the work: each
    sample file, training, score of the heads and system is one process's at a time.

    Args:
        arguments: See `ReproduceArguments`.

    Returns:
        A table of scores by length for each part, or what was made if it is the samples only.

    Raises:
        ValueError: There is no such part, a batch has no prompts, the process sees several GPUs, or the work folder
            holds work of another model, size or batch, or samples that tasks make otherwise by now.
        OSError: There is no such model, or it has no tokenizer that can be read.
        ImportError: matplotlib is missing.
    """
    new_figure(1, 1)  # asked first: pictures come last
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        raise ValueError(f"There is no part {unknown[0]!r}. The parts: {', '.join(PARTS)}.")
    if (prompts := arguments.per_device_eval_batch_size) < 1:
        raise ValueError(f"per_device_eval_batch_size={prompts} was given; use at least 1.")
    if (gpus := torch.cuda.device_count()) > 1 and not arguments.samples_only:
        raise ValueError(
            f"This process sees {gpus} GPUs and uses one. Start one or more for each GPU, which share the work: "
            f"`CUDA_VISIBLE_DEVICES=0 seal-peft reproduce ... &` and so on to {gpus - 1}."
        )
    full = arguments.size == "full"
    work = Path(arguments.work_dir or f"runs/reproduce{'' if full else '-tiny'}")
    output = Path(arguments.output_dir or ("results" if full else work))
    check_place(output)
    check_place(work)
    load_config(arguments.model_name_or_path)  # a model that is not there claims no folder
    load_tokenizer(arguments.model_name_or_path)
    _claim_folder(
        work,
        {"model": arguments.model_name_or_path, "size": arguments.size, "recipes": RECIPES},
        "Choose another --work_dir.",
    )
    parts = {name: PARTS[name] if full else shrunk(PARTS[name]) for name in arguments.parts}
    runs = [Run(name, part, arguments, work, output) for name, part in parts.items()]
    if not arguments.samples_only:
        for run in runs:
            _claim_folder(
                run.folder,
                {"per_device_eval_batch_size": arguments.per_device_eval_batch_size},
                "In bfloat16 other batches round otherwise: give that number, or remove this folder to ask all again.",
            )
    shown = []
    for run in runs:
        run.make_samples()
        if arguments.samples_only:
            shown.append(f"{run.name}: the samples are in {run.work / 'data'}.")
            continue
        metrics = run.finish()
        shown.append(f"{run.name}: {run.part.about}\n\n{markdown_table(length_rows(metrics))}")
    return "\n\n".join(shown)


def _claim_folder(folder: Path, settings: dict[str, Any], remedy: str) -> None:
    """Refuse a folder with work of other settings, which would be taken for this one's."""
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
    before = read_json(path)
    if before != settings:
        raise ValueError(f"{folder} holds work with {before}, not {settings}. {remedy}")
