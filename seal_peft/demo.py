"""The whole path on a real model, stage by stage, each in a process of its own as a user would run them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .data import encode_prompt, read_samples
from .loading import load_adapter, load_model, load_tokenizer
from .provenance import provenance, write_json
from .report import markdown_table

logger = logging.getLogger(__name__)


@dataclass
class DemoArguments:
    """Size of the demo; the defaults take minutes on two CPU cores."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Folder for everything that the demo makes."})
    model_name_or_path: str = field(default="smollm2", metadata={"help": "Base model."})
    length: int = field(default=1024, metadata={"help": "Tokens per sample."})
    num_train_samples: int = field(default=80, metadata={"help": "Training contexts."})
    questions_per_context: int = field(default=5, metadata={"help": "Questions that share a training context."})
    num_test_samples: int = field(default=40, metadata={"help": "Held-out samples."})
    learning_rate: float = field(default=3e-2, metadata={"help": "Peak learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of data and training."})


def demo(arguments: DemoArguments) -> str:
    """Generate data, evaluate the base, train, reload, evaluate, merge and evaluate again.

    Writes `metrics.json` (accuracies of base, adapter and merged model, size, seconds), `report.md` and `scales.png`
    into the output folder. Finished evaluation rows and Trainer checkpoints of an interrupted demo are kept.

    Args:
        arguments: See `DemoArguments`.

    Returns:
        A table for the terminal.

    Raises:
        OSError: A stage failed; its own message stands above.
    """
    started = time.monotonic()
    folder = Path(arguments.output_dir)
    train_file, test_file = folder / "train.jsonl", folder / "test.jsonl"
    adapter, merged, results = folder / "adapter", folder / "merged", folder / "eval"
    model = ["--model_name_or_path", arguments.model_name_or_path]
    seed = ["--seed", arguments.seed]
    data = ["make-data", *model, *seed, "--lengths", arguments.length]
    _stage(*data, "--split", "test", "--num_samples", arguments.num_test_samples, "--output_file", test_file)
    _stage(
        *data, "--split", "train", "--num_samples", arguments.num_train_samples, "--output_file", train_file,
        "--questions_per_context", arguments.questions_per_context,
    )  # fmt: skip
    evaluation = ["evaluate", *model, "--test_file", test_file, "--output_dir", results]
    _stage(*evaluation)
    if not (adapter / "run.json").is_file():
        _stage("train", *model, *seed, "--train_file", train_file, "--output_dir", adapter,
               "--learning_rate", arguments.learning_rate)  # fmt: skip
    if not merged.exists():
        _stage("merge", "--adapter_name_or_path", adapter, *model, "--output_dir", merged)
    _stage(*evaluation, "--adapters", f"adapter={adapter}", "--models", f"merged={merged}")
    _stage("report", "--metrics_file", results / "metrics.json", "--adapter", adapter, "--output_dir", folder)

    systems = json.loads((results / "metrics.json").read_text(encoding="utf-8"))["systems"]
    run = json.loads((adapter / "run.json").read_text(encoding="utf-8"))
    summary: dict[str, Any] = {
        **{name: systems[name] for name in ("base", "adapter", "merged")},
        "max_logit_difference_merged": _logit_difference(arguments.model_name_or_path, adapter, merged, test_file),
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "trainable_parameters": run["trainable_parameters"],
        "training_seconds": run["seconds"],
        "seconds": time.monotonic() - started,
        **provenance(),
    }
    write_json(folder / "metrics.json", summary)
    return _table(summary, folder)


def _stage(*words: Any) -> None:
    command = [sys.executable, "-m", "seal_peft", *map(str, words)]
    logger.info("\n$ seal-peft %s", " ".join(command[3:]))
    code = subprocess.run(command, check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise OSError(f"`seal-peft {words[0]}` ended with code {code}; its message stands above.")


def _logit_difference(model_name: str, adapter: Path, merged: Path, test_file: Path) -> float:
    """Largest difference of any logit between the adapter and the merged model, on the first test prompt."""
    prompt = encode_prompt(read_samples(test_file)[0], load_tokenizer(model_name))
    logits = []
    for model in (load_adapter(load_model(model_name), str(adapter)), load_model(str(merged)).eval()):
        with torch.inference_mode():
            logits.append(model(torch.tensor([prompt], device=model.device)).logits.float())
    return (logits[0] - logits[1]).abs().max().item()


def _table(summary: dict[str, Any], folder: Path) -> str:
    rows = [["system", "accuracy", "95% interval", "samples"]]
    for name in ("base", "adapter", "merged"):
        result = summary[name]
        interval = f"{result['low']:.2f} to {result['high']:.2f}"
        rows.append([name, f"{result['accuracy']:.2f}", interval, str(result["n"])])
    return (
        f"\n{markdown_table(rows)}\n\n"
        f"{summary['trainable_parameters']:,} scales, {summary['adapter_bytes']:,} bytes, trained in "
        f"{summary['training_seconds']:.0f} s; everything took {summary['seconds']:.0f} s on {summary['device']}.\n"
        f"Largest logit difference of the merged model: {summary['max_logit_difference_merged']:.2g}.\n"
        f"Picture: {folder / 'scales.png'}"
    )
