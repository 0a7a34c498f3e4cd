"""Which heads matter on SmolLM2 (lines, 1K and 4K tokens): scores, their agreement, the quadrant test, and speed.

    python benchmarks/heads.py --output_dir runs/heads
    python benchmarks/heads.py --parts speed --size 8b --tokens 16384 --output_dir runs/heads-8b

Parts, each with a file of its own: `maps` trains SEAL-H and SEAL-C and runs `seal-peft heads` beside them
(heads-maps.json), `speed` times the maps against full forward passes and compares their values (heads-speed.json),
`quadrants` evaluates the adapters of the quadrant test on held-out samples (heads-quadrants.json; after `maps`). The
16 samples of a length ask 4 questions about each of 4 contexts; `speed` also times 16 contexts with one question each.
What is finished in the output folder is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from heads_speed import speed
from line_samples import lines, samples_of

from seal_peft.data import write_samples
from seal_peft.evaluate import EvaluateArguments, evaluate
from seal_peft.files import write_json
from seal_peft.heads import EncodedSample, encode_samples, find_heads
from seal_peft.heads.inputs import collate, score_logits
from seal_peft.heads.layers import scoring
from seal_peft.heads.stage import HeadsArguments, heads
from seal_peft.loading import load_adapter, load_model, load_tokenizer, unload_adapter
from seal_peft.provenance import provenance
from seal_peft.statistics import bootstrap_interval
from seal_peft.tasks import Sample
from seal_peft.train import SealTrainingArguments, TrainArguments, train

QUADRANTS = ("Q1=0.9", "Q3=0.9", "Q1=0.9,Q3=1.1")
RATES = {"head": 3e-2, "channel": 2e-2}
SEEDS = {"samples": 0, "training samples": 1, "training": 42}


# --- maps ----------------------------------------------------------------------------------------------------------


def maps(options: argparse.Namespace) -> dict[str, Any]:
    """Train two adapters, score all heads beside the scales of each."""
    folder: Path = options.output_dir
    write_samples(
        folder / "maps.jsonl", [s for n in options.lengths for s in samples_of(options, n, options.contexts)]
    )
    result: dict[str, Any] = {}
    for granularity, rate in RATES.items():
        adapter, out = folder / f"seal-{granularity}", folder / f"heads-{granularity}"
        if not (adapter / "run.json").is_file():
            train_adapter(options, granularity, rate, adapter)
        if not out.exists() and result:  # the scores are of the base model, so the second call need not repeat them
            shutil.copytree(folder / f"heads-{next(iter(RATES))}", out)
        print(
            heads(
                HeadsArguments(
                    options.model,
                    str(folder / "maps.jsonl"),
                    str(out),
                    adapter=str(adapter),
                    ablations=["zero", "mean"],
                    channels_of=options.channels_of,
                    generate_heads=options.generate_heads,
                    quadrants=list(QUADRANTS),
                    dtype=options.dtype,
                )
            )
        )
        comparison = json.loads((out / "heads.json").read_text())
        result[granularity] = {
            key: comparison[key] for key in ("rank_correlations", "across_lengths", "top", "bottom")
        }
        result[granularity]["heads"] = comparison["heads"]
    pruning = json.loads((out / "pruning.json").read_text())
    result["pruning"] = {key: pruning[key] for key in ("base", "channels", "generated") if key in pruning}
    return result


def train_adapter(options: argparse.Namespace, granularity: Any, rate: float, folder: Path) -> None:
    """Train one adapter on lines of mixed lengths."""
    file = options.output_dir / "train.jsonl"
    if not file.is_file():
        made = lines(
            options.model, "train", options.train_lengths, options.num_train_samples, SEEDS["training samples"]
        )
        random.Random(0).shuffle(made)
        write_samples(file, [replace(sample, id=f"train-{i}") for i, sample in enumerate(made)])
    settings = SealTrainingArguments(
        output_dir=str(folder),
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_strategy="no",
        logging_steps=50,
        num_train_epochs=1,
        seed=SEEDS["training"],
        use_cpu=not torch.cuda.is_available(),
    )
    train(TrainArguments(options.model, str(file), granularity=granularity, dtype=options.dtype), settings)


# --- quadrants -----------------------------------------------------------------------------------------------------


def quadrants(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate base, quadrant adapters and trained adapters on held-out samples: accuracy and log-probability."""
    folder: Path = options.output_dir
    made = lines(options.model, "test", options.lengths, options.num_test_samples)
    write_samples(folder / "test.jsonl", made)
    adapters = {path.name: path for path in sorted((folder / "heads-head" / "quadrants").iterdir())}
    adapters |= {f"seal-{granularity}": folder / f"seal-{granularity}" for granularity in RATES}
    metrics = evaluate(
        EvaluateArguments(
            options.model,
            str(folder / "test.jsonl"),
            str(folder / "eval"),
            adapters=[f"{name}={path}" for name, path in adapters.items()],
            dtype=options.dtype,
        )
    )
    cells = [cell for cell in metrics["cells"] if cell["depth"] is None]
    return {"accuracy": cells, "logprob": logprobs(options, made, adapters)}


