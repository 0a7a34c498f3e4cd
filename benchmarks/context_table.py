"""All answers of benchmarks/context.py put together: results, table, picture."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from context_systems import EXTENSIONS, METHODS, SYSTEMS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seal_peft.data import read_samples
from seal_peft.files import write_json
from seal_peft.provenance import source_of
from seal_peft.report import markdown_table
from seal_peft.statistics import summarise
from seal_peft.tasks import SPLITS


def merge(arguments: argparse.Namespace, search: dict[float, float]) -> None:
    """Put all answers together: results, table, picture; and with them what the search for a rate found."""
    results: dict[str, Any] = {"model": arguments.model, "extensions": EXTENSIONS}
    results["seeds"] = {"training": "beside each", "samples": 0}
    results |= {"search": {f"{rate:g}": loss for rate, loss in search.items()}}
    results |= {"samples": {}, "training": {}, "tasks": {}}
    sources = []
    for task in arguments.tasks:
        samples = read_samples(arguments.folder / f"{task}-test.jsonl")
        results["samples"][task] = {split: counted(arguments.folder / f"{task}-{split}.jsonl") for split in SPLITS}
        scores = {}
        for system in arguments.systems:
            folder = arguments.folder / task / system
            if not (folder / "asked.json").is_file():
                raise SystemExit(f"{folder} is not finished: use `run`.")
            answered = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
            if missing := [sample.id for sample in samples if sample.id not in answered]:
                raise SystemExit(f"{folder} lacks {len(missing)} answers: its samples were others. Take a new folder.")
            scores[system] = [answered[sample.id]["score"] for sample in samples]
            results["training"][f"{task}, {system}"] = training_of(folder / "adapter" / "run.json")
            sources.append(json.loads((folder / "asked.json").read_text(encoding="utf-8")))
        results["tasks"][task] = summarise(samples, scores, "base")
        print(f"\n{task}\n{table(results['tasks'][task], arguments.systems)}")
    write_json(arguments.output, {**results, **source_of(sources)})
    picture(results["tasks"], arguments.systems, arguments.picture or Path(arguments.output).with_suffix(".png"))


def counted(file: Path) -> dict[str, int]:
    """Samples of a file by length."""
    return {str(length): n for length, n in Counter(sample.length for sample in read_samples(file)).items()}


def training_of(record: Path) -> dict[str, Any] | None:
    """What a training was and cost, if there was one."""
    if not record.is_file():
        return None
    run = json.loads(record.read_text(encoding="utf-8"))
    names = ("seconds", "tokens", "steps", "samples", "peak_memory_bytes", "device", "commit", "trainable_parameters")
    settings = ("learning_rate", "gradient_accumulation_steps", "seed")
    return {
        **{name: run[name] for name in names},
        **{name: run["training_arguments"][name] for name in settings},
        "final_loss": run["loss_curve"][-1]["loss"],
    }


def cells(summary: dict[str, Any], system: str) -> dict[int, float]:
    """Mean score by length, over all depths."""
    own = [cell for cell in summary["cells"] if cell["system"] == system and cell["depth"] is None]
    return {cell["length"]: cell["accuracy"] for cell in sorted(own, key=lambda cell: cell["length"])}


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
    colours = {name: f"C{number}" for number, name in enumerate(EXTENSIONS)}
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
