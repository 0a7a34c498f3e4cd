"""Pictures of results, each with a JSON file of the same name that holds its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .files import write_json
from .statistics import label_of
from .tuner.queries import QUERY_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; the base is grey, because it is what one compares to.
_BASE_COLOUR = "#666666"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
# Beyond these many fields a map's numbers are too small to read; beyond these many lengths their names meet.
_MOST_NUMBERS = 150
_MOST_LEVEL_NAMES = 8
_SLANTED: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "seal-peft[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_lengths(metrics: dict[str, Any], task: str, path: Path) -> Path:
    """Draw mean score against length, a line with 95% intervals for each system.

    Args:
        metrics: What `metrics.json` holds.
        task: The task to draw.
        path: The PNG file to write.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing. The JSON of the numbers is written all the same.
    """
    cells = [cell for cell in metrics["cells"] if cell["task"] == task and cell["depth"] is None]
    threshold = metrics.get("effective_lengths", {}).get("threshold")
    windows = _windows(metrics)
    label = label_of(metrics, task)
    numbers = {"task": label, "threshold": threshold, "windows": windows, "cells": cells}
    write_json(path.with_suffix(".json"), numbers)

    lengths = sorted({cell["length"] for cell in cells})
    systems = list(metrics["systems"])
    crowded = len(lengths) > _MOST_LEVEL_NAMES
    figure = new_figure(max(7, 1.5 + 0.3 * len(lengths)) if crowded else 7, 4.2)
    axes = figure.subplots()
    for number, system in enumerate(systems):
        own = {cell["length"]: cell for cell in cells if cell["system"] == system}
        scores = [own[length]["accuracy"] for length in lengths]
        reach = [
            [max(0.0, own[length]["accuracy"] - own[length]["low"]) for length in lengths],
            [max(0.0, own[length]["high"] - own[length]["accuracy"]) for length in lengths],
        ]
        # Lengths stand at equal distances, and systems side by side: intervals that cover each other tell nothing.
        places = [place + 0.06 * (number - (len(systems) - 1) / 2) for place in range(len(lengths))]
        colour = _BASE_COLOUR if system == "base" else _COLOURS[(number - ("base" in systems)) % len(_COLOURS)]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.errorbar(places, scores, yerr=reach, label=system, color=colour, marker=marker, capsize=3, linewidth=1.8)
        outside = [index for index, n in enumerate(lengths) if n > windows.get(system, n)]
        x, y = [places[index] for index in outside], [scores[index] for index in outside]
        axes.plot(x, y, linestyle="", marker=marker, color=colour, markerfacecolor="white", zorder=5)
    if threshold is not None:
        axes.axhline(threshold, color="#999999", linestyle=":", linewidth=1)
        axes.annotate(
            f"effective length:\nat least {threshold:g}",
            (1, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#666666",
        )
    hollow = any(length > windows.get(system, length) for system in systems for length in lengths)
    beyond = "; hollow: beyond the system's window" if hollow else ""
    axes.set(xlabel="length in tokens", ylabel="mean score", ylim=(-0.03, 1.03))
    axes.set_title(f"{label}: score by length\n{_counted(cells)} a point, 95% intervals{beyond}", fontsize=11)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], **_SLANTED if crowded else {})
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # As many names in a row as there is room for.
    columns = max(1, 64 // (6 + max(map(len, systems))))
    figure.legend(loc="outside lower center", ncols=min(columns, len(systems)), frameon=False)
    return _save(figure, path)


def plot_depths(metrics: dict[str, Any], task: str, path: Path) -> Path | None:
    """Draw maps of mean score by depth and length: each system, and below it its difference to the base.

    Args:
        metrics: What `metrics.json` holds.
        task: The task to draw.
        path: The PNG file to write.

    Returns:
        `path`, or `None` where the results of the task do not go by depth.

    Raises:
        ImportError: matplotlib is missing. The JSON of the numbers is written all the same.
    """
    cells = [cell for cell in metrics["cells"] if cell["task"] == task and cell["depth"] is not None]
    lengths, depths = ([*sorted({cell[name] for cell in cells})] for name in ("length", "depth"))
    if len(depths) < 2:
        return None
    found = {(cell["system"], cell["depth"], cell["length"]): cell["accuracy"] for cell in cells}
    scores = {
        system: [[found.get((system, depth, length)) for length in lengths] for depth in depths]
        for system in metrics["systems"]
    }
    base = scores.get("base")
    others = {name: values for name, values in scores.items() if name != "base"}
    differences = {name: _difference(values, base) for name, values in others.items()} if base else {}
    label = label_of(metrics, task)
    windows = _windows(metrics)
    numbers = {"task": label, "lengths": lengths, "depths": depths, "windows": windows}
    numbers |= {"scores": scores, "differences": differences}
    write_json(path.with_suffix(".json"), numbers)

    numbered = len(lengths) * len(depths) <= _MOST_NUMBERS
    width = max(3.0, 1.2 + (0.55 if numbered else 0.24) * len(lengths))
    height = max(2.4, 0.9 + (0.3 if numbered else 0.17) * len(depths))
    rows = 2 if differences else 1
    figure = new_figure(1.5 + width * len(scores), 0.8 + height * rows)
    grid = figure.subplots(rows, len(scores), squeeze=False, sharex=True, sharey=True)
    for axes, (name, values) in zip(grid[0], scores.items(), strict=True):
        title = name
        if (within := sum(length <= windows.get(name, length) for length in lengths)) < len(lengths):
            title = f"{name} (window {windows[name]:,}, dashed)"
            axes.axvline(within - 0.5, color="#D55E00", linestyle="--", linewidth=2)
        image = _draw_map(axes, values, lengths, depths, title, "viridis", (0, 1))
    figure.colorbar(image, ax=list(grid[0]), label="mean score", fraction=0.05)
    for axes, name in zip(grid[1] if differences else (), scores, strict=False):
        if name == "base":
            axes.set_axis_off()
            axes.text(0.5, 0.5, "difference to the base,\nfield by field", ha="center", transform=axes.transAxes)
            continue
        image = _draw_map(axes, differences[name], lengths, depths, f"{name} \N{MINUS SIGN} base", "RdBu", (-1, 1))
        axes.tick_params(labelleft=True)
    if differences:
        figure.colorbar(image, ax=list(grid[1]), label="difference (blue: better)", fraction=0.05)
    figure.supylabel("depth of the fact (0: start, 1: end)", fontsize=10)
    empty = any(value is None for values in scores.values() for row in values for value in row)
    figure.suptitle(
        f"{label}: score by depth and length\n{_counted(cells)} a field{'; hatched: not asked' if empty else ''}",
        fontsize=11,
    )
    return _save(figure, path)


def _windows(metrics: dict[str, Any]) -> dict[str, int]:
    """Tokens that each system reaches, as far as there is such a limit."""
    return {name: window for name, window in metrics.get("windows", {}).items() if window is not None}


def _counted(cells: list[dict[str, Any]]) -> str:
    counts = sorted({cell["n"] for cell in cells})
    return f"{counts[0]} samples" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} samples"


def _difference(values: list[list[Any]], base: list[list[Any]]) -> list[list[float | None]]:
    return [
        [None if a is None or b is None else a - b for a, b in zip(row, base_row, strict=True)]
        for row, base_row in zip(values, base, strict=True)
    ]


def _draw_map(
    axes: Axes,
    values: list[list[float | None]],
    lengths: list[int],
    depths: list[float],
    title: str,
    colours: str,
    limits: tuple[float, float],
) -> Any:
    """Draw one map with the numbers in its fields; fields without samples are hatched, because white is a value."""
    axes.set_facecolor("#dddddd")
    axes.patch.set(hatch="////", edgecolor="#999999")
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    image: Any = axes.imshow(numbers, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], **_SLANTED)
    axes.set_yticks(range(len(depths)), [f"{round(depth, 2):g}" for depth in depths])
    axes.set_xlabel("length in tokens")
    axes.tick_params(labelbottom=True)
    if len(lengths) * len(depths) <= _MOST_NUMBERS:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value is not None:
                    red, green, blue, _ = image.to_rgba(value)
                    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                    text = f"{value:.2f}" if limits[0] == 0 or not value else f"{value:+.2f}"
                    text = text.replace("-", "\N{MINUS SIGN}")
                    axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return image


def plot_scales(layers: dict[str, Tensor], path: Path) -> Path:
    """Draw learned scales as layers x heads.

    Args:
        layers: What `seal_peft.scales` returns. For SEAL-C two maps are drawn: the mean over a head's channels, and
            how far its channels spread from 1 (root mean square).
        path: The PNG file to write.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing. The JSON of the numbers is written all the same.
    """
    maps = scale_maps(layers)
    write_json(path.with_suffix(".json"), {"layers": list(layers), "maps": maps})
    figure = new_figure(1.5 + 4.5 * len(maps), 6)
    for axes, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        if title.startswith("scale"):  # 1 is unchanged
            reach = max(*(abs(value - 1) for row in values for value in row), 1e-3)
            image = axes.imshow(values, cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
            ends = ("sharper attention", "flatter") if "query" in title else ("emphasised", "muted")
            label = f"scale (red: {ends[0]}, white: unchanged, blue: {ends[1]})"
        else:
            reach = max(*(value for row in values for value in row), 1e-3)
            image = axes.imshow(values, cmap="viridis", vmin=0, vmax=reach, aspect="auto")
            label = "root mean square of scale \N{MINUS SIGN} 1 (0: unchanged)"
        axes.set(title=title, xlabel="head", ylabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    return _save(figure, path)


def scale_maps(layers: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    """Return one number per layer and head, by title; layers with fewer heads are filled up as unchanged."""
    queries = [value for name, value in layers.items() if name.rpartition(".")[2] in QUERY_NAMES]
    outputs = [value for name, value in layers.items() if name.rpartition(".")[2] not in QUERY_NAMES]
    width = max(len(value) for value in layers.values())

    def rows(per_head: list[Tensor], unchanged: float) -> list[list[float]]:
        return [row.tolist() + [unchanged] * (width - len(row)) for row in per_head]

    maps = {}
    if outputs and outputs[0].dim() == 1:
        maps["scale"] = rows(outputs, 1.0)
    elif outputs:
        maps["scale, mean over channels"] = rows([value.mean(-1) for value in outputs], 1.0)
        maps["spread of channels around 1"] = rows([(v - 1).square().mean(-1).sqrt() for v in outputs], 0.0)
    if queries:
        maps["scale of the query"] = rows(queries, 1.0)
    return maps


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