def logprobs(options: argparse.Namespace, made: list[Sample], adapters: dict[str, Path]) -> list[dict[str, Any]]:
    """Mean log-probability of the answer by system and length, and the paired difference to the base."""
    rows = encode_samples(made, load_tokenizer(options.model))
    model = load_model(options.model, options.dtype)
    values = {"base": answer_logprobs(model, rows)}
    for name, path in adapters.items():
        worn = load_adapter(model, str(path))
        values[name] = answer_logprobs(worn, rows)
        model = unload_adapter(worn)
    table = []
    for name, own in values.items():
        for length in options.lengths:
            chosen = [i for i, row in enumerate(rows) if row.length == length]
            mean, low, high = bootstrap_interval([own[i] - values["base"][i] for i in chosen])
            difference = {"mean": mean, "low": low, "high": high}
            table.append(
                {
                    "system": name,
                    "length": length,
                    "mean": sum(own[i] for i in chosen) / len(chosen),
                    "difference": difference,
                }
            )
    return table


def answer_logprobs(model: torch.nn.Module, rows: list[EncodedSample]) -> list[float]:
    """Mean log-probability of each sample's answer."""
    found = find_heads(model)
    with scoring(found), torch.inference_mode():
        batches = (collate([row], found.base.device) for row in rows)
        return [score_logits(model(**batch).logits, labels).logprob.item() for batch, labels in batches]


PARTS = {"maps": maps, "speed": speed, "quadrants": quadrants}


def main() -> None:
    """Run the parts and write a file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/heads"))
    parser.add_argument("--model_name_or_path", dest="model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--num_samples", type=int, default=16, help="samples of each length")
    parser.add_argument("--contexts", type=int, default=4, help="contexts that they share")
    parser.add_argument("--train_lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--num_train_samples", type=int, default=200, help="of each length")
    parser.add_argument("--num_test_samples", type=int, default=100, help="held-out samples of each length")
    parser.add_argument("--channels_of", nargs="*", default=[])
    parser.add_argument("--generate_heads", type=int, default=4)
    parser.add_argument("--check_heads", type=int, default=12, help="heads whose values are compared")
    parser.add_argument("--batch_tokens", type=int, default=65_536)
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--size", choices=["8b", "tiny"], help="a random model of this shape, for `speed`")
    parser.add_argument("--tokens", type=int, default=16_384)
    options = parser.parse_args()
    if options.num_samples % options.contexts:
        parser.error("--num_samples must be a multiple of --contexts.")
    for part in options.parts:
        started = time.perf_counter()
        result = PARTS[part](options)
        took = time.perf_counter() - started
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        record = {"part": part, "arguments": arguments, "seeds": SEEDS, "seconds": took, "results": result}
        write_json(options.output_dir / f"heads-{part}.json", record | provenance())
        print(f"{part}: {took:.0f} s, written to {options.output_dir / f'heads-{part}.json'}", flush=True)


if __name__ == "__main__":
    main()
