"""What a person sees of `seal-peft heads` in the terminal: the outermost heads and the rank correlations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SHOWN = 5


def show(comparison: Mapping[str, Any], folder: Path) -> list[str]:
    """Return lines of Markdown tables, of the longest length; the file has them all.

    Args:
        comparison: What `compare` returned.
        folder: Where the files are.
    """
    longest = max(comparison["rank_correlations"], key=int)
    lines = [f"| {f'at {longest} tokens' if int(longest) else 'head'} | greatest | least |", "| --- | --- | --- |"]
    for column in comparison["top"]:
        name, _, length = column.partition("@")
        if length in ("", longest):
            ends = (comparison[end][column][:_SHOWN] for end in ("top", "bottom"))
            cells = (", ".join(f"{head} {value:+.3g}" for head, value in end) for end in ends)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    pairs = comparison["rank_correlations"][longest]
    lines += ["", "| rank correlations | " + " | ".join(pairs) + " |", "|" + " --- |" * (len(pairs) + 1)]
    for name, own in pairs.items():
        cells = ("" if own.get(other) is None else f"{own[other]:+.2f}" for other in pairs)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", f"All heads and lengths: {folder / 'heads.json'}"]
