"""Pictures of head maps. The numbers of each stand in the JSON file of its score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plots import new_figure
from .layers import Heads, head_name
from .maps import LABELS

# Beyond this share of the fields a colour is full: one outlier must not leave all others grey.
_FULL_COLOUR = 0.99
_LABELLED = 8
_QUADRANT_COLOURS = {1: "#D55E00", 2: "#999999", 3: "#0072B2", 4: "#999999", 0: "#999999"}
_QUADRANTS = {1: "helps at both", 2: "helps at the longer", 3: "hurts at both", 4: "helps at the shorter"}


def draw_maps(
    maps: Mapping[str, Mapping[Any, Tensor]],
    heads: Heads,
    path: Path,
    centre: float | None = 0.0,
    mlps: Mapping[str, Mapping[Any, Tensor]] | None = None,
) -> Path:
    """Draw maps as layers x heads: one row per map, one column per length.

    Args:
        maps: `(layers, heads)` by title and length; 0 or `None` stand for none. Heads that are NaN stay grey.
        heads: The heads of the model.
        path: PNG file to write.
        centre: Value that is white, colours diverging from it; `None` for maps that start at 0.
        mlps: `(layers,)` in the same way: a column beside the heads, in the colours that suit the heads.

    Raises:
        ImportError: matplotlib is missing.
    """
    columns = max(len(by_length) for by_length in maps.values())
    layers, width = heads.shape
    figure = new_figure(1.0 + columns * max(2.6, 1.4 + 0.16 * width), 0.6 + len(maps) * max(2.4, 0.9 + 0.14 * layers))
    grid = figure.subplots(len(maps), columns, squeeze=False)
    for row, (title, by_length) in zip(grid, maps.items(), strict=True):
        finite = torch.cat([values[values.isfinite()] for values in by_length.values()])
        reach = float((finite - (centre or 0.0)).abs().quantile(_FULL_COLOUR).clamp(min=1e-9))
        limits = (0.0, reach) if centre is None else (centre - reach, centre + reach)
        colours = "viridis" if centre is None else "RdBu_r"
        for axes, (length, values) in zip(row, by_length.items(), strict=False):
            axes.set_facecolor("#bbbbbb")  # no such head; white is a value
            if mlps:
                gap = torch.full((layers, 1), torch.nan)
                values = torch.cat([values, gap, mlps[title][length][:, None]], dim=1)
                every = range(0, width, max(1, width // 4))
                axes.set_xticks([*every, width + 1], [*map(str, every), "MLP"])
            image = axes.imshow(values.tolist(), cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
            axes.set_title(f"{title}\n{length:,} tokens" if length else title, fontsize=10)
            axes.set(xlabel="head", ylabel="layer")
            step = max(1, layers // 16)
            axes.set_yticks(range(0, layers, step), [str(layer.number) for layer in heads.layers[::step]])
        for axes in row[len(by_length) :]:
            axes.set_visible(False)
        label = LABELS.get(title.removesuffix("_adapter"))
        bar = figure.colorbar(image, ax=list(row), shrink=0.8, extend="max" if centre is None else "both")
        bar.set_label(label or "", fontsize=8)
    return _save(figure, path)


def draw_quadrants(maps: Mapping[int, Tensor], found: Tensor, heads: Heads, path: Path) -> Path:
    """Draw what pruning changes at one length against another, a point a head, the outermost ones named.

    Args:
        maps: `(layers, heads)` at two lengths.
        found: Quadrants, from `quadrants`.
        heads: The heads of the model.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    (shorter, x), (longer, y) = maps.items()
    figure = new_figure(6, 5.5)
    axes = figure.subplots()
    for number in (0, 1, 2, 3, 4):
        chosen = found == number
        if chosen.any():
            label = f"Q{number}, {_QUADRANTS[number]}: {int(chosen.sum())}" if number else None
            places = x[chosen].tolist(), y[chosen].tolist()
            axes.scatter(*places, s=14, color=_QUADRANT_COLOURS[number], label=label, alpha=0.8, zorder=2 + number % 2)
    distance = (x.square() + y.square()).nan_to_num(nan=-1.0).flatten()
    for i in distance.argsort(descending=True, stable=True)[:_LABELLED].tolist():
        layer, head = divmod(i, x.shape[1])
        place = (x[layer, head].item(), y[layer, head].item())
        name = head_name(heads.layers[layer].number, head)
        axes.annotate(name, place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.margins(0.1)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set(xlabel=f"change at {shorter:,} tokens, nats", ylabel=f"change at {longer:,} tokens, nats")
    axes.set_title("Log-probability of the answer when a head is pruned\nabove 0: pruning helps", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, title="What pruning the head does")
    return _save(figure, path)


def draw_channels(channels: Mapping[str, Mapping[str, Tensor]], path: Path) -> Path:
    """Draw the channels of some heads: exact pruning as bars, the gradient's estimate as points.

    Args:
        channels: By name of the head `pruning`, and `gradient` if it is known, `(head_dim,)` each.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(9, 0.6 + 2.2 * len(channels))
    for axes, (name, own) in zip(figure.subplots(len(channels), squeeze=False)[:, 0], channels.items(), strict=True):
        places = range(len(own["pruning"]))
        axes.bar(places, own["pruning"].tolist(), color="#0072B2", label="pruned")
        if "gradient" in own:
            axes.plot(places, own["gradient"].tolist(), ".", color="#D55E00", label="by gradient")
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set_title(f"{name}: change of the answer's log-probability by channel", fontsize=10)
        axes.set(xlabel="channel", ylabel="nats\n(above 0: better without)")
        axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _save(figure: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)  # type: ignore[attr-defined]
    return path
