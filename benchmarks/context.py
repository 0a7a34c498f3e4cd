"""SEAL on top of context extension, in the shape of the paper's table 2: SmolLM2 (8K native) from 4K to 32K tokens.

Every extension answers alone, under SEAL-C, and under SEAL-C with temperatures; all are trained on the same samples,
of mixed lengths up to 31K. Three steps, each of which goes on where it was interrupted:

    python benchmarks/context.py data  --folder runs/context            # CPU; a few minutes
    python benchmarks/context.py run   --folder runs/context --tasks lines --systems ntk ntk+seal-c
    python benchmarks/context.py merge --folder runs/context --output results/context-smollm2.json

`run` takes any of the systems, so that several processes share a GPU. A trial on a CPU:

    python benchmarks/context.py data --folder /tmp/c --lengths 1024 --train_lengths 1024 --contexts 2 --num_samples 2
    python benchmarks/context.py run  --folder /tmp/c --systems ntk self-extend+seal-c+temperature
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import get_peft_model
from tqdm.auto import tqdm

from seal_peft import SealConfig
from seal_peft.data import make_samples, read_samples, write_samples
from seal_peft.files import write_json
from seal_peft.generation import generate_answers
from seal_peft.loading import load_adapter, load_model, load_tokenizer, unload_adapter
from seal_peft.provenance import provenance
from seal_peft.report import markdown_table
from seal_peft.statistics import summarise
from seal_peft.tasks import get_task
from seal_peft.tokens import encode_prompt
from seal_peft.train import SealTrainingArguments, TrainArguments, train

TASKS = ("lines", "needle")
EXTENSIONS: dict[str, dict[str, dict[str, Any]]] = {
    # The model's own rotation, only told that it may go on.
    "base": {"rope_parameters": {"rope_type": "default", "max_position_embeddings": 32768}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    "ntk": {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "self-extend": {"self_extend": {"group_size": 8, "window": 1024}},
}
METHODS = {"": [], "+seal-c": ["output"], "+seal-c+temperature": ["output", "query"]}
SYSTEMS = {extension + method: (extension, method) for extension in EXTENSIONS for method in METHODS}


def make_data(arguments: argparse.Namespace) -> None:
    """Write the samples that all systems share."""
    tokenizer = load_tokenizer(arguments.model)
    for task in arguments.tasks:
        per_length = max(1, arguments.contexts // len(arguments.train_lengths))
        parts: dict[str, dict[str, Any]] = {
            "train": {
                "lengths": arguments.train_lengths,
                "num_samples": per_length,
                "questions_per_context": arguments.questions,
            },
            "test": {"lengths": arguments.lengths, "num_samples": arguments.num_samples},
        }
        for split, numbers in parts.items():
            path = arguments.folder / f"{task}-{split}.jsonl"
            if not path.is_file():
                write_samples(path, make_samples(task, tokenizer=tokenizer, split=split, **numbers))


def run(arguments: argparse.Namespace) -> None:
    """Train and ask the chosen systems, one after the other."""
    tokenizer = load_tokenizer(arguments.model)
    for task in arguments.tasks:
        for system in arguments.systems:
            folder = arguments.folder / task / system
            if not (folder / "adapter" / "adapter_config.json").is_file():
                make_adapter(arguments, task, system, folder / "adapter")
            ask(arguments, task, folder, tokenizer)


def make_adapter(arguments: argparse.Namespace, task: str, system: str, folder: Path) -> None:
    """Train a system's scales, or save the extension alone."""
    extension, method = SYSTEMS[system]
    if not METHODS[method]:
        config = SealConfig(sites=(), task_type="CAUSAL_LM", **EXTENSIONS[extension])
        get_peft_model(load_model(arguments.model), config).save_pretrained(str(folder))
        return
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
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            gradient_accumulation_steps=arguments.accumulate,
            activation_checkpointing=True,
            seed=arguments.seed,
        ),
    )


