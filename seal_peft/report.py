"""Turn result files into what a person reads: Markdown tables and pictures, each picture with its numbers beside it.

seal-peft report --metrics_file runs/demo/eval/metrics.json --adapter runs/demo/adapter --output_dir runs/demo
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .files import read_json, replacing
from .folders import check_place
from .plots import plot_depths, plot_lengths, plot_scales
from .statistics import MEAN_OF_TASKS, label_of
from .tasks import TASKS
from .tuner import scales

logger = logging.getLogger(__name__)


_ABOUT = {"Model": "model_name_or_path", "Adapters": "adapters", "Other models": "models", "Samples": "test_file"}
_ABOUT_P = "p: how probable so uneven a count of better and worse answers is if neither system is better."


@dataclass
class ReportArguments:
    """Which result files to show."""

    output_dir: str = field(metadata={"help": "Folder for report.md and the pictures."})
    metrics_file: str | None = field(default=None, metadata={"help": "metrics.json of `seal-peft evaluate`."})
    adapter: str | None = field(default=None, metadata={"help": "SEAL adapter folder, for a picture of its scales."})


def report(arguments: ReportArguments) -> Path:
    """Write `report.md` and its pictures, each with a JSON file of the same name.

    For a metrics file: `TASK-lengths.png` for every task, and `TASK-depths.png` where results go by depth. For an
    adapter: `scales.png`. Without matplotlib the tables and the JSON files are written, and a line says how to get the
    pictures.

    Args:
        arguments: See `ReportArguments`.

    Returns:
        Path of `report.md`.

    Raises:
        ValueError: Neither a metrics file nor an adapter is given, a file is not what it should be, or the folder is a
            file.
    """
    if arguments.metrics_file is None and arguments.adapter is None:
        raise ValueError("There is nothing to report: give --metrics_file, --adapter or both.")
    folder = Path(arguments.output_dir)
    check_place(folder)
    parts = ["# Report"]
    if arguments.metrics_file is not None:
        parts += _results(read_metrics(Path(arguments.metrics_file)), folder)
    if arguments.adapter is not None:
        learned = scales(arguments.adapter)
        if broken := [name for name, value in learned.items() if not value.isfinite().all()]:
            raise ValueError(f"{arguments.adapter} holds NaN or infinite scales ({broken[0]}); do not use it.")
        draw = partial(plot_scales, learned)
        parts += ["## Scales", *_picture(draw, folder / "scales.png", "Learned scales by layer and head")]
        parts.append(f"Of {arguments.adapter}. 1 is unchanged.")
    path = folder / "report.md"
    with replacing(path) as file:
        file.write("\n\n".join(parts) + "\n")
    return path


def _results(metrics: dict[str, Any], folder: Path) -> list[str]:
    """Paragraphs about what was measured; draws their pictures."""
    tasks = sorted({cell["task"] for cell in metrics["cells"]})
    arguments = metrics.get("arguments", {})
    about = {name: arguments.get(key) or [] for name, key in _ABOUT.items()}
    about = {name: [given] if isinstance(given, str) else given for name, given in about.items()}
    parts = [f"{name}: {', '.join(f'`{one}`' for one in given)}" for name, given in about.items() if given]
    parts.append("\n".join(f"- `{task}`: {TASKS[task].description}" for task in tasks if task in TASKS))
    parts += notes(metrics)
    parts += ["## Scores", markdown_table(overall_rows(metrics))]
    parts.append(f"Mean over all samples. {_ABOUT_P}")
    for task, rules in metrics.get("more_scores", {}).items():
        for rule, systems in rules.items():
            parts += [f"`{task}` by `{rule}`, for comparison:", markdown_table(overall_rows({"systems": systems}))]
    parts += ["## By length", markdown_table(length_rows(metrics)), "Mean score, in brackets its 95% interval."]
    if beyond := _beyond(metrics):
        parts.append(f"\\* longer than what the system reaches: {beyond}.")
    for task in tasks:
        for kind, plot in (("length", plot_lengths), ("depth and length", plot_depths)):
            name = f"{task}-{kind.partition(' ')[0]}s.png"
            parts += _picture(
                partial(plot, metrics, task), folder / name, f"{label_of(metrics, task)}: score by {kind}"
            )
    if reached := metrics.get("effective_lengths"):
        parts += [
            "## Effective length",
            f"The greatest length with a mean score of at least {reached['threshold']:g}.",
        ]
        parts.append(markdown_table(effective_rows(metrics)))
    if tables := guard_tables(metrics):
        parts += ["## Short contexts", "Whether an adapter harms what the model could do before."]
        for title, rows in tables.items():
            parts += [title, markdown_table(rows)]
    versions = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items() if number)
    return [*parts, f"{metrics['device']}; {versions}; commit {metrics['commit']}; {metrics['date']}."]


def notes(metrics: dict[str, Any]) -> list[str]:
    """Return sentences about tasks that are not what their names promise: other words, another haystack."""
    found = {
        label: ", ".join(task for task, values in metrics.get(label, {}).items() if "own" in values)
        for label in ("wording", "haystack")
    }
    told = {
        "wording": f"In a wording of our own, so not comparable with published scores: {found['wording']}.",
        "haystack": f"Hidden in plain sentences of ours, not in essays: {found['haystack']}.",
    }
    return [told[label] for label, tasks in found.items() if tasks]


def _beyond(metrics: dict[str, Any]) -> str:
    """Systems that were asked beyond their windows, with these."""
    longest = max(cell["length"] for cell in metrics["cells"])
    windows = metrics.get("windows", {}).items()
    return ", ".join(f"{name} {window} tokens" for name, window in windows if window and window < longest)


def _picture(draw: Callable[[Path], Path | None], path: Path, what: str) -> list[str]:
    """Draw a picture and return the paragraph that shows it; none where there is nothing to draw."""
    try:
        return [f"![{what}]({path.name})"] if draw(path) else []
    except ImportError as error:
        logger.warning("%s: the numbers are in %s. %s", what, path.with_suffix(".json"), error)
        return [f"{what}: the numbers are in [{path.stem}.json]({path.stem}.json). {error}"]


def overall_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of all systems, the header first."""
    rows = [["system", "score", "95% interval", "samples", "difference to base (95% interval)", "p"]]
    for name, result in metrics["systems"].items():
        row = [name, f"{result['accuracy']:.3f}", f"{result['low']:.3f} to {result['high']:.3f}", str(result["n"])]
        difference = result.get("difference_to_base")
        change = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference) if difference else ""
        rows.append([*row, change, f"{difference['p_value']:.2g}" if difference else ""])
    return rows


