"""The whole path on a real model, stage by stage.

Training and evaluation run in processes of their own, as a user would start them: what is measured was saved to disk
and loaded again.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .data import read_samples
from .files import read_json, write_json
from .folders import check_place
from .loading import load_adapter, load_model, load_tokenizer
from .make_data import MakeDataArguments, make_data
from .merge import MergeArguments, merge
from .provenance import provenance
from .report import ReportArguments, markdown_table, report
from .tokens import encode_prompt

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
    into the output folder. Called again with the same settings, it keeps what is finished and goes on from there.

    Args:
        arguments: See `DemoArguments`.

    Returns:
        A table for the terminal.

    Raises:
        ValueError: The folder holds a demo with other settings, or a setting is not allowed.
        OSError: A stage failed; its own message stands above.
    """
    started = time.monotonic()
    folder = Path(arguments.output_dir)
    if find_spec("matplotlib") is None:  # asked first: the picture comes last
        raise ImportError('Pictures need matplotlib: pip install "seal-peft[plot]"')
    check_place(folder)
    resumed = _same_settings(folder / "demo.json", arguments)
    train_file, test_file = folder / "train.jsonl", folder / "test.jsonl"
    adapter, merged, results = folder / "adapter", folder / "merged", folder / "eval"
    model, seed = arguments.model_name_or_path, arguments.seed
    data: dict[str, Any] = {"model_name_or_path": model, "lengths": [arguments.length], "seed": seed}
    make_data(
        MakeDataArguments(
            **data,
            output_file=str(train_file),
            num_samples=arguments.num_train_samples,
            questions_per_context=arguments.questions_per_context,
        )
    )
    make_data(
        MakeDataArguments(**data, output_file=str(test_file), split="test", num_samples=arguments.num_test_samples)
    )
    write_json(folder / "demo.json", asdict(arguments))
    base = ["--model_name_or_path", model]
    evaluation = ["evaluate", *base, "--test_file", test_file, "--output_dir", results]
    _stage(*evaluation)
    if not (adapter / "run.json").is_file():
        settings = ["--learning_rate", arguments.learning_rate, "--seed", seed]
        _stage("train", *base, "--train_file", train_file, "--output_dir", adapter, *settings)
    if not merged.exists():
        merge(MergeArguments(str(adapter), str(merged), model))
    _stage(*evaluation, "--adapters", f"adapter={adapter}", "--models", f"merged={merged}")
    report(ReportArguments(str(folder), str(results / "metrics.json"), str(adapter)))

    systems = read_json(results / "metrics.json")["systems"]
    run = read_json(adapter / "run.json")
    summary: dict[str, Any] = {
        **{name: systems[name] for name in ("base", "adapter", "merged")},
        "arguments": asdict(arguments),
        "max_logit_difference_merged": _logit_difference(model, adapter, merged, test_file),
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "trainable_parameters": run["trainable_parameters"],
        "training_seconds": run["seconds"],
        "seconds": time.monotonic() - started,
        "resumed": resumed,  # if so, some of the work was done by an earlier call, whose seconds do not count here
        **provenance(),
    }
    write_json(folder / "metrics.json", summary)
    return _table(summary, folder)


def _same_settings(record: Path, arguments: DemoArguments) -> bool:
    """Tell whether an earlier call began this very demo."""
    if not record.is_file():
        return False
    before, settings = read_json(record), asdict(arguments)
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        described = ", ".join(f"{name} {before.get(name)} -> {settings[name]}" for name in changed)
        raise ValueError(
            f"{record.parent} holds a demo with other settings ({described}). Remove it, or choose another "
            "--output_dir."
        )
    return True


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
        f"Largest difference of any logit by merging: {summary['max_logit_difference_merged']:.2g} "
        "(the merged weights are rounded to their dtype once more).\n"
        f"Picture: {folder / 'scales.png'}"
    )