def ask(arguments: argparse.Namespace, task: str, folder: Path, tokenizer: Any) -> None:
    """Answer what has not been answered yet; one prompt at a time, so that no padding slows attention down."""
    samples = read_samples(arguments.folder / f"{task}-test.jsonl")
    record = folder / "answers.jsonl"
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    answered = {json.loads(line)["id"] for line in lines}
    todo = [sample for sample in samples if sample.id not in answered]
    if not todo:
        return
    model = load_adapter(load_model(arguments.model), str(folder / "adapter"))
    rule, started = get_task(task), time.monotonic()
    with record.open("a", encoding="utf-8") as file:
        for sample in tqdm(todo, desc=f"{task}, {folder.name}"):
            prompt = encode_prompt(sample, tokenizer)
            (answer,) = generate_answers(model, tokenizer, [prompt], rule.max_new_tokens)
            row = {"id": sample.id, "answer": answer, "score": rule.score(answer, sample.answers)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    unload_adapter(model)
    write_json(folder / "asked.json", {"seconds": time.monotonic() - started, "rows": len(todo), **provenance()})


def merge(arguments: argparse.Namespace) -> None:
    """Put all answers together: results, table, picture."""
    results: dict[str, Any] = {"extensions": EXTENSIONS, "tasks": {}, "training": {}}
    for task in arguments.tasks:
        samples = read_samples(arguments.folder / f"{task}-test.jsonl")
        scores = {}
        for system in arguments.systems:
            folder = arguments.folder / task / system
            rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
            by_id = {row["id"]: row["score"] for row in rows}
            if missing := [sample.id for sample in samples if sample.id not in by_id]:
                raise SystemExit(f"{folder} lacks {len(missing)} answers: run it again.")
            scores[system] = [by_id[sample.id] for sample in samples]
            results["training"][f"{task}, {system}"] = training_of(folder / "adapter" / "run.json")
            results["device of the answers"] = json.loads((folder / "asked.json").read_text())["device"]
        results["tasks"][task] = summarise(samples, scores, "base")
        print(f"\n{task}\n{table(results['tasks'][task], arguments.systems)}")
    write_json(arguments.output, {"arguments": {**vars(arguments), "folder": None}, **results, **provenance()})
    picture(results["tasks"], arguments.systems, arguments.picture or Path(arguments.output).with_suffix(".png"))


def training_of(record: Path) -> dict[str, Any] | None:
    """What a training cost, if there was one."""
    if not record.is_file():
        return None
    run = json.loads(record.read_text(encoding="utf-8"))
    names = ("seconds", "tokens", "steps", "samples", "peak_memory_bytes", "device", "commit", "trainable_parameters")
    rate = run["training_arguments"]["learning_rate"]
    return {**{name: run[name] for name in names}, "learning_rate": rate, "final_loss": run["loss_curve"][-1]["loss"]}


def cells(summary: dict[str, Any], system: str) -> dict[int, float]:
    """Mean score by length; depths were drawn at random."""
    found = {cell["length"]: cell["accuracy"] for cell in summary["cells"] if cell["system"] == system}
    return dict(sorted(found.items()))


def table(summary: dict[str, Any], systems: list[str]) -> str:
    """Systems by lengths."""
    lengths = list(cells(summary, systems[0]))
    rows = [["system", *(f"{length:,}" for length in lengths)]]
    for system in systems:
        rows.append([system, *(f"{score:.2f}" for score in cells(summary, system).values())])
    return markdown_table(rows)


def picture(tasks: dict[str, Any], systems: list[str], path: Path) -> None:
    """Score against length: a colour for each extension, a dash for each method."""
    figure = Figure(figsize=(5.5 * len(tasks), 4.2), layout="constrained")
    colours = dict(
        zip(EXTENSIONS, ("0.5", "tab:orange", "tab:green", "tab:blue", "tab:red", "tab:purple"), strict=True)
    )
    styles = dict(zip(METHODS, (":", "--", "-"), strict=True))
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for panel, (task, summary) in zip(panels, tasks.items(), strict=True):
        for system in systems:
            extension, method = SYSTEMS[system]
            points = cells(summary, system)
            look = {"color": colours[extension], "linestyle": styles[method], "marker": "o", "markersize": 3}
            panel.plot([length / 1024 for length in points], list(points.values()), label=system, **look)
        panel.axvline(8, color="0.8", linewidth=1)
        panel.set(title=task, xlabel="length (thousands of tokens)", ylim=(-0.03, 1.03))
        panel.set_xticks([length / 1024 for length in points])
    panels[0].set_ylabel("score")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    FigureCanvasAgg(figure).print_png(str(path))
    print(f"\nwritten to {path}")


def main() -> None:
    """Do one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["data", "run", "merge"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 24576, 32768])
    parser.add_argument("--num_samples", type=int, default=50, help="test samples per length")
    parser.add_argument(
        "--train_lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 12288, 16384, 24576, 31744]
    )
    parser.add_argument("--contexts", type=int, default=240, help="training contexts, shared out over the lengths")
    parser.add_argument("--questions", type=int, default=8, help="questions per training context")
    parser.add_argument("--learning_rate", type=float, default=2e-2)
    parser.add_argument("--accumulate", type=int, default=1, help="contexts per optimiser step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/context-smollm2.json")
    parser.add_argument("--picture", type=Path, help="default: beside the output")
    arguments = parser.parse_args()
    {"data": make_data, "run": run, "merge": merge}[arguments.step](arguments)


if __name__ == "__main__":
    main()
