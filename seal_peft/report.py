"""Turn result files into what a person reads: Markdown tables and pictures, each picture with its numbers beside it.

seal-peft report --metrics_file runs/demo/eval/metrics.json --adapter runs/demo/adapter --output_dir runs/demo
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import replacing
from .plots import new_figure, plot_depths, plot_lengths, plot_scales
from .tuner import scales


@dataclass
class ReportArguments:
    """Which result files to show."""

    output_dir: str = field(metadata={"help": "Folder for report.md and the pictures."})
    metrics_file: str | None = field(default=None, metadata={"help": "metrics.json of `seal-peft evaluate`."})
    adapter: str | None = field(default=None, metadata={"help": "SEAL adapter folder, for a picture of its scales."})


def report(arguments: ReportArguments) -> Path:
    """Write `report.md` and its pictures, each with a JSON file of the same name.

    For a metrics file: `TASK-lengths.png` for every task, and `TASK-depths.png` where results go by depth. For an
    adapter: `scales.png`.

    Args:
        arguments: See `ReportArguments`.

    Returns:
        Path of `report.md`.

    Raises:
        ValueError: Neither a metrics file nor an adapter is given, or a file is not what it should be.
        ImportError: matplotlib is missing.
    """
    if arguments.metrics_file is None and arguments.adapter is None:
        raise ValueError("There is nothing to report: give --metrics_file, --adapter or both.")
    new_figure(1, 1)  # Without matplotlib nothing is written.
    folder = Path(arguments.output_dir)
    parts = ["# Report"]
    if arguments.metrics_file is not None:
        parts += _results(read_metrics(Path(arguments.metrics_file)), folder)
    if arguments.adapter is not None:
        picture = plot_scales(scales(arguments.adapter), folder / "scales.png")
        parts += ["## Scales", f"![Learned scales by layer and head]({picture.name})", "1 is unchanged."]
    path = folder / "report.md"
    with replacing(path) as file:
        file.write("\n\n".join(parts) + "\n")
    return path


def _results(metrics: dict[str, Any], folder: Path) -> list[str]:
    """Paragraphs about what was measured; draws their pictures."""
    parts = ["## Accuracy", markdown_table(overall_rows(metrics))]
    parts.append("p: how probable so uneven a count of better and worse answers is if neither system is better.")
    parts += ["## By length", markdown_table(length_rows(metrics))]
    for task in sorted({cell["task"] for cell in metrics["cells"]}):
        picture = plot_lengths(metrics, task, folder / f"{task}-lengths.png")
        parts.append(f"![{task}: score by length]({picture.name})")
        if plot_depths(metrics, task, folder / f"{task}-depths.png"):
            parts.append(f"![{task}: score by depth and length]({task}-depths.png)")
    if reached := metrics.get("effective_lengths"):
        parts += [
            "## Effective length",
            f"The greatest length with a mean score of at least {reached['threshold']:g}.",
        ]
        parts.append(markdown_table(effective_rows(reached["systems"])))
    if guard := metrics.get("guard"):
        parts += ["## Short contexts", markdown_table(guard_rows(guard))]
        parts.append("Held-out essays; loss in nats a token. A difference above 0 is harm.")
    if own := [task for task, wording in metrics.get("wording", {}).items() if "own" in wording]:
        parts.append(f"In a wording of our own, so not comparable with published scores: {', '.join(own)}.")
    versions = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items() if number)
    return [*parts, f"{metrics['device']}; {versions}; commit {metrics['commit']}; {metrics['date']}."]


def overall_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of all systems, the header first."""
    rows = [["system", "accuracy", "95% interval", "samples", "difference to base", "p"]]
    for name, result in metrics["systems"].items():
        row = [name, f"{result['accuracy']:.3f}", f"{result['low']:.3f} to {result['high']:.3f}", str(result["n"])]
        difference = result.get("difference_to_base")
        change = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference) if difference else ""
        rows.append([*row, change, f"{difference['p_value']:.2g}" if difference else ""])
    return rows


def effective_rows(reached: dict[str, dict[str, int | None]]) -> list[list[str]]:
    """Rows of a table of effective lengths, one column per system, the header first."""
    tasks = dict.fromkeys(task for own in reached.values() for task in own)
    return [["task", *reached], *([task, *(str(own[task] or "none") for own in reached.values())] for task in tasks)]


def guard_rows(guard: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of perplexities, the header first."""
    rows = [["system", "perplexity", "loss", "95% interval", "difference to base"]]
    for name, own in guard.items():
        difference = own.get("difference_to_base")
        change = "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**difference) if difference else ""
        interval = f"{own['low']:.3f} to {own['high']:.3f}"
        rows.append([name, f"{own['perplexity']:.2f}", f"{own['loss']:.3f}", interval, change])
    return rows


def length_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of accuracy against task and length, one column per system, the header first."""
    cells = [cell for cell in metrics["cells"] if cell["depth"] is None]
    systems = list(metrics["systems"])
    found = {(cell["task"], cell["length"], cell["system"]): cell for cell in cells}
    rows = [["task", "length", "samples", *systems]]
    for task, length in sorted({(cell["task"], cell["length"]) for cell in cells}):
        group = [found[task, length, system] for system in systems]
        accuracies = [f"{cell['accuracy']:.3f}" for cell in group]
        rows.append([task, str(length), str(group[0]["n"]), *accuracies])
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """Render rows, the first being the header, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def read_metrics(path: Path) -> dict[str, Any]:
    """Read what `seal-peft evaluate` wrote.

    Raises:
        ValueError: The file is not JSON, or not that.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    needed = {"systems", "cells", "versions", "device", "commit", "date"}
    if not isinstance(metrics, dict) or not needed <= metrics.keys():
        missing = ", ".join(sorted(needed - set(metrics)))
        raise ValueError(f"{path} is not a metrics.json of `seal-peft evaluate`: it has no {missing}.")
    return metrics
