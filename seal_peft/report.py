"""Turn result files into what a person reads: Markdown tables and pictures, each picture with its numbers beside it.

seal-peft report --metrics_file runs/demo/eval/metrics.json --adapter runs/demo/adapter --output_dir runs/demo
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import replacing, write_json
from .tuner import scales


@dataclass
class ReportArguments:
    """Which result files to show."""

    output_dir: str = field(metadata={"help": "Folder for report.md and the pictures."})
    metrics_file: str | None = field(default=None, metadata={"help": "metrics.json of `seal-peft evaluate`."})
    adapter: str | None = field(default=None, metadata={"help": "SEAL adapter folder, for a picture of its scales."})


def report(arguments: ReportArguments) -> Path:
    """Write `report.md`, and `scales.png` with `scales.json` for an adapter.

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
    folder = Path(arguments.output_dir)
    parts = ["# Report"]
    if arguments.metrics_file is not None:
        metrics = _read_metrics(Path(arguments.metrics_file))
        parts += ["## Accuracy", markdown_table(overall_rows(metrics))]
        parts += ["## By length", markdown_table(length_rows(metrics))]
        versions = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items() if number)
        parts.append(f"{metrics['device']}; {versions}; commit {metrics['commit']}; {metrics['date']}.")
    if arguments.adapter is not None:
        picture = plot_scales(scales(arguments.adapter), folder / "scales.png")
        parts += ["## Scales", f"![Learned scales by layer and head]({picture.name})", "1 is unchanged."]
    path = folder / "report.md"
    with replacing(path) as file:
        file.write("\n\n".join(parts) + "\n")
    return path


def overall_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of all systems, the header first."""
    rows = [["system", "accuracy", "95% interval", "samples", "difference to base"]]
    for name, result in metrics["systems"].items():
        row = [name, f"{result['accuracy']:.3f}", f"{result['low']:.3f} to {result['high']:.3f}", str(result["n"])]
        difference = result.get("difference_to_base")
        change = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference) if difference else ""
        rows.append([*row, change])
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


def plot_scales(layers: dict[str, Tensor], path: Path) -> Path:
    """Draw learned scales as layers x heads, with a JSON file of the same name that holds the numbers.

    Args:
        layers: What `seal_peft.scales` returns. For SEAL-C two maps are drawn: the mean over a head's channels, and
            how far its channels spread from 1 (root mean square).
        path: The PNG file to write.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "seal-peft[plot]"') from error
    maps = scale_maps(layers)
    figure = Figure(figsize=(1.5 + 4.5 * len(maps), 6), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        if title.startswith("scale"):
            reach = max(*(abs(value - 1) for row in values for value in row), 1e-6)
            image = axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(1, 1 - reach, 1 + reach), aspect="auto")
        else:
            image = axes.imshow(values, cmap="viridis", vmin=0, aspect="auto")
        axes.set(title=title, xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=axes, shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    write_json(path.with_suffix(".json"), {"layers": list(layers), "maps": maps})
    return path


def scale_maps(layers: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    """Return one number per layer and head, by title; layers with fewer heads are filled up as unchanged."""
    values = list(layers.values())
    width = max(len(value) for value in values)

    def rows(per_head: list[Tensor], unchanged: float) -> list[list[float]]:
        return [row.tolist() + [unchanged] * (width - len(row)) for row in per_head]

    if values[0].dim() == 1:
        return {"scale": rows(values, 1.0)}
    return {
        "scale, mean over channels": rows([value.mean(-1) for value in values], 1.0),
        "spread of channels around 1": rows([(value - 1).square().mean(-1).sqrt() for value in values], 0.0),
    }


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    needed = {"systems", "cells", "versions", "device", "commit", "date"}
    if not isinstance(metrics, dict) or not needed <= metrics.keys():
        missing = ", ".join(sorted(needed - set(metrics)))
        raise ValueError(f"{path} is not a metrics.json of `seal-peft evaluate`: it has no {missing}.")
    return metrics
