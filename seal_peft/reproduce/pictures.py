"""Pictures of parts whose systems form a table of their own, with the numbers beside them."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from ..files import write_json
from ..plots import new_figure


def draw_grid(metrics: dict[str, Any], path: Path) -> None:
    """Draw the scores of systems that are named `RATE x CONTEXTS`.

    Args:
        metrics: What `metrics.json` holds.
        path: The PNG file to write; a JSON file of its numbers stands beside it.
    """
    scores = {tuple(name.split(" x ")): own["accuracy"] for name, own in metrics["systems"].items() if " x " in name}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*scores, strict=True))
    values = [[scores.get((row, column), float("nan")) for column in columns] for row in rows]
    _draw(rows, columns, values, ("contexts", "learning rate"), path)


def draw_transfer(metrics: dict[str, Any], path: Path) -> None:
    """Draw what each system reaches on each task, as a mean over lengths.

    Args:
        metrics: What `metrics.json` holds.
        path: The PNG file to write; a JSON file of its numbers stands beside it.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for cell in metrics["cells"]:
        if cell["depth"] is None:
            found.setdefault((cell["system"], cell["task"]), []).append(cell["accuracy"])
    rows, columns = list(metrics["systems"]), list(dict.fromkeys(task for _, task in found))
    values = [[mean(found[row, column]) for column in columns] for row in rows]
    _draw(rows, columns, values, ("asked", "trained on"), path)


def _draw(rows: list[str], columns: list[str], values: list[list[float]], labels: tuple[str, str], path: Path) -> None:
    write_json(path.with_suffix(".json"), {labels[0]: columns, labels[1]: rows, "mean score": values})
    figure = new_figure(2.8 + 0.8 * len(columns), 1.9 + 0.45 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if value < 0.6 else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(image, label="mean score")
    figure.savefig(path, dpi=150)