def effective_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of effective lengths, one column per system, the header first."""
    reached: dict[str, dict[str, int | None]] = metrics["effective_lengths"]["systems"]
    tasks = dict.fromkeys(task for own in reached.values() for task in own)
    return [
        ["task", *reached],
        *([label_of(metrics, task), *(str(own[task] or "none") for own in reached.values())] for task in tasks),
    ]


def guard_tables(metrics: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Tables of the guard by title, each with its header first; none without `--guard`."""
    guard = metrics.get("guard")
    if not guard:
        return {}
    tables = {"Held-out essays, loss in nats a token (a difference above 0 is harm):": guard_rows(guard)}
    for task in next(iter(guard.values())).get("tasks", {}):
        title = f"`{task}`: {TASKS[task].description} A difference below 0 is harm."
        tables[title] = overall_rows({"systems": {name: own["tasks"][task] for name, own in guard.items()}})
    return tables


def guard_rows(guard: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of perplexities, the header first."""
    rows = [["system", "perplexity", "loss", "95% interval", "difference to base (95% interval)"]]
    for name, own in guard.items():
        difference = own.get("difference_to_base")
        change = "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**difference) if difference else ""
        interval = f"{own['low']:.3f} to {own['high']:.3f}"
        rows.append([name, f"{own['perplexity']:.2f}", f"{own['loss']:.3f}", interval, change])
    return rows


def length_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of scores against task and length, one column per system, the header first.

    With several tasks, the mean of the tasks follows for each length that all of them have.
    """
    cells = [cell for cell in metrics["cells"] if cell["depth"] is None]
    systems, windows = list(metrics["systems"]), metrics.get("windows", {})
    found = {(cell["task"], cell["length"], cell["system"]): cell for cell in cells}
    rows = [["task", "length", "samples", *systems]]
    for task, length in sorted({(cell["task"], cell["length"]) for cell in cells}):
        group = [found[task, length, system] for system in systems]
        marks = ["\\*" if length > (windows.get(system) or length) else "" for system in systems]
        scores = [
            f"{cell['accuracy']:.3f}{mark} ({cell['low']:.2f} to {cell['high']:.2f})"
            for cell, mark in zip(group, marks, strict=True)
        ]
        rows.append([label_of(metrics, task), str(length), str(group[0]["n"]), *scores])
    tasks = {cell["task"] for cell in cells}
    for length in sorted({cell["length"] for cell in cells}) if len(tasks) > 1 else ():
        if all((task, length, systems[0]) in found for task in tasks):
            groups = [[found[task, length, system]["accuracy"] for task in tasks] for system in systems]
            means = [f"{math.fsum(group) / len(group):.3f}" for group in groups]
            samples = sum(found[task, length, systems[0]]["n"] for task in tasks)
            rows.append([MEAN_OF_TASKS, str(length), str(samples), *means])
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """Render rows, the first being the header, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def read_metrics(path: Path) -> dict[str, Any]:
    """Read what `seal-peft evaluate` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON, or not that.
    """
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(
            f"There is no file {path}. Give the metrics.json that `seal-peft evaluate` wrote into its --output_dir."
        )
    metrics = read_json(path)
    needed = {"systems", "cells", "versions", "device", "commit", "date"}
    if not isinstance(metrics, dict) or not needed <= metrics.keys():
        missing = ", ".join(sorted(needed - set(metrics)))
        raise ValueError(f"{path} is not a metrics.json of `seal-peft evaluate`: it has no {missing}.")
    return metrics
